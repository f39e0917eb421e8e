"""The pipeline of commands: order, failures, what is not run twice, and what a SIGKILL leaves behind."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from hf_soo.reproduce.pipeline import Pipeline, Stage


def stage(folder: Path, name: str, *needs: str, code: str = "", product: Path | None = None) -> Stage:
    """A command that adds its name to a file, and does what `code` says."""
    program = f"open({str(folder / 'order')!r}, 'a').write({name + ' '!r}); print('this is {name}'); {code}"
    return Stage(name, (sys.executable, "-c", program), needs, product)


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_stages_run_after_those_they_need_and_only_once(tmp_path: Path) -> None:
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", "a"), stage(tmp_path, "c", "b")]
    assert Pipeline(stages, tmp_path).run() == {}
    assert order(tmp_path) == ["a", "b", "c"]
    mark = json.loads((tmp_path / "done" / "b.json").read_text())
    assert mark["command"] == list(stages[1].command) and mark["seconds"] > 0
    assert (tmp_path / "logs" / "b.log").read_text() == "this is b\n"
    assert Pipeline(stages, tmp_path).run() == {}
    assert order(tmp_path) == ["a", "b", "c"]


def test_a_failure_stops_those_that_need_it_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = stage(tmp_path, "b", "a", code="print('error: no such file'); print('more'); raise SystemExit(3)")
    stages = [stage(tmp_path, "a"), broken, stage(tmp_path, "c", "b"), stage(tmp_path, "d", "a")]
    failed = Pipeline(stages, tmp_path).run()
    assert failed["b"].startswith("exit code 3, error: no such file (see ")
    assert failed["c"] == "it needs b, which failed"
    assert order(tmp_path) == ["a", "b", "d"]
    assert "b: failed: exit code 3" in capsys.readouterr().out
    stages[1] = stage(tmp_path, "b", "a", code="print('other words'); raise SystemExit(4)")
    assert Pipeline(stages, tmp_path).run()["b"].startswith("exit code 4, other words (see ")  # not the first start's
    stages[1] = stage(tmp_path, "b", "a")  # put right: it goes on from there
    assert Pipeline(stages, tmp_path).run() == {}
    assert order(tmp_path) == ["a", "b", "d", "b", "b", "c"]


def test_a_product_says_that_a_stage_is_done(tmp_path: Path) -> None:
    product = tmp_path / "manifest.json"
    product.write_text("{}")
    assert Pipeline([stage(tmp_path, "a", product=product), stage(tmp_path, "b", "a")], tmp_path).run() == {}
    assert order(tmp_path) == ["b"]


def test_another_command_for_a_stage_that_is_done(tmp_path: Path) -> None:
    """Also where its product is there: it is that of the other command."""
    product = tmp_path / "manifest.json"
    done = stage(tmp_path, "a", code=f"open({str(product)!r}, 'w')", product=product)
    Pipeline([done], tmp_path).run()
    assert product.is_file()
    with pytest.raises(ValueError, match=r"stage a was done with .* use another output folder, or delete"):
        Pipeline([stage(tmp_path, "a", product=product)], tmp_path)


def test_an_edited_config_of_a_stage_that_is_done(tmp_path: Path) -> None:
    """Comments may be edited, settings may not; what counts is what they were when the stage began."""
    config = tmp_path / "recipe.yaml"
    config.write_text("learning_rate: 0.1\n")
    edit = f"open({str(config)!r}, 'a').write('# a comment\\nseed: 1\\n')"
    done = dataclasses.replace(stage(tmp_path, "a", code=edit), configs=(config,))
    assert Pipeline([done], tmp_path).run() == {}
    with pytest.raises(ValueError, match=r"stage a was done with other values of seed than .*recipe.yaml give now"):
        Pipeline([done], tmp_path)
    config.write_text("# a comment\nlearning_rate: 0.1\n")
    assert Pipeline([done], tmp_path).done == {"a"}


def test_how_a_stage_works_may_change_once_it_is_done(tmp_path: Path) -> None:
    fast = dataclasses.replace(stage(tmp_path, "a", code="import sys; print(sys.argv[1:])"), how=("--num_proc", "4"))
    Pipeline([fast], tmp_path).run()
    assert (tmp_path / "logs" / "a.log").read_text() == "this is a\n['--num_proc', '4']\n"
    assert Pipeline([dataclasses.replace(fast, how=("--num_proc", "1"))], tmp_path).done == {"a"}
    with pytest.raises(ValueError, match=r"stage a was done with .* use another output folder, or delete"):
        Pipeline([stage(tmp_path, "a", code="1 + 1")], tmp_path)


def test_jobs_run_beside_each_other_and_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two waits for a file that the other writes; one after the other they would never end."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    wait = "import os, time\nopen({mine!r}, 'w').write(os.environ['OMP_NUM_THREADS'])\n"
    wait += "while not os.path.exists({other!r}): time.sleep(0.01)"
    files = [str(tmp_path / name) for name in ("first", "second")]
    programs = [wait.format(mine=mine, other=other) for mine, other in (files, files[::-1])]
    stages = [Stage(str(i), (sys.executable, "-c", program)) for i, program in enumerate(programs)]
    assert Pipeline(stages, tmp_path, jobs=2, cores=6).run() == {}
    assert [Path(file).read_text() for file in files] == ["3", "3"]


def test_a_stage_that_runs_alone_has_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    say = "import os, time\nfile = open({file!r}, 'a', buffering=1)\nthreads = os.environ.get('OMP_NUM_THREADS', '')\n"
    say += "print({name!r} + threads, file=file)\ntime.sleep(0.3)\nprint('end-' + {name!r}, file=file)"
    file = str(tmp_path / "said")
    programs = [Stage(name, (sys.executable, "-c", say.format(file=file, name=name))) for name in "abc"]
    programs[1] = dataclasses.replace(programs[1], alone=True)
    assert Pipeline(programs, tmp_path, jobs=2, cores=6).run() == {}
    said = Path(file).read_text().split()
    assert said[said.index("b6") + 1] == "end-b"  # nothing between its beginning and its end
    assert {"a3", "c3"} < set(said)


SLOW = "import time, os; open('order', 'a').write('x ')\nwhile not os.path.exists('go'): time.sleep(0.01)"


def run_slow(folder: Path) -> None:
    """A stage that is a child of a child, as under a launcher; its pipeline may be killed."""
    os.chdir(folder)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLOW!r}], check=True)"
    assert Pipeline([Stage("slow", (sys.executable, "-c", child))], folder).run() == {}
    (folder / f"ended-{os.getpid()}").touch()


@pytest.fixture
def slow(tmp_path: Path, no_ignored_signals: None) -> Iterator[Path]:
    """A folder for `run_slow`; its stages end with the test, also with one that fails."""
    yield tmp_path
    (tmp_path / "go").touch()


def test_after_sigkill_a_stage_that_lives_on_is_waited_for(slow: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The next pipeline must not start it a second time beside the first."""
    context = multiprocessing.get_context("fork")  # a fresh process would spend its time importing torch
    first = context.Process(target=run_slow, args=(slow,))
    first.start()
    until(lambda: (slow / "order").is_file())
    first.kill()
    first.join()
    second = context.Process(target=run_slow, args=(slow,))
    second.start()
    said: list[str] = []
    until(lambda: said.append(capfd.readouterr().out) or "running from before; waiting for it" in "".join(said))
    assert order(slow) == ["x"]
    (slow / "go").touch()
    second.join(timeout=60)
    assert second.exitcode == 0 and (slow / f"ended-{second.pid}").is_file()
    assert order(slow) == ["x", "x"]  # nobody knows how it ended: it is asked to go on, and has nothing to do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_stages_with_the_pipeline(slow: Path, number: signal.Signals) -> None:
    """Also the children of a launcher that does not pass signals on."""
    pipeline = multiprocessing.get_context("fork").Process(target=run_slow, args=(slow,))
    pipeline.start()
    until(lambda: (slow / "order").is_file())
    assert pipeline.pid is not None
    os.kill(pipeline.pid, number)
    pipeline.join(timeout=60)
    assert pipeline.exitcode == (1 if number == signal.SIGINT else 128 + number)
    with (slow / "logs" / "slow.log").open("ab") as log:
        until(lambda: locks(log))
    assert not (slow / "done").exists()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As nohup does it; and what was there before is there again."""
    before, term = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        program = f"import os, signal; os.kill({os.getpid()}, signal.SIGHUP)"
        assert Pipeline([Stage("hangs up", (sys.executable, "-c", program))], tmp_path).run() == {}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is term


def locks(log: IO[bytes]) -> bool:
    """Whether nobody else holds it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError

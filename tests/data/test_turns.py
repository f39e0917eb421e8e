"""Several processes of one run, on nodes that share a file system, prepare what they need once, one after the other."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_soo.bert import inputs
from hf_soo.files import in_turn
from hf_soo.runs.run_arguments import RunTrainingArguments


def forked(body: Callable[[], None]) -> int:
    """A process of its own that runs it; it ends with 1 where that raises."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            body()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def waited_for(file: Path) -> None:
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not appear"
        time.sleep(0.01)


def test_one_at_a_time(tmp_path: Path) -> None:
    """Each reads a number, dawdles, and writes the next one."""
    number = tmp_path / "number"
    number.write_text("0")

    def count() -> None:
        for _ in range(5):
            with in_turn(tmp_path / "new" / "lock"):
                seen = int(number.read_text())
                time.sleep(0.002)
                number.write_text(str(seen + 1))

    assert [code_of(child) for child in [forked(count) for _ in range(4)]] == [0] * 4
    assert number.read_text() == "20"


def with_a_child_that_lives_on(tmp_path: Path) -> None:
    child = forked(lambda: time.sleep(60))
    (tmp_path / "child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


ENDS: dict[str, tuple[Callable[[Path], Any], int]] = {
    "returns": (lambda folder: None, 0),
    "raises": (lambda folder: 1 / 0, 1),
    "is killed": (lambda folder: os.kill(os.getpid(), signal.SIGKILL), -9),
    "is killed and leaves a worker": (with_a_child_that_lives_on, -9),
}


@pytest.mark.parametrize("case", ENDS)
def test_whoever_waits_goes_on_when_the_holder_ends(case: str, tmp_path: Path) -> None:
    end, code = ENDS[case]

    def hold() -> None:
        with in_turn(tmp_path / "lock"):
            (tmp_path / "held").touch()
            waited_for(tmp_path / "asked")
            time.sleep(0.1)
            end(tmp_path)

    def wait() -> None:
        waited_for(tmp_path / "held")
        (tmp_path / "asked").touch()
        with in_turn(tmp_path / "lock"):
            (tmp_path / "got").touch()

    holder, waiter = forked(hold), forked(wait)
    assert code_of(holder) == code
    assert code_of(waiter) == 0 and (tmp_path / "got").exists()
    if (left := tmp_path / "child").exists():
        os.kill(int(left.read_text()), signal.SIGKILL)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    said = r"cannot be locked .*No locks.* prepare with one process first"
    with pytest.raises(OSError, match=said), in_turn(tmp_path / "a"):
        pass


@pytest.mark.parametrize("killed", [False, True], ids=["", "the first is killed"])
def test_nodes_that_share_a_disk_prepare_once(killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is its node's first, as `LOCAL_RANK` has it; each says when it prepares."""
    corpus, log = tmp_path / "corpus.txt", tmp_path / "log"
    pages = (" ".join(f"Line {line} of page {page} speaks of things." for line in range(12)) for page in range(40))
    corpus.write_text("\n\n".join(pages))
    prepare = inputs.prepare

    def telling(config: Any) -> None:
        with log.open("a") as stream:
            stream.write("prepares\n")
        if killed and len(log.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        prepare(config)

    monkeypatch.setattr(inputs, "prepare", telling)
    run = SimpleNamespace(folder=tmp_path / "out", world_size=3)
    run.in_turn = lambda: RunTrainingArguments.in_turn(run)  # type: ignore[arg-type]
    data = inputs.DataArguments(corpus=str(corpus), seq_length=32, vocab_size=200, eval_documents=0.1)

    def load() -> None:
        assert len(inputs.PretrainingData.load(data, run).train) > 0  # type: ignore[arg-type]

    codes = sorted(code_of(child) for child in [forked(load) for _ in range(3)])
    assert codes == ([-9, 0, 0] if killed else [0, 0, 0])
    assert log.read_text().splitlines() == ["prepares"] * (1 + killed)

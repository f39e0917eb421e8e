"""Suites: every job runs, in as many calls as it takes, and what one has measured is kept."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_soo import cli
from hf_soo.bench import suite
from hf_soo.bench.jobs import SUITES, TINY, Job
from hf_soo.bench.measure import parse_pairs
from hf_soo.bench.pretraining import Sequences, TrainConfig
from hf_soo.bench.suite import DONE, MORE, SOME_FAILED, SuiteConfig, _in_a_process, _words, run_suite
from hf_soo.bench.workload import BenchConfig
from hf_soo.plan.request import PlanConfig
from hf_soo.runs.arguments import parse
from hf_soo.runs.record import read_runs
from tests.scripts.script_runs import prepare_corpus


def in_this_process(words: list[str], seconds: float) -> tuple[int | None, str]:
    """A job as the suite starts it, without the seconds that a new process takes; the tests are not run in a test."""
    return (0, "") if words[0] == "pytest" else (cli.main(words), "")


@pytest.mark.timeout(300)
def test_the_gpu_suite_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its jobs, with a toy model on a CPU: the day a GPU is at hand, no flag and no method is unknown.

    One of those that differ in the model alone, which is the toy here.
    """
    jobs = {re.sub("bert-base|bert-large", "", job.words): job for job in SUITES["gpu"]}
    monkeypatch.setitem(SUITES, "gpu", tuple(jobs.values()))
    config = SuiteConfig(suite="gpu", results=str(tmp_path), scale="tiny")
    assert run_suite(config, in_this_process) == DONE
    assert f"{len(SUITES['gpu'])} jobs are over." in capsys.readouterr().out
    about = json.loads((tmp_path / "suite_gpu.json").read_text())
    assert {name: job["status"] for name, job in about["jobs"].items()} == {j.name: "done" for j in SUITES["gpu"]}
    for job in SUITES["gpu"]:
        words = shlex.split(job.words)
        if words[0] == "bench" and "--train_minutes" not in words:
            pairs = parse_pairs(words[words.index("--optim") + 1])
            results = json.loads((tmp_path / f"{job.name}.json").read_text())
            assert [row["optimizer"] for row in results["rows"]] == [pair.name for pair in pairs]
            for row in results["rows"]:
                assert row["launches"] > 0 and row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1
                assert row["roofline"]["step_to_limit_ratio"] > 1
    runs = read_runs(tmp_path / "pretraining")
    assert [(run.name, run.optimizer, run.status) for run in runs] == [
        ("lamb", "lamb", "completed"),
        ("mkor", "mkor", "completed"),
    ]
    assert runs[0].workload == runs[1].workload and runs[0].workload["data"] == {"source": "synthetic"}
    assert all(run.curve[0]["step"] == 0 and run.curve[-1]["step"] == run.steps > 0 for run in runs)
    assert run_suite(config, lambda words, seconds: pytest.fail("nothing is left")) == DONE


def test_the_gpu_suite_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU; --scale tiny"):
        run_suite(SuiteConfig(suite="gpu", results=str(tmp_path)))


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_the_jobs_flags_are_known(suite: str, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len({job.name for job in SUITES[suite]}) == len(SUITES[suite])
    for job in SUITES[suite]:
        command, *words = _words(job, SuiteConfig(suite=suite, scale=scale), Path("x.json"))  # type: ignore[arg-type]
        if command == "bench":
            bench, _ = parse((BenchConfig, TrainConfig), words)
            assert bench.json == "x.json" and parse_pairs(bench.optim)
            assert bench.device == ("cuda" if suite == "gpu" and scale == "full" else "cpu")
        elif command == "plan":
            flags = dict(zip(words[::2], words[1::2], strict=True))
            assert {flag.removeprefix("--") for flag in flags} <= set(PlanConfig.__dataclass_fields__)
        else:
            assert command == "pytest"


FIRST, SECOND = Job("first", "bench --optim a"), Job("second", "bench --optim b")
THIRD = Job("third", "pytest tests/methods/test_cuda.py")


class Launches:
    """Answers one job after the other, and remembers what was asked."""

    def __init__(self, folder: Path, *answers: tuple[int | None, str]) -> None:
        self.folder, self.answers, self.asked = folder, list(answers), []  # type: ignore[var-annotated]

    def __call__(self, words: list[str], seconds: float) -> tuple[int | None, str]:
        self.asked.append(words[2] if words[0] == "bench" else "x")
        return self.answers.pop(0)


def test_a_suite_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "cpu", (FIRST, SECOND, THIRD))
    config = SuiteConfig(suite="cpu", results=str(tmp_path))

    def call(code: int, asked: list[str], *answers: tuple[int | None, str]) -> None:
        launch = Launches(tmp_path, *answers)
        assert run_suite(config, launch) == code and launch.asked == asked

    call(MORE, ["a", "b", "x"], (0, ""), (1, "no memory"), (None, ""))
    jobs = json.loads((tmp_path / "suite_cpu.json").read_text())["jobs"]
    assert [(job["status"], job["tries"], job["said"]) for job in jobs.values()] == [
        ("done", 1, ""),
        ("failed", 1, "no memory"),
        ("stopped", 0, ""),  # it had not the whole call, and may try again
    ]
    call(MORE, ["b", "x"], (1, "no memory"), (None, ""))  # twice failed is over
    call(MORE, ["x"], (None, ""))  # a whole call, and no further
    call(SOME_FAILED, ["x"], (0, ""))
    call(SOME_FAILED, [])


def test_a_call_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "cpu", (FIRST, SECOND))
    launch = Launches(tmp_path, (0, ""))
    assert run_suite(SuiteConfig(suite="cpu", results=str(tmp_path), minutes=0.5), launch) == MORE
    assert launch.asked == ["a"]  # less than a minute is left


def test_a_wheel_has_no_tests_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(SUITES, "cpu", (THIRD, FIRST))
    monkeypatch.setattr(suite, "_ROOT", tmp_path)
    launch = Launches(tmp_path, (0, ""))
    assert run_suite(SuiteConfig(suite="cpu", results=str(tmp_path)), launch) == DONE and launch.asked == ["a"]
    said = capsys.readouterr().out
    assert "third: left out; tests/methods/test_cuda.py is in a clone of the project alone." in said
    assert "1 jobs are over." in said


def test_progress_is_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of many methods that needs more than two whole calls gets them, as long as each gets further."""
    monkeypatch.setitem(SUITES, "cpu", (FIRST,))
    config = SuiteConfig(suite="cpu", results=str(tmp_path))
    for number in range(4):
        content = str(number)

        def launch(words: list[str], seconds: float, content: str = content) -> tuple[int | None, str]:
            (tmp_path / "first.json").write_text(content)
            return None, ""

        assert run_suite(config, launch) == MORE


@pytest.mark.parametrize(
    ("script", "ended"), [("exit 0", (0, "")), ("echo bad flag >&2; exit 3", (3, "bad flag")), ("sleep 60", (None, ""))]
)
def test_a_job_is_a_process_and_is_stopped_in_time(
    script: str, ended: tuple[int | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, commands = subprocess.Popen, []

    def started(command: list[str], **more: Any) -> Any:
        commands.append(command)
        return real(["sh", "-c", script], **more)

    monkeypatch.setattr(subprocess, "Popen", started)
    assert _in_a_process(["bench", "--preset", "toy"], 1.0) == ended
    assert commands == [[sys.executable, "-m", "hf_soo.cli", "bench", "--preset", "toy"]]


TOY = [*shlex.split(TINY["bench"]), "--resume", "true"]


def test_rows_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(tmp_path / "b.json")
    assert cli.main(["bench", *TOY, "--optim", "lamb,mkor", "--json", file]) == 0
    before = json.loads(Path(file).read_text())
    assert cli.main(["bench", *TOY, "--optim", "lamb,eva,mkor+lamb,mkor:history=4", "--json", file]) == 0
    after = json.loads(Path(file).read_text())
    assert after["rows"][:2] == before["rows"] and after["reference"] == before["reference"]
    assert [(row["optimizer"], row["set"]) for row in after["rows"][2:]] == [("eva", {}), ("mkor", {"history": 4})]
    assert cli.main(["bench", *TOY, "--optim", "lamb", "--rounds", "2", "--json", file]) == 0  # another workload
    assert len(json.loads(Path(file).read_text())["rows"]) == 1


def test_a_method_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_soo.bench import measure

    real = measure._measure

    def failing(work: Any, config: Any, pair: Any, *more: Any) -> Any:
        if pair.name == "lamb":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(work, config, pair, *more)

    monkeypatch.setattr(measure, "_measure", failing)
    file = str(tmp_path / "b.json")
    assert cli.main(["bench", *TOY, "--optim", "lamb,eva", "--json", file]) == 1
    assert [row["optimizer"] for row in json.loads(Path(file).read_text())["rows"]] == ["eva"]


def test_prepared_sequences_are_trained_on(tmp_path: Path) -> None:
    """What `hf-soo prepare` wrote, in one file that needs no `datasets`, read back as it was."""
    folder, file = prepare_corpus(tmp_path), str(tmp_path / "p.safetensors")
    assert cli.main(["bench", "--tensors_from", str(folder), "--tensors", file, "--most_sequences", "200"]) == 0
    direct, read = Sequences.prepared(str(folder), 200), Sequences.read(file)
    assert len(read) == len(direct) > 20 and read.ids == direct.ids and read.source == "p.safetensors"
    for i in (0, 1, len(read) - 1):
        first, second = direct[i], read[i]
        assert first.pop("input_ids").tolist() == second.pop("input_ids").tolist() and first == second
    flags = ["--optim", "mkor+lamb", "--train_minutes", "0.005", "--tensors", file]
    flags += ["--json", str(tmp_path / "r" / "m.json")]
    assert cli.main(["bench", *TOY, "--seq_length", "64", *flags]) == 0
    (run,) = read_runs(tmp_path / "r")
    assert (run.status, run.config["data"], run.name) == ("completed", {"source": "p.safetensors"}, "m")


def test_synthetic_sequences_are_pairs() -> None:
    data = Sequences.synthetic(200, 16, 64)
    assert len(data) == 64 and data.source == "synthetic"
    row = data[3]
    assert len(row["input_ids"]) == 2 * 6 + 3 and row["segment_b_start"] == 8
    assert [int(row["input_ids"][i]) for i in (0, 7, 14)] == [data.ids.cls, data.ids.sep, data.ids.sep]
    assert 0 < int(data.tensors["label"].sum()) < 64 and row["example_id"] == 3

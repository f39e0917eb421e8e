"""Every long job says where it stands: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from hf_soo import progress
from hf_soo.bench.command import main as bench
from hf_soo.domains import main as pretrain
from hf_soo.progress import Progress
from hf_soo.reproduce.pipeline import Pipeline
from tests.scripts.launch_runs import TINY
from tests.scripts.script_runs import prepare_corpus
from tests.scripts.test_pipeline import stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at every step."""
    make = Progress.__init__
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    monkeypatch.setattr(Progress, "__init__", lambda self, **settings: make(self, **{"mininterval": 0, **settings}))


def test_lines_where_nobody_looks_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(desc="run", unit="step", total=1000, initial=10, mininterval=0) as bar:
        for _ in range(600):
            now[0] += 0.25
            bar.update()
            bar.say(loss=2.123456, best_eval=None, target=1.0)
            bar.write("a row")  # draws no bar anew
    lines = capsys.readouterr().err.splitlines()
    assert [re.match(r"run: (\d+)/1000 \[", line).group(1) for line in lines] == ["250", "490"]  # type: ignore[union-attr]
    assert all(line.endswith(", loss 2.123, target 1]") for line in lines)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(desc="run", total=4, mininterval=0, ncols=60) as bar:
        bar.update(2)
        bar.write("a row")
    assert re.search(r"\rrun:  50%\|#+ +\| 2/4 ", terminal.getvalue()) and terminal.getvalue().endswith("\n")
    assert capsys.readouterr().out == "a row\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_shows_its_losses_and_the_way_to_its_target(
    quiet: bool, always: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *TINY, "--data_dir", str(prepare_corpus(tmp_path)), "--optim", "mkor", "--learning_rate", "0.02",
        "--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1",
        "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true", "--output_dir", str(tmp_path / "out"),
        "--target_eval_loss", "0.5", "--name", "mine", "--disable_tqdm", str(quiet),
    ]  # fmt: skip
    assert pretrain(flags) == 0
    said = capsys.readouterr().err
    assert ("mine: " in said, "evaluation: " in said) == (not quiet, not quiet)
    if not quiet:
        run = json.loads((tmp_path / "out" / "runs" / "mine.json").read_text())
        train, best = run["curve"][2]["train_loss"], run["curve"][1]["eval_loss"]
        assert re.search(rf"mine: 4/4 \[.*, loss {train:.4g}, best eval {best:.4g}, target 0.5\]", said)


def test_a_pipeline(always: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Pipeline([stage(tmp_path, "a"), stage(tmp_path, "b", "a")], tmp_path).run() == {}
    said = capsys.readouterr()
    assert re.search(r"reproduce: 0/2 \[.*, a\]", said.err) and "reproduce: 2/2 [" in said.err
    assert "a: done in" in said.out


def test_a_benchmark(always: None, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--preset", "toy", "--batch_size", "2", "--seq_length", "16", "--rounds", "1", "--steps", "1"]
    assert bench([*sizes, "--optim", "lamb,sgd", "--memory", "false", "--bare", "false"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"bench: 2/4 \[.*, lamb\]", said) and re.search(r"bench: 4/4 \[.*, sgd\]", said)


def test_prepared_documents(always: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a known number where a vocabulary was made of them first."""
    prepare_corpus(tmp_path)
    said = capsys.readouterr().err
    assert "characters: 40.0/? [" in said and "vocabulary: 40.0/40.0 [" in said
    assert re.search(r"preparing: 40\.0/40\.0 \[.*documents/s, \d+ examples\]", said)

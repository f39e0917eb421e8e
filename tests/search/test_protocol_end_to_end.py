"""The protocol from search to report, on a language model that takes a second: both methods, all stages, real runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_soo import cli
from hf_soo.runs.record import RunRecord, read_runs

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (1, 2)
WORKLOAD = """
extends: {root}/configs/workloads/byte_gpt_embedded.yaml
hidden_size: 16
num_hidden_layers: 1
window: 16
max_eval_samples: 16
max_steps: 8
per_device_train_batch_size: 4
per_device_eval_batch_size: 16
eval_steps: 2
logging_steps: 2
"""
SPACE = """
optim: {optim}
optim_args: {{}}
space:
  learning_rate: {{log_uniform: [0.01, 0.08], grid: [0.02, 0.04]}}
"""
QUEUE = """
jobs:
  - {workload: tiny, space: muon, stage: wide, trials: 2, whole: true}
  - {workload: tiny, space: mkor_muon, stage: wide, trials: 2, whole: true}
  - {workload: tiny, space: muon, stage: confirm, trials: 1, seeds: [1, 2]}
  - {workload: tiny, space: mkor_muon, stage: confirm, trials: 1, seeds: [1, 2]}
"""


def environment() -> dict[str, str]:
    """Of a process of its own; the package is the one under test."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by method."""
    part = re.split(r"^### ", text, flags=re.MULTILINE)
    (table,) = [each for each in part if heading in each.partition("\n")[0]]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    place = cells[0].index("method")
    return {row[place]: row for row in cells}


@pytest.mark.slow
def test_from_search_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = tmp_path / "search" / "all.queue.yaml"
    for file, text in {
        tmp_path / "workloads" / "tiny.yaml": WORKLOAD.format(root=ROOT),
        tmp_path / "search" / "muon.yaml": SPACE.format(optim="muon"),
        tmp_path / "search" / "mkor_muon.yaml": SPACE.format(optim="mkor\nbase_optim: muon"),
        queue: QUEUE,
    }.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    results = tmp_path / "results"
    search = [sys.executable, "-m", "hf_soo.cli", "search", "--queue", str(queue), "--results", str(results)]
    done = subprocess.run(search, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = read_runs(results / "tiny")
    check_runs(runs)

    before = {file.name: file.stat().st_mtime_ns for file in (results / "tiny").glob("*.json")}
    subprocess.run(search, env=environment(), cwd=tmp_path, capture_output=True, check=True)
    after = {file.name: file.stat().st_mtime_ns for file in (results / "tiny").glob("*.json")}
    assert after == before, "a search that is done was done again"

    assert cli.main(["report", str(results / "tiny"), "--picture", str(tmp_path / "tiny.png")]) == 0
    check_report(capsys.readouterr().out, runs)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    check_repeats(next(run for run in runs if run.search["space"] == "mkor_muon"), tmp_path)


def check_runs(runs: list[RunRecord]) -> None:
    """Eight whole runs of one code; a seed's runs start from the same weights; claims are on their own held-out set."""
    assert len(runs) == 8 and {run.status for run in runs} == {"completed"}, [(run.name, run.status) for run in runs]
    assert len({run.code for run in runs}) == 1 and runs[0].code
    for seed in (0, *SEEDS):
        assert len({run.config["initial_weights"] for run in runs if run.seed == seed}) == 1
    sets = {(run.search["stage"], run.config["data"]["held_out"]) for run in runs}
    assert sets == {("wide", "choose"), ("confirm", "claim")}
    for space in ("muon", "mkor_muon"):
        wide = {run.config["learning_rate"]: run.final["eval_loss"] for run in runs_of(runs, space, "wide")}
        best = min(wide, key=lambda rate: wide[rate] or 0.0)
        assert {run.config["learning_rate"] for run in runs_of(runs, space, "confirm")} == {best}


def runs_of(runs: list[RunRecord], space: str, stage: str) -> list[RunRecord]:
    found = [run for run in runs if (run.search["space"], run.search["stage"]) == (space, stage)]
    return sorted(found, key=lambda run: run.seed)


def check_report(text: str, runs: list[RunRecord]) -> None:
    """The numbers of the table are those of the JSONs."""
    losses = {
        space: np.array([run.final["eval_loss"] for run in runs_of(runs, space, "confirm")], dtype=float)
        for space in ("muon", "mkor_muon")
    }
    found = rows(text, "held-out set 'claim'")
    row = {space: dict(zip(found["method"], found[space], strict=True)) for space in losses}
    for space, values in losses.items():
        assert row[space]["final loss"] == row[space]["loss at 8"] == f"{values.mean():.3f}"
        assert (row[space]["trials"], row[space]["seeds"], row[space]["why not ranked"]) == ("2 + 0", "2", "")
    difference = losses["mkor_muon"] - losses["muon"]
    column = next(name for name in found["method"] if name.startswith("minus muon 0.0"))
    assert row["muon"][column] == "baseline"
    error = difference.std(ddof=1) / np.sqrt(len(SEEDS))
    assert row["mkor_muon"][column] == f"{difference.mean():+.4f} ± {error:.4f}"
    p = stats.ttest_rel(losses["mkor_muon"], losses["muon"], alternative="less").pvalue
    assert row["mkor_muon"]["p"] == row["mkor_muon"]["p (Holm)"] == f"{p:.4f}"
    assert "Few seeds: 2" in text and "Not new" not in text and "held-out set that the claims" not in text
    assert "at the edge" in rows(text, "sensitivity")["muon"][-1], "of two rates one is at the edge"


def check_repeats(run: RunRecord, folder: Path) -> None:
    """The command that a trial's JSON says makes the same run, to the last bit."""
    words = shlex.split(run.search["command"])
    assert words[:2] == ["hf-soo", "pretrain"]
    words[words.index("--config") + 1] = str(folder / "workloads" / "tiny.yaml")  # outside the project: its name alone
    places = ["--output_dir", str(folder / "again"), "--results_dir", str(folder / "again_runs"), "--name", "again"]
    command = [sys.executable, "-m", "hf_soo.cli", *words[1:], *places]
    subprocess.run(command, env=environment(), cwd=folder, capture_output=True, check=True)
    again = json.loads((folder / "again_runs" / "again.json").read_text())
    assert again["final"]["eval_loss"] == run.final["eval_loss"] and again["final"] == run.final
    assert again["code"] == run.code and again["config"] == run.config

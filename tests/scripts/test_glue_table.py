"""The table of GLUE runs: medians, the paper's average, what it is over, and what is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_soo import cli
from hf_soo.glue import table as glue_table
from hf_soo.runs.record import RunRecord

FULL = {"train_subset": False, "dev_subset": False, "source": "nyu-mll/glue"}
MRPC, RTE = {"accuracy": 0.8, "f1": 0.9, "combined_score": 0.85}, {"accuracy": 0.6}


def record(task: str, final: dict[str, Any], optimizer: str = "adamw", seed: int = 0, **changes: Any) -> RunRecord:
    config = {
        "model": {"name": "tiny", "hidden_size": 16}, "task": task, "data": FULL, "max_seq_length": 128,
        "learning_rate": 2e-5, "optim_args": {}, "base_optim_args": {}, "initial_weights": f"{task}{seed}",
        "num_train_epochs": 3.0, "per_device_train_batch_size": 32, **changes,
    }  # fmt: skip
    name = f"{task}-{optimizer}-seed{seed}-{changes}"
    made = RunRecord(name, optimizer, "adamw", config, seed, status="completed", kind="glue", steps=10)
    made.final = {"train_loss": 0.1, "eval_loss": 0.2, **final}
    return made


def cells(text: str, start: str) -> list[list[str]]:
    """The cells of the rows that begin so."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(start)]


def test_medians_over_seeds_and_the_papers_average() -> None:
    runs = [record("mrpc", {"accuracy": 0.8 + s / 100, "f1": 0.9 - s / 50}, seed=s) for s in range(3)]
    runs += [record("rte", {"accuracy": value}, seed=s) for s, value in enumerate((0.5, 0.9, 0.6, 0.7))]
    runs += [record("mnli", {"accuracy": 0.84, "accuracy_mm": 0.85})]
    text = glue_table.table(runs)
    assert cells(text, "| tiny | adamw") == [
        # (84.5 + (81 + 88) / 2 + 65) / 3
        ["tiny", "adamw", "", "2e-05", "81.0/88.0", "84.0/85.0", "65.0", "78.0 (3 tasks)"]
    ]
    assert "over 3: MRPC, MNLI, RTE." in text and "*" not in text and "†" not in text
    assert cells(text, "| tiny, adamw") == [
        ["tiny, adamw, 2e-05", "MRPC", "accuracy", "81.0", "80.0", "82.0", "0 1 2"],
        ["tiny, adamw, 2e-05", "MRPC", "f1", "88.0", "86.0", "90.0", "0 1 2"],
        ["tiny, adamw, 2e-05", "RTE", "accuracy", "65.0", "50.0", "90.0", "0 1 2 3"],
    ]


def test_a_row_for_each_optimizer_and_learning_rate_best_first() -> None:
    runs = [
        record("rte", {"accuracy": 0.6}),
        record("rte", {"accuracy": 0.7}, "mkor"),
        record("rte", {"accuracy": 0.65}, "mkor", learning_rate=1e-4, optim_args={"update_period": 5}),
        record("mrpc", MRPC, "mkor"),
    ]
    text = glue_table.table(runs)
    assert [row[1:] for row in cells(text, "| tiny |")] == [
        ["mkor", "adamw", "2e-05", "80.0/90.0", "70.0", "77.5 (2 tasks)"],
        ["mkor (update_period=5)", "adamw", "0.0001", "", "65.0", "65.0 (1 task)"],
        ["adamw", "", "2e-05", "", "60.0", "60.0 (1 task)"],
    ]
    assert "over 2: MRPC, RTE; 1: RTE. Averages over different tasks cannot be compared." in text


def test_one_task_run_in_two_ways_has_two_rows_that_say_so() -> None:
    """MRPC's usual five epochs are no second way of RTE's three."""
    runs = [record("rte", RTE), record("mrpc", MRPC, num_train_epochs=5.0)]
    assert len(cells(glue_table.table(runs), "| tiny |")) == 1
    runs.append(record("mrpc", {"accuracy": 0.5, "f1": 0.5}, num_train_epochs=1.0))
    rows = cells(glue_table.table(runs), "| tiny |")
    assert {row[1]: row[4:6] for row in rows} == {
        "adamw (MRPC: num_train_epochs=5.0)": ["80.0/90.0", ""],
        "adamw (MRPC: num_train_epochs=1.0)": ["50.0/50.0", "60.0"],
    }


def test_a_trial_on_part_of_the_data_stands_apart_from_the_whole() -> None:
    part = {**FULL, "train_subset": True, "digest": "1", "train_examples": 64}
    runs = [record("mrpc", {"accuracy": 0.5, "f1": 0.5}, data=part), record("rte", RTE), record("mrpc", MRPC)]
    rows = cells(glue_table.table(runs), "| tiny |")
    assert {row[1]: row[4:6] for row in rows} == {
        "adamw (MRPC: train_examples=None)": ["80.0/90.0", "60.0"],
        "adamw (MRPC: train_examples=64)": ["50.0/50.0†", ""],
    }


def test_runs_that_failed_and_subsets_are_marked() -> None:
    diverged = record("rte", {}, seed=1)
    diverged.status = "diverged"
    part = {**FULL, "train_subset": True, "dev_subset": True}
    text = glue_table.table([record("rte", RTE), diverged, record("qqp", MRPC, data=part), record("wnli", RTE)])
    (row,) = cells(text, "| tiny |")
    assert row[4:7] == ["80.0/90.0\\*†", "60.0 (diverged: 1 of 2)", "60.0"]
    assert "no official score" in text and "† not trained on the official training set" in text
    (row,) = cells(glue_table.table([diverged]), "| tiny |")
    assert row[4:] == ["(diverged: 1 of 1)", ""]


def test_other_runs_are_passed_over() -> None:
    evaluation = record("rte", RTE)
    evaluation.steps = 0
    other = RunRecord("x", "lamb", "lamb", {"learning_rate": 0.1}, 0, status="completed", steps=3)
    assert glue_table.table([evaluation, other]) == "No runs on GLUE.\n"
    assert len(cells(glue_table.table([evaluation, other, record("rte", RTE)]), "| tiny |")) == 1


def test_hf_soo_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of GLUE runs gives this table, and a picture of the scores."""
    for run in (record("rte", RTE), record("mrpc", MRPC, seed=1)):
        run.name = f"{run.config['task']}"
        run.write(tmp_path)
    assert cli.main(["report", str(tmp_path), "--table", str(tmp_path / "table.md")]) == 0
    text = capsys.readouterr().out
    assert "| tiny | adamw |  | 2e-05 | 80.0/90.0 | 60.0 | 72.5 (2 tasks) |" in text
    assert (tmp_path / "table.md").read_text() == text
    assert cli.main(["report", str(tmp_path), "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (line,) = glue_table.figures(tmp_path)[0].axes[0].get_lines()
    assert list(line.get_xdata()) == [0.0, 1.0] and line.get_ydata() == pytest.approx([85.0, 60.0])

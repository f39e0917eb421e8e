"""The table and the picture: which run is best, what is counted, what stays empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_soo.runs import report
from hf_soo.runs.record import RunRecord

WORKLOAD = {"data": {"source": "AA"}, "max_steps": 100}


def run(optimizer: str, base: str, rate: float, losses: list[float | None], **more: Any) -> RunRecord:
    config = {**WORKLOAD, "learning_rate": rate, "optim_args": {}, "base_optim_args": {}, **more.pop("config", {})}
    record = RunRecord(f"{optimizer}-{base}-{rate}", optimizer, base, config, seed=0, status="completed", **more)
    record.curve = [
        {"step": 50 * i, "seconds": 10.0 * i, "train_loss": None, "eval_loss": loss} for i, loss in enumerate(losses)
    ]
    record.steps, record.seconds, record.final = 100, 20.0, {"eval_loss": losses[-1]}
    return record


def runs() -> list[RunRecord]:
    diverged = run("mkor", "lamb", 0.4, [10.0, None, None])
    diverged.status = "diverged"
    return [
        run("lamb", "lamb", 0.01, [10.0, 8.0, 7.0]),
        run("mkor", "lamb", 0.01, [10.0, 8.0, 6.5]),
        run("mkor", "lamb", 0.02, [10.0, 7.5, 6.0]),
        diverged,
        run("muon", "muon", 0.02, [10.0, 9.0, 8.0], config={"optim_args": {"rest_lr": 0.001}}),
    ]


def test_table() -> None:
    assert report.table(runs()).splitlines() == [
        "| optimizer | base | learning rate | final eval loss | steps to lamb's 7.000 | s/step | status |",
        "|---|---|---|---:|---:|---:|---|",
        "| mkor | lamb | 0.02 | 6.000 | 67 | 0.200 | completed |",
        "| lamb |  | 0.01 | 7.000 | 100 | 0.200 | completed |",
        "| muon |  | 0.02, rest_lr 0.001 | 8.000 |  | 0.200 | completed |",
        "",
        "Other learning rates tried (final eval loss). mkor over lamb: 0.01 → 6.500, 0.4 → diverged.",
    ]


def test_metrics_are_columns_and_a_run_without_one_has_an_empty_cell() -> None:
    first, second = run("adamw", "adamw", 0.01, [2.0, 0.5]), run("sgd", "sgd", 0.1, [2.0, 1.0])
    first.final |= {"train_loss": 0.1, "accuracy": 0.95}
    assert report.table([first, second]).splitlines() == [
        "| optimizer | base | learning rate | final eval loss | accuracy | steps to adamw's 0.500 | s/step | status |",
        "|---|---|---|---:|---:|---:|---:|---|",
        "| adamw |  | 0.01 | 0.500 | 0.950 | 50 | 0.200 | completed |",
        "| sgd |  | 0.1 | 1.000 |  |  | 0.200 | completed |",
    ]


def test_only_learning_rates_are_searched_over() -> None:
    other = run("mkor", "lamb", 0.02, [10.0, 7.0, 5.0], config={"optim_args": {"update_period": 5}})
    decayed = run("lamb", "lamb", 0.01, [10.0, 8.0, 7.2], config={"weight_decay": 0.1})
    found = report._methods([*runs(), other, decayed])
    labels = ["mkor over lamb (update_period=5)", "mkor over lamb", "lamb", "lamb", "muon"]
    assert [report._label(method[0]) for method in found] == labels
    assert [len(method) for method in found] == [1, 3, 1, 1, 1]


def test_a_method_that_never_finished_has_empty_cells() -> None:
    failed = run("mkor", "lamb", 0.02, [10.0, 9.0])
    failed.status, failed.steps = "oom", 0
    assert report.table([failed]).splitlines()[2] == "| mkor | lamb | 0.02 |  |  |  | oom |"


@pytest.mark.parametrize("change", [{"max_steps": 200}, {"data": {"source": "AB"}}, {"extra": 1}])
def test_different_workloads_are_refused(change: dict[str, Any]) -> None:
    other = run("lamb", "lamb", 0.02, [10.0, 8.0], config=change)
    with pytest.raises(ValueError, match=f"differ in {next(iter(change))} .* one workload"):
        report.table([*runs(), other])


def test_another_seed_is_another_workload() -> None:
    other = run("lamb", "lamb", 0.02, [10.0, 8.0])
    other.seed = 1
    with pytest.raises(ValueError, match=r"differ in seed \(0, 1\)"):
        report.table([*runs(), other])


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    report.save(report.figure(runs(), "A title"), tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps, seconds = drawn[0].axes
    assert [line.get_label() for line in steps.get_lines()] == [
        "mkor over lamb, lr 0.02: 6.000",
        "lamb, lr 0.01: 7.000",
        "muon, lr 0.02, rest_lr 0.001: 8.000",
    ]
    assert list(steps.get_lines()[0].get_xdata()) == [0.0, 50.0, 100.0]
    assert list(seconds.get_lines()[0].get_xdata()) == [0.0, 10.0, 20.0]
    assert list(steps.get_lines()[0].get_ydata()) == [10.0, 7.5, 6.0]
    assert steps.get_ylim() == pytest.approx((6.0 - 0.15, 9.0 + 0.15))  # without the loss before training
    assert drawn[0].get_suptitle() == "A title"


def test_a_result_is_in_the_picture_wherever_it_ends() -> None:
    """Also one that rose again; what never ended may leave at the top."""
    pytest.importorskip("matplotlib")
    rising, diverged = run("mkor", "lamb", 0.1, [0.6, 0.5, 0.9]), run("muon", "muon", 0.1, [0.6, 5.0, 7.0])
    diverged.status = "diverged"
    steps, _ = report.figure([rising, run("lamb", "lamb", 0.1, [0.7, 0.6, 0.55]), diverged]).axes
    assert steps.get_ylim() == pytest.approx((0.5 - 0.02, 0.9 + 0.02))


def test_picture_of_a_run_without_evaluations(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stopped = run("mkor", "lamb", 0.02, [None])
    stopped.status = "stopped"
    report.save(report.figure([stopped]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


README = "# Title\n\n<!-- results:wiki -->\nold\n<!-- /results -->\n\n<!-- results:other -->\nkept\n<!-- /results -->\n"


def test_update_readme_replaces_its_own_part_alone(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(README)
    report.update_readme(file, "wiki", "| a |\n")
    assert file.read_text() == README.replace("\nold\n", "\n| a |\n")
    report.update_readme(file, "wiki", "| a |\n")
    assert file.read_text() == README.replace("\nold\n", "\n| a |\n")


@pytest.mark.parametrize("text", ["no markers", "<!-- results:wiki -->\n", README + README])
def test_update_readme_without_its_markers_changes_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"markers '<!-- results:wiki -->', needed is one"):
        report.update_readme(file, "wiki", "| a |")
    assert file.read_text() == text

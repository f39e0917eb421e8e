"""The table of GLUE runs: a row an optimizer and learning rate, a column a task, medians over seeds.

The average is that of the GLUE paper: the mean over tasks of the mean of a task's metrics. Each row says which tasks it
is over; rows over different tasks cannot be compared by it. Cells that are not known stay empty.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from hf_soo.glue.tasks import TASKS, GlueTask
from hf_soo.runs import report
from hf_soo.runs.markdown import label, plain
from hf_soo.runs.record import Damaged, RunRecord, differing, passed_over, read_runs

_COMBINED = "combined_score"  # the mean of the two before it, for choosing a model; not shown
_PER_TASK = ("weight_decay", "max_grad_norm")  # settings of a method that, like the epochs, may be a task's own
_PER_RUN = ("seed", "initial_weights", "task")
_SUBSET, _PARTIAL = "\\*", "†"


@dataclass(frozen=True, slots=True)
class _Row:
    """The runs of one model, optimizer and setting: by task, and of each task by seed."""

    model: str
    optimizer: str
    base: str
    rate: str
    note: str
    cells: dict[str, list[RunRecord]]

    @property
    def method(self) -> str:
        """The optimizer and what sets the row apart."""
        return f"{self.optimizer} ({self.note})" if self.note else self.optimizer

    @property
    def title(self) -> str:
        """All that sets it apart, on one line."""
        over = f" over {self.base}" if self.base else ""
        return f"{self.model}, {self.optimizer}{over}, {self.rate}" + (f" ({self.note})" if self.note else "")

    @property
    def tasks(self) -> list[str]:
        """Those that were measured, in the order of the columns."""
        return [name for name in TASKS if name in self.cells and medians(self.cells[name])]

    @property
    def average(self) -> float | None:
        """Over its tasks, of the mean of each one's metrics; None where there is none."""
        means = [mean(medians(self.cells[name]).values()) for name in self.tasks]
        return mean(means) if means else None


def _is_fine_tuning(record: RunRecord) -> bool:
    """Whether a record is of a fine-tuning run on GLUE; evaluations alone are not."""
    return record.config.get("task") in TASKS and (record.steps > 0 or record.status != "completed")


def medians(runs: Sequence[RunRecord]) -> dict[str, float]:
    """The median of each official metric over the completed runs of a cell."""
    task = TASKS[runs[0].config["task"]]
    return {metric: median(values) for metric in shown(task) if (values := _values(runs, metric))}


def shown(task: GlueTask) -> list[str]:
    """The metrics of a task that stand in its column."""
    return [metric for metric in task.metrics if metric != _COMBINED]


def _values(runs: Sequence[RunRecord], metric: str) -> list[float]:
    completed = (run.final.get(metric) for run in runs if run.status == "completed")
    return [value for value in completed if value is not None]


def _rows(records: Sequence[RunRecord]) -> list[_Row]:
    """Put runs together; where a task was run in several ways, each further one has a row that says what differs."""
    groups: dict[str, dict[str, list[RunRecord]]] = {}
    for record in records:
        tasks = groups.setdefault(json.dumps(_identity(record), sort_keys=True), {})
        tasks.setdefault(record.config["task"], []).append(record)
    found = []
    for tasks in groups.values():
        ways = {name: _ways(tasks[name]) for name in TASKS if name in tasks}
        for number in range(max(map(len, ways.values()))):
            part = [run for each in ways.values() for run in (each[number] if number < len(each) else ())]
            differences = (_difference(name, each, number) for name, each in ways.items())
            found.append(_row(part, "; ".join(filter(None, differences))))
    return sorted(found, key=lambda row: -(row.average or 0.0))


def _identity(record: RunRecord) -> dict[str, Any]:
    """Model and method, as far as all tasks share it."""
    method = {key: value for key, value in record.method.items() if value is not None and key not in _PER_TASK}
    return {"model": (record.workload.get("model") or {}).get("name"), **method}


def _way(record: RunRecord) -> dict[str, Any]:
    """Everything else that a record says of its settings, data flattened."""
    of_task = {key: record.method[key] for key in _PER_TASK if key in record.method}
    workload = {key: value for key, value in record.workload.items() if key not in (*_PER_RUN, "model", "data")}
    return of_task | workload | (record.workload.get("data") or {})


def _ways(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs of one task by their other settings, those on whole data first."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        way = _way(run)
        subset = [bool(way.get(key)) for key in ("dev_subset", "train_subset")]
        found.setdefault(json.dumps([subset, way], sort_keys=True), []).append(run)
    return [found[key] for key in sorted(found)]


def _difference(name: str, ways: Sequence[Sequence[RunRecord]], number: int) -> str:
    """What sets one way to run a task apart: "MRPC: num_train_epochs=5.0"; nothing where there is one."""
    if len(ways) == 1 or number >= len(ways):
        return ""
    settings = [_way(runs[0]) for runs in ways]
    repeat = ("source", "digest", "train_subset", "dev_subset")  # what the others say
    keys = differing(*settings, free=repeat) or differing(*settings)
    told = ", ".join(f"{key}={settings[number].get(key)}" for key in keys)
    return f"{TASKS[name].title}: {told}"


def _row(runs: Sequence[RunRecord], difference: str) -> _Row:
    first, cells = runs[0], {}
    for name in TASKS:
        by_seed = {run.seed: run for run in runs if run.config["task"] == name}
        if by_seed:
            cells[name] = [by_seed[seed] for seed in sorted(by_seed)]
    config = first.config
    notes = [f"{key}={value}" for key, value in report.chosen(first).items()]
    return _Row(
        str((config.get("model") or {}).get("name", "")),
        first.optimizer,
        "" if first.base == first.optimizer else first.base,
        f"{config['learning_rate']:g}" if config.get("learning_rate") is not None else "",
        ", ".join(filter(None, (*notes, difference))),
        cells,
    )


def text_of(folder: Path) -> str:
    """The table of a folder of run JSONs; of evaluations alone, which are no fine-tuning, that of any runs."""
    damaged: Damaged = {}
    records = read_runs(folder, damaged)
    fine_tuned = any(map(_is_fine_tuning, records)) or not records
    return (table(records) if fine_tuned else report.table(records)) + passed_over(damaged)


def figures(folder: Path, title: str = "") -> list[Any]:
    """The scores: a mark for each row of the table and task, on a line from the lowest seed to the highest.

    Args:
        folder: of run JSONs.
        title: over the scores.

    Returns:
        None of them where no task was measured.
    """
    found = [row for row in _rows(list(filter(_is_fine_tuning, read_runs(folder, {})))) if row.tasks]
    if not found:
        return []
    names = [name for name in TASKS if any(name in row.tasks for row in found)]
    drawn = report.figure_of(7, 4.8)
    axis = drawn.subplots()
    for index, row in enumerate(found):
        places = [names.index(name) + 0.6 * (index - (len(found) - 1) / 2) / len(found) for name in row.tasks]
        scores = [mean(medians(row.cells[name]).values()) for name in row.tasks]
        style = report.style(index)
        axis.plot(places, [100 * score for score in scores], linestyle="", **style, label=label(row.title))
        for place, name in zip(places, row.tasks, strict=True):
            seeds = [100 * mean(medians([run]).values()) for run in row.cells[name] if medians([run])]
            axis.vlines(place, min(seeds), max(seeds), color=style["color"], linewidth=1)
    axis.set_xticks(range(len(names)), [TASKS[name].title for name in names])
    axis.set_xlabel("task")
    axis.set_ylabel("mean of the metrics, in percent")
    report.tidy(axis)
    return [report.with_legend(drawn, 2, title)]


def parts(folder: Path) -> dict[str, list[RunRecord]]:
    """The runs of each task."""
    found = list(filter(_is_fine_tuning, read_runs(folder, {})))
    alike = {name: [run for run in found if run.config["task"] == name] for name in TASKS}
    return {TASKS[name].title: runs for name, runs in alike.items() if runs}


def table(records: Sequence[RunRecord]) -> str:
    """The markdown table of a folder of run JSONs, and below it the seeds that its medians are of.

    Args:
        records: of any runs; those that are not of GLUE are passed over.
    """
    found = _rows([record for record in records if _is_fine_tuning(record)])
    if not found:
        return "No runs on GLUE.\n"
    names = [name for name in TASKS if any(name in row.cells for row in found)]
    header = ["model", "optimizer", "base", "learning rate", *(_column(TASKS[name]) for name in names), "average"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * 4 + "---:|" * (len(names) + 1)]
    for row in found:
        method = [plain(cell) for cell in (row.model, row.method, row.base, row.rate)]
        cells = [_cell(row.cells[name]) if name in row.cells else "" for name in names]
        lines.append("| " + " | ".join([*method, *cells, _average(row)]) + " |")
    return "\n".join([*lines, "", *_notes(found), *_seeds(found)]) + "\n"


def _column(task: GlueTask) -> str:
    short = {
        "matthews_correlation": "Matthews", "accuracy": "acc", "f1": "F1", "pearson": "Pearson",
        "spearmanr": "Spearman", "accuracy_mm": "mm",
    }  # fmt: skip
    named = "m/mm acc" if task.name == "mnli" else "/".join(short[metric] for metric in shown(task))
    return f"{task.title} {named}"


def _cell(runs: Sequence[RunRecord]) -> str:
    """Medians in percent, or why there are none."""
    failed = [run.status for run in runs if run.status != "completed"]
    text = "/".join(f"{100 * value:.1f}" for value in medians(runs).values())
    if failed:
        text = f"{text} ({', '.join(sorted(set(failed)))}: {len(failed)} of {len(runs)})".strip()
    data = runs[0].config.get("data") or {}
    return text + (_SUBSET if data.get("dev_subset") else "") + (_PARTIAL if data.get("train_subset") else "")


def _average(row: _Row) -> str:
    tasks = f"{len(row.tasks)} task{'s' * (len(row.tasks) != 1)}"
    return "" if row.average is None else f"{100 * row.average:.1f} ({tasks})"


def _notes(found: Sequence[_Row]) -> list[str]:
    """What the average is over, and what the marks mean where they occur."""
    cells = [_cell(runs) for row in found for runs in row.cells.values()]
    covered = list(dict.fromkeys(tuple(row.tasks) for row in found if row.tasks))
    sets = "; ".join(f"{len(names)}: {', '.join(TASKS[name].title for name in names)}" for names in covered)
    text = ["Dev sets, in percent, medians over seeds."]
    if covered:
        text.append(f"Average: the mean over tasks of the mean of a task's metrics, over {sets}.")
    if len(covered) > 1:
        text.append("Averages over different tasks cannot be compared.")
    if any(_SUBSET in cell for cell in cells):
        text.append(f"{_SUBSET} not the whole official dev set: no official score.")
    if any(_PARTIAL in cell for cell in cells):
        text.append(f"{_PARTIAL} not trained on the official training set as a whole.")
    return [" ".join(text)]


def _seeds(found: Sequence[_Row]) -> list[str]:
    """Median, lowest and highest of each cell with several seeds."""
    lines = []
    for row in found:
        for name, runs in row.cells.items():
            for metric in shown(TASKS[name]):
                if len(values := _values(runs, metric)) > 1:
                    numbers = (f"{100 * value:.1f}" for value in (median(values), min(values), max(values)))
                    seeds = " ".join(str(run.seed) for run in runs if run.status == "completed")
                    cells = [plain(row.title), TASKS[name].title, metric, *numbers, seeds]
                    lines.append(f"| {' | '.join(cells)} |")
    header = ["", "| run | task | metric | median | lowest | highest | seeds |", "|---|---|---|---:|---:|---:|---|"]
    return [*header, *lines] if lines else []

"""The table and the picture of a reproduction, out of its run JSONs alone; what is not there yet stays empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_soo.files import write_atomically
from hf_soo.glue import table as glue_table
from hf_soo.glue.tasks import TASKS
from hf_soo.runs import report
from hf_soo.runs.markdown import plain
from hf_soo.runs.record import Damaged, RunRecord, passed_over, reach, read_runs

PHASE_2_FOLDER = "phase2"
_REFERENCE = "lamb"
# MKOR (NeurIPS 2023), BERT-Large phase 2: steps, and SQuAD v1.1 F1 after fine-tuning.
PAPER = {
    "lamb": (1563, 90.44),
    "kaisa": (1000, 90.44),
    "mkor": (1000, 90.50),
    "mkor_h": (600, 90.64),
    "eva": (1000, 90.55),
}
_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")  # the examples of one
_PHASE_2 = ("steps", "eval loss", "masked acc.", "NSP acc.", "steps to LAMB's loss", "s/step")


def write(results: Path, scale: str) -> str:
    """Write ``table.md`` and ``phase2.png`` beside the JSONs.

    Args:
        results: the folder with phase1, phase2, squad and glue.
        scale: for the title.

    Returns:
        The table; empty, and nothing is written, while there is no run of phase 2.
    """
    runs = _read(results / PHASE_2_FOLDER, {})
    if not runs:
        return ""
    text = text_of(results)
    write_atomically(results / "table.md", text)
    title = f"Phase 2 of BERT-{scale} ({runs[0].parameters / 1e6:.1f} M parameters)"
    report.save(report.figure(runs, title, free={"max_steps"}), results / "phase2.png")
    return text


def parts(results: Path) -> dict[str, list[RunRecord]]:
    """The runs of both phases: what fine-tunes is the same for all."""
    found = {"Phase 2": PHASE_2_FOLDER, "Phase 1": "phase1"}
    return {title: runs for title, name in found.items() if (runs := _read(results / name, {}))}


def text_of(results: Path) -> str:
    """The table, and what its numbers are of, from a folder with phase1, phase2, squad and glue."""
    damaged: Damaged = {}
    phase_2 = {record.name: record for record in _read(results / PHASE_2_FOLDER, damaged)}
    squad = {record.name: record for record in _read(results / "squad", damaged)}
    glue = {name: _read(results / "glue" / name, damaged) for name in phase_2}
    phase_1 = _read(results / "phase1", damaged)
    return _table(phase_2, squad, glue) + _notes(phase_1, phase_2, squad, glue) + passed_over(damaged)


def _read(folder: Path, damaged: Damaged) -> list[RunRecord]:
    return read_runs(folder, damaged) if folder.is_dir() and any(folder.glob("*.json")) else []


def _table(
    phase_2: Mapping[str, RunRecord], squad: Mapping[str, RunRecord], glue: Mapping[str, Sequence[RunRecord]]
) -> str:
    """A row an optimizer of phase 2, best evaluation loss first; what fine-tuned it, by the same name."""
    tasks = [name for name in TASKS if any(run.config.get("task") == name for runs in glue.values() for run in runs)]
    heads = ("phase 2", *_PHASE_2, "SQuAD EM", "F1", *(_head(name) for name in tasks), "GLUE avg", "paper: steps", "F1")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    target = report.final_loss(phase_2[_REFERENCE]) if _REFERENCE in phase_2 else math.inf
    for name, run in sorted(phase_2.items(), key=lambda item: report.final_loss(item[1])):
        steps, f1 = PAPER.get(name, (None, None))
        cells = [
            plain(name),
            *_phase_2_cells(run, target),
            *_squad_cells(squad.get(name)),
            *_glue_cells(glue.get(name, ()), tasks),
            f"{steps:,}" if steps else "",
            f"{f1:.2f}" if f1 else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(name: str) -> str:
    metrics = "/".join(metric.replace("matthews_correlation", "Matthews") for metric in glue_table.shown(TASKS[name]))
    return f"{TASKS[name].title} {metrics}"


def _phase_2_cells(run: RunRecord, target: float) -> list[str]:
    if run.status != "completed":
        return [f"{run.steps:,} ({run.status})", *[""] * (len(_PHASE_2) - 1)]
    reached = reach(run.curve, target)["steps"] if math.isfinite(target) else None
    return [
        f"{run.steps:,}",
        *(_number(run.final.get(key)) for key in ("eval_loss", "mlm_accuracy", "nsp_accuracy")),
        "" if reached is None else f"{reached:.0f}",
        _number(run.seconds / run.steps if run.steps else None, 2),
    ]


def _squad_cells(run: RunRecord | None) -> list[str]:
    return ["", ""] if run is None else [_number(run.final.get(key), 2) for key in ("exact_match", "f1")]


def _glue_cells(runs: Sequence[RunRecord], tasks: Sequence[str]) -> list[str]:
    cells, means = [], []
    for name in tasks:
        mine = [run for run in runs if run.config.get("task") == name]
        values = list(glue_table.medians(mine).values()) if mine else []
        cells.append("/".join(f"{100 * value:.1f}" for value in values))
        means += [sum(values) / len(values)] if values else []
    whole = len(means) == len(tasks) and means
    return [*cells, f"{100 * sum(means) / len(means):.1f}" if whole else ""]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _notes(
    phase_1: Sequence[RunRecord],
    phase_2: Mapping[str, RunRecord],
    squad: Mapping[str, RunRecord],
    glue: Mapping[str, Sequence[RunRecord]],
) -> str:
    """What the numbers are of, as the JSONs say it: batches, steps and samples."""
    lines = [f"Phase 1: {_pretraining(run)}, final eval loss {_number(run.final.get('eval_loss'))}." for run in phase_1]
    lines += [f"Phase 2: {_pretraining(run)}." for run in list(phase_2.values())[:1]]
    lines += [f"SQuAD v1.1: {_fine_tuning(run)}." for run in list(squad.values())[:1]]
    tasks: dict[str, RunRecord] = {}
    for run in (run for runs in glue.values() for run in runs if run.config.get("task") in TASKS):
        tasks.setdefault(run.config["task"], run)
    lines += [f"{TASKS[name].title}: {_fine_tuning(run)}." for name, run in tasks.items()]
    lines.append("Fine-tuning is the same for all rows; GLUE in percent, medians over seeds where there are several.")
    return "\n" + " ".join(lines) + "\n"


def _pretraining(run: RunRecord) -> str:
    data = run.config.get("data") or {}
    batch, length = run.config.get("global_batch_size", "?"), data.get("seq_length", "?")
    return f"{run.steps:,} steps of {plain(batch)} x {plain(length)} tokens"


def _fine_tuning(run: RunRecord) -> str:
    data, config = run.config.get("data") or {}, run.config
    rate = config.get("learning_rate")
    optimizer = plain(run.optimizer) + ("" if rate is None else f" at {rate:g}")
    examples = f"{_count(data, 'train')} training and {_count(data, 'eval')} dev examples"
    batch = math.prod(value for key in _STEP if isinstance(value := config.get(key), int))
    return f"{examples}, {run.steps:,} steps of {batch}, {optimizer}"


def _count(data: Mapping[str, Any], part: str) -> str:
    """Questions of SQuAD, examples of GLUE."""
    return _said(data[part], "questions") if isinstance(data.get(part), Mapping) else _said(data, f"{part}_examples")


def _said(config: Mapping[str, Any], key: str) -> str:
    """A number of an older JSON, which may not say it."""
    value = config.get(key)
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else plain(value)

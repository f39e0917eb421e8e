"""Tables of the step benchmark, from the JSONs of ``scripts/bench_step.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_soo.bench import curves
from hf_soo.bench.curves import name_of
from hf_soo.runs import report
from hf_soo.runs.markdown import label, plain
from hf_soo.runs.record import Damaged, kind_of, passed_over, read_documents

COLUMNS = {
    "step": "step_ratio",
    "min": "step_ratio_min",
    "max": "step_ratio_max",
    "plain": "plain_step_ratio",
    "update": "update_step_ratio",
    "refresh": "refresh_step_ratio",
    "bare": "bare_products_ratio",
    "step/bare": "step_to_bare_ratio",
    "capture": "capture_ratio",
    "train step": "train_step_ratio",
    "step/base": "step_ratio/",
    "train/base": "train_step_ratio/",
    "state B/param": "state_bytes_per_parameter",
    "memory": "peak_memory_ratio",
}
_ROOFLINE = {
    "MB moved": "megabytes",
    "GFLOP": "gflops",
    "memory limit": "memory_ratio",
    "arithmetic limit": "arithmetic_ratio",
    "bound by": "bound",
    "step": "step_ratio",
    "step/limit": "step_to_limit_ratio",
}
_OVER_BASE = ("step_ratio", "train_step_ratio")
_IF_ASKED = {  # setting -> the columns that it adds
    "launches": {"launches": "launches", "tokens/s": "tokens_per_second", "MFU": "mfu"},
    "peer": {"peer": "peer_ratio", "step/peer": "step_to_peer_ratio"},
}


def columns(results: dict[str, Any]) -> dict[str, str]:
    """Title -> key of a row, of what was asked to be measured."""
    asked = (more for name, more in _IF_ASKED.items() if results.get("settings", {}).get(name))
    return dict(COLUMNS, **{title: key for more in asked for title, key in more.items()})


def heading(results: dict[str, Any]) -> str:
    """What was measured, and the head of the table."""
    size, reference = f"{results['parameters'] / 1e6:.1f}M parameters", results["reference"]
    shown = columns(results)
    fused, seconds = reference["adamw_fused_ratio"], reference["adamw_foreach_seconds"]
    where = f"{plain(results['preset'])}: {size} on {plain(results['device'])}"
    return (
        f"{where}; AdamW(foreach) {seconds * 1e3:.1f} ms a step, "
        f"fused {fused:.2f} of it\n\n"
        f"| {'optimizer':<16} | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 1)}"
    )


def line(row: dict[str, Any], shown: dict[str, str] = COLUMNS, rows: Sequence[dict[str, Any]] = ()) -> str:
    """One row of the table; what an older benchmark did not measure is an empty cell.

    Args:
        row: a method's.
        shown: the columns.
        rows: of the same file, before it and perhaps after; its base alone may be one of them.
    """
    alone = next((each for each in rows if each["optimizer"] == each["base"] == row["base"]), row)
    over = {} if alone is row else {f"{key}/": row[key] / alone[key] for key in _OVER_BASE}
    return _line(row, {**row, **over}, shown)


def roofline(results: dict[str, Any]) -> str:
    """What each step must move and do, the limits as ratios to AdamW(foreach)'s step, and the step over the larger."""
    found = [(row, row["roofline"]) for row in results["rows"] if "roofline" in row]
    if not found:
        return ""
    lines = [f"\n| {'optimizer':<16} | {' | '.join(_ROOFLINE)} |", "|---" * (len(_ROOFLINE) + 1) + "|"]
    for row, limit in found:
        values = {**row, **limit, "megabytes": limit["bytes"] / 1e6}
        lines.append(_line(row, {**values, "gflops": sum(limit["operations"].values()) / 1e9}, _ROOFLINE))
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], values: dict[str, Any], shown: dict[str, str]) -> str:
    cells = map(_cell, map(values.get, shown.values()))
    padded = (f"{cell:>{len(title)}}" for cell, title in zip(cells, shown, strict=True))
    return f"| {plain(name_of(row)):<16} | {' | '.join(padded)} |"


def _cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.2f}"


def _table(results: dict[str, Any]) -> str:
    """A benchmark as markdown; ratios are to AdamW(foreach=True) in the same process and round."""
    shown = columns(results)
    return (
        "\n".join([heading(results), *(line(row, shown, results["rows"]) for row in results["rows"])])
        + "\n"
        + roofline(results)
    )


def _tables(documents: Mapping[Path, Any], damaged: Damaged) -> list[tuple[dict[str, Any], str]]:
    """The benchmarks that lie on no curve, each with its table; what is none as this version reads it is damaged."""
    found = []
    for path, document in documents.items():
        if kind_of(document) == "bench" and "curve" not in document:
            try:
                found.append((document, _table(document)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                damaged[path] = f"no benchmark as this version reads it: {type(error).__name__} {error}"
    return found


def text_of(folder: Path) -> str:
    """The tables of the benchmarks among a folder's JSONs, by file name; of those that lie on curves, one a curve."""
    damaged: Damaged = {}
    documents = read_documents(folder, damaged)
    tables = [table for _, table in _tables(documents, damaged)]
    more = curves.text_of(curves.curves_of(documents.values()))
    return "\n".join([*tables, *([more] if more else [])]) + passed_over(damaged)


def figures(folder: Path, title: str = "") -> list[Any]:
    """The cost curves, where there are any; and what a step costs on each of the other benchmarks' models.

    Args:
        folder: of benchmarks.
        title: over the first of them.
    """
    documents = read_documents(folder, {})
    found = curves.curves_of(documents.values())
    drawn = [curves.figure(found, title)] if found else []
    rows: dict[str, list[dict[str, Any]]] = {}
    for results, _ in _tables(documents, {}):
        rows.setdefault(str(results["preset"]), []).extend(results["rows"])
    return [*drawn, _costs(rows, "" if drawn else title)] if rows else drawn


def _costs(rows: Mapping[str, Sequence[dict[str, Any]]], title: str) -> Any:
    """A panel for each model, a mark for each method: its step, and its whole train step."""
    drawn = report.figure_of(7 * len(rows), 4.8)
    for axis, (preset, own) in zip(drawn.subplots(1, len(rows), squeeze=False).flat, rows.items(), strict=True):
        names = list(dict.fromkeys(map(name_of, own)))
        for index, (said, key) in enumerate({curves.STEP: "step_ratio", curves.TRAIN: "train_step_ratio"}.items()):
            known = [row for row in own if isinstance(row.get(key), int | float)]
            places, ratios = [names.index(name_of(row)) for row in known], [row[key] for row in known]
            axis.plot(places, ratios, linestyle="", label=said, **report.style(index))
        axis.set_xticks(range(len(names)), map(label, names), rotation=60, ha="right", rotation_mode="anchor")
        axis.set_xlabel("method")
        axis.set_ylabel("ratio to AdamW")
        axis.set_title(label(f"{preset}: the cost of a step"))
        report.tidy(axis)
        report.logarithmic(axis)
    return report.with_legend(drawn, 2, title)

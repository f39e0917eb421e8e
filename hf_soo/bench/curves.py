"""How the cost of a step grows: over width, layers, batch and ranks, from the JSONs of a suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hf_soo.runs.markdown import label, plain
from hf_soo.runs.record import kind_of
from hf_soo.runs.report import figure_of, logarithmic, style, tidy, with_legend

_TITLES = {
    "width": "width",
    "layers": "layers",
    "batch_size": "sequences in a batch",
    "ranks": "ranks (gloo)",
    "gpus": "GPUs (predicted)",
}
STEP, TRAIN = "step over AdamW(foreach)'s", "whole train step over AdamW's"


class _Point(NamedTuple):
    """Of one method: where, its step and its whole train step, as ratios to AdamW's; None: not known."""

    at: int
    step: float | None
    train: float | None


_Curves = dict[str, dict[str, list[_Point]]]  # axis -> method -> points


def curves_of(documents: Iterable[Any]) -> _Curves:
    """The points of all benchmarks that lie on a curve, and of plans that predict AdamW too.

    Args:
        documents: the JSONs of a folder.
    """
    found: _Curves = {}
    for document in documents:
        if kind_of(document) == "bench" and "curve" in document:
            for row in document["rows"]:
                name = name_of(row)
                point = _Point(document["curve"]["at"], row.get("step_ratio"), row.get("train_step_ratio"))
                found.setdefault(document["curve"]["over"], {}).setdefault(name, []).append(point)
        elif kind_of(document) == "plan":
            seconds = {method["method"]: method["predicted_seconds"]["step"] for method in document["methods"]}
            reference = seconds.pop("adamw", None)
            for name, each in seconds.items() if reference else ():
                point = _Point(document["config"]["gpus"], None, each / reference)
                found.setdefault("gpus", {}).setdefault(name, []).append(point)
    order = list(_TITLES)
    return {
        axis: {name: sorted(points) for name, points in found[axis].items()} for axis in sorted(found, key=order.index)
    }


def name_of(row: Mapping[str, Any]) -> str:
    """A row's method: NAME:key=value+BASE."""
    method = ":".join([row["optimizer"], *(f"{key}={value}" for key, value in row.get("set", {}).items())])
    return method if row["base"] == row["optimizer"] else f"{method}+{row['base']}"


def text_of(curves: _Curves) -> str:
    """A table of each curve: a row for each method, a column for each point."""
    tables = []
    for axis, methods in curves.items():
        places = sorted({point.at for points in methods.values() for point in points})
        lines = [f"| {_TITLES[axis]} | {' | '.join(map(str, places))} |", "|---" * (len(places) + 1) + "|"]
        for name, points in methods.items():
            at = {point.at: point for point in points}
            lines.append(f"| {plain(name)} | {' | '.join(_cell(at.get(place)) for place in places)} |")
        tables.append("\n".join(lines) + "\n")
    if not tables:
        return ""
    return "\n".join([f"Each cell: {STEP}; {TRAIN}.\n", *tables])


def _cell(point: _Point | None) -> str:
    if point is None:
        return ""
    return "; ".join("-" if value is None else f"{value:.2f}" for value in (point.step, point.train))


def figure(curves: _Curves, title: str = "") -> Any:
    """Steps above, whole train steps below, a column for each axis.

    Args:
        curves: at least one.
        title: over the panels.

    Raises:
        ValueError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for methods in curves.values() for name in methods))
    drawn = figure_of(3.2 * len(curves) + 1, 6.4)
    panels = drawn.subplots(2, len(curves), squeeze=False)
    for column, (axis, methods) in enumerate(curves.items()):
        for row, said in enumerate((STEP, TRAIN)):
            panel = panels[row][column]
            panel.set_visible(_draw(panel, methods, names, said))
            panel.set_xlabel(_TITLES[axis])
            panel.set_ylabel(said if column == 0 or not panels[row][column - 1].get_visible() else "")
    return with_legend(drawn, 8, title)


def _draw(panel: Any, methods: Mapping[str, list[_Point]], names: list[str], said: str) -> bool:
    """The lines of one panel; whether there are any."""
    places = sorted({point.at for points in methods.values() for point in points})
    drawn = False
    for name, points in methods.items():
        values = [(p.at, p.step if said == STEP else p.train) for p in points]
        known = [(at, value) for at, value in values if value is not None]
        if known:
            panel.plot(*zip(*known, strict=True), label=label(name), **style(names.index(name)))
            drawn = True
    panel.set_xscale("log", base=2)
    panel.set_xticks(places, map(str, places))
    panel.minorticks_off()
    logarithmic(panel)
    tidy(panel)
    return drawn

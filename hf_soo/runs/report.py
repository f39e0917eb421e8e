"""The table and the picture of a folder of run JSONs.

Runs that differ in the learning rates alone are one method: its best by final evaluation loss stands in the table, the
others are listed below it. Runs can be compared when model, data, batch, schedule and seed are the same; a folder that
mixes them is refused. A cell that is not known stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hf_soo.files import write_atomically
from hf_soo.runs.markdown import label, plain
from hf_soo.runs.record import RunRecord, differing, reach

# The method the others' steps are counted against: the first of these that is there.
_BASELINES = ("lamb", "adamw", "sgd", "muon", "rmsprop")
_HEADER = ("optimizer", "base", "learning rate", "final eval loss")
_HEADER_END = ("steps to {}", "s/step", "status")  # between them an evaluation's other metrics, where there are any
_LOSSES = ("train_loss", "eval_loss")
_Method = list[RunRecord]  # the runs of one optimizer, base and configuration, best first; their learning rates differ


def _methods(records: Sequence[RunRecord], free: Collection[str] | None = ()) -> list[_Method]:
    """Group runs by optimizer, base and configuration, each group and the list of groups best first.

    Args:
        records: the runs of one workload.
        free: settings besides a method's own in which they may differ; None: all.

    Raises:
        ValueError: the runs are of different workloads.
    """
    first = records[0]
    groups: dict[str, _Method] = {}
    for run in records:
        if free is not None and (changed := differing(first.workload, run.workload, free=free)):
            ours, theirs = (each.workload.get(changed[0]) for each in (first, run))
            raise ValueError(
                f"Runs {first.name} and {run.name} differ in {changed[0]} ({ours!r}, {theirs!r}); "
                "one table compares runs of one workload, so keep each workload's runs in a folder of its own."
            )
        decay_and_clip = [run.method.get(key) for key in ("weight_decay", "max_grad_norm")]
        groups.setdefault(f"{_label(run)}|{run.base}|{decay_and_clip}", []).append(run)
    return sorted((sorted(group, key=final_loss) for group in groups.values()), key=lambda group: final_loss(group[0]))


def _label(run: RunRecord) -> str:
    """A run's method, for a legend: "mkor over lamb (update_period=5)"."""
    over = "" if run.base == run.optimizer else f" over {run.base}"
    return f"{run.optimizer}{over}{_settings(run)}"


def final_loss(record: RunRecord) -> float:
    """The loss to rank by: the last evaluation of a completed run, infinite for every other."""
    loss = record.final.get("eval_loss") if record.status == "completed" else None
    return math.inf if loss is None else loss


def table(records: Sequence[RunRecord]) -> str:
    """The markdown table of the best run of every method, and the list of the other runs.

    Args:
        records: the runs of one workload.

    Raises:
        ValueError: the runs are of different workloads.
    """
    found = _methods(records)
    bests = [method[0] for method in found]
    finished = {run.optimizer: run for run in reversed(bests) if math.isfinite(final_loss(run))}
    baseline = next((finished[name] for name in _BASELINES if name in finished), None)
    target = final_loss(baseline) if baseline else math.inf
    goal = f"{plain(_label(baseline))}'s {target:.3f}" if baseline else "the baseline"
    metrics = tuple(dict.fromkeys(key for run in bests for key in run.final if key not in _LOSSES))
    header = " | ".join((*_HEADER, *map(plain, metrics), _HEADER_END[0].format(goal), *_HEADER_END[1:]))
    lines = [f"| {header} |", "|" + "---|" * 3 + "---:|" * (3 + len(metrics)) + "---|"]
    lines += ["| " + " | ".join(_row(run, target, metrics)) + " |" for run in bests]
    tried = [[f"{_rates(run)} → {_outcome(run)}" for run in method[1:]] for method in found]
    if others := [f"{plain(_label(run))}: {', '.join(each)}" for run, each in zip(bests, tried, strict=True) if each]:
        lines += ["", "Other learning rates tried (final eval loss). " + "; ".join(others) + "."]
    return "\n".join(lines) + "\n"


def _row(run: RunRecord, target: float, metrics: Sequence[str]) -> list[str]:
    steps = reach(run.curve, target)["steps"] if math.isfinite(target) else None
    return [
        plain(f"{run.optimizer}{_settings(run)}"),
        "" if run.base == run.optimizer else plain(run.base),
        _rates(run),
        _outcome(run, ""),
        *("" if (value := run.final.get(metric)) is None else f"{value:.3f}" for metric in metrics),
        "" if steps is None else f"{steps:.0f}",
        f"{run.seconds / run.steps:.3f}" if run.steps else "",
        run.status,
    ]


def _outcome(run: RunRecord, otherwise: str | None = None) -> str:
    """The final loss; where there is none, the status, or what else stands for it."""
    loss = final_loss(run)
    return f"{loss:.3f}" if math.isfinite(loss) else run.status if otherwise is None else otherwise


def _rates(run: RunRecord) -> str:
    """All a run's learning rates: "0.02, rest_lr 0.001"."""
    rest = chosen(run).get("rest_lr")
    rate = run.config.get("learning_rate")
    return ("" if rate is None else f"{rate:g}") + ("" if rest is None else f", rest_lr {rest:g}")


def _settings(run: RunRecord) -> str:
    """What is set besides learning rates, or nothing: " (update_period=5)"."""
    said = [f"{key}={value}" for key, value in chosen(run).items() if key != "rest_lr"]
    return f" ({', '.join(said)})" if said else ""


def chosen(run: RunRecord) -> dict[str, Any]:
    """What is set of a method and its base besides learning rate, weight decay and clip."""
    layers = {key: " ".join(run.method.get(key) or ()) for key in ("precondition_include", "precondition_exclude")}
    given = {**(run.method.get("optim_args") or {}), **(run.method.get("base_optim_args") or {})}
    return given | {key: patterns for key, patterns in layers.items() if patterns}


def save(drawn: Any, path: str | Path) -> None:
    """Write a figure.

    Args:
        drawn: the figure.
        path: the file, whose folder is made; its ending says the format.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)


def figure(
    records: Sequence[RunRecord], title: str = "", *, free: Collection[str] | None = (), loss: str = "eval_loss"
) -> Any:
    """Loss over steps and over seconds of training, one line a method, the best run of each.

    Args:
        records: the runs of one workload.
        title: over both panels.
        free: settings besides a method's own in which they may differ.
        loss: the key of a curve's points to draw.

    Raises:
        ValueError: the runs are of different workloads, or matplotlib is not installed.
    """
    drawn = figure_of(11, 4.8)
    panels = drawn.subplots(1, 2, sharey=True)
    found = _methods(records, free)
    for index, method in enumerate(found):
        _draw(panels, method[0], index, loss)
    for axis, name in zip(panels, ("optimizer steps", "seconds of training"), strict=True):
        axis.set_xlabel(name)
        tidy(axis)
    panels[0].set_ylabel({"eval_loss": "evaluation loss", "train_loss": "training loss"}[loss])
    if loss == "eval_loss" and (limits := _limits(found)):
        panels[0].set_ylim(*limits)
    return with_legend(drawn, 3, title)


def health_figure(records: Sequence[RunRecord], *, free: Collection[str] | None = ()) -> Any:
    """The health of the layers over steps, a panel for each number, the runs of `figure` in its colours.

    Args:
        records: the runs of one workload.
        free: settings besides a method's own in which they may differ.

    Returns:
        None where no run recorded it as it went.

    Raises:
        ValueError: the runs are of different workloads, or matplotlib is not installed.
    """
    bests = [method[0] for method in _methods(records, free)]
    keys = dict.fromkeys(key for run in bests for point in run.curve for key in point.get("health") or ())
    if not keys:
        return None
    drawn = figure_of(4.8 * len(keys), 4.8)
    for axis, key in zip(drawn.subplots(1, len(keys), squeeze=False).flat, keys, strict=True):
        for index, run in enumerate(bests):
            points = [(p["step"], value) for p in run.curve if (value := (p.get("health") or {}).get(key)) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), **style(index), label=_named(run))
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label(HEALTH.get(key, key)))
        tidy(axis)
        if key.endswith("_layers"):
            axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
            axis.locator_params("y", integer=True)
    return with_legend(drawn, 3)


def figure_of(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    except ImportError as error:
        raise ValueError("The picture needs matplotlib; pip install 'hf-soo[report]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


# Wong's palette (Nature Methods 2011), told apart also without colour vision, and three of Tol's; markers serve print.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288"
)  # fmt: skip
_MARKERS = "osD^vPXp<>"
# What the numbers of a record's health are.
HEALTH = {
    "cos_median": "cos(G, P), median over layers",
    "cos_min": "cos(G, P), lowest of all layers",
    "distance_median": "|F - I|, median over layers",
    "distance_max": "|F - I|, largest of all layers",
    "fallback_layers": "layers that fell back",
    "noise_layers": "layers with a side of noise",
}


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a method's line, by its place among them."""
    place = index % len(_COLOURS)
    marker = _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]  # no pair comes twice
    return {"color": _COLOURS[place], "marker": marker, "markersize": 4}


def _named(run: RunRecord, loss: str = "") -> str:
    """What a legend says of a run: its final evaluation loss only where that is what is drawn."""
    return f"{label(_label(run))}, lr {_rates(run)}" + (f": {_outcome(run)}" if loss == "eval_loss" else "")


def _draw(panels: Any, run: RunRecord, index: int, loss: str) -> None:
    points = _points(run, loss)
    look = style(index) | {"markevery": max(1, len(points) // 12), "label": _named(run, loss)}
    for axis, key in zip(panels, ("step", "seconds"), strict=True):
        axis.plot([point[key] for point in points], [point[loss] for point in points], **look)


def tidy(axis: Any) -> None:
    """A light grid, and no frame."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def logarithmic(axis: Any) -> None:
    """A vertical scale of ratios, with numbers as they are read: 0.5, 1, 2."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.minorticks_off()


def with_legend(drawn: Any, columns: int, title: str = "") -> Any:
    """The figure, with one legend for all its panels below them.

    Args:
        drawn: the figure.
        columns: most of them in the legend.
        title: over the panels.
    """
    entries: dict[str, Any] = {}
    for axis in drawn.axes:
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, line)
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False}
    drawn.legend(entries.values(), entries.keys(), ncols=max(1, min(columns, len(entries))), **place)
    if title:
        drawn.suptitle(label(title))
    return drawn


def _points(run: RunRecord, loss: str) -> list[dict[str, float]]:
    return [
        {key: float(point[key] or 0.0) for key in ("step", "seconds", loss)}
        for point in run.curve
        if point[loss] is not None and math.isfinite(point[loss])
    ]


def _limits(found: Sequence[_Method]) -> tuple[float, float] | None:
    """Show what the methods differ in: from the lowest loss to the highest of first evaluations and of results."""
    evaluations = [_points(method[0], "eval_loss") for method in found]
    later = [point["eval_loss"] for points in evaluations for point in points if point["step"] > 0]
    start = [points[0]["eval_loss"] for points in evaluations if points]
    start += [loss for method in found if math.isfinite(loss := final_loss(method[0]))]
    if not later:
        return None
    low, high = min(later), min(max(later), max(start))
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def update_readme(readme: str | Path, name: str, text: str) -> None:
    """Put a table between the markers ``<!-- results:NAME -->`` and ``<!-- /results -->``, atomically.

    Args:
        readme: the file.
        name: of the marker.
        text: the new content between the markers.

    Raises:
        ValueError: a marker is missing, or stands there twice.
    """
    path = Path(readme)
    old, opening, closing = path.read_text(encoding="utf-8"), f"<!-- results:{name} -->", "<!-- /results -->"
    head, *rest = old.split(opening)
    if len(rest) != 1 or closing not in rest[0]:
        raise ValueError(
            f"{path} has {len(rest)} markers {opening!r}, needed is one with {closing!r} after it; add the two lines."
        )
    tail = rest[0].split(closing, 1)[1]
    write_atomically(path, f"{head}{opening}\n{text.strip()}\n{closing}{tail}")

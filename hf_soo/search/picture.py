"""The picture of a folder of trials: loss over the rate, and the curves of the confirmed runs over steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Any

from hf_soo.runs.markdown import label
from hf_soo.runs.record import RunRecord
from hf_soo.runs.report import figure_of, tidy
from hf_soo.search.claims import PLAIN
from hf_soo.search.groups import CHOOSING, CLAIM, EDGE, Group, Setting, best_of, by_method, edges, groups, loss_or_last

# Wong's palette (Nature Methods 2011) and three of Tol's; the markers serve print.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288"
)  # fmt: skip
_MARKERS = "osD^vPXp<>"
_SIZE = (7.0, 4.6)  # of a panel, in inches


def figure(trials: Sequence[RunRecord], title: str = "") -> Any:
    """A panel for each group: of runs that chose, loss over rate; of runs that confirm, loss over steps.

    Args:
        trials: of any searches.
        title: over all panels.

    Raises:
        ValueError: matplotlib is not installed.
    """
    panels = [(_draw_rates, group) for group in groups(trials, CHOOSING)]
    panels += [(_draw_curves, group) for group in groups(trials, (CLAIM,))]
    panels.sort(key=lambda panel: panel[1].study)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    drawn = figure_of(_SIZE[0] * columns, _SIZE[1] * rows + 1.0)
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    styles = _styles([group for _, group in panels])
    for axis, (draw, group) in zip(axes, panels, strict=False):
        draw(axis, group, styles)
        tidy(axis)
        axis.set_ylabel("evaluation loss")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend(drawn, styles, 3 * columns)
    if title:
        drawn.suptitle(label(title))
    return drawn


def _styles(found: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, the same in all panels, by their best losses; plain ones are dashed."""
    best: dict[str, float] = {}
    for group in found:
        for method, settings in by_method(group).items():
            best[method] = min(best.get(method, float("inf")), loss_or_last(best_of(settings)))
    return {
        method: {
            "label": label(method),
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],  # no pair comes twice
            "linestyle": "--" if method in PLAIN else "-",
        }
        for index, method in enumerate(sorted(best, key=lambda method: best[method]))
    }


def _legend(drawn: Any, styles: dict[str, dict[str, Any]], columns: int) -> None:
    from matplotlib.lines import Line2D

    star = {"marker": "*", "markersize": 14}
    signs: dict[str, dict[str, Any]] = {
        "best": star,
        f"best, {EDGE}: widen": {**star, "markerfacecolor": "white"},
        "diverged": {"marker": "x", "markersize": 7},
        "stopped by the rule": {"marker": "2", "markersize": 9},
    }
    handles = [Line2D([], [], markersize=5, **style) for style in styles.values()]
    handles += [Line2D([], [], label=name, color="grey", linestyle="", **sign) for name, sign in signs.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _draw_rates(axis: Any, group: Group, styles: dict[str, dict[str, Any]]) -> None:
    """Loss over rate: a star at each method's best, hollow at the edge; above, the runs without a final loss."""
    lost: Counter[float] = Counter()
    bests, losses = [], []
    for method, settings in by_method(group).items():
        style, rates = styles[method], sorted({setting.rate for setting in settings})
        at = {rate: best_of([setting for setting in settings if setting.rate == rate]) for rate in rates}
        points = [(rate, loss_or_last(found)) for rate, found in at.items() if found]
        losses += [loss for _, loss in points]
        axis.plot(*zip(*points, strict=True), **style, markersize=4, linewidth=1.2) if points else None
        if best := best_of(settings):
            face = "white" if EDGE in edges(settings) else style["color"]
            star = {"marker": "*", "markersize": 14, "zorder": 5, "clip_on": False}
            axis.plot([best.rate], [best.loss], color=style["color"], markerfacecolor=face, **star)
            bests.append(loss_or_last(best))
        for run in (run for setting in settings if not setting.is_whole for run in setting.runs):
            _draw_lost(axis, run, lost, style["color"])
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_title(label(f"{group.title}: by rate"), fontsize="medium")
    if bests:  # what the methods differ in; of several, much worse runs leave at the top
        low, high, worst = min(bests), max(bests), max(losses)
        high = worst if high == low else min(worst, high + 1.5 * (high - low))
        margin = 0.06 * (high - low) or 0.05
        axis.set_ylim(low - margin, high + margin)


def _draw_lost(axis: Any, run: RunRecord, lost: Counter[float], colour: str) -> None:
    """A run without a final loss, in a column at its rate that hangs from the top of the panel."""
    if run.status == "completed":
        return
    rate = float(run.config.get("learning_rate") or run.search["params"].get("learning_rate") or 0.0)
    height = 0.985 - 0.035 * lost[rate]
    lost[rate] += 1
    sign = {"marker": "2" if run.status == "stopped" else "x", "markersize": 7, "markeredgewidth": 1.6, "linestyle": ""}
    axis.plot([rate], [height], color=colour, transform=axis.get_xaxis_transform(), **sign)


def _draw_curves(axis: Any, group: Group, styles: dict[str, dict[str, Any]]) -> None:
    """The mean over seeds of each method's best setting over steps, in the band of its lowest and highest seed."""
    lows, highs = [], []
    for method, settings in by_method(group).items():
        if (best := best_of(settings)) is None:
            continue
        steps, losses = _over_seeds(best)
        style, middle = styles[method], [mean(each) for each in losses]
        axis.plot(steps, middle, **style, markersize=4, linewidth=1.2)
        axis.fill_between(steps, [min(each) for each in losses], [max(each) for each in losses],
                          color=style["color"], alpha=0.2, linewidth=0)  # fmt: skip
        lows += [min(losses[-1])] if losses else []
        highs += [loss for step, loss in zip(steps, middle, strict=True) if step >= group.budget / 4]
    axis.set_xlabel("optimizer steps")
    axis.set_title(label(f"{group.title}: the best setting of each"), fontsize="medium")
    if lows and highs:  # the first quarter of the steps would take all the room
        axis.set_ylim(min(lows) - 0.05 * (max(highs) - min(lows)), max(highs))


def _over_seeds(setting: Setting) -> tuple[list[int], list[list[float]]]:
    """The steps that every seed was evaluated at, and the losses there."""
    curves = [
        {point["step"]: float(loss) for point in run.curve if (loss := point["eval_loss"]) is not None}
        for run in setting.runs
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [[curve[step] for curve in curves] for step in steps]

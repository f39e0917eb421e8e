"""The picture of trials: loss over the rate, curves of the confirmed runs, steps to the target, gain and cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import mean
from textwrap import fill
from typing import Any

from hf_soo.runs.markdown import label
from hf_soo.runs.record import RunRecord
from hf_soo.runs.report import figure_of, logarithmic, style, tidy
from hf_soo.search.claims import PLAIN, Claim, Claims
from hf_soo.search.cost import Benchmarks, step_time
from hf_soo.search.groups import CHOOSING, EDGE, Group, Setting, best_of, by_method, edges, groups, loss_or_last
from hf_soo.search.overview import Compared, bests, compared

_SIZE = (6.0, 4.4)  # of a panel, in inches
_BESIDE = "steps beside the strongest plain method"
_Styles = Mapping[str, dict[str, Any]]
_Draw = Callable[[Any, _Styles], None]  # draws a panel


def figure(trials: Sequence[RunRecord], title: str = "", documents: Benchmarks = ()) -> Any:
    """The panels of each study of trials in rows of their own, then gain over batch, and over cost by benchmarks.

    Raises:
        ValueError: matplotlib is not installed.
    """
    found, choosing = compared(trials), groups(trials, CHOOSING)
    own: dict[str, list[_Draw]] = {study: [] for study in sorted({run.search["study"] for run in trials})}
    for group in choosing:
        own[group.study].append(partial(_draw_rates, group=group))
    for group, claims in found:
        paces = _paces(claims, documents)
        own[group.study].append(partial(_draw_curves, group=group))
        own[group.study] += [partial(_draw_curves, group=group, paces=paces)] if len(paces) > 1 else []
        own[group.study] += [partial(_draw_steps, group=group, claims=claims)] if claims.baseline else []
    columns = max(map(len, own.values())) if len(own) > 1 else 2
    blocks = [*own.values(), list(_together(found, documents))]
    rows = [block[start : start + columns] for block in blocks for start in range(0, len(block), columns)]
    columns = max(map(len, rows))
    drawn = figure_of(_SIZE[0] * columns, _SIZE[1] * len(rows) + 1.0)
    styles = _styles([*choosing, *(group for group, _ in found)])
    for axes, row in zip(drawn.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis, draw in zip(axes, row, strict=False):
            draw(axis, styles)
            tidy(axis)
        for axis in axes[len(row) :]:
            axis.set_axis_off()
    _legend(drawn, styles, 3 * columns)
    if title:
        drawn.suptitle(label(title))
    return drawn


def _together(found: Compared, documents: Benchmarks) -> Iterator[_Draw]:
    """Gain over batch, of workloads that were run at several; and gain over cost, where a step was timed."""
    families: dict[str, Compared] = {}
    for group, claims in found:
        if group.batch is not None and claims.baseline:
            families.setdefault(group.family, []).append((group, claims))
    for family in families.values():
        if len({group.batch for group, _ in family}) > 1:
            yield partial(_draw_batches, family=family)
    points = [
        (method, _paces(claims, documents).get(method), claim.steps.mean)
        for _, claims in found
        for method, claim in _ranked(claims).items()
        if claim.steps and claim.setting is not claim.baseline
    ]
    timed = [(method, pace, steps) for method, pace, steps in points if pace]
    if timed:
        yield partial(_draw_costs, points=timed, missing=len(points) - len(timed))


def _ranked(claims: Claims) -> dict[str, Claim]:
    return {method: claim for method, claim in bests(claims.rows).items() if not claim.reasons}


def _say(axis: Any, title: str, along: str, measured: str) -> None:
    axis.set_title(label(title), fontsize="medium")
    axis.set_xlabel(fill(label(along), 72))
    axis.set_ylabel(measured)


def _styles(found: Sequence[Group]) -> _Styles:
    """A colour and a marker for each method, the same in all panels, by their best losses; plain ones are dashed."""
    best: dict[str, float] = {}
    for group in found:
        for method, settings in by_method(group).items():
            best[method] = min(best.get(method, float("inf")), loss_or_last(best_of(settings)))
    return {
        method: {**style(index), "label": label(method), "linestyle": "--" if method in PLAIN else "-"}
        for index, method in enumerate(sorted(best, key=lambda method: best[method]))
    }


def _legend(drawn: Any, styles: _Styles, columns: int) -> None:
    from matplotlib.lines import Line2D

    star = {"marker": "*", "markersize": 14}
    signs: dict[str, dict[str, Any]] = {
        "best": star,
        f"best, {EDGE}: widen": {**star, "markerfacecolor": "white"},
        "diverged": {"marker": "x", "markersize": 7},
        "stopped by the rule": {"marker": "2", "markersize": 9},
    }
    handles = [Line2D([], [], **look | {"markersize": 5}) for look in styles.values()]
    handles += [Line2D([], [], label=name, color="grey", linestyle="", **sign) for name, sign in signs.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _draw_rates(axis: Any, styles: _Styles, group: Group) -> None:
    """Loss over rate: a star at each method's best, hollow at the edge; above, the runs without a final loss."""
    from matplotlib.ticker import LogLocator

    lost: Counter[float] = Counter()
    bests, losses = [], []
    for method, settings in by_method(group).items():
        look, rates = styles[method], sorted({setting.rate for setting in settings})
        at = {rate: best_of([setting for setting in settings if setting.rate == rate]) for rate in rates}
        points = [(rate, loss_or_last(found)) for rate, found in at.items() if found]
        losses += [loss for _, loss in points]
        axis.plot(*zip(*points, strict=True), **look, linewidth=1.2) if points else None
        if best := best_of(settings):
            face = "white" if EDGE in edges(settings) else look["color"]
            star = {"marker": "*", "markersize": 14, "zorder": 5, "clip_on": False}
            axis.plot([best.rate], [best.loss], color=look["color"], markerfacecolor=face, **star)
            bests.append(loss_or_last(best))
        for run in (run for setting in settings if not setting.is_whole for run in setting.runs):
            _draw_lost(axis, run, lost, look["color"])
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    _say(axis, f"{group.title}: by rate", "learning rate", "evaluation loss")
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


def _paces(claims: Claims, documents: Benchmarks) -> dict[str, float]:
    """What a step of each method takes beside one of the strongest plain method, where both were timed."""
    found = {
        method: step_time(documents, claim.setting.runs[0], claim.baseline.runs[0])
        for method, claim in bests(claims.rows).items()
        if claim.baseline
    }
    return {method: time[0] for method, time in found.items() if time}


def _draw_curves(axis: Any, styles: _Styles, group: Group, paces: Mapping[str, float] | None = None) -> None:
    """The mean over seeds of each method's best setting, in the band of its lowest and highest; over steps, or time."""
    found = {method: best for method, settings in by_method(group).items() if (best := best_of(settings))}
    shown = dict.fromkeys(found, 1.0) if paces is None else paces
    ends: dict[str, float] = {}
    tops, low = [], float("inf")
    for method in sorted(found.keys() & shown.keys(), key=lambda method: loss_or_last(found[method])):
        steps, losses = _over_seeds(found[method])
        look, middle = styles[method], [mean(each) for each in losses]
        places = [step * shown[method] for step in steps]
        axis.plot(places, middle, **look, linewidth=1.2)
        axis.fill_between(places, [min(each) for each in losses], [max(each) for each in losses],
                          color=look["color"], alpha=0.2, linewidth=0)  # fmt: skip
        tops += [next((loss for step, loss in zip(steps, middle, strict=True) if step >= group.budget / 4), low)]
        ends[method], low = middle[-1], min(low, *losses[-1])
    # what the better methods differ in, after the first quarter of their steps
    top = sorted(tops)[(len(tops) - 1) // 2] if tops else low
    said = "optimizer steps" if paces is None else "time in steps of the strongest plain method, by hf-soo bench"
    above = [f"{method} {end:.2f}" for method, end in ends.items() if end > top]
    for what, names in {"not timed": sorted(found.keys() - shown.keys()), "above": above}.items():
        said += f"; {what}: {', '.join(names)}" if names else ""
    _say(axis, f"{group.title}: the best setting of each", said, "evaluation loss")
    if tops:
        axis.set_ylim(low - 0.05 * (top - low), top)


def _over_seeds(setting: Setting) -> tuple[list[int], list[list[float]]]:
    """The steps that every seed was evaluated at, and the losses there."""
    curves = [
        {point["step"]: float(loss) for point in run.curve if (loss := point["eval_loss"]) is not None}
        for run in setting.runs
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [[curve[step] for curve in curves] for step in steps]


def _draw_steps(axis: Any, styles: _Styles, group: Group, claims: Claims) -> None:
    """A bar a method: its best setting's steps to the baseline's final loss, open where a seed does not reach it."""
    names: list[str] = []
    for method, claim in _ranked(claims).items():
        if (reached := claim.reached) is None:
            continue
        look, place, steps = styles[method], len(names), reached.steps if reached.count == reached.of else None
        names.append(label(method))
        height, said = (group.budget, f"{reached.count} of {reached.of}") if steps is None else (steps, f"{steps:.0f}")
        bar = {"facecolor": "none", "hatch": "//"} if steps is None else {"facecolor": look["color"]}
        error = None if steps is None or claim.steps is None else group.budget * claim.steps.error
        axis.bar(place, height, yerr=error, edgecolor=look["color"], alpha=0.6, **bar)
        axis.plot([place], [math.nan if steps is None else steps], **look | {"linestyle": ""})
        axis.annotate(said, (place, height), (0, 6), textcoords="offset points", ha="center", fontsize="small")
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize="small")
    axis.set_xlim(-0.7, max(len(names), 5) - 0.3)
    axis.set_ylim(0, 1.15 * group.budget)
    _say(axis, f"{group.short}: steps to the final loss of {claims.baseline}", "", "optimizer steps")


def _draw_batches(axis: Any, styles: _Styles, family: Compared) -> None:
    """Steps beside the strongest plain method's at each batch, within a standard error."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for group, claims in sorted(family, key=lambda each: each[0].batch or 0):
        for method, claim in _ranked(claims).items():
            if claim.steps and group.batch:
                points.setdefault(method, []).append((group.batch, claim.steps.mean, claim.steps.error))
    for method, own in points.items():
        batches, ratios, errors = zip(*own, strict=True)
        axis.plot(batches, ratios, **styles[method], linewidth=1.2)
        axis.errorbar(batches, ratios, errors, fmt="none", ecolor=styles[method]["color"])
    axis.set_xscale("log", base=2)
    tried = sorted({batch for own in points.values() for batch, *_ in own})
    axis.set_xticks(tried, map(str, tried))
    axis.minorticks_off()
    logarithmic(axis)
    studies = ", ".join(dict.fromkeys(group.study for group, _ in family))
    _say(axis, f"{studies}: gain over batch", "examples in a step", _BESIDE)


def _draw_costs(axis: Any, styles: _Styles, points: Sequence[tuple[str, float, float]], missing: int) -> None:
    """Steps over step time, both beside the strongest plain method's; below the line seconds are saved."""
    for method, ratio, steps in points:
        axis.plot([ratio], [steps], **styles[method] | {"linestyle": "", "markersize": 7})
    ratios = [0.9, 1.1, *(ratio for _, ratio, _ in points)]
    places = [min(ratios) + (max(ratios) - min(ratios)) * n / 50 for n in range(51)]
    axis.plot(places, [1 / place for place in places], color="grey", linewidth=1.0, label="the same seconds")
    logarithmic(axis)
    said = f"gain over cost: {len(points)} timed, {missing} not; on the line the same seconds"
    _say(axis, said, "seconds of a step beside it, by hf-soo bench", _BESIDE)

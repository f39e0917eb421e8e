"""The comparison of methods out of a folder of trials, as Markdown.

For each workload (equal but for the seed, with one held-out set and one budget) the claims, out of the runs that
confirm; the same methods over their own bases; and how sensitive each is to its rates, out of the runs that chose
them. No run is left out silently: what is not ranked says why, what is not counted is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hf_soo.runs.markdown import plain
from hf_soo.runs.record import Damaged, RunRecord, folders_of, passed_over, read_runs
from hf_soo.search import overview, picture
from hf_soo.search.claims import PLAIN, SEEDS, Claim, Claims, said
from hf_soo.search.cost import benchmarks
from hf_soo.search.groups import (
    CHOOSING,
    CLAIM,
    EDGE,
    HELD_OUT,
    Group,
    Setting,
    best_of,
    by_method,
    edges,
    groups,
    is_over,
    loss_or_last,
    number,
    trials_of,
    tuning,
)  # fmt: skip


def text_of(folder: Path) -> str:
    """The comparisons of a folder of trials, or of such folders; runs of no search are named and passed over."""
    damaged: Damaged = {}
    runs = _runs(folder, damaged)
    trials = [run for run in runs if run.search]
    found = overview.compared(trials)
    parts = [overview.text_of(found, trials)] if len({run.search["study"] for run in trials}) > 1 else []
    parts += [_claims_text(group, claims, trials) for group, claims in found]
    parts += [_sensitivity(group) for group in groups(trials, CHOOSING)]
    parts += filter(None, [overview.costs(found, benchmarks(folder))])
    unfinished = [run.name for run in trials if not is_over(run)]
    notes = _named(
        "Failed or interrupted, and not counted as trials (without its JSON a search makes one again)", unfinished
    )
    notes += _named("Of no search, and passed over", [run.name for run in runs if not run.search])
    return "\n".join([*parts, *notes]) + passed_over(damaged)


def figures(folder: Path, title: str = "") -> list[Any]:
    """One picture of the same folders, with a title over all panels."""
    return [picture.figure(_trials(folder), title, benchmarks(folder))]


def parts(folder: Path) -> dict[str, list[RunRecord]]:
    """The runs that can be compared, those that confirm before those that chose."""
    found = [(stages, group) for stages in ((CLAIM,), CHOOSING) for group in groups(_trials(folder), stages)]
    return {
        f"{group.title}: {' and '.join(stages)}": [run for setting in group.settings for run in setting.runs]
        for stages, group in found
    }


def _runs(folder: Path, damaged: Damaged) -> list[RunRecord]:
    return [run for each in folders_of(folder) for run in read_runs(each, damaged)]


def _trials(folder: Path) -> list[RunRecord]:
    return [run for run in _runs(folder, {}) if run.search]


def _named(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {', '.join(map(plain, names))}.\n"] if names else []


def _claims_text(group: Group, found: Claims, trials: Sequence[RunRecord]) -> str:
    """The tables of a group of confirmed runs, with the notes that they are read by."""
    trials = trials_of(group, trials)
    tuned = tuning(trials, group.study)
    base = plain(found.baseline) if found.baseline else "baseline"
    ranks = {id(claim): str(rank) for rank, claim in enumerate((row for row in found.rows if not row.reasons), start=1)}
    columns: dict[str, Callable[[Claim], str]] = {
        "rank": lambda claim: ranks.get(id(claim), ""),
        "method": lambda claim: plain(claim.setting.method),
        "rate": lambda claim: number(claim.setting.rate),
        "other settings": lambda claim: plain(claim.setting.others),
        "trials": lambda claim: said(tuned[claim.setting.method]),
        "seeds": lambda claim: str(len(claim.setting.losses)),
        "final loss": lambda claim: _float(claim.setting.loss, 3),
        f"loss at {group.budget}": lambda claim: _float(_at_budget(claim.setting, group.budget), 3),
        "steps to target": _steps,
        "seconds": lambda claim: _float(claim.reached.seconds if claim.reached else None, 0),
        "steps ratio": lambda claim: _float(claim.ratio, 3),
        f"minus {base}": lambda claim: "baseline" if claim.setting is claim.baseline else _difference(claim),
        "p": lambda claim: _p(claim.p),
        "p (Holm)": lambda claim: _p(claim.adjusted),
        "why not ranked": lambda claim: plain("; ".join(claim.reasons)),
    }
    lines = [f"### {plain(group.title)}\n", *_table(columns, found.rows), *_over_own_base(found, columns)]
    return "\n".join([*lines, "", *_notes(group, found, trials)]) + "\n"


def _over_own_base(found: Claims, columns: dict[str, Callable[[Claim], str]]) -> list[str]:
    """The table of the methods that have another base than the strongest plain method."""
    if not found.over_own_base:
        return []
    kept = ("method", "rate", "other settings", "seeds", "steps to target", "steps ratio")
    end = ("p", "p (Holm)", "why not ranked")
    own: dict[str, Callable[[Claim], str]] = {
        **{key: columns[key] for key in kept},
        "own base": lambda claim: plain(claim.baseline),
        "minus own base": _difference,
        **{key: columns[key] for key in end},
    }
    return ["\nOver its own base:\n", *_table(own, found.over_own_base)]


def _table(columns: dict[str, Callable[[Claim], str]], rows: Sequence[Claim]) -> list[str]:
    text = ("method", "other settings", "own base", "why not ranked")
    head = "|".join("---" if name in text else "---:" for name in columns)
    cells = ([cell(row) for cell in columns.values()] for row in rows)
    return [f"| {' | '.join(columns)} |", f"|{head}|", *(f"| {' | '.join(row)} |" for row in cells)]


def _float(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _difference(claim: Claim) -> str:
    """The mean difference and its standard error: "-0.0383 ± 0.0047"."""
    if (found := claim.difference) is None:
        return ""
    return f"{found.mean:+.4f}" + ("" if found.error is None else f" ± {found.error:.4f}")


def _steps(claim: Claim) -> str:
    """Steps to the target, and how many seeds reached it where not all did: "251 (3 of 4)"."""
    if (reached := claim.reached) is None or not reached.of:
        return ""
    share = "" if reached.count == reached.of else f"({reached.count} of {reached.of})"
    return " ".join(filter(None, (_float(reached.steps, 0), share)))


def _at_budget(setting: Setting, budget: int) -> float | None:
    """The mean loss of the evaluations at the budget's last step; None where a run has none there."""
    curves = [{point["step"]: point["eval_loss"] for point in run.curve} for run in setting.runs]
    losses = [loss for curve in curves if (loss := curve.get(budget)) is not None]
    return mean(losses) if len(losses) == len(setting.runs) else None


def _notes(group: Group, found: Claims, trials: Sequence[RunRecord]) -> list[str]:
    """What the numbers are, and what in these runs is not as the protocol wants it."""
    devices = sorted({run.device for setting in group.settings for run in setting.runs} - {""})
    wide, narrow = CHOOSING
    notes = [
        f"Means over seeds. Trials: {wide} + {narrow}. ± is the standard error of the mean difference over the seeds "
        "of both, p the one-sided paired t-test that it is below zero."
    ]
    if found.baseline:
        notes[0] += (
            f" Target: the final loss of {plain(found.baseline)} (in the second table: of the own base) at the same "
            f"seed; it is the best of {', '.join(PLAIN)} by mean final loss, which are not tested against it. "
            f"{found.comparisons} comparison{'s' * (found.comparisons != 1)} in all, which Holm's p is adjusted for."
        )
    else:
        notes.append(f"No comparison: none of {', '.join(PLAIN)} is whole, with two seeds or more. Nothing is ranked.")
    where = f" on {plain(', '.join(devices))}" if devices else ""
    notes.append(
        f"Seconds are what these runs took{where}, where others may have shared the cores: what a step costs beside "
        "another is for `hf-soo bench` to say."
    )
    notes += map(plain, departures(group, found, trials))
    return [f"- {note}" for note in notes]


def departures(group: Group, found: Claims, trials: Sequence[RunRecord]) -> Iterable[str]:
    """Where the runs depart from the protocol without being beyond comparison."""
    choosing = [run for run in trials if run.search["study"] == group.study and run.search["stage"] in CHOOSING]
    seeds = {run.seed for setting in group.settings for run in setting.runs}
    if len(seeds) < SEEDS:
        yield f"Few seeds: {len(seeds)}; a claim needs {SEEDS} at least."
    if old := sorted(seeds & {run.seed for run in choosing}):
        yield f"Not new: settings were chosen with seed {', '.join(map(str, old))} too."
    sets = {run.config.get("data", {}).get(HELD_OUT.rpartition(".")[2]) for run in choosing}
    if group.held_out in sets:
        yield f"Settings were chosen on the held-out set that the claims are made on ({group.held_out or 'not named'})."
    chosen = [by_method(each) for each in groups(trials, CHOOSING) if each.study == group.study]
    if at_edge := sorted({method for each in chosen for method in each if EDGE in edges(each[method])}):
        yield f"Not tuned to the end, the best rate is {EDGE} of what was tried: {', '.join(at_edge)}."
    for setting in group.settings:
        if len(kinds := sorted({str(run.arithmetic) for run in setting.runs})) > 1:
            yield f"Seeds of {setting} differ in arithmetic: {', '.join(kinds)}."
    code = found.baseline.code if found.baseline else None
    if code and (other := sorted({run.search["space"] for run in choosing if run.code != code})):
        yield f"Settings chosen under other code than {code}: {', '.join(other)}."


def _sensitivity(group: Group) -> str:
    """The table of how each method's loss depends on its rate, out of the runs that settings were chosen by."""
    head = "method | loss by rate | best rate | loss | other settings | runs | diverged | stopped | the best is"
    lines = [f"| {head} |", "|---|---|---:|---:|---|---:|---:|---:|---|"]
    rows = [(best_of(settings), method, settings) for method, settings in by_method(group).items()]
    for best, method, settings in sorted(rows, key=lambda row: loss_or_last(row[0])):
        runs = [run for setting in settings for run in setting.runs]
        counts = [str(sum(run.status == status for run in runs)) for status in ("diverged", "stopped")]
        chosen = [number(best.rate), _float(best.loss, 3), plain(best.others)] if best else ["", "", ""]
        cells = [plain(method), _by_rate(settings), *chosen, _share(runs), *counts, edges(settings)]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "- Means over seeds; of several settings at one rate the best. Diverged and stopped runs are counted in runs."
    )
    return "\n".join([f"### {plain(group.title)}: sensitivity to the rate\n", *lines, "", note]) + "\n"


def _share(runs: Sequence[RunRecord]) -> str:
    """How many runs there are, and of how many where some are still to come: "4 of 6"."""
    planned = {run.search["stage"]: int(run.search["trials"]) for run in runs}
    missing = len(runs) < (total := sum(planned.values()))
    return f"{len(runs)} of {total}" if missing else str(len(runs))


def _by_rate(settings: Sequence[Setting]) -> str:
    """The best loss at each rate, or how its runs ended: "0.02: 1.846, 0.04: **1.806**, 0.08: diverged"."""
    best, cells = best_of(settings), []
    for rate in sorted({setting.rate for setting in settings}):
        here = [setting for setting in settings if setting.rate == rate]
        if found := best_of(here):
            loss = f"**{found.loss:.3f}**" if best is not None and rate == best.rate else f"{found.loss:.3f}"
            outcome = loss + (f" (best of {len(here)})" if len(here) > 1 else "")
        else:
            outcome = ", ".join(dict.fromkeys(_end(run) for setting in here for run in setting.runs))
        cells.append(f"{number(rate)}: {outcome}")
    return ", ".join(cells)


def _end(run: RunRecord) -> str:
    step = run.search.get("stopped_at")
    return run.status if step is None else f"stopped at {step}"

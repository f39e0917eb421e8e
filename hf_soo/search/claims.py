"""What a group of confirmed runs says: each method against the strongest plain one and against its own base.

A comparison is paired over seeds, and it is made only where it is fair: equal tuning, equal code, the same seeds from
the same weights, more than one of them, all of them done. Where it is not, it says why, and has no p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from hf_soo.runs.record import RunRecord, reach
from hf_soo.runs.report import final_loss
from hf_soo.search.groups import Group, Setting, Trials, done_confirming, main_code, tuning
from hf_soo.search.statistics import Paired, holm, paired

PLAIN = ("adamw", "lamb", "muon")  # the methods that the others have to beat


@dataclass(frozen=True, slots=True)
class Reached:
    """Steps and seconds to the baseline's final loss of the same seed: means over those that reached it."""

    count: int
    of: int
    steps: float | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Claim:
    """One setting beside a baseline (None: there is none); ``reasons`` say why it is not ranked, and has no p."""

    setting: Setting
    baseline: Setting | None
    reasons: tuple[str, ...]
    difference: Paired | None = None
    reached: Reached | None = None
    ratio: float | None = None  # of the mean steps to the target; None where a seed did not reach it
    adjusted: float | None = None  # p by Holm over all comparisons of the group; None: none was made

    @property
    def p(self) -> float | None:
        """Of the comparison, where one was made."""
        return None if self.difference is None or self.adjusted is None else self.difference.p


@dataclass(frozen=True, slots=True)
class Claims:
    """All that is said of a group: the rows of its two tables, best first, those that are not ranked last."""

    baseline: Setting | None
    rows: list[Claim]
    over_own_base: list[Claim]

    @property
    def comparisons(self) -> int:
        """How many p values were looked at."""
        return sum(claim.p is not None for claim in (*self.rows, *self.over_own_base))


def claims(group: Group, trials: Sequence[RunRecord], plain: Sequence[str] = PLAIN) -> Claims:
    """Every setting of a group of confirmed runs, best first, against the strongest plain one and its own base.

    Args:
        group: of the stage that claims are made on.
        trials: those of the folder, for the tuning that went before.
        plain: methods of which the best mean is the baseline.
    """
    tuned = tuning(trials, group.study)
    own = []
    for setting in group.settings:
        runs = done_confirming(trials, group.study, setting.method, setting.code)
        own.append((setting, tuple(_own_reasons(setting, runs, tuned[setting.method]))))
    code = main_code([setting for setting in group.settings if setting.method in plain] or group.settings)
    sound = [setting for setting, reasons in own if not reasons and setting.code == code]
    baseline = _best([setting for setting in sound if setting.method in plain])
    rows, over_own_base = [], []
    for setting, reasons in own:
        rows.append(_claim(setting, baseline, reasons, tuned))
        their = _best([each for each in sound if each.method == setting.runs[0].base])
        if their is not None and their is not baseline and setting.method not in plain:
            over_own_base.append(_claim(setting, their, reasons, tuned))
    # the baseline is the best of the plain methods: to test the others of them against it would say nothing
    tested = [row for row in (*rows, *over_own_base) if row.setting.method not in plain and not row.reasons]
    known = {id(row): row.difference.p for row in tested if row.difference and row.difference.p is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    tables = [[replace(row, adjusted=adjusted.get(id(row))) for row in each] for each in (rows, over_own_base)]
    return Claims(baseline, *(sorted(each, key=_order) for each in tables))


def _best(settings: Sequence[Setting]) -> Setting | None:
    return min(settings, key=lambda setting: setting.loss or 0.0, default=None)


def _order(claim: Claim) -> tuple[bool, float]:
    loss = claim.setting.loss
    return bool(claim.reasons), math.inf if loss is None else loss


def _claim(
    setting: Setting, baseline: Setting | None, reasons: Sequence[str], tuned: dict[str, dict[str, Trials]]
) -> Claim:
    """Compare two settings over the seeds that both completed."""
    if baseline is None:
        return Claim(setting, None, (*reasons, "no baseline"))
    others = [] if setting is baseline else _relative_reasons(setting, baseline, tuned)
    ours, theirs = setting.losses, baseline.losses
    seeds = sorted(ours.keys() & theirs.keys())
    difference = paired([ours[seed] - theirs[seed] for seed in seeds]) if seeds and setting is not baseline else None
    reached, target = (
        _reached([(run, theirs[run.seed]) for run in each.runs if run.seed in theirs]) for each in (setting, baseline)
    )
    ratio = None
    if reached.steps and target.steps and reached.count == target.count == reached.of:
        ratio = reached.steps / target.steps
    return Claim(setting, baseline, (*reasons, *others), difference, reached, ratio)


def _reached(runs: Sequence[tuple[RunRecord, float]]) -> Reached:
    """When each run came down to its target; one that did not end well reaches nothing."""
    found = [reach(run.curve, target) for run, target in runs if run.status == "completed"]
    steps, seconds = ([value for each in found if (value := each[key]) is not None] for key in ("steps", "seconds"))
    return Reached(len(steps), len(runs), *(mean(each) if each else None for each in (steps, seconds)))


def _own_reasons(setting: Setting, confirmed: Trials, tuned: dict[str, Trials]) -> list[str]:
    """Why a setting can be compared with nothing."""
    reasons = []
    seeds = [run.seed for run in setting.runs]
    if len(set(seeds)) < 2:
        reasons.append("one seed")
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        reasons.append(f"seed {_listed(twice)} ran more than once")
    for status in sorted({run.status for run in setting.runs} - {"completed"}):
        count = sum(run.status == status for run in setting.runs)
        reasons.append(f"{count} of {len(setting.runs)} {status}")
    if any(run.status == "completed" and math.isinf(final_loss(run)) for run in setting.runs):
        reasons.append("a completed run has no evaluation")
    if not setting.code:
        reasons.append("code not recorded")
    if confirmed.done < confirmed.planned:
        reasons.append(f"{confirmed.done} of {confirmed.planned} runs done")
    for stage, trial in tuned.items():
        if trial.done < trial.planned:
            reasons.append(f"{trial.done} of {trial.planned} {stage} trials done")
    return reasons


def _relative_reasons(setting: Setting, baseline: Setting, tuned: dict[str, dict[str, Trials]]) -> list[str]:
    """Why a setting cannot be compared with the baseline."""
    reasons = []
    ours, theirs = (said(tuned[each.method]) for each in (setting, baseline))
    if ours != theirs:
        reasons.append(f"tuned with {ours} trials, {baseline.method} with {theirs}")
    if setting.code != baseline.code and setting.code:
        reasons.append(f"code {setting.code}, {baseline.method}'s {baseline.code}")
    weights = {run.seed: run.config.get("initial_weights") for run in baseline.runs}
    seeds = {run.seed for run in setting.runs}
    if alone := sorted(seeds ^ weights.keys()):
        reasons.append(f"no pair for seed {_listed(alone)}")
    known = [run for run in setting.runs if run.seed in weights]
    if any(run.config.get("initial_weights") is None or weights[run.seed] is None for run in known):
        reasons.append("initial weights not recorded")
    elif other := sorted({run.seed for run in known if run.config["initial_weights"] != weights[run.seed]}):
        reasons.append(f"other initial weights at seed {_listed(other)}")
    return reasons


def said(stages: dict[str, Trials]) -> str:
    """The trials of the stages that settings were chosen in: "6 + 4"."""
    return " + ".join(str(trial.done) for trial in stages.values())


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

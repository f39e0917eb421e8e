"""What a group of confirmed runs says: each method against the strongest plain one and against its own base.

A comparison is paired over seeds, and it is made only where it is fair: equal tuning, equal code, the same seeds from
the same weights, more than one of them, all of them done. Where it is not, it says why, and has no p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from hf_soo.runs.record import RunRecord, reach
from hf_soo.runs.report import final_loss
from hf_soo.search.groups import Group, Setting, Trials, done_confirming, main_code, trials_of, tuning
from hf_soo.search.statistics import Paired, holm, paired

PLAIN = ("adamw", "lamb", "muon")  # the methods that the others have to beat
LEVEL = 0.01  # that p must be below
SEEDS = 4  # that a claim needs


@dataclass(frozen=True, slots=True)
class Reached:
    """Steps and seconds to the baseline's final loss of the same seed: means over those that reached it."""

    count: int
    of: int
    steps: float | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps to the higher of two final losses over the baseline's to it: mean over seeds, standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{100 * (self.mean - 1):+.1f} % ± {100 * self.error:.1f}"


@dataclass(frozen=True, slots=True)
class Claim:
    """One setting beside a baseline (None: there is none); ``reasons`` say why it is not ranked, and has no p."""

    setting: Setting
    baseline: Setting | None
    reasons: tuple[str, ...]
    difference: Paired | None = None
    reached: Reached | None = None
    ratio: float | None = None  # of the mean steps to the target; None where a seed did not reach it
    steps: Steps | None = None  # None: of fewer than two pairs
    adjusted: float | None = None  # p by Holm over all comparisons of the group; None: none was made
    higher: float | None = None  # the same of the other side, that the difference is above zero

    @property
    def verdict(self) -> str:
        """What may be said of it: "baseline", "fewer", "more", "not shown", "not tested", "not ranked"."""
        if self.setting is self.baseline:
            return "baseline"
        if self.reasons:
            return "not ranked"
        if self.adjusted is None or self.higher is None:
            return "not tested"
        if self.difference is None or self.difference.count < SEEDS:
            return "not shown"
        return "fewer" if self.adjusted < LEVEL else "more" if self.higher < LEVEL else "not shown"

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
    beside: dict[str, list[Claim]]  # every setting against each plain method's best, and each base's, by its name

    @property
    def comparisons(self) -> int:
        """How many p values were looked at."""
        return sum(claim.p is not None for claims in self.beside.values() for claim in claims)


def claims(group: Group, trials: Sequence[RunRecord], plain: Sequence[str] = PLAIN) -> Claims:
    """Every setting of a group of confirmed runs; the folder's other trials are for the tuning that went before."""
    trials = trials_of(group, trials)
    tuned = tuning(trials, group.study)
    own = []
    for setting in group.settings:
        runs = done_confirming(trials, group.study, setting.method, setting.code)
        own.append((setting, tuple(_own_reasons(setting, runs, tuned[setting.method]))))
    code = main_code([setting for setting in group.settings if setting.method in plain] or group.settings)
    sound = [setting for setting, reasons in own if not reasons and setting.code == code]
    bases = {setting.method: setting.runs[0].base for setting, _ in own}
    beside: dict[str, list[Claim]] = {}
    for name in sorted({*plain, *bases.values()}):
        if (other := _best([setting for setting in sound if setting.method == name])) is not None:
            beside[name] = [_claim(setting, other, reasons, tuned) for setting, reasons in own]
    beside = _adjusted(beside, plain)
    baseline = _best([setting for setting in sound if setting.method in plain])
    rows = beside[baseline.method] if baseline else [_claim(setting, None, reasons, tuned) for setting, reasons in own]
    over_own_base = [
        claim
        for name, claims in beside.items()
        for claim in claims
        if name == bases[claim.setting.method] and claim.baseline is not baseline and claim.setting.method != name
    ]
    return Claims(baseline, rows, sorted(over_own_base, key=_order), beside)


def _adjusted(beside: dict[str, list[Claim]], plain: Sequence[str]) -> dict[str, list[Claim]]:
    """The claims with their p of either side by Holm, best first."""
    # the baseline is the best of the plain methods: to test the others of them against it would say nothing
    tested = [each for name, own in beside.items() for each in own if each.setting.method not in (name, *plain)]
    known = [(id(each), each.difference.p) for each in tested if each.difference and not each.reasons]
    p = {key: value for key, value in known if value is not None}
    lower, higher = (dict(zip(p, holm(side), strict=True)) for side in (list(p.values()), [1 - x for x in p.values()]))
    return {
        name: [
            replace(each, adjusted=lower.get(id(each)), higher=higher.get(id(each))) for each in sorted(own, key=_order)
        ]
        for name, own in beside.items()
    }


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
    return Claim(setting, baseline, (*reasons, *others), difference, reached, ratio, _steps(setting, baseline))


def _steps(setting: Setting, baseline: Setting) -> Steps | None:
    """How many times the baseline's steps a setting takes to a loss that both come down to, seed by seed."""
    ours, theirs = ({run.seed: run for run in each.runs if run.seed in each.losses} for each in (setting, baseline))
    ratios = []
    for seed in sorted(ours.keys() & theirs.keys()):
        target = max(setting.losses[seed], baseline.losses[seed])
        took, base = (reach(run.curve, target)["steps"] for run in (ours[seed], theirs[seed]))
        if took and base:
            ratios.append(took / base)
    return Steps(mean(ratios), stdev(ratios) / math.sqrt(len(ratios))) if len(ratios) > 1 else None


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
    enough = len(seeds & weights.keys()) >= SEEDS  # either may have had more, for another comparison
    if not enough and (alone := sorted(seeds ^ weights.keys())):
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

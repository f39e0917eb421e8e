"""The trials of a folder, put together: by what must be equal, then by method and settings."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from hf_soo.runs.record import RunRecord, differing
from hf_soo.runs.report import final_loss
from hf_soo.runs.stored import flat

CHOOSING = ("wide", "narrow")  # the stages that settings are chosen in
CLAIM = "confirm"  # the stage that claims are made on
HELD_OUT = "data.held_out"  # the setting that names the held-out set
EDGE = "at the edge"  # how a best rate lies that may not be the best one
_PER_SEED = ("seed", "initial_weights")
_PER_GROUP = (HELD_OUT, "max_steps")  # what a group's heading says anyway
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")  # their product is the batch


@dataclass(frozen=True, slots=True)
class Setting:
    """One method with one choice of its parameters, under one state of the code: its runs, by seed."""

    method: str  # the search space's name
    params: dict[str, Any]
    code: str
    runs: list[RunRecord]

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.params.get("learning_rate", self.runs[0].config.get("learning_rate", math.nan)))

    @property
    def losses(self) -> dict[int, float]:
        """The final loss of each seed whose run was completed."""
        return {run.seed: loss for run in self.runs if math.isfinite(loss := final_loss(run))}

    @property
    def loss(self) -> float | None:
        """The mean of those; None where there is none."""
        return mean(self.losses.values()) if self.losses else None

    @property
    def is_whole(self) -> bool:
        """Whether every run of it was completed."""
        return all(math.isfinite(final_loss(run)) for run in self.runs)

    @property
    def others(self) -> str:
        """What is chosen besides the learning rate: "rest_lr 0.005"."""
        rest = {key.rpartition(".")[2]: value for key, value in self.params.items() if key != "learning_rate"}
        return ", ".join(f"{key} {number(value)}" for key, value in rest.items())

    def __str__(self) -> str:
        """The method and its rate: "muon 0.04"."""
        return f"{self.method} {number(self.rate)}"


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one study that can be compared: of equal workload (but for the seed), held-out set and budget."""

    study: str
    held_out: str | None
    budget: int  # steps
    differs: str  # from the study's first group, in other settings: "per_device_train_batch_size=32"
    settings: list[Setting]
    batch: int | None  # examples in a step; None: not recorded
    family: str  # equal for groups that differ in the batch, and in the steps that follow from it, alone

    @property
    def short(self) -> str:
        """What a column's head says of it."""
        return ", ".join(filter(None, (f"{self.study}: {self.budget} steps", self.differs)))

    @property
    def title(self) -> str:
        """What a heading says of it."""
        held_out = f"held-out set {self.held_out!r}" if self.held_out else "held-out set not named"
        steps, *differs = self.short.split(", ", 1)
        return ", ".join((steps, held_out, *differs))


@dataclass(frozen=True, slots=True)
class Trials:
    """How many trials a method had in a stage: those that are over, and those planned."""

    done: int
    planned: int


def number(value: Any) -> str:
    """A setting as text; a float that was drawn from a range with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def is_over(run: RunRecord) -> bool:
    """Whether a trial is done with: completed, diverged, out of memory or stopped by the rule, but not interrupted."""
    return run.status in {"completed", "diverged", "oom"} or run.search.get("stopped_at") is not None


def groups(trials: Sequence[RunRecord], stages: Sequence[str]) -> list[Group]:
    """What can be compared among the trials of some stages, by study."""
    searched: dict[str, set[str]] = {}
    for run in trials:
        searched.setdefault(run.search["study"], set()).update(run.search["params"])
    found: dict[str, dict[str, list[RunRecord]]] = {}
    for run in sorted(trials, key=lambda run: (run.seed, run.search["number"])):
        if run.search["stage"] in stages:
            key = _text(_workload(run, searched[run.search["study"]]))
            found.setdefault(run.search["study"], {}).setdefault(key, []).append(run)
    return [
        _group(study, [_workload(runs[0], searched[study]) for runs in (next(iter(alike.values())), each)], each)
        for study, alike in sorted(found.items())
        for each in alike.values()
    ]


def _group(study: str, workloads: Sequence[Mapping[str, Any]], runs: Sequence[RunRecord]) -> Group:
    """The group of some runs; ``workloads`` are those of the study's first group and its own."""
    own = workloads[1]
    keys = differing(*workloads, free=_PER_GROUP)
    settings: dict[str, Setting] = {}
    for run in runs:
        key = _text([run.search["space"], run.search["params"], run.code])
        empty = Setting(run.search["space"], run.search["params"], run.code, [])
        settings.setdefault(key, empty).runs.append(run)
    budget = own.get("max_steps", 0)
    budget = budget if budget > 0 else max(run.steps for run in runs)
    differs = ", ".join(f"{key}={own.get(key)}" for key in keys)
    family = {key: value for key, value in own.items() if key not in (*_PER_GROUP, *_BATCH, "global_batch_size")}
    return Group(study, own.get(HELD_OUT), budget, differs, [*settings.values()], batch_of(runs[0]), _text(family))


def _workload(run: RunRecord, searched: set[str]) -> dict[str, Any]:
    """What must be equal, by dotted names: all but the seed, the weights that it drew and what is searched over."""
    found = dict(flat(run.workload))
    return {key: value for key, value in found.items() if key not in searched and key not in _PER_SEED}


def _text(settings: Any) -> str:
    """Equal for equal ones."""
    return json.dumps(settings, sort_keys=True, default=str)


def batch_of(run: RunRecord) -> int | None:
    """Examples in a step of a run; None: not recorded."""
    first, *more = (run.config.get(key) for key in _BATCH)
    return math.prod((first, *(size for size in more if isinstance(size, int)))) if isinstance(first, int) else None


def trials_of(group: Group, trials: Sequence[RunRecord]) -> list[RunRecord]:
    """The trials of a group's study at its batch: what one batch was tuned with counts for no other."""
    return [run for run in trials if run.search["study"] == group.study and batch_of(run) == group.batch]


def tuning(trials: Sequence[RunRecord], study: str) -> dict[str, dict[str, Trials]]:
    """What each method of a study was tuned with: its trials by stage."""
    runs = [run for run in trials if run.search["study"] == study]
    return {
        method: {stage: _trials(of_method, stage) for stage in CHOOSING}
        for method in dict.fromkeys(run.search["space"] for run in runs)
        for of_method in [[run for run in runs if run.search["space"] == method]]
    }


def done_confirming(trials: Sequence[RunRecord], study: str, method: str, code: str) -> Trials:
    """What a method's claims are made on: its trials of the last stage, under one state (a digest) of the code."""
    own = (study, method, code)
    return _trials([run for run in trials if (run.search["study"], run.search["space"], run.code) == own], CLAIM)


def _trials(runs: Sequence[RunRecord], stage: str) -> Trials:
    """A trial that was repeated under its own number and seed is one."""
    of_stage = [run for run in runs if run.search["stage"] == stage]
    done = {(run.search["number"], run.seed) for run in of_stage if is_over(run)}
    return Trials(len(done), max((int(run.search["trials"]) for run in of_stage), default=0))


def main_code(settings: Sequence[Setting]) -> str:
    """The code that most of the runs come from."""
    count = Counter(run.code for setting in settings for run in setting.runs)
    return count.most_common(1)[0][0]


def by_method(group: Group) -> dict[str, list[Setting]]:
    """The settings of each method."""
    methods: dict[str, list[Setting]] = {}
    for setting in group.settings:
        methods.setdefault(setting.method, []).append(setting)
    return methods


def loss_or_last(best: Setting | None) -> float:
    """What settings are sorted by: the mean loss, infinite where there is none."""
    return math.inf if best is None or best.loss is None else best.loss


def best_of(settings: Iterable[Setting]) -> Setting | None:
    """The setting of the lowest mean loss among those whose runs were all completed."""
    whole = [setting for setting in settings if setting.is_whole]
    return min(whole, key=loss_or_last, default=None)


def edges(settings: Sequence[Setting]) -> str:
    """Whether the best setting's rates lie inside of what was tried: "inside", "at the edge (upper): widen"."""
    best = best_of(settings)
    if best is None:
        return "none: no run was completed"
    found = []
    for key in dict.fromkeys(("learning_rate", *best.params)):
        name = key.rpartition(".")[2]
        rates = {id(each): each.rate if key == "learning_rate" else each.params.get(key) for each in settings}
        tried = [rate for rate in rates.values() if rate is not None]
        if not name.endswith(("learning_rate", "_lr")) or rates[id(best)] not in (min(tried), max(tried)):
            continue
        where = "lower" if rates[id(best)] == min(tried) else "upper"
        edge = f"{EDGE} ({where}): widen" if min(tried) < max(tried) else "the only one tried"
        found.append(edge if name == "learning_rate" else f"{name} {edge}")
    return "; ".join(found) or "inside"

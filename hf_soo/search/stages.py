"""A stage of a search: which trials it has, as numbers, parameters and seeds, and how each is run by itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_soo.runs import shipped
from hf_soo.runs.recipes import COMMANDS, read_recipe
from hf_soo.search.evidence import Evidence, Finished, best_settings, setting
from hf_soo.search.spaces import Params, Space

_CLAIM = "claim"  # the held-out set on which claims are made
_COST = re.compile(r"Cost: (?:about|some|under) (\d[\d,]*) (seconds|minutes)")  # in a recipe's first lines


@dataclass(frozen=True)
class Trial:
    """One run of a stage."""

    number: int
    params: Params
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """What makes two trials the same."""
        return setting(self.params), self.seed


@dataclass(frozen=True)
class Stage:
    """One stage of the search of one space on one workload."""

    workload: Path
    space: Space
    name: str = "wide"
    settings: int = 6
    seeds: tuple[int, ...] = (0,)
    whole: bool = False

    @property
    def study(self) -> str:
        """The workload's name."""
        return self.workload.stem

    @property
    def title(self) -> str:
        """For lines and for Optuna: "byte_gpt/muon/wide"."""
        return f"{self.study}/{self.space.name}/{self.name}"

    def run_name(self, trial: Trial) -> str:
        """The name of a trial's JSON."""
        return f"{self.space.name}-{self.name}-{trial.number:03d}-seed{trial.seed}"

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The workload's settings.

        Raises:
            ValueError: it cannot be read.
        """
        return read_recipe([self.workload])

    def seconds(self, evidence: Evidence) -> float | None:
        """Seconds a whole run takes, by what has ended, else by the recipe's first lines; None: neither says.

        Args:
            evidence: of the workload.
        """
        if (measured := evidence.seconds(self.space.name)) is not None:
            return measured
        found = _COST.search(self.workload.read_text(encoding="utf-8"))
        return float(found[1].replace(",", "")) * (60 if found[2] == "minutes" else 1) if found else None

    @property
    def first_rung(self) -> int | None:
        """The step at which the stopping rule first looks: a quarter of the run; None: never."""
        steps = int(self.recipe.get("max_steps") or 0)
        return None if self.name == "confirm" or steps < 4 else steps // 4

    def flags(self, trial: Trial) -> list[str]:
        """The flags of a trial, which with the command of its domain make the same run."""
        more: dict[str, Any] = {"seed": trial.seed}
        if self.name == "confirm" and "held_out" in self.recipe:
            more["held_out"] = _CLAIM
        return ["--config", str(self.workload), *self.space.as_flags(trial.params, **more)]

    def command(self, trial: Trial) -> str:
        """The command line of a trial, with the recipe's path as from the folder that ``configs/`` lies in."""
        flags = self.flags(trial)
        root, recipe = shipped.folder().parent, self.workload.resolve()
        flags[1] = recipe.relative_to(root).as_posix() if recipe.is_relative_to(root) else recipe.name
        task = str((self.recipe | self.space.fixed).get("task") or "bert")
        return shlex.join(["hf-soo", COMMANDS.get(task, task), *flags])

    def plan(self, evidence: Evidence, begun: Sequence[Trial] = ()) -> list[Trial]:
        """All trials of the stage, those that have ended too, by number.

        Args:
            evidence: what has ended.
            begun: those that were planned before, of this stage.

        Raises:
            ValueError: the stage follows another one, of which nothing has ended.
        """
        ended = [Trial(each.number, each.params, each.seed) for each in evidence.trials(self.space.name, self.name)]
        known = {trial.key: trial for trial in (*begun, *ended)}
        settings = {
            setting(trial.params): trial.params for trial in sorted(known.values(), key=lambda each: each.number)
        }
        if self.name == "confirm":
            wanted = self._best(evidence, "wide", "narrow")[: self.settings]
        else:
            new = [params for params in self._points(evidence) if setting(params) not in settings]
            wanted = [*settings.values(), *new[: max(0, self.settings - len(settings))]]
        free = _free_numbers(trial.number for trial in known.values())
        for params in wanted:
            for seed in self.seeds:
                if (key := (setting(params), seed)) not in known:
                    known[key] = Trial(next(free), params, seed)
        return sorted(known.values(), key=lambda each: each.number)

    def _points(self, evidence: Evidence) -> list[Params]:
        if self.name == "wide":
            return self.space.wide(self.settings)
        return self.space.narrow(self.settings, self._best(evidence, "wide")[0])

    def _best(self, evidence: Evidence, *stages: str) -> list[Params]:
        best = [params for _, params in best_settings(evidence.trials(self.space.name, *stages))]
        if not best:
            raise ValueError(
                f"{self.title}: no trial of {' or '.join(stages)} came to its end in {evidence.folder}; run "
                "the wide stage first."
            )
        return best

    def open_trials(self, evidence: Evidence) -> int:
        """How many trials have not ended; as many as there are settings and seeds where that is not known yet."""
        ended = {(each.setting, each.seed) for each in evidence.trials(self.space.name, self.name)}
        try:
            return sum(trial.key not in ended for trial in self.plan(evidence))
        except ValueError:
            return self.settings * len(self.seeds)

    def best_line(self, ended: Iterable[Finished]) -> str:
        """The best so far, with a word when it lies at an end of the range."""
        best = best_settings(ended)
        if not best:
            return "none came to its end"
        loss, params = best[0]
        said = ", ".join(f"{key}={value}" for key, value in params.items())
        ends = self.space.at_an_end(params)
        return f"best {loss:.4f} at {said}" + (f" (at an end of {', '.join(ends)}: widen it)" if ends else "")


def _free_numbers(taken: Iterable[int]) -> Iterator[int]:
    """The numbers that are not taken, from 0 on."""
    there = set(taken)
    number = 0
    while True:
        if number not in there:
            yield number
        number += 1

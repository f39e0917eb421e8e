"""Search spaces: what of a method is fixed, what is searched, and which settings a stage tries.

A space is a YAML file, named after the method::

    optim: mkor                                   # any flags of the run: what is fixed, and where a grid starts from
    base_optim: muon
    base_optim_args: {rest_lr: 0.005}
    space:
      learning_rate: {log_uniform: [0.005, 0.16], grid: [0.02, 0.04, 0.01, 0.08, 0.005, 0.16]}
      base_optim_args.rest_lr: {log_uniform: [0.001, 0.02]}
      base_optim_args.momentum: {uniform: [0.85, 0.98]}
      optim_args.sides: {choices: [both, input]}

The wide stage tries the grid first, with everything else as it is fixed, then points of a Sobol sequence over the whole
space. The narrow stage tries points of one a third as wide (in logarithms, where the range is one of them) around the
best of the wide stage, which may lie beyond a logarithmic range that had its best at an end. So the settings of a
stage depend on the space, on their number and, when narrow, on the best; never on the order in which trials end.
"""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna import create_study, logging
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import QMCSampler

from hf_soo.engine.checks import fits, unknown_key
from hf_soo.runs.recipes import read_recipe

Params = dict[str, Any]
_KINDS = ("log_uniform", "uniform", "choices")
_SEED = 0  # of the Sobol sequence: the same for all methods
_NARROW = 1 / 3  # of the width of the wide stage

logging.set_verbosity(logging.ERROR)


@dataclass(frozen=True)
class Range:
    """What a flag may be: from ``values[0]`` to ``values[1]``, or, of the kind "choices", one of ``values``."""

    kind: str
    values: tuple[Any, ...]
    grid: tuple[Any, ...] = ()

    @classmethod
    def read(cls, given: Any, where: str) -> Range:
        """A range as it stands in a file.

        Args:
            given: ``{log_uniform: [low, high]}``, ``{uniform: [low, high]}`` or ``{choices: [...]}``, with or without
                ``grid: [...]``.
            where: the file and the flag, for what is said of an error.

        Raises:
            ValueError: another form, or a range that is empty.
        """
        form = f"{where}: {given!r} is no range; give {{log_uniform: [low, high]}}, uniform or choices."
        if not isinstance(given, dict):
            raise ValueError(form)
        for key in given:
            if key not in (*_KINDS, "grid"):
                raise ValueError(f"{where}: {unknown_key('key', str(key), (*_KINDS, 'grid'))}")
        kinds = [key for key in given if key in _KINDS]
        if len(kinds) != 1 or not all(isinstance(values, list) and values for values in given.values()):
            raise ValueError(form)
        found = cls(kinds[0], tuple(given[kinds[0]]), tuple(given.get("grid", ())))
        found._check(where)
        return found

    def _check(self, where: str) -> None:
        if self.kind == "choices":
            if len({json.dumps(value) for value in self.values}) < len(self.values):
                raise ValueError(f"{where}: choices={list(self.values)} names one twice; leave it out.")
            return
        for value in (*self.values, *self.grid):
            if not fits(value, float):
                raise ValueError(f"{where}: {value!r} is no number; YAML wants 1.0e-4, not 1e-4.")
        if len(self.values) != 2 or not self.values[0] < self.values[1]:
            raise ValueError(f"{where}: {self.kind}={list(self.values)} must be [low, high] with low below high.")
        if self.kind == "log_uniform" and self.values[0] <= 0:
            raise ValueError(f"{where}: log_uniform={list(self.values)} must be above 0; give a uniform range.")

    @property
    def distribution(self) -> BaseDistribution:
        """The range as Optuna's."""
        if self.kind == "choices":
            return CategoricalDistribution([coded(value) for value in self.values])
        return FloatDistribution(float(self.values[0]), float(self.values[1]), log=self.kind == "log_uniform")

    def decoded(self, value: Any) -> Any:
        """A value of Optuna's: one of the choices, or a number of four digits.

        Args:
            value: of `distribution`.
        """
        if self.kind == "choices":
            return next(choice for choice in self.values if coded(choice) == value)
        return float(f"{value:.4g}")

    @property
    def text(self) -> str:
        """The range in words."""
        grid = f", grid {list(self.grid)}" if self.grid else ""
        return f"{self.kind} {list(self.values)}{grid}"

    def around(self, best: Any) -> Range:
        """The narrowed range around a value; choices are left, as are ranges of flags that the best left as they were.

        Args:
            best: a value; None: unknown.
        """
        if self.kind == "choices" or best is None:
            return self
        low, high = self.values
        if self.kind == "log_uniform":  # may go beyond an end at which the best lay
            factor = (high / low) ** (_NARROW / 2)
            return replace(self, values=(best / factor, best * factor))
        reach = (high - low) * _NARROW / 2
        return replace(self, values=(max(low, best - reach), min(high, best + reach)))


@dataclass(frozen=True)
class Space:
    """A method's fixed settings and its ranges, by flag: "learning_rate", "base_optim_args.rest_lr"."""

    name: str
    file: Path
    fixed: dict[str, Any]
    ranges: dict[str, Range] = field(default_factory=dict)
    _drawn: dict[str, list[Params]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, file: Path) -> Space:
        """A space's file.

        Args:
            file: YAML.

        Raises:
            ValueError: it cannot be read, has no ``space``, or ranges that are none.
        """
        try:
            settings = read_recipe([file])
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--config ")) from error
        given = settings.pop("space", None)
        if not isinstance(given, dict) or not given:
            raise ValueError(f"{file}: no 'space'; give 'space: {{learning_rate: {{log_uniform: [low, high]}}}}'.")
        ranges = {str(key): Range.read(value, f"{file}: {key}") for key, value in given.items()}
        for key in ranges:
            flag, dot, _ = key.partition(".")
            if dot and not isinstance(settings.get(flag, {}), dict):
                raise ValueError(f"{file}: {flag}={settings[flag]!r} and {key} is searched; write {flag} as a mapping.")
        return cls(file.stem, file, settings, ranges)

    def settings(self, params: Params) -> dict[str, Any]:
        """Every flag of a trial, with its mappings filled.

        Args:
            params: value of each flag that is searched; what is missing stays as it is fixed.
        """
        found = {key: dict(value) if isinstance(value, dict) else value for key, value in self.fixed.items()}
        for key, value in params.items():
            flag, dot, part = key.partition(".")
            if dot:
                found.setdefault(flag, {})[part] = value
            else:
                found[flag] = value
        return found

    def as_flags(self, params: Params, **more: Any) -> list[str]:
        """A trial's settings as flags of a command line, mappings as JSON.

        Args:
            params: value of each flag that is searched.
            **more: further settings.
        """
        flags: list[str] = []
        for key, value in (self.settings(params) | more).items():
            if isinstance(value, list):
                flags += [f"--{key}", *map(str, value)]
            elif value is not None:
                flags += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return flags

    def wide(self, number: int) -> list[Params]:
        """The settings of the wide stage, the grid first.

        Args:
            number: of them; a larger one only adds to the list.

        Raises:
            ValueError: fewer than the grid has.
        """
        grids = {key: each.grid for key, each in self.ranges.items() if each.grid}
        points = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
        points = points if grids else []
        if number < len(points):
            raise ValueError(f"{self.file}: the grid has {len(points)} points; give --trials {len(points)} or more.")
        return points + self._sobol(self.ranges, number - len(points))

    def narrow(self, number: int, best: Params) -> list[Params]:
        """The settings of the narrow stage.

        Args:
            number: of them.
            best: the settings that were best in the wide stage.
        """
        start = {key: self._start(key) for key in self.ranges} | best
        return self._sobol({key: each.around(start[key]) for key, each in self.ranges.items()}, number)

    def _sobol(self, ranges: dict[str, Range], number: int) -> list[Params]:
        """The first points of a sequence, drawn once: a worker asks for them again and again."""
        key = f"{number} {ranges}"
        if key not in self._drawn:
            self._drawn[key] = _sobol(ranges, number)
        return self._drawn[key]

    def at_an_end(self, params: Params) -> list[str]:
        """The flags whose value is an end of what the grid or, without one, the range allows."""
        ends = {
            key: sorted(each.grid or each.values)
            for key, each in self.ranges.items()
            if each.kind != "choices" and len(each.grid) != 1
        }
        return [key for key, values in ends.items() if key in params and not values[0] < params[key] < values[-1]]

    def _start(self, key: str) -> Any:
        flag, dot, part = key.partition(".")
        return self.fixed.get(flag, {}).get(part) if dot else self.fixed.get(flag)


def _sobol(ranges: dict[str, Range], number: int) -> list[Params]:
    """The first points of a Sobol sequence over ranges, numbers rounded to four digits."""
    if number <= 0:
        return []
    distributions = {key: each.distribution for key, each in ranges.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = QMCSampler(scramble=True, seed=_SEED, warn_independent_sampling=False)
    study = create_study(sampler=sampler)
    points = []
    for _ in range(number + 1):
        trial = study.ask(distributions)
        points.append({key: each.decoded(trial.params[key]) for key, each in ranges.items()})
        study.tell(trial, 0.0)
    return points[1:]  # the sequence begins when its space is known, after a first trial


def coded(value: Any) -> Any:
    """A value as Optuna takes it: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value

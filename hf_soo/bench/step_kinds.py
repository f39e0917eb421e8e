"""Which kinds of steps a method takes, and how often: the period that a benchmark and a plan average over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hf_soo.engine.preconditioner import Preconditioner

_SETTLED = 1000  # optimizer steps after which no method is in its warm-up
_WINDOW = 10_000  # steps looked at; a period is at most half of it, or all of it where nothing repeats


class Kind(NamedTuple):
    """What a step does besides preconditioning: update the factors, compute new inverses."""

    updates: bool
    refreshes: bool


@dataclass(frozen=True, slots=True)
class StepKinds:
    """The kinds of a period of a method's steps in order, from step ``_SETTLED`` on."""

    kinds: tuple[Kind, ...]

    @property
    def distinct(self) -> list[Kind]:
        """The kinds that occur; refreshes and updates first, so that there is something to precondition with."""
        return sorted(set(self.kinds), key=lambda kind: (kind.refreshes, kind.updates), reverse=True)

    @property
    def counts(self) -> dict[str, int]:
        """Steps, updates and refreshes in a period."""
        updates, refreshes = (sum(kind[i] for kind in self.kinds) for i in (0, 1))
        return {"steps": len(self.kinds), "updates": updates, "refreshes": refreshes}

    def step(self, kind: Kind) -> int:
        """A step of a kind."""
        return _SETTLED + self.kinds.index(kind)

    def mean(self, of: Mapping[Kind, float], which: Callable[[Kind], bool] = lambda kind: True) -> float | None:
        """Average of a number of each kind over a period's steps of these kinds; None if there is none."""
        counts = Counter(kind for kind in self.kinds if which(kind))
        return sum(n * of[kind] for kind, n in counts.items()) / counts.total() if counts else None


def step_kinds_of(preconditioner: Preconditioner) -> StepKinds:
    """The smallest period of a method's steps; where they do not repeat (growing intervals), the whole window."""
    window = range(_SETTLED, _SETTLED + _WINDOW)
    kinds = tuple(Kind(preconditioner.updates_at(t), preconditioner.refreshes_at(t)) for t in window)
    codes = bytes(2 * kind.updates + kind.refreshes for kind in kinds)
    periods = (p for p in range(1, _WINDOW // 2 + 1) if codes[p:] == codes[:-p])
    return StepKinds(kinds[: next(periods, _WINDOW)])

"""Differences over seeds: the paired t-test, and Holm's adjustment where several are made at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True, slots=True)
class Paired:
    """The differences of two methods over seeds.

    ``mean`` is negative where the first has the lower loss; ``error`` is its standard error, ``p`` the one-sided
    probability of a mean as low as this if there were no difference. None: not known from so few, or from equal ones.
    """

    count: int
    mean: float
    error: float | None
    p: float | None


def paired(differences: Sequence[float]) -> Paired:
    """The paired t-test of the hypothesis that the mean difference is below zero.

    Args:
        differences: one a seed, a method's loss less the baseline's; at least one.

    Raises:
        ValueError: SciPy is not installed.
    """
    count, center = len(differences), mean(differences)
    if count < 2:
        return Paired(count, center, None, None)
    error = stdev(differences) / math.sqrt(count)
    if error == 0.0:  # one machine, one seed, one result: nothing varies, so nothing can be said of chance
        return Paired(count, center, error, None)
    try:
        from scipy.stats import t
    except ImportError as missing:
        raise ValueError("A comparison over seeds needs SciPy; pip install 'hf-soo[report]'.") from missing
    return Paired(count, center, error, float(t.cdf(center / error, count - 1)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of comparisons made at once, in the order given: below α they hold together at the level α."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted

"""What the benchmark averages over: the kinds of a method's steps, and the ratios of its rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from hf_soo.bench.rounds import _Round, ratios
from hf_soo.bench.step_kinds import Kind, StepKinds, step_kinds_of
from hf_soo.engine.preconditioner import Identity

PLAIN, UPDATE, REFRESH, BOTH = Kind(False, False), Kind(True, False), Kind(False, True), Kind(True, True)


class Schedule(Identity):
    """Updates and refreshes where it is told to."""

    def __init__(self, updates: Callable[[int], bool], refreshes: Callable[[int], bool]) -> None:
        self.updates, self.refreshes = updates, refreshes

    def updates_at(self, step: int) -> bool:
        return self.updates(step)

    def refreshes_at(self, step: int) -> bool:
        return self.refreshes(step)


def every(period: int, after: int = 0) -> Callable[[int], bool]:
    return lambda step: step % period == after


def never(step: int) -> bool:
    return False


@pytest.mark.parametrize(
    ("updates", "refreshes", "counts", "kinds"),
    [
        (never, never, (1, 0, 0), [PLAIN]),
        (every(1), never, (1, 1, 0), [UPDATE]),
        (every(10), never, (10, 1, 0), [UPDATE, PLAIN]),
        (every(1), every(20), (20, 20, 1), [BOTH, UPDATE]),
        (every(10), every(100), (100, 10, 1), [BOTH, UPDATE, PLAIN]),
        (every(4), every(6, 1), (12, 3, 2), [REFRESH, UPDATE, PLAIN]),  # they never meet
        (every(4), every(6), (12, 3, 2), [BOTH, REFRESH, UPDATE, PLAIN]),  # they meet once
        (every(1), every(5000), (5000, 5000, 1), [BOTH, UPDATE]),
        (every(1), every(6000), (10000, 10000, 1), [BOTH, UPDATE]),  # too long to be seen twice: all that was seen
        (every(1), lambda t: math.isqrt(t) ** 2 == t, (10000, 10000, 73), [BOTH, UPDATE]),  # 32² to 104²: ever rarer
    ],
)
def test_the_cycle_is_the_smallest_period(
    updates: Callable[[int], bool],
    refreshes: Callable[[int], bool],
    counts: tuple[int, int, int],
    kinds: list[Kind],
) -> None:
    step_kinds = step_kinds_of(Schedule(updates, refreshes))
    assert tuple(step_kinds.counts.values()) == counts
    assert step_kinds.distinct == kinds
    for kind in kinds:
        assert Kind(updates(step_kinds.step(kind)), refreshes(step_kinds.step(kind))) == kind


def test_ratios_average_over_a_cycle() -> None:
    step_kinds = StepKinds((UPDATE, PLAIN, PLAIN, PLAIN, PLAIN))
    rounds = [
        _Round(2.0, 10.0, {UPDATE: 6.0, PLAIN: 1.0}, capturing=12.0, idle=11.0),
        _Round(1.0, 10.0, {UPDATE: 6.0, PLAIN: 1.0}, capturing=14.0, idle=10.0),
        _Round(4.0, 10.0, {UPDATE: 6.0, PLAIN: 1.0}, capturing=13.0, idle=10.0),
    ]
    row = ratios(rounds, step_kinds)  # an amortised step is (6 + 4 · 1) / 5 = 2
    assert [row[f"step_ratio{end}"] for end in ("", "_min", "_max")] == [1.0, 0.5, 2.0]
    assert (row["plain_step_ratio"], row["update_step_ratio"], row["capture_ratio"]) == (0.5, 3.0, 1.3)
    first, second, third = (12 + 44) / 5 + 2, (14 + 40) / 5 + 2, (13 + 40) / 5 + 2
    assert row["train_step_ratio"] == pytest.approx(sorted([first / 12, second / 11, third / 14])[1], rel=1e-15)
    assert [row[key] for key in ("refresh_step_ratio", "bare_products_ratio", "step_to_bare_ratio")] == [None] * 3
    every_step = ratios([_Round(2.0, 10.0, {UPDATE: 3.0}, capturing=11.0)], StepKinds((UPDATE,)))
    assert [every_step[key] for key in ("step_ratio", "plain_step_ratio", "train_step_ratio")] == [1.5, None, 14 / 12]
    alone = ratios([_Round(2.0, 10.0, {PLAIN: 1.0})], StepKinds((PLAIN,)))
    assert [alone[key] for key in ("step_ratio", "capture_ratio", "train_step_ratio")] == [0.5, None, 11 / 12]


def test_refreshes_and_bare_products_are_amortised_over_the_same_cycle() -> None:
    """Ten steps: six plain, two that update, one that refreshes, one that does both."""
    step_kinds = StepKinds((BOTH, *[PLAIN] * 3, UPDATE, REFRESH, *[PLAIN] * 3, UPDATE))
    seconds = {BOTH: 50.0, REFRESH: 40.0, UPDATE: 4.0, PLAIN: 2.0}
    row = ratios(
        [_Round(10.0, 100.0, seconds, 130.0, 110.0, {"every": 1.0, "update": 2.0, "refresh": 12.0})], step_kinds
    )
    assert row["step_ratio"] == (50 + 40 + 2 * 4 + 6 * 2) / 10 / 10
    assert [row[f"{kind}_step_ratio"] for kind in ("plain", "update", "refresh")] == [0.2, 0.4, 4.5]
    minimal = 1 + 0.3 * 2 + 0.2 * 12
    assert row["bare_products_ratio"] == pytest.approx(minimal / 10, rel=1e-15)
    assert row["step_to_bare_ratio"] == pytest.approx(11 / minimal, rel=1e-15)
    assert row["train_step_ratio"] == pytest.approx((0.3 * 130 + 0.7 * 110 + 11) / 110, rel=1e-15)

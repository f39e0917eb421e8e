"""What two ranks were given is compared before the first step; where it differs, both say in what."""

from __future__ import annotations

import pytest

from hf_soo.engine import comm
from tests.ranks.agreement_runs import ALIKE, DIFFERENT, first_steps
from tests.ranks.distributed import run_ranks


@pytest.fixture(scope="module")
def said() -> list[dict[str, str]]:
    return run_ranks(2, first_steps)


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_difference_ends_the_run_on_every_rank(case: str, said: list[dict[str, str]]) -> None:
    _, name, here, there = DIFFERENT[case]
    first, second = (found[case] for found in said)
    assert first == second
    assert first.startswith(f"the ranks disagree on the optimizer's {name}: rank 0 has "), first
    one, other = first.split(", rank 1 ")
    assert here in one and there in other, first
    assert "build it alike on every rank" in other


@pytest.mark.parametrize("case", ALIKE)
def test_what_may_differ_does_not_end_it(case: str, said: list[dict[str, str]]) -> None:
    assert [found[case] for found in said] == ["nothing", "nothing"]


def test_settings_that_part_later_are_found_at_the_next_check(said: list[dict[str, str]]) -> None:
    for found in said:
        assert found["drifts"].startswith("2: the ranks disagree on the optimizer's lr of group 0: rank 0 has "), found
        assert "rank 0 has '0.002', rank 1 '0.001'" in found["drifts"]


def test_many_ranks_are_named_by_their_values() -> None:
    everybody = [{"seed": str(value), "steps": "0"} for value in (1, 2, 1, 3, *[2] * 9)]
    assert comm._first_disagreement(everybody) == (
        "seed: ranks 0, 2 have '1', ranks 1, 4, 5, 6, 7, 8, 9, 10 ... '2', rank 3 '3'"
    )

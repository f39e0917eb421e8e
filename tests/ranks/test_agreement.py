"""What two ranks were given is compared before the first step; where it differs, both say in what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_soo.engine import comm
from tests.ranks.agreement_runs import ALIKE, DIFFERENT, JOINED, first_steps, joined
from tests.ranks.agreement_trainers import ARGUMENTS, FREE, OTHERS, RUNS, trainers
from tests.ranks.distributed import Ranks, run_ranks


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


# ---- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, trainers, str(tmp_path_factory.mktemp("agreement")))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_differs_ends_the_run_before_its_first_step(name: str, trained: list[dict[str, Any]]) -> None:
    first, second = (found[name] for found in trained)
    assert first == second
    here, there = (repr(repr(value)) if isinstance(value, str) else repr(value) for value in ARGUMENTS[name])
    assert first.startswith(f"the ranks disagree on the run's {name}: rank 0 has "), first
    one, other = first.split(", rank 1 ")
    assert here.strip("'\"[]") in one and there.strip("'\"[]") in other, first
    assert "start every rank with the same arguments" in other


@pytest.mark.parametrize("what", OTHERS)
def test_a_model_or_data_that_differ_end_the_run(what: str, trained: list[dict[str, Any]]) -> None:
    _, name, here, there = OTHERS[what]
    first, second = (found[what] for found in trained)
    assert first == second
    assert first.startswith(f"the ranks disagree on the run's {name}: rank 0 has "), first
    one, other = first.split(", rank 1 ")
    assert here in one and there in other, first


@pytest.mark.parametrize("name", FREE)
def test_arguments_of_a_rank_alone_may_differ(name: str, trained: list[dict[str, Any]]) -> None:
    assert [found[name] for found in trained] == ["nothing", "nothing"]


def test_ranks_of_different_torch_seeds_would_draw_the_same_examples(trained: list[dict[str, Any]]) -> None:
    """Why the seed of the order is compared: each rank takes its share of a permutation of its own."""
    apart, together = ({tuple(found["order"][seed]) for found in trained} for seed in (None, 1))
    assert set.intersection(*(set(drawn) for drawn in apart))
    assert not set.intersection(*(set(drawn) for drawn in together))


@pytest.mark.parametrize("case", RUNS)
def test_a_recorded_run_ends_before_its_trainer_is_made(case: str, trained: list[dict[str, Any]]) -> None:
    _, name, here, there = RUNS[case]
    first, second = (found["runs"][case] for found in trained)
    assert first == second
    assert first.startswith(f"the ranks disagree on the run's {name}: rank 0 has "), first
    one, other = first.split(", rank 1 ")
    assert here in one and there in other, first


def test_the_record_of_a_run_under_zero_has_its_health(trained: list[dict[str, Any]]) -> None:
    for found in trained:
        for health in found["health"].values():
            distances = {"distance_median", "distance_max"}
            assert set(health) - distances == {"cos_median", "cos_min", "fallback_layers", "noise_layers"}
            assert distances <= set(health) and 0 < health["distance_median"] <= health["distance_max"]
            assert health["fallback_layers"] == 0 and 0 < health["cos_min"] <= health["cos_median"] < 1


# ---- other numbers of batches ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_join() -> list[dict[str, Any]]:
    ended = Ranks(2, joined, timeout=20.0).wait()  # a rank that waits for another fails
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.error for rank in ended)
    return [rank.result for rank in ended]


@pytest.mark.parametrize("case", JOINED)
def test_other_numbers_of_batches_in_join_work_or_are_refused_at_once(case: str, in_join: list[dict[str, Any]]) -> None:
    first, second = (found[case] for found in in_join)
    expected, arguments = JOINED[case]
    if expected == "done":
        assert first["end"] == second["end"] == "done"
        assert [first["steps"], second["steps"]] == ([3, 3] if arguments else [3, 7])
        assert torch.equal(first["weights"], second["weights"]) and second["weights"].isfinite().all()
    elif expected == "ended":
        assert first["steps"] == second["steps"] == 3
        assert all("exhausted" in found["end"] for found in (first, second))
    else:
        assert first["end"] == second["end"] and first["steps"] == second["steps"] == 0
        assert first["end"].startswith(f"{case.split()[0]} in join(): its step sums statistics over all ranks")

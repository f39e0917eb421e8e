"""What goes wrong on several processes: the exact continuation, or a clear error on every rank; no hang, no drift."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.fault_runs import METHODS, Ended, Ranks, loses_a_rank, mixture, shared_process_group
from tests.oracles import assert_close_report

TIMEOUT = 8.0  # of the process group, where a peer sleeps
SLACK = 40.0  # for starting ranks and taking steps on a busy machine

GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe")
TIMED_OUT = re.compile(r"Timed out waiting 8000ms")


# ---- a peer that is gone ---------------------------------------------------------------------------------------------

# world, strategy, method, where
LOST = {
    "between steps": (2, "ddp", "mkor", "between steps"),
    "mkor in step": (2, "ddp", "mkor", "sum_"),
    "kfac-1 in step": (2, "ddp", "kfac-1", "send_"),
    "kfac-2 of 4 in step": (4, "ddp", "kfac-2", "send_"),
    "FSDP2 in step": (2, "fsdp2", "rf_rmsprop", "sum_"),
    "ZeRO-2 in step": (2, "zero2", "eva", "gather"),
}


@pytest.fixture(scope="module")
def lost() -> dict[tuple[str, str], list[Ended]]:
    """All cases side by side: they wait more than they work."""
    running = {
        (how, case): Ranks(world, loses_a_rank, *rest, how, timeout=TIMEOUT if how == "sleeps" else 10 * TIMEOUT)
        for case, (world, *rest) in LOST.items()
        for how in ("dies", "sleeps")
    }
    return {
        key: ranks.wait(SLACK, sleeping=len(ranks.processes) - 1 if key[0] == "sleeps" else None)
        for key, ranks in running.items()
    }


@pytest.mark.parametrize("case", LOST)
def test_a_rank_that_dies_ends_the_others_with_its_connection(case: str, lost: dict[Any, list[Ended]]) -> None:
    *others, dead = lost["dies", case]
    assert dead.code == -9
    for rank, other in enumerate(others):
        assert other.code == 1, f"rank {rank} is still waiting"
        assert GONE.search(other.error), other.error
        assert other.seconds < TIMEOUT + SLACK / 2  # as soon as the connection breaks, not at the time-out of 80 s
    if LOST[case][3] != "between steps":
        assert "hf_soo/engine/comm.py" in others[0].error  # in our step, and the traceback says in which message


@pytest.mark.parametrize("case", LOST)
def test_a_rank_that_hangs_ends_the_others_with_the_time_out(case: str, lost: dict[Any, list[Ended]]) -> None:
    *others, asleep = lost["sleeps", case]
    assert asleep.code is None
    for rank, other in enumerate(others):
        assert other.code == 1, f"rank {rank} is still waiting: its group has another time-out than the process group"
        assert TIMED_OUT.search(other.error) or GONE.search(other.error), other.error
        assert TIMEOUT < other.seconds < TIMEOUT + SLACK / 2
    assert any(TIMED_OUT.search(other.error) for other in others)


# ---- a batch that is not finite, a layer without rows ----------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, shared_process_group)


def one_result(two_ranks: list[dict[str, Any]], *key: Any) -> dict[str, Any]:
    """What both ranks found, if it is the same to the last bit."""
    first, second = (found["spoiled"][key] for found in two_ranks)
    for name in first:
        if isinstance(first[name], torch.Tensor):
            # as bits: a NaN equals itself
            assert torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)), f"{name}: ranks differ"
        else:
            assert first[name] == second[name], f"{name}: ranks differ"
    return first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_nan_batch_spares_the_factors_and_is_reported(
    strategy: str, method: str, two_ranks: list[dict[str, Any]]
) -> None:
    """Without a loss scale nobody skips the step: the averaged gradient is NaN everywhere, and the base takes it."""
    found = one_result(two_ranks, "nan", strategy, method)
    assert found["factors kept"] and found["steps"] == 1
    assert found["all weights NaN"]
    assert found["fallback"] == found["layers"]
    name = METHODS[method][0]
    lost = f"{name} keeps the old factors of {found['layers']} layers (non-finite statistics)"
    assert [message for message in found["warnings"] if message.startswith(lost)]


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_batch_is_skipped_by_zero(method: str, two_ranks: list[dict[str, Any]]) -> None:
    found = one_result(two_ranks, "nan", "zero2", method)
    assert found["factors kept"] and found["weights kept"] and found["same turn"]
    assert found["steps"] == 0 and found["left over"] == 0.0
    assert found["continued"], "the run goes on as one that never had that batch"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("strategy", "at"), [("ddp", 2), ("ddp", 3), ("fsdp2", 2)])
def test_an_inf_under_a_loss_scale_is_skipped(
    strategy: str, at: int, method: str, two_ranks: list[dict[str, Any]]
) -> None:
    found = one_result(two_ranks, "inf", strategy, method, at)
    assert found["factors kept"] and found["weights kept"] and found["same turn"]
    assert found["steps"] == 0 and found["left over"] == 0.0
    assert found["scale"] == 2.0**9  # halved once
    assert found["continued"], "the run goes on as one that never had that batch"


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_in_one_shard_is_seen_by_the_ranks_without_it(method: str, two_ranks: list[dict[str, Any]]) -> None:
    whole, shards = (one_result(two_ranks, "shard", s, method)["weights"] for s in ("ddp", "fsdp2"))
    assert whole.isnan().any() and whole.isfinite().sum() > len(whole) / 2  # one layer, or one entry of it
    assert torch.equal(whole.isnan(), shards.isnan())
    finite = whole.isfinite()
    # fp32: sums over rows in another order
    assert_close_report(shards[finite], whole[finite], 1e-6, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_without_rows_for_a_layer_equals_one_process(method: str, two_ranks: list[dict[str, Any]]) -> None:
    moved, start, without_rows = mixture(method, 0, 1)
    first, second = (found["mixtures"][method] for found in two_ranks)
    assert torch.equal(first[0], second[0])
    assert_close_report(first[0], moved, 1e-10, method)  # float64, sums in another order
    assert first[2] == second[2] == without_rows
    assert len(start) == len(moved) and moved.abs().sum() > 0.1
    assert method == "rf_rmsprop" or without_rows == {"experts.3"}  # it learns from gradients, not from rows

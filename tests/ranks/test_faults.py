"""What goes wrong on several processes: the exact continuation, or a clear error on every rank; no hang, no drift."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.oracles.core import assert_close_report
from tests.ranks.distributed import Ended, Ranks
from tests.ranks.fault_checkpoints import (
    CONTINUED,
    DAMAGES,
    KILLS,
    MISFITS,
    damaged_checkpoints,
    killed_in_a_save,
    resumed_after_a_kill,
)
from tests.ranks.fault_runs import (
    DIFFERENT,
    METHODS,
    loses_a_rank,
    mixture,
    set_up_differently,
    shared_process_group,
)

TIMEOUT = 8.0  # of the process group, where a peer sleeps
SLACK = 40.0  # for starting ranks and taking steps on a busy machine

GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe")
TIMED_OUT = re.compile(r"Timed out waiting 8000ms")


def on_both(ended: list[Ended]) -> tuple[Any, Any]:
    """What two ranks that came through returned."""
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.error for rank in ended)
    return ended[0].result, ended[1].result


# ---- a peer that is gone ---------------------------------------------------------------------------------------------

# world, strategy, method, where
LOST = {
    "between steps": (2, "ddp", "mkor", "between steps"),
    "before the first step": (2, "ddp", "adamw", "agree"),
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
    return list(on_both(Ranks(2, shared_process_group).wait(240)))


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


# ---- ranks that were set up differently ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def different() -> list[Ended]:
    return Ranks(2, set_up_differently, timeout=TIMEOUT * 3).wait()


SEES = {
    "method": ("method", "'mkor over Lamb'", "'eva over SGD'"),
    "method without messages": ("method", "'mkor over Lamb'", "'rf_rmsprop over SGD'"),
    "method without layers": ("method", "'mkor over Lamb'", "'adamw over AdamW'"),
    "method that shares work": ("method", "'mkor over Lamb'", "'kfac_expand over SGD'"),
    "period": ("settings", "'update_period': 2", "'update_period': 3"),
    "decay": ("settings", "'factor_decay': 0.95", "'factor_decay': 0.5"),
    "exclude": ("layers", "('2', (8, 8))", "[('0', (8, 6)), ('4', (3, 8))]"),
    "base": ("method", "'mkor over Lamb'", "'mkor over SGD'"),
    "base settings": ("base settings", "'betas': (0.9, 0.999)", "'betas': (0.5, 0.9)"),
    "steps": ("steps done", "rank 0 has '2'", "rank 1 '0'"),
    "process groups": ("method", "'mkor over Lamb'", "'kfac_expand over SGD'"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_were_set_up_differently_refuse_to_step(case: str, different: list[Ended]) -> None:
    for found in on_both(different):
        error, unchanged = found[case]
        name, here, there = SEES[case]
        assert error.startswith(f"the ranks disagree on the optimizer's {name}: ") and unchanged
        assert here in error and there in error, error
        assert "build it alike on every rank, and resume all ranks from one checkpoint" in error


def test_ranks_that_agree_ask_once(different: list[Ended]) -> None:
    assert [found["asked"] for found in on_both(different)] == [[32], [32]]  # bytes


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass
class Checkpoints:
    """What became of the Trainer runs: damaged and misfitting checkpoints, killed savers, and their continuation."""

    damaged: list[Ended]
    killed: dict[str, list[Ended]]
    resumed: list[Ended]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    damaged = Ranks(2, damaged_checkpoints, folder)
    killing = {case: Ranks(2, killed_in_a_save, folder, case) for case in KILLS}
    killed = {case: ranks.wait() for case, ranks in killing.items()}
    resumed = Ranks(2, resumed_after_a_kill, folder)
    return Checkpoints(damaged.wait(), killed, resumed.wait())


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_every_rank(case: str, checkpoints: Checkpoints) -> None:
    for found in on_both(checkpoints.damaged):
        error = found["explicit"][case]
        assert error.startswith("ValueError: ") and f"checkpoint-4 cannot be resumed from: {DAMAGES[case][0]}" in error
        assert "give an earlier checkpoint, or True for the newest whole one" in error


@pytest.mark.parametrize("case", CONTINUED)
def test_a_damaged_checkpoint_is_passed_over(case: str, checkpoints: Checkpoints) -> None:
    first, second = on_both(checkpoints.damaged)
    for found in (first, second):
        continued = found["continued"][case]
        assert continued["error"] == "nothing"
        assert torch.equal(continued["weights"], first["weights"]), "resumed from checkpoint-2, bit for bit"
        assert any("checkpoint-4 is passed over" in m and case.split()[0] in m for m in continued["warnings"])


def test_a_manifest_that_cannot_be_read_is_a_clear_error(checkpoints: Checkpoints) -> None:
    for found in on_both(checkpoints.damaged):
        error = found["explicit"]["manifest.json cut"]
        assert error.startswith("ValueError: ") and "checkpoint-4 cannot be resumed from: manifest.json" in error


def test_ranks_that_see_other_checkpoints_refuse_to_step(checkpoints: Checkpoints) -> None:
    for found in on_both(checkpoints.damaged):
        by_true, by_name = found["apart"]
        assert "has no whole checkpoint that every rank sees" in by_true
        assert "run's resume_from_checkpoint: rank 0 has 'checkpoint-4', rank 1 'checkpoint-2'" in by_name


SAYS = {
    "layer sizes": r"RuntimeError: .*size mismatch",  # torch's, of the weights, which are read first
    "one layer more": r"ValueError: the checkpoint's layers differ .*missing \['bert\.encoder\.layer\.2",
    "layers": r"ValueError: the checkpoint's layers differ .*unknown \['bert\.pooler",
    "method": "ValueError: this checkpoint was written with optimizer 'mkor', this run has 'eva'",
    "base": "ValueError: this checkpoint was written with base optimizer 'Lamb', this run has 'AdamW'",
    "none of ours": "ValueError: .* was written with optimizer 'mkor', this run has 'adamw_torch'",
    "state": r"ValueError: the checkpoint's state of layer '.*' is .*, this run needs",
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_every_rank(case: str, checkpoints: Checkpoints) -> None:
    for found in on_both(checkpoints.damaged):
        assert re.match(SAYS[case], found["misfits"][case], re.DOTALL), found["misfits"][case]


@pytest.mark.parametrize("case", KILLS)
def test_a_rank_killed_in_a_save(case: str, checkpoints: Checkpoints) -> None:
    ended = checkpoints.killed[case]
    victim = KILLS[case][1]
    assert ended[victim].code == -9
    assert ended[1 - victim].code == 1 and GONE.search(ended[1 - victim].error)
    undisturbed = on_both(checkpoints.damaged)[0]["kfac" if KILLS[case][2] else "weights"]
    for found in on_both(checkpoints.resumed):
        assert found[case]["error"] == "nothing"
        assert torch.equal(found[case]["weights"], undisturbed)
        assert any("checkpoint-4 is passed over" in message for message in found[case]["warnings"])

"""One result on one process and on many: the same global batch gives the same weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.methods.toy import CASES, batches, build, loss_of, parts, splits_rows, tolerance, toy, train, weights
from tests.oracles.core import assert_close_report
from tests.ranks.distributed import run_ranks
from tests.trainer.test_trainer import final_weights, run_trainer

STEPS = 5


def fails_on_rank_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("deliberate")


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(RuntimeError, match="deliberate"):
        run_ranks(2, fails_on_rank_one)


def ddp_run(rank: int, world: int, cases: list[str], shares: list[int]) -> dict[str, torch.Tensor]:
    """Every case under DDP; rank r gets ``shares[r]`` rows of each batch of 12, weighted to the global mean."""
    results = {}
    for case in cases:
        model = toy()
        # built on the wrapped model: the wrapper is taken off; the unused layer is what DDP must be told of
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = build(case, ddp)
        for x, y in batches(STEPS):
            optimizer.zero_grad()
            mine = tuple(t.split(shares)[rank] for t in (x, y))
            weight = world * shares[rank] / sum(shares)
            loss = loss_of(ddp, mine) * weight  # type: ignore[arg-type]
            optimizer.report_loss(loss)
            loss.backward()
            optimizer.step()
        results[case] = weights(model)
        optimizer.remove_hooks()
    return results


@pytest.mark.parametrize("shares", [[6, 6], [3, 9], [3, 3, 3, 3]], ids=["2", "2-uneven", "4"])
def test_ddp_equals_one_process(shares: list[int]) -> None:
    """Where parts of a batch's rows are told apart, they are those of the ranks' shares as micro-batches."""
    ranks = run_ranks(len(shares), ddp_run, list(CASES), shares)
    for case in CASES:
        single = toy()
        train(single, build(case, single), batches(STEPS), parts(shares if splits_rows(case) else [sum(shares)]))
        for result in ranks:
            assert torch.equal(result[case], ranks[0][case]), f"{case}: ranks differ"
        # fp64, sums in another order
        assert_close_report(ranks[0][case], weights(single), tolerance(case, 1e-10), case)


def trainer_rank(rank: int, world: int, folder: str) -> torch.Tensor:
    trainer = run_trainer(f"{folder}/{rank}", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert trainer.args.world_size == world and type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return final_weights(trainer)


def test_trainer_under_ddp_equals_one_process(tmp_path: object) -> None:
    single = run_trainer(f"{tmp_path}/single", per_device_train_batch_size=8)
    ranks = run_ranks(2, trainer_rank, str(tmp_path))
    assert torch.equal(ranks[0], ranks[1])
    # fp32: rounding of 1e-7 a gradient, through LAMB's square roots and 6 steps
    assert_close_report(ranks[0], final_weights(single), 2e-5, "weights")

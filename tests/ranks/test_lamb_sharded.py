"""LAMB over pieces of parameters takes the steps of LAMB over whole ones: FSDP2's DTensors, ZeRO's flat partitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks.distributed import run_ranks
from tests.ranks.sharded_lamb import (
    OPTIONS,
    STEPS,
    mixed_parameters,
    refusals,
    state_round_trips,
    steps_of_dtensors,
    steps_of_flat_tensors,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # rounding of norms that are summed in another order
NAIVE = 1e-3  # ratios of local norms move the weights by more than this


def on_two_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    return {
        "shard": steps_of_dtensors(mesh),
        "states": state_round_trips(mesh, Path(folder)),
        "mixed": mixed_parameters(mesh),
        "refusals": refusals(mesh),
        "flat": steps_of_flat_tensors(rank, world),
    }


def on_four_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {
        "shard": steps_of_dtensors(init_device_mesh("cpu", (world,))),
        "hsdp": steps_of_dtensors(replicas, cases=(0, 3)),
        "states": state_round_trips(replicas, Path(folder)),
        "flat": steps_of_flat_tensors(rank, world),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks, str(tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, on_four_ranks, str(tmp_path_factory.mktemp("four")))


def check_dtensors(found: dict[str, Any]) -> None:
    for (dtype, i), error in found["errors"].items():
        assert error <= TOLERANCE[dtype], f"{dtype} {OPTIONS[i]}: {error}"
    clipped, free = found["counts"]
    assert clipped == {"c10d.allreduce_": 2} and free == {"c10d.allreduce_": 1}  # the norms; the clip
    assert found["naive"] > NAIVE


def test_two_shards_step_as_the_whole(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        check_dtensors(found["shard"])


def test_four_shards_step_as_the_whole(four_ranks: list[dict[str, Any]]) -> None:
    for found in four_ranks:
        check_dtensors(found["shard"])


def test_replicated_shards_step_as_the_whole(four_ranks: list[dict[str, Any]]) -> None:
    for found in four_ranks:
        check_dtensors(found["hsdp"])


def test_states_of_shards_survive_saving(two_ranks: list[dict[str, Any]], four_ranks: list[dict[str, Any]]) -> None:
    for ranks in (two_ranks, four_ranks):
        assert len(ranks[0]["states"]) == 3 + 6 * 3  # and each parameter's state against the whole one's
        for found in ranks:
            assert max(found["states"].values()) <= 1e-12, found["states"]


def test_shards_and_whole_tensors_in_one_optimizer(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        error, reductions = found["mixed"]
        assert error <= 1e-6 and reductions == [2] * STEPS  # bf16 and fp32 norms go together


def test_other_placements_are_refused(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        shard, replicate, partial = found["refusals"]
        assert "placed as (Shard(dim=1),)" in shard and "fully_shard" in shard
        assert "placed as (Replicate(),)" in replicate
        assert "placements (Shard(dim=0),) and a gradient placed as (Partial(sum),)" in partial


@pytest.mark.parametrize("world", [2, 4])
def test_flat_partitions_step_as_the_whole(world: int, request: pytest.FixtureRequest) -> None:
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world])
    for found in ranks:
        for (dtype, way, i), error in found["flat"]["errors"].items():
            assert error <= TOLERANCE[dtype], f"{dtype} {way} {OPTIONS[i]}: {error}"
    assert max(found["flat"]["naive"] for found in ranks) > NAIVE

"""Adapters (LoRA, and a part that is trained whole) go on under any strategy, under their own to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.ranks import cells
from tests.ranks.cells import TOLERANCE, tiny_bert
from tests.ranks.distributed import run_ranks
from tests.ranks.equality import distance
from tests.ranks.test_reshard import BY_NAME, Leg, run_leg

METHOD = "mkor"
FIRST = ["DDP x 2", "ZeRO-2 x 2", "FSDP2 x 2", "FSDP2 x 2, shards", "ZeRO-3 x 2, whole weights"]
SAME = [Leg(name, name) for name in FIRST]
OTHER = [
    Leg("single", "DDP x 2"),
    Leg("single", "ZeRO-2 x 2"),
    Leg("single", "FSDP2 x 2"),
    Leg("single", "FSDP2 x 2, shards"),
    Leg("DDP x 2", "ZeRO-3 x 2, whole weights"),
    Leg("ZeRO-2 x 2", "DDP x 2"),
    Leg("ZeRO-3 x 2", "ZeRO-2 x 2"),
    Leg("FSDP2 x 2", "DDP x 2"),
    Leg("FSDP2 x 2, shards", "ZeRO-2 x 2"),
]
Ends = dict[Leg, Tensor]


def adapted_bert(**sizes: int) -> Any:
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["pooler"])
    return get_peft_model(tiny_bert(**sizes), config)


def run_adapted(rank: int, world: int, legs: Sequence[Leg], folder: str) -> Ends:
    with mock.patch.object(cells, "tiny_bert", adapted_bert):
        return {leg: run_leg(leg, METHOD, folder) for leg in legs}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[Ends]:
    """For each rank the final weights of each leg; those of one process stand in each."""
    folder = str(tmp_path_factory.mktemp("adapters"))
    of_two = [Leg(name) for name in FIRST] + SAME + [leg for leg in OTHER if leg.strategy != "single"]
    ranks = run_ranks(2, run_adapted, of_two, folder)
    alone = run_adapted(0, 1, [leg for leg in OTHER if leg.strategy == "single"] + [Leg("single")], folder)
    return [{**rank, **alone} for rank in ranks]


@pytest.mark.parametrize("name", FIRST)
def test_a_strategy_ends_as_one_process(name: str, ends: list[Ends]) -> None:
    assert BY_NAME[name].world == 2
    for rank in ends:
        assert distance(rank[Leg(name)], rank[Leg("single")]) <= TOLERANCE


@pytest.mark.parametrize("leg", SAME, ids=lambda leg: leg.strategy)
def test_goes_on_to_the_last_bit(leg: Leg, ends: list[Ends]) -> None:
    for rank in ends:
        assert torch.equal(rank[leg], rank[Leg(leg.strategy)])


@pytest.mark.parametrize("leg", OTHER, ids=lambda leg: f"{leg.source} -> {leg.strategy}")
def test_goes_on_under_another_strategy(leg: Leg, ends: list[Ends]) -> None:
    for rank in ends:
        assert distance(rank[leg], rank[Leg("single")]) <= TOLERANCE

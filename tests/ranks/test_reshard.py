"""A run that goes on under another strategy, or on other ranks, ends as if it had run there from the start."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from tests.ranks.cells import (
    METHODS,
    RESUME_AT,
    SINGLE,
    STRATEGIES,
    TOLERANCE,
    Result,
    Sentences,
    Strategy,
    assert_spread,
    forget,
    make_trainer,
    run,
    stay_on_gloo,
    whole_weights,
)
from tests.ranks.distributed import run_ranks
from tests.ranks.equality import distance

BY_NAME = {strategy.name: strategy for strategy in (SINGLE, *STRATEGIES)} | {
    "FSDP2 x 2, shards": Strategy("FSDP2 x 2, shards", "fsdp2", 2, None, {"state_dict_type": "SHARDED_STATE_DICT"}),
    "ZeRO-2 x 4": Strategy("ZeRO-2 x 4", "zero", 4, 2),
    "ZeRO-3 x 2, whole weights": Strategy(
        "ZeRO-3 x 2, whole weights", "zero", 2, 3,
        {"zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
        }},
    ),
}  # fmt: skip
# trust ratios of whole tensors and averages beside the moments, and a state that lies in row shards under FSDP2
NAMES = ("all around lamb", "rf_rmsprop")


@dataclass(frozen=True)
class Leg:
    """The first three steps of a run with a checkpoint, or (``source`` given) the last three from another's."""

    strategy: str
    source: str | None = None


FIRST = ["ZeRO-2 x 2", "FSDP2 x 2", "FSDP2 x 2, shards", "ZeRO-3 x 2, whole weights", "DDP x 2"]
SECOND = [
    Leg("single", "ZeRO-2 x 2"),
    Leg("single", "FSDP2 x 2"),
    Leg("DDP x 2", "ZeRO-3 x 2, whole weights"),
    Leg("ZeRO-1 x 2", "DDP x 2"),
    Leg("ZeRO-3 x 2", "DDP x 2"),
    Leg("FSDP2 x 2", "DDP x 2"),
    Leg("FSDP2 x 2", "FSDP2 x 2, shards"),
    Leg("FSDP2 x 2, shards", "DDP x 2"),
    Leg("ZeRO-2 x 2", "FSDP2 x 2, shards"),
    Leg("DDP x 4", "FSDP2 x 2, shards"),
    Leg("DDP x 4", "ZeRO-2 x 2"),
    Leg("ZeRO-2 x 4", "ZeRO-2 x 2"),
]


def run_leg(leg: Leg, name: str, folder: str) -> Tensor:
    strategy, first = BY_NAME[leg.strategy], leg.source is None
    if strategy.kind == "zero":
        stay_on_gloo()
    place = Path(folder) / (leg.source or leg.strategy) / name
    trainer = make_trainer(strategy, METHODS[name], "resume" if first else "plain", place, Sentences())
    trainer.train(resume_from_checkpoint=None if first else str(place / f"checkpoint-{RESUME_AT}"))
    assert_spread(strategy, trainer)
    weights = whole_weights(trainer)
    forget(SINGLE)
    return weights


def run_legs(rank: int, world: int, legs: Sequence[Leg], folder: str) -> dict[tuple[Leg, str], Tensor]:
    return {(leg, name): run_leg(leg, name, folder) for leg in legs for name in NAMES}


def of_world(world: int) -> list[Leg]:
    return [leg for leg in SECOND if BY_NAME[leg.strategy].world == world]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def continued(checkpoints: str) -> dict[Leg, list[dict[str, Tensor]]]:
    """Leg -> for each rank the final weights of each method; processes are started once for each world size."""
    ends: dict[Leg, list[dict[str, Tensor]]] = {}
    for world, first in ((2, [Leg(name) for name in FIRST]), (4, []), (1, [])):
        legs = [*first, *of_world(world)]
        ranks = [run_legs(0, 1, legs, checkpoints)] if world == 1 else run_ranks(world, run_legs, legs, checkpoints)
        for leg in of_world(world):
            ends[leg] = [{name: weights[leg, name] for name in NAMES} for weights in ranks]
    return ends


@functools.cache
def undisturbed() -> dict[str, Result]:
    return {name: weights for (name, _), weights in run(SINGLE, [(name, "plain") for name in NAMES]).items()}


@pytest.mark.parametrize("leg", SECOND, ids=lambda leg: f"{leg.source} -> {leg.strategy}")
def test_resume_under_another_strategy(leg: Leg, continued: dict[Leg, list[dict[str, Tensor]]]) -> None:
    for weights in continued[leg]:
        for name in NAMES:
            assert distance(weights[name], undisturbed()[name]) <= TOLERANCE, name


def first_in_pieces(rank: int, world: int, folder: str) -> str:
    run_leg(Leg("ZeRO-3 x 2"), NAMES[0], folder)
    with pytest.raises(ValueError) as caught:
        run_leg(Leg("DDP x 2", "ZeRO-3 x 2"), NAMES[0], folder)
    return str(caught.value)


def test_weights_in_pieces_need_the_strategy_that_wrote_them(tmp_path: Path) -> None:
    for message in run_ranks(2, first_in_pieces, str(tmp_path)):
        assert "zero3 x 2" in message and "stage3_gather_16bit_weights_on_model_save" in message

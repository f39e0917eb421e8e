"""A run that goes on under another strategy, or on other ranks, ends as if it had run there from the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.equality import (
    METHODS,
    RESUME_AT,
    SINGLE,
    STRATEGIES,
    TOLERANCE,
    Method,
    Sentences,
    Strategy,
    assert_spread,
    clean_process,
    make_trainer,
    whole_weights,
)

BY_NAME = {strategy.name: strategy for strategy in (SINGLE, *STRATEGIES)} | {
    "ZeRO-2 x 4": Strategy("ZeRO-2 x 4", "zero", 4, 2)
}
MKOR_OVER_LAMB = METHODS["mkor over lamb"]
ROOT_FREE = METHODS["rf_rmsprop"]  # whose state is in row shards under FSDP2


def first_half(rank: int, world: int, strategy: Strategy, methods: list[Method], folder: str) -> None:
    for method in methods:
        with clean_process(strategy):
            trainer = make_trainer(strategy, method, "resume", Path(folder) / method.name, Sentences())
            trainer.train()


def second_half(
    rank: int, world: int, strategy: Strategy, methods: list[Method], folder: str
) -> dict[str, torch.Tensor]:
    weights = {}
    for method in methods:
        with clean_process(strategy):
            trainer = make_trainer(strategy, method, "plain", Path(folder) / "second", Sentences())
            trainer.train(resume_from_checkpoint=str(Path(folder) / method.name / f"checkpoint-{RESUME_AT}"))
            assert_spread(strategy, trainer)
            weights[method.name] = whole_weights(trainer)
    return weights


def on(strategy: Strategy, function: object, *args: object) -> list[object]:
    if strategy.kind == "single":
        return [function(0, 1, strategy, *args)]  # type: ignore[operator]
    return run_ranks(strategy.world, function, strategy, *args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source, targets",
    [
        ("ZeRO-2 x 2", ["single", "DDP x 4", "ZeRO-2 x 4", "FSDP2 x 2"]),
        ("FSDP2 x 2", ["single", "ZeRO-3 x 2"]),
        ("ZeRO-3 x 2", ["DDP x 2"]),
        ("DDP x 2", ["ZeRO-1 x 2", "FSDP2 x 2"]),
    ],
)
def test_resume_under_another_strategy(source: str, targets: list[str], tmp_path: Path) -> None:
    methods = [MKOR_OVER_LAMB, ROOT_FREE]
    on(BY_NAME[source], first_half, methods, str(tmp_path))
    for target in targets:
        for method in methods:
            for weights in on(BY_NAME[target], second_half, [method], str(tmp_path)):
                with clean_process(SINGLE):
                    alone = make_trainer(SINGLE, method, "plain", tmp_path / "alone", Sentences())
                    alone.train()
                    difference = float((weights[method.name] - whole_weights(alone)).abs().max())  # type: ignore[index]
                assert difference <= TOLERANCE, f"{source} -> {target}, {method.name}: {difference}"

"""Averages of the weights under each strategy: evaluated alike, saved whole, and no trace of it in training."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Subset
from transformers.trainer_utils import IntervalStrategy

from tests.ranks.cells import (
    METHODS,
    SINGLE,
    STRATEGIES,
    TOLERANCE,
    Sentences,
    Strategy,
    assert_spread,
    forget,
    make_trainer,
    stay_on_gloo,
    tiny_bert,
    whole_weights,
)
from tests.ranks.distributed import run_ranks

# vectors stay gathered on every rank, as all small parameters do by DeepSpeed's own threshold
ZERO_3 = Strategy(
    "ZeRO-3 x 2", "zero", 2, 3,
    {"zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 1000, "stage3_gather_16bit_weights_on_model_save": True,
    }},
)  # fmt: skip
PLACES = [*(s for s in STRATEGIES if s.name in ("FSDP2 x 2", "ZeRO-2 x 2")), ZERO_3]
Run = tuple[list[float], Tensor, Path]  # losses of evaluations, the trained weights, where others were saved


def one_run(strategy: Strategy, folder: Path) -> Run:
    if strategy.kind == "zero":
        stay_on_gloo()
    data = Sentences()
    trainer = make_trainer(strategy, METHODS["all around lamb"], "plain", folder, data)
    trainer.eval_dataset = Subset(data, range(8))
    trainer.args.eval_strategy, trainer.args.eval_steps, trainer.args.max_steps = IntervalStrategy.STEPS, 1, 3
    trainer.train()
    trainer.save_model(str(folder))
    trainer.second_order.train()
    if strategy != ZERO_3:
        assert_spread(strategy, trainer)
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    trained = whole_weights(trainer)
    forget(SINGLE)
    return losses, trained, folder


def runs(rank: int, world: int, folder: str) -> dict[str, Run]:
    return {strategy.name: one_run(strategy, Path(folder) / strategy.name) for strategy in PLACES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    return run_ranks(2, runs, str(tmp_path_factory.mktemp("averages")))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return one_run(SINGLE, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("name", [strategy.name for strategy in PLACES])
def test_averages_are_shown_and_hidden(name: str, found: list[dict[str, Run]], single: Run) -> None:
    for on_rank in found:
        losses, trained, folder = on_rank[name]
        assert losses == pytest.approx(single[0], abs=1e-5)
        assert float((trained - single[1]).abs().max()) <= TOLERANCE
        saved, shown = (load_file(place / "model.safetensors") for place in (folder, single[2]))
        assert saved.keys() >= shown.keys()
        assert max(float((saved[key] - value).abs().max()) for key, value in shown.items()) <= TOLERANCE


def test_the_averages_are_other_weights(single: Run) -> None:
    losses, trained, folder = single
    assert len(losses) == 3
    saved = load_file(folder / "model.safetensors")
    named = sorted(tiny_bert().named_parameters())
    parts = trained.split([parameter.numel() for _, parameter in named])
    apart = [
        (saved[name].flatten() - part).abs().max()
        for (name, _), part in zip(named, parts, strict=True)
        if name in saved
    ]
    assert float(max(apart)) > 1e-4

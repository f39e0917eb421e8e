"""Averages of the weights under Trainer: evaluated, predicted and saved; training goes on with its own, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from hf_soo.integrations.trainer import SecondOrderTrainer
from tests.trainer.test_trainer import Examples, arguments, bert, final_weights, run_trainer

AROUND = {
    "slow_momentum": 0.9, "slow_weight": 1.0, "cautious": True, "ema_decay": 0.5, "lookahead": 0.5,
    "lookahead_decay": 0.8,
}  # fmt: skip
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def run(folder: Path, resume: str | None = None, **overrides: Any) -> SecondOrderTrainer:
    callbacks: list[TrainerCallback] = overrides.pop("callbacks", [])
    args = arguments(str(folder), base_optim="adamw", base_optim_args=AROUND, **overrides)
    trainer = SecondOrderTrainer(
        model=bert(), args=args, train_dataset=Examples(), eval_dataset=Examples(8), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def averages(trainer: SecondOrderTrainer) -> Tensor:
    optimizer, model = trainer.second_order, trainer.accelerator.unwrap_model(trainer.model)
    assert optimizer is not None
    return torch.cat([optimizer.state.get(p, {}).get("ema", p.detach()).flatten() for p in model.parameters()])


class Seen(TrainerCallback):
    """The averages at each evaluation, and whether the model had them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.shown: list[bool] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(kwargs["metrics"]["eval_loss"])
        optimizer = kwargs["optimizer"].optimizer
        self.shown.append(all(torch.equal(p, s["ema"]) for p, s in optimizer.state.items() if s))


def test_evaluation_and_saving_use_the_average_and_leave_no_trace(tmp_path: Path) -> None:
    seen = Seen()
    trainer = run(tmp_path / "evaluated", callbacks=[seen], **EVALUATED)
    plain = run(tmp_path / "plain", eval_strategy="no")
    assert len(seen.losses) == 3 and all(seen.shown)
    trained = final_weights(plain)
    trainer.second_order.train()  # type: ignore[union-attr]
    assert torch.equal(final_weights(trainer), trained) and not torch.equal(averages(trainer), trained)
    assert trainer.evaluate()["eval_loss"] == seen.losses[-1] == trainer.predict(Examples(8)).metrics["test_loss"]  # type: ignore[arg-type]
    assert torch.equal(final_weights(trainer), averages(trainer))

    plain.save_model(str(tmp_path / "model"))
    saved, name = load_file(tmp_path / "model" / "model.safetensors"), "bert.pooler.dense.weight"
    parameter = plain.model.get_parameter(name)  # type: ignore[union-attr]
    assert torch.equal(saved[name], plain.second_order.state[parameter]["ema"])  # type: ignore[union-attr]
    checkpoint = load_file(tmp_path / "evaluated" / "checkpoint-6" / "model.safetensors")
    plain.second_order.train()  # type: ignore[union-attr]
    assert torch.equal(checkpoint[name], parameter)

    resumed = run(tmp_path / "evaluated", str(tmp_path / "evaluated" / "checkpoint-4"), **EVALUATED)
    resumed.second_order.train()  # type: ignore[union-attr]
    assert torch.equal(final_weights(resumed), trained) and torch.equal(averages(resumed), averages(plain))
    assert resumed.evaluate()["eval_loss"] == seen.losses[-1]

    for each in (resumed, plain):  # a second train() goes on from what was trained, shown or not
        each.args.max_steps, each.args.eval_strategy, each.args.save_strategy = 2, "no", "no"
        each.train()
    assert torch.equal(final_weights(resumed), final_weights(plain))


def test_the_best_model_is_the_best_average(tmp_path: Path) -> None:
    """Evaluated worse and worse: the first is the best, also after training has gone on and ended."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    seen = Seen()
    trainer = run(tmp_path, callbacks=[seen], **EVALUATED, **best)
    assert seen.losses == sorted(seen.losses, reverse=True), "the first average is the best of no other rule"
    assert trainer.evaluate()["eval_loss"] == seen.losses[0]
    trainer.save_model(str(tmp_path / "best"))
    assert torch.equal(final_weights(trainer), averages(trainer))
    with pytest.raises(ValueError, match="load_best_model_at_end with save_only_model"):
        run(tmp_path / "alone", save_only_model=True, **EVALUATED, **best)


def test_a_run_without_averages_saves_what_it_trains(tmp_path: Path) -> None:
    trainer = run_trainer(str(tmp_path), max_steps=2)
    trainer.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    name = "bert.pooler.dense.weight"
    assert torch.equal(saved[name], trainer.model.get_parameter(name))  # type: ignore[union-attr]

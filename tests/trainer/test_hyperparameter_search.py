"""``Trainer.hyperparameter_search`` over our names: each trial is the run that its settings alone would be."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForPreTraining

from hf_soo.integrations.trainer import SecondOrderTrainer
from tests.trainer.test_trainer import Examples, arguments, bert

SPACES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "rates and decays": ({"optim": "mkor"}, {"learning_rate": [0.003, 0.02], "weight_decay": [0.0, 0.1]}),
    "settings": ({"optim": "mkor"}, {"optim_args": ["update_period=1", "update_period=4,history=8"]}),
    "names": ({"optim": "mkor"}, {"optim": ["eva", "lamb", "adamw_torch"]}),
    "bases": ({"optim": "mkor"}, {"base_optim": ["adamw", "sgd"], "learning_rate": [0.004]}),
    "fields of Adam": ({"optim": "adamw"}, {"adam_beta1": [0.5, 0.95], "adam_epsilon": [1e-3]}),
    "batches": (
        {"optim": "rf_rmsprop", "learning_rate": 0.1}, {"per_device_train_batch_size": [2, 8], "seed": [1, 2]},
    ),
}  # fmt: skip


def trainer_of(folder: Path, settings: dict[str, Any]) -> SecondOrderTrainer:
    given = {"max_steps": 3, "lr_scheduler_type": "linear", "learning_rate": 0.01} | settings
    return SecondOrderTrainer(
        model_init=lambda: bert(),
        args=arguments(str(folder), **given),
        train_dataset=Examples(),
        eval_dataset=Examples(8),
    )


@pytest.mark.parametrize("kind", SPACES)
def test_a_trial_is_the_run_of_its_settings(kind: str, tmp_path: Path) -> None:
    fixed, space = SPACES[kind]
    given: list[dict[str, Any]] = []
    scores: list[float] = []

    def choose(trial: Any) -> dict[str, Any]:
        given.append({name: trial.suggest_categorical(name, values) for name, values in space.items()})
        return given[-1]

    def objective(metrics: dict[str, float]) -> float:
        scores.append(metrics["eval_loss"])
        return scores[-1]

    import optuna

    trainer = trainer_of(tmp_path, fixed)
    best = trainer.hyperparameter_search(
        choose, objective, n_trials=3, backend="optuna", sampler=optuna.samplers.GridSampler(space, seed=0)
    )
    assert len(given) > 1 and best.objective == min(scores)
    assert len({tuple(chosen.values()) for chosen in given}) == len(given)
    for chosen, score in zip(given, scores, strict=True):
        single = trainer_of(tmp_path, fixed | chosen)
        single.train()
        assert score == single.evaluate()["eval_loss"], chosen


def test_a_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither the model of the trial before, with its hooks, nor its optimizer."""
    models: list[Any] = []
    optimizers: list[Any] = []

    def init() -> Any:
        model = bert(BertForPreTraining)
        models.append(weakref.ref(model))
        return model

    class Kept(SecondOrderTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            optimizers.append(weakref.ref(self.second_order))
            return optimizer

    trainer = Kept(
        model_init=init, args=arguments(str(tmp_path), max_steps=1, lr_scheduler_type="linear"),
        train_dataset=Examples(), eval_dataset=Examples(8),
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.001, 0.01)}, n_trials=3, backend="optuna"
    )
    gc.collect()
    assert sum(model() is not None for model in models) <= 1 and sum(each() is not None for each in optimizers) <= 1
    assert trainer.model_accepts_loss_kwargs is False


def test_a_setting_that_cannot_be_is_told_in_its_trial(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"optim": "mkor"})
    for space, message in (
        ({"optim_args": "update_period=0"}, "update_period=0"),
        ({"learning_rate": -1.0}, "-1.0"),
        ({"optim": "mkro"}, "mkro"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.hyperparameter_search(lambda trial, space=space: space, n_trials=1, backend="optuna")
        trainer = trainer_of(tmp_path, {"optim": "mkor"})

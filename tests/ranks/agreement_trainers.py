"""Trainer's runs on two ranks that were given different things in one place, or in none: functions of a rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerState, set_seed

from hf_soo.integrations.trainer import SecondOrderTrainer
from hf_soo.runs.callbacks import RecordCallback
from hf_soo.runs.record import RunRecord
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.training import Job, Task, train
from tests.ranks.agreement_runs import net
from tests.ranks.cells import METHODS, STRATEGIES, Sentences, Strategy, forget, make_trainer
from tests.trainer.test_trainer import Examples, arguments, bert

ARGUMENTS: dict[str, tuple[Any, Any]] = {
    "max_steps": (2, 3),
    "num_train_epochs": (1.0, 2.0),
    "per_device_train_batch_size": (4, 2),
    "per_device_eval_batch_size": (8, 4),
    "gradient_accumulation_steps": (1, 2),
    "learning_rate": (0.01, 0.02),
    "weight_decay": (0.01, 0.1),
    "warmup_steps": (2, 1),
    "lr_scheduler_type": ("poly_warmup", "linear"),
    "max_grad_norm": (0.0, 1.0),
    "optim": ("mkor", "eva"),
    "optim_args": (None, "update_period=3"),
    "base_optim_args": (None, "eps=1e-4"),
    "precondition_exclude": (None, ["pooler"]),
    "save_strategy": ("no", "epoch"),
    "save_steps": (500, 1),
    "eval_steps": (None, 1),
    "logging_steps": (1, 2),
    "bf16": (False, True),
    "ddp_find_unused_parameters": (None, True),
    "train_sampling_strategy": ("random", "sequential"),
    "dataloader_drop_last": (False, True),
    "label_smoothing_factor": (0.0, 0.1),
    "seed": (42, 43),
    "data_seed": (None, 43),
}
"""An argument -> what rank 0 is given, and rank 1."""


def wet(where: str) -> Any:
    """A model with another dropout, in its configuration or put in by hand."""
    if where == "in the configuration":
        model = bert()
        model.config.hidden_dropout_prob = 0.1
        return model
    model = bert()
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    modules[-1].p = 0.25
    return model


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str, str, str]] = {
    "dropout by hand": (lambda: {"model": wet("by hand")}, "dropout", ".p': 0.0", ".p': 0.25"),
    "dropout": (lambda: {"model": wet("in the configuration")}, "model", "dropout_prob': 0.0", "dropout_prob': 0.1"),
    "training examples": (lambda: {"train_dataset": Examples(60)}, "training examples", "'64'", "'60'"),
    "evaluation examples": (lambda: {"eval_dataset": Examples(8)}, "evaluation examples", "'unknown'", "'8'"),
    "torch's seed": (lambda: {"seed": 7}, "order of the examples", "'seed 0'", "'seed 7'"),
}
"""What -> what rank 1 has instead, what the error calls it, and what it shows of the two."""

FREE: dict[str, dict[str, Any]] = {
    "paths and names": {"output_dir": "elsewhere", "run_name": "one", "log_level": "error"},
    "loader": {"dataloader_prefetch_factor": None, "dataloader_pin_memory": False},
    "seed of dropout": {"seed": 43},
}
"""Arguments of rank 1 alone that change nothing which the ranks share."""


def trained(rank: int, folder: str, parts: dict[str, Any], **changed: Any) -> str:
    """The error of a run, or "nothing"."""
    seed = parts.pop("seed", 0)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, **changed}
    args = arguments(settings.pop("output_dir", folder), **settings)
    given = {"model": bert(), "train_dataset": Examples(), **parts}
    trainer = SecondOrderTrainer(args=args, **given)
    set_seed(seed)
    try:
        trainer.train()
    except ValueError as error:
        assert trainer.state.global_step == 0
        return str(error)
    return "nothing"


def trainers(rank: int, world: int, folder: str) -> dict[str, Any]:
    """What becomes of every run; and of one under ZeRO, its health."""
    found: dict[str, Any] = {}
    for name, values in ARGUMENTS.items():
        length = {"max_steps": -1} if name == "num_train_epochs" else {}
        found[name] = trained(rank, folder, {}, **length, **{name: values[rank]})
    for name, (parts, *_) in OTHERS.items():
        found[name] = trained(rank, folder, parts() if rank == 1 else {})
    for name, changed in FREE.items():
        found[name] = trained(rank, f"{folder}/{name}", {}, data_seed=1, **(changed if rank == 1 else {}))
    found["order"] = {seed: order(rank, folder, seed) for seed in (None, 1)}
    found["runs"] = {case: recorded(rank, Path(folder) / "runs", case) for case in RUNS}
    zero = next(strategy for strategy in STRATEGIES if strategy.stage == 2)
    found["health"] = health(zero, Path(folder) / "zero")
    return found


def order(rank: int, folder: str, data_seed: int | None) -> list[int]:
    """The examples that this rank would draw first if nobody compared anything, its torch seeded by its rank."""
    args = arguments(folder, per_device_train_batch_size=4, data_seed=data_seed)
    data = [{"labels": torch.tensor(i)} for i in range(64)]
    trainer = SecondOrderTrainer(
        model=bert(), args=args, train_dataset=data, data_collator=lambda rows: torch.stack([r["labels"] for r in rows])
    )
    set_seed(rank)
    return [int(i) for drawn in list(trainer.get_train_dataloader())[:4] for i in drawn]


class Toy(Task):
    """A recorded run of two steps."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def make_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return net()

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {"train_examples": self.examples}

    def make_trainer(self, model: nn.Module, args: Any, callbacks: Any) -> Any:
        raise AssertionError("the ranks were given different things, and go on")


RUNS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "rate": ({"learning_rate": 0.5}, "name", "'mkor-lamb-lr0.01'", "'mkor-lamb-lr0.5'"),
    "rate under one name": ({"learning_rate": 0.5, "name": "run"}, "learning_rate", "'0.01'", "'0.5'"),
    "seed": ({"seed": 1}, "seed", "'42'", "'1'"),
    "data": ({"examples": 9}, "train_examples", "'8'", "'9'"),
    "target": ({"target_eval_loss": 2.0}, "target_eval_loss", "'None'", "'2.0'"),
    "comparison": ({"compare_with": "adamw"}, "compare_with", "'None'", "'adamw'"),
    "restart": ({"restart": True}, "restart", "'False'", "'True'"),
    "what it resumes": ({"resume_from_checkpoint": "a/checkpoint-2"}, "resume_from_checkpoint", "'None'", "point-2'"),
    "a result that one rank sees": ({"results_dir": "own"}, "finished", "'False'", "'True'"),
}
"""What rank 1 is given -> what the error calls it, and what it shows of the two."""


def recorded(rank: int, folder: Path, case: str) -> str:
    """The error of a run of the commands, before a Trainer is made."""
    given: dict[str, Any] = {"examples": 8} | (RUNS[case][0] if rank == 1 else {})
    examples, place = given.pop("examples"), folder / case.replace(" ", "_")
    if "name" in RUNS[case][0]:
        given["name"] = "run"
    if "results_dir" in RUNS[case][0]:  # the last step is there for both
        given["results_dir"] = str(folder / f"results{rank}")
        write_last_checkpoint(rank, place, Path(given["results_dir"]))
    told = {key: given.pop(key) for key in vars(RunArguments()) if key in given}
    settings = {"optim": "mkor", "learning_rate": 0.01, "max_steps": 2, "report_to": "none", "use_cpu": True} | given
    try:
        train(Job(RunArguments(**told), RunTrainingArguments(str(place), **settings)), Toy(examples))
    except ValueError as error:
        return str(error)
    return "nothing"


def write_last_checkpoint(rank: int, place: Path, results: Path) -> None:
    """The last checkpoint of a run, on a disk that both see; its JSON is on the second's own."""
    if rank == 0:
        (place / "checkpoint-2").mkdir(parents=True)
        TrainerState(global_step=2, max_steps=2).save_to_json(str(place / "checkpoint-2" / "trainer_state.json"))
    else:
        RunRecord("mkor-lamb-lr0.01", "mkor", "lamb", {}, 42, status="completed").write(results)
    dist.barrier()


def health(strategy: Strategy, folder: Path) -> dict[str, Any]:
    """What a record of a run under a strategy says of its layers."""
    trainer = make_trainer(strategy, METHODS["mkor"], "plain", folder, Sentences())
    trainer.args.max_steps = 2
    record = RunRecord("mkor", "mkor", "adamw", {}, 0)
    trainer.add_callback(RecordCallback(record))
    trainer.train()
    forget(Strategy("single", "single", 1))
    return {"whole": record.health, "first": record.curve[0].get("health")}

"""Runs that others save and load: accelerate's states, and torch's distributed checkpoint. Functions of a rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_soo.integrations.accelerate import bind, unwrap_optimizer
from tests.ranks.cells import SINGLE, Strategy, forget
from tests.ranks.fault_runs import ROWS, Run

METHODS = ("mkor", "mkor_h", "eva", "kfac-1", "rf_rmsprop")
STEPS, SAVED_AT = 6, 3


class Accelerated(Run):
    """As ``Run``, prepared by accelerate."""

    def __init__(self, how: str, method: str) -> None:
        self.how = how
        forget(Strategy(how, "zero", 2, 2) if how == "zero2" else SINGLE)
        plugin: dict[str, Any] = {}
        if how == "zero2":
            plugin["deepspeed_plugin"] = DeepSpeedPlugin(
                hf_ds_config={
                    "train_micro_batch_size_per_gpu": ROWS, "zero_allow_untested_optimizer": True,
                    "gradient_clipping": 0.0, "zero_optimization": {"stage": 2},
                }
            )  # fmt: skip
        elif how != "ddp":
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # no FSDP on a CPU otherwise
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            plugin["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2, state_dict_type=how, auto_wrap_policy="NO_WRAP"
            )
        self.accelerator = Accelerator(cpu=how != "zero2", **plugin)  # with it there is no DeepSpeed
        super().__init__("accelerate", method)

    def _start_accelerate(self) -> None:
        self.wrapped, self.prepared = self.accelerator.prepare(self.model, self.build())
        bind(self.accelerator, self.prepared)
        self.optimizer = unwrap_optimizer(self.prepared)  # type: ignore[assignment]
        kinds = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine"}
        assert type(self.wrapped).__name__ == kinds.get(self.how, "FSDPSequential"), "accelerate falls back in silence"

    def step(self, step: int, spoil: float | None = None) -> None:
        x, y = self.batch(step)
        loss = nn.functional.cross_entropy(self.wrapped(x), y)
        if self.how != "zero2":  # whose engine reports it
            self.optimizer.report_loss(loss)
        self.accelerator.backward(loss)
        self.prepared.step()
        self.prepared.zero_grad()


ACCELERATED = ("ddp", "zero2", "FULL_STATE_DICT", "SHARDED_STATE_DICT")


def through_accelerate(how: str, method: str, folder: Path) -> dict[str, bool]:
    """Whether a run that accelerate has saved and loaded ends as the one that went on."""
    run = Accelerated(how, method).steps(range(SAVED_AT))
    run.accelerator.save_state(str(folder))
    whole = run.steps(range(SAVED_AT, STEPS)).weights()
    again = Accelerated(how, method)
    again.accelerator.load_state(str(folder))
    steps = again.optimizer.steps
    found = {"same": torch.equal(again.steps(range(SAVED_AT, STEPS)).weights(), whole), "steps": steps == SAVED_AT}
    forget(SINGLE)
    return found


OPTIONS = {
    "sharded": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "first rank": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
}


def through_torch(strategy: str, method: str, options: StateDictOptions, folder: Path | None) -> dict[str, bool]:
    """The same with torch's functions, by a folder or in memory; and what the factors that are carried are good for."""
    run = Run(strategy, method).steps(range(SAVED_AT))
    model, moments = get_model_state_dict(run.model, options=options), _optimizer_state(run, options)
    if folder is not None:
        checkpoint.save({"model": model, "optimizer": moments}, storage_writer=checkpoint.FileSystemWriter(folder))
    saved = {"model": _copied(model), "optimizer": _copied(moments)}
    whole = run.steps(range(SAVED_AT, STEPS)).weights()
    again = Run(strategy, method)
    if folder is not None:
        saved = {
            "model": get_model_state_dict(again.model, options=options),
            "optimizer": _optimizer_state(again, options),
        }
        checkpoint.load(saved, storage_reader=checkpoint.FileSystemReader(folder))
    set_model_state_dict(again.model, saved["model"], options=options)
    set_optimizer_state_dict(again.model, again.optimizer, saved["optimizer"], options=options)
    steps = again.optimizer.steps
    return {"same": torch.equal(again.steps(range(SAVED_AT, STEPS)).weights(), whole), "steps": steps == SAVED_AT}


def _optimizer_state(run: Run, options: StateDictOptions) -> Any:
    return get_optimizer_state_dict(run.model, run.optimizer, options=options)


def _copied(value: Any) -> Any:
    """A state as it is now: what torch hands out are the tensors that the run goes on with."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def without_factors(strategy: str) -> dict[str, str | bool]:
    """A state whose factors are gone is refused; and asking an idle optimizer for its state is no step of it."""
    run = Run(strategy, "eva", base_args={"momentum": 0.0}).steps(range(2))
    steps, factors = run.optimizer.steps, run.factors()
    options = StateDictOptions()
    saved = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    kept = run.optimizer.steps == steps and torch.equal(run.factors(), factors)
    del saved["param_groups"][0]["second_order"]  # type: ignore[union-attr]
    try:
        set_optimizer_state_dict(run.model, run.optimizer, saved, options=options)
    except ValueError as error:
        return {"kept": kept, "error": str(error)}
    return {"kept": kept, "error": "nothing"}


def saved_by_others(rank: int, world: int, folder: str) -> dict[tuple[str, ...], Any]:
    """Every case: what it found, or its error."""
    found: dict[tuple[str, ...], Any] = {}
    for method in METHODS:
        for how in ACCELERATED:
            found[how, method] = through_accelerate(how, method, Path(folder) / how / method)
        for strategy in ("ddp", "fsdp2"):
            for name, options in OPTIONS.items():
                place = Path(folder) / strategy / method if name == "sharded" else None
                found[strategy, name, method] = through_torch(strategy, method, options, place)
    return found | {("without factors", strategy): without_factors(strategy) for strategy in ("ddp", "fsdp2")}

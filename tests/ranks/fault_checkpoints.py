"""Trainer runs on two ranks whose checkpoints are damaged, do not fit, or were being written when a rank died."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soo.integrations.trainer import SecondOrderTrainer
from tests.ranks.fault_runs import die, warnings_of
from tests.trainer.test_trainer import Examples, arguments, bert, final_weights, run_trainer

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
"""Six steps, of which 2, 4 and 6 are saved. One K-FAC run, since its ranks have to exchange their factors to save."""

KFAC: dict[str, Any] = {"optim": "kfac_expand", "optim_args": "update_period=1,inverse_period=2,grad_workers=1"}


def cut(file: Path) -> None:
    """To half its length."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ("preconditioner.pt", "optimizer.pt", "model.safetensors", "rng_state_1.pth", "scheduler.pt")
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    f"{name} {what}": (name, damage) for name in FILES for what, damage in (("missing", os.remove), ("cut", cut))
}
CONTINUED = ("preconditioner.pt missing", "optimizer.pt cut", "manifest.json cut")
"""Damages after which True is tried as well; a manifest that cannot be read tells nothing about the other files."""

MISFITS: dict[str, dict[str, Any]] = {
    "layer sizes": {"model": {"intermediate_size": 48}},
    "one layer more": {"model": {"num_hidden_layers": 3}},
    "layers": {"precondition_exclude": ["pooler"]},
    "method": {"optim": "eva"},
    "base": {"base_optim": "adamw"},
    "none of ours": {"optim": "adamw_torch"},
    "state": {"optim_args": "representation=dense"},
}


def resized(**changed: int) -> Any:
    """The runs' model with another size."""
    model = bert()
    config = copy.deepcopy(model.config)
    for name, value in changed.items():
        setattr(config, name, value)
    return type(model)(config) if changed else model


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What it raises: the type, and the message."""
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def copied(rank: int, run: Path, name: str, damage: Callable[[Path], None] | None = None, file: str = "") -> Path:
    """Another output folder with checkpoints 2 and 4 of a run, the later one damaged; made by rank 0."""
    folder = run.parent / name.replace(" ", "_")
    if rank == 0:
        for step in (2, 4):
            shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        if damage is not None:
            damage(folder / "checkpoint-4" / file)
    dist.barrier()
    return folder


def damaged_checkpoints(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The whole run, and what becomes of resuming it from checkpoints that are damaged or do not fit."""
    run = Path(folder) / "mkor"
    whole = final_weights(run_trainer(str(run), **SETTINGS))
    found: dict[str, Any] = {"weights": whole, "explicit": {}, "continued": {}, "misfits": {}}
    found["kfac"] = final_weights(run_trainer(f"{folder}/kfac", **SETTINGS, **KFAC))
    damages = DAMAGES | {"manifest.json cut": ("manifest.json", cut)}
    for case, (file, damage) in damages.items():
        output = copied(rank, run, case, damage, file)
        found["explicit"][case] = error_of(run_trainer, str(output), resume=str(output / "checkpoint-4"), **SETTINGS)
    for case in CONTINUED:
        found["continued"][case] = continued(Path(folder) / case.replace(" ", "_"))
    found["apart"] = folders_apart(rank, run)
    for case, changed in MISFITS.items():
        changed = dict(changed)
        model = resized(**changed.pop("model", {}))
        found["misfits"][case] = error_of(
            run_trainer, f"{folder}/misfit", model, resume=str(run / "checkpoint-4"), **{**SETTINGS, **changed}
        )
    return found


def folders_apart(rank: int, run: Path) -> list[str]:
    """The errors where each rank sees a disk of its own, and rank 1 has not got the last one: by True, and by name."""
    folder = run.parent / f"disk{rank}"
    checkpoint = folder / f"checkpoint-{4 - 2 * rank}"
    shutil.copytree(run / checkpoint.name, checkpoint)
    return [error_of(run_trainer, str(folder), resume=resume, **SETTINGS) for resume in (True, str(checkpoint))]


def continued(folder: Path, **settings: Any) -> dict[str, Any]:
    """A run resumed by True: its error or its weights, and what it warned of."""
    messages = warnings_of("hf_soo")
    trainers: list[Any] = []
    error = error_of(lambda: trainers.append(run_trainer(str(folder), resume=True, **SETTINGS, **settings)))
    weights: Tensor = final_weights(trainers[0]) if trainers else torch.zeros(0)
    return {"error": error, "weights": weights, "warnings": list(messages)}


class Killed(SecondOrderTrainer):
    """Loses a rank while it writes the checkpoint of step 4."""

    where: str
    victim: int

    def _here(self, where: str) -> bool:
        return self.state.global_step == 4 and where == self.where and self.args.process_index == self.victim

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._here("after optimizer.pt"):
            assert self.second_order is not None
            self.second_order.second_order_state = lambda: (  # type: ignore[method-assign]
                die() if os.path.exists(f"{output_dir}/optimizer.pt") else None
            )
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._here("before the random states"):
            die()
        super()._save_rng_state(output_dir)
        if self._here("before trainer_state.json"):
            die()


KILLS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "rank 0 after optimizer.pt": ("after optimizer.pt", 0, {}),
    "rank 0 before trainer_state.json": ("before trainer_state.json", 0, {}),
    "rank 1 before the random states": ("before the random states", 1, KFAC),
}


def killed_in_a_save(rank: int, world: int, folder: str, case: str) -> None:
    where, victim, settings = KILLS[case]
    args = arguments(f"{folder}/{case.replace(' ', '_')}", **SETTINGS, **settings)
    trainer = Killed(model=bert(), args=args, train_dataset=Examples())
    trainer.where, trainer.victim = where, victim
    trainer.train()


def resumed_after_a_kill(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {case: continued(Path(folder) / case.replace(" ", "_"), **KILLS[case][2]) for case in KILLS}

"""What the ranks of a Trainer's run were given, compared before anything is spread over them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from hf_soo.engine.comm import Communicator, checksums, text_of
from hf_soo.files import read_object
from hf_soo.integrations.checkpoints import MANIFEST_FILE

_OWN = frozenset({
    "output_dir", "resume_from_checkpoint", "local_rank", "deepspeed", "seed", "data_seed", "run_name", "report_to",
    "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "save_on_each_node", "save_total_limit", "debug",
    "skip_memory_metrics", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps",
})  # fmt: skip
"""Arguments that say where a rank reads and writes, what it shows, or how fast its data come; or are compared apart."""

WAY_OUT = (
    "start every rank with the same arguments, model, data and checkpoint (give data_seed=... where the ranks' seeds "
    "differ on purpose, for their dropout)."
)


def refuse_alone(args: Any) -> None:
    """Refuse processes that would each train alone: what a launcher starts without a GPU, unless the Trainer is told.

    Raises:
        ValueError: the launcher has started other processes, which the Trainer does not see.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started not in (1, args.world_size):
        way_out = "--ddp_backend gloo" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else "--use_cpu true"
        raise ValueError(
            f"The launcher started {started} processes, the Trainer sees {args.world_size}; without GPUs add {way_out}."
        )


def compare_arguments(args: Any, resume_from_checkpoint: str | bool | None) -> None:
    """Compare what a run is told; every rank must call it, before they look for a checkpoint together.

    Args:
        args: the TrainingArguments.
        resume_from_checkpoint: what ``Trainer.train`` was given.

    Raises:
        ValueError: it is not the same, on every rank.
    """
    given = {field.name: text_of(getattr(args, field.name)) for field in dataclasses.fields(args)}
    shared = {name: text for name, text in given.items() if name not in _OWN}
    resume = resume_from_checkpoint or None
    told = {"number of processes": str(args.world_size), "resume_from_checkpoint": name_of(resume)}
    Communicator().agree(shared | told, "the run's", WAY_OUT)


def compare_run(trainer: Any, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> None:
    """Compare what a run has made of that; every rank must call it, before model and optimizer are prepared.

    A seed may differ where it draws nothing but dropout: where ``data_seed`` orders the examples and the model was made
    before. Weights are compared where each rank shards its own (FSDP2); DDP and DeepSpeed hand out the first rank's.

    Args:
        trainer: with its arguments, model and data sets.
        max_steps: of the run, as counted from arguments and data.
        train_dataloader: what the run will draw from.
        checkpoint: what it goes on from.

    Raises:
        ValueError: it is not the same, on every rank.
    """
    args, model, comm = trainer.args, trainer.model, Communicator()
    if comm.world_size == 1:
        return
    draws = args.data_seed is None or trainer.model_init is not None
    deepspeed = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    comm.agree(
        {
            "max_steps, counted": str(max_steps),
            "data_seed": str(args.data_seed),
            "seed": str(args.seed) if draws else "of dropout alone",
            "order of the examples": _order(train_dataloader),
            "training examples": _size(trainer.train_dataset),
            "evaluation examples": _size(trainer.eval_dataset),
            "model": _config(model),
            "dropout": text_of(_dropout(model)),
            "DeepSpeed config": text_of(deepspeed.deepspeed_config) if deepspeed is not None else "none",
            "checkpoint": _checkpoint(checkpoint),
            "first weights": str(checksums(list(model.named_parameters()))) if _shards_its_own(trainer) else "given",
        },
        whose="the run's",
        way_out=WAY_OUT,
    )


def name_of(checkpoint: str | os.PathLike[str] | bool | None) -> str:
    """A checkpoint without the path under which a node sees it."""
    return Path(checkpoint).name if isinstance(checkpoint, (str, os.PathLike)) else str(checkpoint)


def _order(dataloader: Any) -> str:
    """The seed that accelerate shuffles with: torch's own of this process unless there is a data_seed."""
    batches = getattr(dataloader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # of which a rank takes its share
    seed = getattr(getattr(batches, "sampler", None), "initial_seed", None)
    return "no seed" if seed is None else f"seed {seed}"


def _size(data: Any) -> str:
    """How many examples a data set has, or each of several; of a stream nothing is known."""
    if isinstance(data, dict):
        return text_of({name: _size(part) for name, part in data.items()})
    try:
        return str(len(data))
    except TypeError:
        return "unknown"


def _config(model: nn.Module) -> str:
    """A transformers model's configuration but for where it came from, or the class's name."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return type(model).__name__
    elsewhere = {"_name_or_path", "transformers_version"}
    return text_of({key: value for key, value in config.to_dict().items() if key not in elsewhere})


def _dropout(model: nn.Module) -> dict[str, float]:
    """Every probability: a Dropout module's, and those that attention keeps as a number."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and ("dropout" in key or (key == "p" and "Dropout" in type(module).__name__))
    }


def _checkpoint(folder: str | None) -> str:
    """A checkpoint's name and its whole weights; nodes may see it under other paths, and each have files of its own."""
    if folder is None:
        return "none"
    file = Path(folder) / MANIFEST_FILE
    manifest = read_object(file) if file.is_file() else {}
    files = manifest.get("sha256", manifest.get("files", {}))
    weights = {name: found for name, found in files.items() if "model" in name and "/" not in name}
    return f"{name_of(folder)} ({hashlib.sha256(text_of(weights).encode()).hexdigest()[:16]})"


def _shards_its_own(trainer: Any) -> bool:
    """Whether no rank's weights are handed out to the others."""
    if not trainer.is_fsdp_enabled:
        return False
    return not trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading

"""Going on under another strategy than the checkpoint's: weights and base state out of whole tensors."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_soo.engine.dtensors import is_dtensor, placed_as
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.strategy import from_state_dict
from hf_soo.integrations.checkpoints import BASE_FILE, load_whole

WHOLE = "whole"
"""One process, or DistributedDataParallel on any number of ranks."""
SHARDS = "pytorch_model_fsdp_0"
"""Where accelerate puts the weights of FSDP2's SHARDED_STATE_DICT."""


def strategy_of(trainer: Any) -> str:
    """Over what a Trainer, prepared or not, shards: what its own checkpoints can be read by."""
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return f"zero{stage} x {trainer.args.world_size}"  # DeepSpeed reads its files on as many ranks alone
    if not trainer.is_fsdp_enabled:
        return WHOLE
    in_shards = "SHARDED_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    return "fsdp2 in shards" if in_shards else "fsdp2"


def load_weights(model: nn.Module, folder: str | os.PathLike[str], written_by: str) -> None:
    """Load a checkpoint's whole weights into a model, sharded or not; every rank must call it.

    Args:
        model: the bare model, with plain parameters, DTensors, or parameters that ZeRO-3 has taken apart.
        folder: the checkpoint.
        written_by: its strategy, for the message.

    Raises:
        ValueError: the checkpoint has no whole weights, or those of another model.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if (Path(folder) / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder} was written under {written_by!r} and holds a PEFT adapter; adapters can be resumed under the "
            "strategy they were written under alone."
        )
    if not files and not (Path(folder) / SHARDS).is_dir():
        raise ValueError(
            f"{folder} was written under {written_by!r} and has no whole weights (model.safetensors) to go on with "
            "under another strategy; resume as it was written, or let it write them: stage3_gather_16bit_weights_on_"
            "model_save: true (ZeRO-3)."
        )
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    saved = saved or _put_together(Path(folder) / SHARDS)
    names: dict[int, list[str]] = defaultdict(list)
    targets: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)  # tied weights have several
        targets[id(tensor)] = tensor
    for key, target in targets.items():
        found = next((name for name in names[key] if name in saved), None)
        if found is None:
            raise ValueError(f"{folder} has no weight {names[key][0]!r}, which this model has; use the same model.")
        with torch.no_grad():
            _assign(found, target, saved[found])


def _put_together(shards: Path) -> dict[str, Tensor]:
    """The whole weights of shards that any number of ranks wrote; each rank reads for itself."""
    # the imports cost most of a second, and are needed here alone
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(shards)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    whole = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in tensors.items()}
    load(whole, storage_reader=reader, no_dist=True)
    return {key.removeprefix("model."): tensor for key, tensor in whole.items()}


def _assign(name: str, target: Any, value: Tensor) -> None:
    shape = tuple(getattr(target, "ds_shape", target.shape))
    if shape != tuple(value.shape):
        raise ValueError(f"weight {name!r} has shape {tuple(value.shape)} in the checkpoint, {shape} in this model.")
    if is_dtensor(target):
        target.copy_(placed_as(value.to(target.dtype), target))
    elif hasattr(target, "ds_id"):
        import deepspeed  # an optional dependency; here it has been used already

        with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                target.copy_(value)
    else:
        target.copy_(value)


def load_base(optimizer: PreconditionedOptimizer, folder: str | os.PathLike[str]) -> None:
    """Load the base's state of a checkpoint that another strategy wrote; every rank must call it.

    Raises:
        ValueError: the checkpoint has none, or another optimizer's.
    """
    optimizer.load_base_state(saved_base_state(optimizer, folder))


def saved_base_state(optimizer: PreconditionedOptimizer, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The base's state of a checkpoint in whole tensors by parameter name (``base_state.py``).

    Args:
        optimizer: of the same model and groups.
        folder: the checkpoint.

    Raises:
        ValueError: the checkpoint has none, or one of other groups.
    """
    saved: Mapping[str, Any] | None = load_whole(folder, BASE_FILE)
    if saved is None and (plain := load_whole(folder, "optimizer.pt")) is not None:
        saved = from_state_dict(plain, optimizer.parameter_index.parameters)
    if saved is None:
        raise ValueError(
            f"{folder} has no state of the base optimizer in whole tensors ({BASE_FILE} or optimizer.pt); resume under "
            "the strategy it was written under."
        )
    return dict(saved)

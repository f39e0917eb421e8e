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
_ADAPTER = "adapter_model.safetensors"


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
    """Load a checkpoint's whole weights, or adapters, into a model, sharded or not; every rank must call it.

    Args:
        model: the bare model, with plain parameters, DTensors, or parameters that ZeRO-3 has taken apart.
        folder: the checkpoint.
        written_by: its strategy, for the message.

    Raises:
        ValueError: the checkpoint has no whole weights, or those of another model.
    """
    if adapter_files(model):
        _load_adapters(model, Path(folder), written_by)
        return
    if (Path(folder) / _ADAPTER).is_file():
        raise ValueError(
            f"{folder} was written under {written_by!r} and holds a PEFT adapter, which this model has not; put the "
            "adapters into the model before the Trainer is made."
        )
    _fill(model.state_dict(keep_vars=True), _whole(Path(folder), "model*.safetensors", written_by), folder)


def adapter_files(model: nn.Module) -> dict[str, str]:
    """The file in a checkpoint of each of a model's adapters (PEFT), by the adapter's name."""
    return {name: _ADAPTER if name == "default" else f"{name}/{_ADAPTER}" for name in getattr(model, "peft_config", ())}


def _load_adapters(model: Any, folder: Path, written_by: str) -> None:
    """Into the tensors that are there: PEFT's own loading makes those in half precision new, and fp32."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict  # who has adapters has it

    for name, file in adapter_files(model).items():
        if name not in model.active_adapters and not (folder / file).is_file():
            continue  # frozen, as the model's own weights are, and FSDP2's shards have none of them
        saved, state = _whole(folder, file, written_by), model.state_dict(keep_vars=True)
        own = get_peft_model_state_dict(model, state, name)
        if {id(tensor) for tensor in own.values()} <= {id(tensor) for tensor in state.values()}:
            _fill(own, saved, folder)
        else:  # made for the file, as prompts are
            set_peft_model_state_dict(model, saved, adapter_name=name)


def _whole(folder: Path, files: str, written_by: str) -> dict[str, Tensor]:
    """The tensors in whole files, or put together from FSDP2's shards."""
    found = sorted(folder.glob(files))
    if not found and not (folder / SHARDS).is_dir():
        raise ValueError(
            f"{folder} was written under {written_by!r} and has no whole weights ({files.replace('*', '')}) to go on "
            "with under another strategy; resume as it was written, or let it write them: stage3_gather_16bit_weights_"
            "on_model_save: true (ZeRO-3)."
        )
    saved = {name: tensor for file in found for name, tensor in load_file(file).items()}
    return saved or _put_together(folder / SHARDS)


def _fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Copy what was saved into the tensors of a model, of which each has one name or, tied, several."""
    names: dict[int, list[str]] = defaultdict(list)
    targets: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
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

"""Accelerate: our optimizer under its wrapper, and the loss scale of fp16 training."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, DistributedType

from hf_soo.engine.optimizer import PreconditionedOptimizer


def unwrap_optimizer(optimizer: Any) -> PreconditionedOptimizer | None:
    """Our optimizer inside what ``accelerator.prepare`` returned, or None if it is another one."""
    while optimizer is not None and not isinstance(optimizer, PreconditionedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def bind(accelerator: Accelerator, optimizer: Any) -> None:
    """Tell the optimizer the loss scale (fp16), and put it around the step of DeepSpeed's engine if there is one.

    Call it after ``accelerator.prepare``. Captured output gradients are then unscaled as the others are.

    Args:
        accelerator: the accelerator that runs the backward pass.
        optimizer: our optimizer, wrapped or not.

    Raises:
        NotImplementedError: the accelerator shards parameters in a way that is not supported, or not although asked.
    """
    ours = unwrap_optimizer(optimizer)
    if ours is None:
        return
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.NO):
        raise NotImplementedError(
            f"FSDP was asked for, but accelerate does not shard on {accelerator.device.type!r} and would train under "
            f"{accelerator.distributed_type.value} without a word; use DistributedDataParallel there."
        )
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise NotImplementedError(
            f"{ours.name} under Megatron-LM is not supported: it cuts layers; use DDP, FSDP2 or DeepSpeed."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        version = accelerator.state.fsdp_plugin.fsdp_version
        if version != 2:
            raise NotImplementedError(
                f"{ours.name} under FSDP version {version}, which flattens parameters, is not supported; set "
                "fsdp_version: 2."
            )
    if getattr(accelerator, "deepspeed_engine_wrapped", None) is not None:
        from hf_soo.integrations.deepspeed import attach  # deepspeed is an optional dependency

        attach(accelerator.deepspeed_engine_wrapped.engine, ours)
    scaler = accelerator.scaler
    if scaler is not None:
        ours.loss_scale = lambda: float(scaler.get_scale())

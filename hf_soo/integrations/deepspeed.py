"""DeepSpeed: our optimizer around the step of a ZeRO engine.

ZeRO replaces the parameters of the client optimizer by flat pieces and calls its ``step`` on them, so a gradient
transform has no place there. ``attach`` puts it around the engine's optimizer step instead, for every stage:

    after the reduction    raw gradients are clipped (the engine's clip is taken over), pieces gathered, G -> P
    the engine's step      overflow check, unscaling, and the base optimizer on the pieces
    afterwards             our step counter moves, unless the engine has skipped the step
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.passes.reads import ReadLayer
from hf_soo.integrations.zero import ZeroFragments, fragments_of
from hf_soo.optimizers.bases import check_flat
from hf_soo.optimizers.lamb import Lamb

__all__ = ["attach"]

logger = logging.getLogger(__name__)

MARK = "_hf_soo_step"
"""The attribute of an engine's optimizer that holds our step: attaching twice is attaching once."""


def attach(engine: Any, optimizer: PreconditionedOptimizer) -> None:
    """Make a DeepSpeed engine step with a second-order optimizer.

    Call it once, after ``deepspeed.initialize(model=model, optimizer=optimizer, config=...)`` and before the first
    step; then ``engine.backward(loss)`` and ``engine.step()`` as ever. SecondOrderTrainer does it by itself. The
    engine's ``gradient_clipping`` clips the raw averaged gradient, before the preconditioner, as Trainer does without
    DeepSpeed. Say it in the config: without it DeepSpeed clips at 1.0, and a warning says so.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        optimizer: the optimizer it was initialised with.

    Raises:
        ValueError: the engine steps another optimizer.
        NotImplementedError: the engine's set-up, or the base optimizer over flat pieces, is not supported.
    """
    if optimizer.stages.capture.sampled is not None:
        raise NotImplementedError(
            f"{optimizer.name} with fisher='mc' under DeepSpeed: its engine takes the sampled loss's backward pass for "
            "the step's own; use fisher='empirical', DDP or FSDP2."
        )
    zero = engine.optimizer
    whole = zero is optimizer  # ZeRO-0 in fp32: our own step is the engine's
    if not whole:
        _check_engine(engine, optimizer)
    _tell_clip(engine, optimizer)
    _follow_loss(engine, optimizer)
    if whole or hasattr(zero, MARK):
        return
    fragments = fragments_of(zero, engine.module, optimizer.stages.comm)
    optimizer.use(fragments)
    zero.step = step = _Step(optimizer, fragments)
    setattr(zero, MARK, step)


def _tell_clip(engine: Any, optimizer: PreconditionedOptimizer) -> None:
    clip = engine.gradient_clipping()
    if clip > 0 and "gradient_clipping" not in engine._config._param_dict:
        logger.warning(
            "the DeepSpeed config has no 'gradient_clipping', and DeepSpeed's default clips the gradients that %s is "
            "given at a norm of %s; set it (0.0: no clip).",
            optimizer.name, clip,
        )  # fmt: skip


def _check_engine(engine: Any, optimizer: PreconditionedOptimizer) -> None:
    zero = engine.optimizer
    stage = engine.zero_optimization_stage()
    stepped = zero if isinstance(zero, torch.optim.Optimizer) else zero.optimizer
    if stepped is not optimizer:  # not its base either: DeepSpeed's checkpoints would leave the factors out
        raise ValueError(
            f"the engine steps a {type(stepped).__name__}, not this {optimizer.name}; hand it over: "
            "deepspeed.initialize(model=model, optimizer=optimizer, config=...) without an 'optimizer' block in the "
            "config."
        )
    if not isinstance(zero, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)):
        raise NotImplementedError(
            f"{optimizer.name} under DeepSpeed's {type(zero).__name__} (stage {stage} in half precision) is not "
            "supported: it hides the gradients; use ZeRO stage 1, 2 or 3, or fp32 with stage 0."
        )
    if getattr(zero, "round_robin_gradients", False):
        raise NotImplementedError(
            f"{optimizer.name} with round_robin_gradients: DeepSpeed's map of parameters to pieces does not follow its "
            "own order then (0.19), and gradients would be exchanged; leave it out of the DeepSpeed config."
        )
    if getattr(zero, "torch_autocast_gradscaler", None) is not None:
        raise NotImplementedError(
            f"{optimizer.name} with torch_autocast in float16: the loss scale lies where it cannot be followed; use "
            "bfloat16, or DeepSpeed's own fp16."
        )
    read = [layer.name for layer in optimizer.layers if isinstance(layer, ReadLayer)]
    if read and isinstance(torch.nn.functional.linear, FunctionType):  # torch's own is built in
        raise NotImplementedError(
            f"{optimizer.name} under ZeRO-3's memory_efficient_linear, which hides what {read[:2]} ({len(read)} "
            "matrices of experts or routers) are multiplied with: set 'zero_optimization': {'memory_efficient_linear': "
            "false} in the DeepSpeed config, from before the model is made, or precondition_exclude them."
        )
    offload = getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
    if offload:
        raise NotImplementedError(
            f"{optimizer.name} with offload_optimizer: the gradients have left the accelerator before they could be "
            "preconditioned; leave offload_optimizer out of the DeepSpeed config."
        )
    world, data_parallel = dist.get_world_size(), dist.get_world_size(group=zero.dp_process_group)
    if world != data_parallel:
        raise NotImplementedError(
            f"{optimizer.name} with {data_parallel} data-parallel ranks of {world}: tensor, pipeline, sequence and "
            "expert parallelism are not supported; use data parallelism alone."
        )
    check_flat(type(optimizer.base), f"ZeRO stage {stage}")


def _follow_loss(engine: Any, optimizer: PreconditionedOptimizer) -> None:
    """Report what goes into the backward pass, as weighted there: with Trainer the engine steps before it returns."""
    if hasattr(engine, MARK):
        return
    backward = engine.backward

    @functools.wraps(backward)
    def reporting(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = kwargs.get("scale_wrt_gas", True)
        optimizer.report_loss(loss.detach() / (engine.gradient_accumulation_steps() if own else 1))
        return backward(loss, *args, **kwargs)

    setattr(engine, MARK, reporting)
    engine.backward = reporting


class _Step:
    """``step`` of an engine's optimizer, with ours around it."""

    def __init__(self, optimizer: PreconditionedOptimizer, fragments: ZeroFragments) -> None:
        self.optimizer, self.fragments, self.zero = optimizer, fragments, fragments.zero
        self.step: Callable[..., Any] = self.zero.step
        self.clip, self.zero.clip_grad = float(self.zero.clip_grad), 0.0  # clipped here: before the preconditioner

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fragments, zero = self.fragments, self.zero
        norm = fragments.measure()
        if fragments.skips_overflow and not math.isfinite(norm):  # DeepSpeed reads it from the device as well
            self.optimizer.begin_window()
            return self.step(*args, **kwargs)
        if self.clip > 0:
            fragments.scale_(torch.clamp(self.clip / (norm + 1e-6), max=1.0))
            if self.optimizer.halves is not None and isinstance(self.optimizer.base, Lamb):
                fragments.measure()  # what is left: it clips the gradients too, before they become directions

        def engine_step() -> Any:
            if isinstance(self.optimizer.base, Lamb):
                fragments.measure()  # of P: for its own clip
            result = self.step(*args, **kwargs)
            if not zero.overflow:
                zero._global_grad_norm = norm  # what Trainer logs: the raw gradient's, as without DeepSpeed
            return result

        return self.optimizer.step_around(engine_step, skipped=lambda: zero.overflow)

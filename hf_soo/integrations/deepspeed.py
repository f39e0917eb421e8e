"""DeepSpeed: our optimizer around the step of a ZeRO engine.

ZeRO replaces the parameters of the client optimizer by flat pieces and calls its ``step`` on them, so a gradient
transform has no place there. ``attach`` puts it around the engine's optimizer step instead, for every stage:

    after the reduction    raw gradients are clipped (the engine's clip is taken over), pieces gathered, G -> P
    the engine's step      overflow check, unscaling, and the base optimizer on the pieces
    afterwards             our step counter moves, unless the engine has skipped the step
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from hf_soo.engine.comm import Communicator, Group
from hf_soo.engine.layers import Layer
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.shards import ShardedGradients, Span
from hf_soo.optimizers.bases import check_flat
from hf_soo.optimizers.lamb import Lamb
from hf_soo.optimizers.partition import Fragment

__all__ = ["attach"]

MARK = "_hf_soo_step"
"""The attribute of an engine's optimizer that holds our step: attaching twice is attaching once."""


def attach(engine: Any, optimizer: PreconditionedOptimizer) -> None:
    """Make a DeepSpeed engine step with a second-order optimizer.

    Call it once, after ``deepspeed.initialize(model=model, optimizer=optimizer, config=...)`` and before the first
    step; then ``engine.backward(loss)`` and ``engine.step()`` as ever. SecondOrderTrainer does it by itself. The
    engine's ``gradient_clipping`` clips the raw averaged gradient, before the preconditioner, as Trainer does without
    DeepSpeed.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        optimizer: the optimizer it was initialised with (or whose ``base`` it was).

    Raises:
        ValueError: the engine steps another optimizer.
        NotImplementedError: the engine's set-up, or the base optimizer over flat pieces, is not supported.
    """
    _follow_loss(engine, optimizer)
    zero = engine.optimizer
    if zero is optimizer:  # ZeRO-0 in fp32: our own step is the engine's
        return
    _check_engine(engine, optimizer)
    if hasattr(zero, MARK):
        return
    source = _source_of(zero, engine.module)
    optimizer.driven = True
    optimizer.gradients = ShardedGradients(source, optimizer.comm)
    optimizer.loss_scale = lambda: source.loss_scale
    step = _Step(optimizer, zero, source)
    setattr(zero, MARK, step)
    zero.step = step


def _check_engine(engine: Any, optimizer: PreconditionedOptimizer) -> None:
    zero = engine.optimizer
    stage = engine.zero_optimization_stage()
    if not isinstance(zero, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)):
        raise NotImplementedError(
            f"{optimizer.name} under DeepSpeed's {type(zero).__name__} (stage {stage} in half precision) is not "
            "supported: it hides the gradients; use ZeRO stage 1, 2 or 3, or fp32 with stage 0."
        )
    if zero.optimizer not in (optimizer, optimizer.base):
        raise ValueError(
            f"the engine steps a {type(zero.optimizer).__name__}, not this {optimizer.name}; hand it over: "
            "deepspeed.initialize(model=model, optimizer=optimizer, config=...) without an 'optimizer' block in the "
            "config."
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
    check_flat(optimizer.base, f"ZeRO stage {stage}")


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

    def __init__(self, optimizer: PreconditionedOptimizer, zero: Any, source: _ZeroSource) -> None:
        self.optimizer, self.zero, self.source = optimizer, zero, source
        self.step: Callable[..., Any] = zero.step
        self.clip, zero.clip_grad = float(zero.clip_grad), 0.0  # clipped here: before the preconditioner
        self.partition = Partition(source, optimizer.comm)
        if isinstance(optimizer.base, Lamb):
            optimizer.base.partition = self.partition

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        norm = self.partition.measure()
        if self.source.skips_overflow and not math.isfinite(norm):  # DeepSpeed reads it from the device as well
            self.optimizer.begin_window()
            return self.step(*args, **kwargs)
        if self.clip > 0:
            self.partition.scale_(torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        self.optimizer.precondition()
        if isinstance(self.optimizer.base, Lamb):
            self.partition.measure()
        result = self.step(*args, **kwargs)
        if self.zero.overflow:
            self.optimizer.begin_window()
        else:
            self.zero._global_grad_norm = norm  # what Trainer logs: the raw gradient's, as without DeepSpeed
            self.optimizer.advance()
        return result


class _ZeroSource:
    """The pieces of a ZeRO optimizer. See ``hf_soo.engine.shards.Source``."""

    layout: object = "whole"  # pieces are no rows: every rank keeps whole states
    in_rows = False
    group: Group = None
    zero: Any

    def __init__(self, zero: Any, model: nn.Module) -> None:
        """Exchange which rank holds what; every rank must call it.

        Args:
            zero: the engine's optimizer.
            model: the engine's module.
        """
        self.zero = zero
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        mine = [self.own_span(p) for p in self.parameters]
        everybody: list[list[Span]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        self._spans = [list(spans) for spans in zip(*everybody, strict=True)]

    @property
    def loss_scale(self) -> float:
        """The factor on the gradients (fp16)."""
        return float(getattr(self.zero, "loss_scale", 1.0))

    @property
    def skips_overflow(self) -> bool:
        """Whether the engine drops a step whose gradient is not finite."""
        return True

    def has(self, layer: Layer) -> bool:
        """Always, for what is trained: DeepSpeed fills in zeros."""
        return id(layer.weight) in self._index and (layer.bias is None or id(layer.bias) in self._index)

    def spans(self, parameter: Tensor) -> list[Span]:
        """As exchanged."""
        return self._spans[self._index[id(parameter)]]

    def index(self, parameter: Tensor) -> int:
        """The number of a parameter, the same on every rank."""
        return self._index[id(parameter)]

    def own_span(self, parameter: Tensor) -> Span:
        """This rank's piece of a parameter."""
        raise NotImplementedError

    def piece(self, parameter: Tensor) -> Tensor:
        """See ``Source``."""
        raise NotImplementedError

    def place(self, parameter: Tensor) -> tuple[Tensor, int]:
        """The flat tensor that the base steps on for this rank's piece, and the piece's first element there."""
        raise NotImplementedError

    def pieces(self) -> list[Tensor]:
        """All pieces on this rank that are not empty."""
        return [self.piece(p) for p in self.parameters if self.own_span(p).length]


class _Flat(_ZeroSource):
    """ZeRO-1 and 2, and DeepSpeed's BF16_Optimizer: a group's parameters end to end, cut into one part a rank."""

    def own_span(self, parameter: Any) -> Span:
        """From DeepSpeed's map; a rank without a piece has none (trap T3 of such code: it is None, not absent)."""
        if parameter._hp_mapping is None:
            return Span(0, 0)
        address = parameter._hp_mapping.lp_fragment_address
        return Span(int(address.start), int(address.numel))

    def piece(self, parameter: Any) -> Tensor:
        """Where the engine will look for it."""
        span = self.own_span(parameter)
        if not span.length:
            return parameter.new_empty(0)  # type: ignore[no-any-return]
        grad: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        if grad.numel() == span.length:
            return grad
        return grad.view(-1)[span.start : span.start + span.length]  # BF16_Optimizer keeps all of it on each rank

    def place(self, parameter: Any) -> tuple[Tensor, int]:
        """In the partition of its group."""
        mapping = parameter._hp_mapping
        (flat,) = self.zero.optimizer.param_groups[mapping.param_group_index]["params"]
        return flat, int(mapping.hp_fragment_address.start)

    @property
    def skips_overflow(self) -> bool:
        """Not in bf16 without DeepSpeed's check; BF16_Optimizer always does."""
        return isinstance(self.zero, BF16_Optimizer) or bool(
            self.zero.dtype != torch.bfloat16 or self.zero.check_grad_overflow
        )


class _Scattered(_ZeroSource):
    """ZeRO-3: each parameter is cut into equal parts."""

    def __init__(self, zero: Any, model: nn.Module) -> None:
        """See ``_ZeroSource``."""
        self._where = {
            id(p): (i, j) for i, group in enumerate(zero.fp16_groups) for j, p in enumerate(group)
        }
        super().__init__(zero, model)

    def own_span(self, parameter: Any) -> Span:
        """The last parts may be shorter, or empty."""
        room, numel = parameter.partition_numel(), parameter.ds_numel
        start = min(room * dist.get_rank(), numel)
        return Span(start, min(room, numel - start))

    def piece(self, parameter: Tensor) -> Tensor:
        """The start of its buffer, without padding."""
        i, j = self._where[id(parameter)]
        buffer: Tensor = self.zero.averaged_gradients[i][j]
        return buffer.view(-1)[: self.own_span(parameter).length]

    def place(self, parameter: Tensor) -> tuple[Tensor, int]:
        """In its sub-group."""
        i, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[i], int(offset)


def _source_of(zero: Any, model: nn.Module) -> _ZeroSource:
    kind = _Scattered if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) else _Flat
    return kind(zero, model)


class Partition:
    """How the flat tensors that the base steps on make up whole parameters, and the norm of all gradients.

    See ``hf_soo.optimizers.partition.Partition``.
    """

    def __init__(self, source: _ZeroSource, comm: Communicator) -> None:
        """Take down the fragments of each flat tensor.

        Args:
            source: the pieces.
            comm: the means of communication.
        """
        self.source, self.comm = source, comm
        self.tensors = len(source.parameters)
        self._norm = torch.zeros(())
        self._fragments: dict[int, list[Fragment]] = {}
        for parameter in source.parameters:
            span = source.own_span(parameter)
            if span.length:
                flat, start = source.place(parameter)
                fragment = Fragment(source.index(parameter), start, span.length)
                self._fragments.setdefault(id(flat), []).append(fragment)

    def fragments(self, param: Tensor) -> Sequence[Fragment]:
        """Those of a flat tensor, in order."""
        return sorted(self._fragments.get(id(param), []), key=lambda fragment: fragment.start)

    def sum_(self, values: Tensor) -> None:
        """Over all ranks."""
        self.comm.sum_([values])

    def measure(self) -> Tensor:
        """|g| over all whole gradients now, free of the loss scale; 0-d."""
        pieces = self.source.pieces()
        norms = torch._foreach_norm(pieces, 2, dtype=torch.float32) if pieces else []
        total = torch.stack(list(norms)).square().sum() if norms else self.source.parameters[0].new_zeros(()).float()
        self.comm.sum_([total])
        self._norm = total.sqrt() / self.source.loss_scale
        return self._norm

    def grad_norm(self) -> Tensor:
        """As measured last: after the preconditioner."""
        return self._norm

    def scale_(self, factor: Tensor) -> None:
        """Multiply all gradients."""
        for piece in self.source.pieces():
            piece.mul_(factor)

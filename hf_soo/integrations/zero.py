"""ZeRO's fragments: which rank holds which range of a parameter's gradient, and where the base steps on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.engine.chunks import root, squares, tensor_norms
from hf_soo.engine.comm import Communicator
from hf_soo.engine.dtensors import full_shape
from hf_soo.engine.layers import Layer
from hf_soo.engine.pieces.exchange import Cut, Span
from hf_soo.engine.pieces.fragments import Fragment, Fragments
from hf_soo.engine.strategy import Entry, LocalGradient, Names, Value, on_cpu


class ZeroFragments(Fragments):
    """Where a ZeRO optimizer keeps gradients and state: pieces of parameters, end to end in flat tensors.

    It is its base's ``Partition`` too: it knows which elements of a flat tensor belong to which whole parameter, and
    the norm of all gradients.
    """

    layout = "whole"  # pieces are no rows: every rank keeps whole states
    external_step = True

    def __init__(self, zero: Any, model: nn.Module, comm: Communicator) -> None:
        """Exchange which rank holds what; every rank must call it."""
        super().__init__(comm, None)
        self.zero = zero
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.tensors = len(self.parameters)
        self.partition = self
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        mine = [self.own_span(p) for p in self.parameters]
        everybody: list[list[Span]] = [[]] * self.size
        dist.all_gather_object(everybody, mine)
        self._spans = [list(spans) for spans in zip(*everybody, strict=True)]
        self._norm: Tensor | None = None
        self._fragments: dict[int, list[Fragment]] = {}
        self._matrices: dict[int, list[tuple[Cut, slice]]] = {}
        for number, (parameter, span) in enumerate(zip(self.parameters, mine, strict=True)):
            flat, start = self.flat_of(parameter)
            cut = Cut(full_shape(parameter), self._spans[number])
            self._matrices.setdefault(id(flat), []).append((cut, slice(start, start + span.length)))
            if span.length:
                self._fragments.setdefault(id(flat), []).append(Fragment(number, start, span.length))
        for fragments in self._fragments.values():
            fragments.sort(key=lambda fragment: fragment.start)

    @property
    def loss_scale(self) -> float:
        """The factor on the gradients (fp16)."""
        return float(getattr(self.zero, "loss_scale", 1.0))

    @property
    def skips_overflow(self) -> bool:
        """Whether the engine drops a step whose gradient is not finite; ZeRO-3 does."""
        return True

    def has(self, layer: Layer) -> bool:
        """Always, for what is trained: DeepSpeed fills in zeros."""
        return id(layer.weight) in self._index and (layer.bias is None or id(layer.bias) in self._index)

    def spans(self, parameter: Tensor) -> list[Span]:
        """As exchanged."""
        return self._spans[self._index[id(parameter)]]

    @abstractmethod
    def own_span(self, parameter: Tensor) -> Span:
        """This rank's piece of a parameter."""

    @abstractmethod
    def flat_of(self, parameter: Tensor) -> tuple[Tensor, int]:
        """The flat tensor that the base steps on, and the first element of this rank's piece (0: there is none)."""

    def model_parameters(self, base: Optimizer, names: Names) -> list[list[tuple[str, Tensor]]]:
        """The base steps on pieces of them."""
        return [[(name, self.named[name]) for name in mine if name in self.named] for mine in names]

    def local_gradients(self, base: Optimizer, names: Names, moved: Collection[str]) -> Iterator[LocalGradient]:
        """Ranges of the flat tensors."""
        for group, mine in zip(base.param_groups, names, strict=True):
            for name, parameter in ((name, self.named[name]) for name in mine):
                flat, start = self.flat_of(parameter)
                cut, piece = slice(start, start + self.own_span(parameter).length), self.piece(parameter).view(-1)
                yield LocalGradient(group, flat, flat[cut], piece, cut, self.loss_scale, name in moved)
        self._norm = None  # whoever asks for gradients may have changed them

    def weights(self, base: Optimizer, names: Names, value: Value) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the model; the base steps on copies of its own."""
        for group, mine in zip(base.param_groups, names, strict=True):
            for parameter in (self.named[name] for name in mine):
                flat, start = self.flat_of(parameter)
                piece = value(group, flat, slice(start, start + self.own_span(parameter).length))
                yield self._weight(parameter, piece)

    @abstractmethod
    def _weight(self, parameter: Any, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Where this rank keeps a parameter, and what shall stand there, from this rank's piece of that."""

    # ---- norms of whole parameters -----------------------------------------------------------------------------------

    def parts_of(self, param: Tensor) -> Sequence[Fragment]:
        """See ``Partition``."""
        return self._fragments.get(id(param), [])

    def matrices_in(self, param: Tensor) -> Sequence[tuple[Cut, slice]]:
        """See ``Partition``."""
        return self._matrices.get(id(param), [])

    def gradients(self) -> list[Tensor]:
        """All pieces of gradients on this rank that are not empty."""
        return [self.piece(p) for p in self.parameters if self.own_span(p).length]

    def sum_norms_(self, values: Tensor) -> None:
        """See ``Partition``: over all ranks."""
        self.comm.sum_([values])

    def measure(self) -> Tensor:
        """|g| over all whole gradients now, free of the loss scale; 0-d."""
        pieces = self.gradients()
        summed = (
            squares(torch.stack(tensor_norms(pieces)).float()) if pieces else self.parameters[0].new_zeros(2).float()
        )
        self.comm.sum_([summed])
        self._norm = root(summed) / self.loss_scale
        return self._norm

    def grad_norm(self) -> Tensor:
        """As measured last, after the preconditioner; anew if they may have changed since."""
        return self.measure() if self._norm is None else self._norm

    def scale_(self, factor: Tensor) -> None:
        """Multiply all gradients by a 0-d factor."""
        for piece in self.gradients():
            piece.mul_(factor)

    # ---- the base's state --------------------------------------------------------------------------------------------

    def base_entries(self, base: Optimizer, names: Names) -> Iterator[tuple[str, Entry]]:
        """The pieces of each parameter's state from all ranks; what has not the flat tensor's shape as it is."""
        for name in (name for mine in names for name in mine):
            parameter = self.named[name]
            flat, start = self.flat_of(parameter)
            length, entry = self.own_span(parameter).length, {}
            for key, value in base.state.get(flat, {}).items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    (value,) = self.assemble([value[start : start + length]], [self.spans(parameter)])
                    value = value.view(full_shape(parameter))
                entry[key] = on_cpu(value)
            yield name, entry

    def restore_base_entries(self, base: Optimizer, names: Names, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """This rank's pieces, into the flat tensors; "step" holds for all of them."""
        for name in (name for mine in names for name in mine):
            parameter = self.named[name]
            flat, start = self.flat_of(parameter)
            mine, state = self.own_span(parameter), base.state[flat]
            for key, value in saved[name].items():
                if isinstance(value, Tensor) and key != "step" and tuple(value.shape) == full_shape(parameter):
                    if key not in state:
                        state[key] = torch.zeros_like(flat, dtype=value.dtype)
                    piece = value.reshape(-1)[mine.start : mine.start + mine.length]
                    state[key][start : start + mine.length] = piece.to(flat.device)
                else:
                    state[key] = value.to(flat.device, copy=True) if isinstance(value, Tensor) else value


class _FlatFragments(ZeroFragments):
    """ZeRO-1 and 2, and DeepSpeed's BF16_Optimizer: a group's parameters end to end, cut into one part a rank."""

    def __init__(self, zero: Any, model: nn.Module, comm: Communicator) -> None:
        """See ``ZeroFragments``."""
        groups = zero.bf16_groups if isinstance(zero, BF16_Optimizer) else zero.bit16_groups
        self._group = {id(p): i for i, group in enumerate(groups) for p in group}
        super().__init__(zero, model, comm)

    def own_span(self, parameter: Any) -> Span:
        """From DeepSpeed's map, which is None, not absent, where this rank has no piece."""
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

    def flat_of(self, parameter: Any) -> tuple[Tensor, int]:
        """In the partition of its group."""
        mapping = parameter._hp_mapping
        (flat,) = self.zero.optimizer.param_groups[self._group[id(parameter)]]["params"]
        return flat, 0 if mapping is None else int(mapping.hp_fragment_address.start)

    def _weight(self, parameter: Any, piece: Tensor) -> tuple[Tensor, Tensor]:
        """All of it, on every rank."""
        (whole,) = self.assemble([piece], [self.spans(parameter)])
        return parameter.data, whole.view_as(parameter)

    @property
    def skips_overflow(self) -> bool:
        """Not in bf16 without DeepSpeed's check; BF16_Optimizer always does."""
        return isinstance(self.zero, BF16_Optimizer) or bool(
            self.zero.dtype != torch.bfloat16 or self.zero.check_grad_overflow
        )


class _ScatteredFragments(ZeroFragments):
    """ZeRO-3: each parameter is cut into equal parts."""

    def __init__(self, zero: Any, model: nn.Module, comm: Communicator) -> None:
        """See ``ZeroFragments``."""
        self._where = {id(p): (i, j) for i, group in enumerate(zero.fp16_groups) for j, p in enumerate(group)}
        super().__init__(zero, model, comm)

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

    def flat_of(self, parameter: Tensor) -> tuple[Tensor, int]:
        """In its sub-group."""
        i, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[i], int(offset)

    def _weight(self, parameter: Any, piece: Tensor) -> tuple[Tensor, Tensor]:
        """The part without padding."""
        return parameter.ds_tensor.data.view(-1)[: piece.numel()], piece

    def forget_gathered(self, model: nn.Module) -> None:
        """Small parameters stay gathered, so they are again."""
        self.zero.checkpoint_event_prologue()
        self.zero.checkpoint_event_epilogue()


def fragments_of(zero: Any, model: nn.Module, comm: Communicator) -> ZeroFragments:
    """The fragments of a ZeRO optimizer; every rank must call it."""
    kind = _ScatteredFragments if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) else _FlatFragments
    return kind(zero, model, comm)

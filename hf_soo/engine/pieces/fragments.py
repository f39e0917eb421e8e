"""Gradients of which each rank stores a piece: FSDP2's row shards, and ZeRO's fragments.

A piece is a range of the flat gradient. Methods that can (``Preconditioner.row_wise``) work on row shards where they
lie; for the others, and for pieces that are no rows, each layer's pieces go to one rank, some layers at a time, and
come back as pieces of P. Factors that learn from whole gradients have them gathered on every rank.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soo.engine.comm import Communicator, Group
from hf_soo.engine.dtensors import full_shape
from hf_soo.engine.gradients import ALL_ROWS, Groups, Joint, TransformNorms
from hf_soo.engine.layers import Layer, accumulation_dtype, joined
from hf_soo.engine.pieces.exchange import Cut, Exchange, Span, deal
from hf_soo.engine.placement import Placement
from hf_soo.engine.strategy import Strategy

GATHER_BYTES = 2**28
"""The most that is gathered in one message, unless a single layer is larger."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``start : start + length`` of a flat parameter belong to whole tensor number ``tensor``.

    The number is the same on every rank.
    """

    tensor: int
    start: int
    length: int


@dataclass(frozen=True)
class Part:
    """What of a parameter belongs to a layer: elements ``start`` and on, of ``shape``; mostly all."""

    parameter: Tensor
    start: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, layer: Layer, parameter: Tensor) -> Part:
        """The part of the weight, or of the bias."""
        return cls(parameter, *layer.part(full_shape(parameter)))

    @property
    def all(self) -> bool:
        """Whether it is the whole parameter."""
        return self.shape == full_shape(self.parameter)

    def of_span(self, span: Span) -> Span:
        """What of a piece of the parameter lies in it, counted from its own first element."""
        if self.all:
            return span
        start, length = span.start - self.start, math.prod(self.shape)
        first, last = max(start, 0), min(start + span.length, length)
        return Span(first, last - first) if first < last else Span(0, 0)


class Fragments(Strategy):
    """Gradients in pieces: what is common to row shards and to fragments that are no rows.

    Attributes:
        in_rows: whether pieces are whole rows of the first dimension.
    """

    in_pieces = True
    in_rows = False

    def __init__(self, comm: Communicator, group: Group) -> None:
        """Take the group of ranks that hold the pieces of a gradient."""
        self.comm, self.group = comm, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._owner: dict[str, int] = {}  # layer name -> the rank that transforms it; empty: all do
        self._exchanges: dict[tuple[str, ...], Exchange] = {}

    @abstractmethod
    def spans(self, parameter: Tensor) -> list[Span]:
        """The piece of each rank of the group."""

    @abstractmethod
    def piece(self, parameter: Tensor) -> Tensor:
        """This rank's piece of the gradient where it is stored, in any shape."""

    def by_rows(self, layer: Layer) -> bool:
        """Whether both the method and the pieces allow it. A single row is no axis to methods that work by axes."""
        return self.row_wise and self.in_rows and layer.rows_first and full_shape(layer.weight)[0] > 1

    def rows(self, layer: Layer) -> slice:
        """From the piece of the weight; the bias is cut alike."""
        if not self.by_rows(layer):
            return ALL_ROWS
        mine, width = self.spans(layer.weight)[self.rank], math.prod(full_shape(layer.weight)[1:])
        return slice(mine.start // width, (mine.start + mine.length) // width)

    def batches(self, groups: Groups, joined: bool = False) -> list[Groups]:
        """All row shards at once; layers to be gathered one by one, as many in a portion as ``GATHER_BYTES`` allow."""
        by_rows = [group for group in groups if self.by_rows(group[0])]
        return ([by_rows] if by_rows else []) + list(self._portions(groups))

    def _portions(self, groups: Groups) -> Iterator[Groups]:
        portion: Groups = []
        size = 0
        for layer in (layer for group in groups if not self.by_rows(group[0]) for layer in group):
            bytes_ = math.prod(layer.shape) * accumulation_dtype(layer.weight.dtype).itemsize
            if portion and size + bytes_ > GATHER_BYTES:
                yield portion
                portion, size = [], 0
            portion.append([layer])
            size += bytes_
        if portion:
            yield portion

    def share_work(self, layers: Sequence[Layer], cost: Callable[[Layer], float], placement: Placement) -> None:
        """See ``Strategy``; not where the ranks that can are of several groups (K-FAC's grid under HSDP)."""
        self._exchanges.clear()
        self.shares_work = placement.world in (None, self.size)
        apart = [layer for layer in layers if self.shares_work and not self.by_rows(layer)]
        allowed = [placement.gradient_workers(layer.name) or range(self.size) for layer in apart]
        owners = deal([cost(layer) for layer in apart], self.size, allowed)
        self._owner = {layer.name: owner for layer, owner in zip(apart, owners, strict=True)}

    def portions(self, groups: Groups, joined: bool) -> Iterator[tuple[Groups, Sequence[Joint | None]]]:
        """See ``Strategy``."""
        for batch in self.batches(groups, joined):
            fetched = self.shares_work and not self.by_rows(batch[0][0])
            yield batch, self._fetch([layer for (layer,) in batch]) if fetched else self.read(batch)

    def read(self, groups: Groups) -> list[Joint]:
        """Views of the shards, or one message."""
        if groups and self.by_rows(groups[0][0]):
            return [self._read_rows(group) for group in groups]
        layers = [layer for (layer,) in groups]
        whole = iter(self._gather(parts_of(layers)))
        return [_joint(layer, whole) for layer in layers]

    def _fetch(self, layers: list[Layer]) -> list[Joint | None]:
        """Whole gradients of the layers that this rank transforms; one message."""
        parts, dtype = parts_of(layers), _dtype(layers)
        pieces = [self._free(part).to(dtype) for part in parts]
        found = iter([whole for _, whole in self._exchange(layers).gather(range(len(parts)), pieces.__getitem__)])
        return [_joint(layer, found) if self._owner[layer.name] == self.rank else None for layer in layers]

    def _exchange(self, layers: Sequence[Layer]) -> Exchange:
        """Of the parts of some layers."""
        key = tuple(layer.name for layer in layers)
        if key not in self._exchanges:
            cuts = [Cut(part.shape, self._part_spans(part)) for part in parts_of(layers)]
            owner = [self._owner[layer.name] for layer in layers for _ in parts_of([layer])]
            self._exchanges[key] = Exchange(self.comm, self.group, cuts, [0.0] * len(cuts), owner)
        return self._exchanges[key]

    def _part_spans(self, part: Part) -> list[Span]:
        return [part.of_span(span) for span in self.spans(part.parameter)]

    def _free(self, part: Part) -> Tensor:
        """This rank's piece in the accumulation dtype, free of the loss scale."""
        piece, scale = _computed(self._piece(part)), self.loss_scale
        return piece if scale == 1.0 else piece / scale

    def _read_rows(self, layers: Sequence[Layer]) -> Joint:
        weights = [_computed(layer.as_matrix(self.piece(layer.weight))) for layer in layers]
        biases = [None if layer.bias is None else _computed(self.piece(layer.bias)) for layer in layers]
        return Joint(*joined(zip(weights, biases, strict=True)), self.rows(layers[0]))

    def own(
        self, groups: Groups, grads: Sequence[Joint | None], norms: list[TransformNorms]
    ) -> tuple[list[Joint], list[TransformNorms]]:
        """The rows, or this rank's flat pieces of a whole P; one message, and a small one for the norms."""
        if self.by_rows(groups[0][0]):
            return super().own(groups, grads, norms)
        layers = [layer for (layer,) in groups]
        if not self.shares_work:
            return [self._own(layer, grad) for layer, grad in zip(layers, grads, strict=True) if grad], norms
        return self._return(layers, grads), self._seen_by_all(layers, grads, norms)

    def _return(self, layers: list[Layer], grads: Sequence[Joint | None]) -> list[Joint]:
        """Pieces of P of all layers, [1, length] each."""
        parts, flat = parts_of(layers), []
        for layer, grad in zip(layers, grads, strict=True):
            if grad is not None:
                like = torch.empty(Part.of(layer, layer.weight).shape, device="meta")
                flat += [layer.from_matrix(grad.weight[0], like).reshape(-1), *([] if grad.bias is None else grad.bias)]
        exchange = self._exchange(layers)
        mine = (i for i, owner in enumerate(exchange.owner) if owner == self.rank)
        prototype = torch.empty(0, dtype=_dtype(layers), device=layers[0].weight.device)
        found = exchange.scatter(range(len(parts)), dict(zip(mine, flat, strict=True)), prototype)
        pieces = [piece[None] for _, piece in sorted(found, key=lambda each: each[0])]
        return [Joint(pieces.pop(0), None if layer.bias is None else pieces.pop(0)) for layer in layers]

    def _seen_by_all(
        self, layers: list[Layer], grads: Sequence[Joint | None], norms: list[TransformNorms]
    ) -> list[TransformNorms]:
        """What each rank has measured on its layers, on every rank."""
        dtype, mine = _dtype(layers), iter(norms)
        table = torch.zeros(4, len(layers), dtype=torch.float64, device=layers[0].weight.device)
        for i, each in enumerate(None if grad is None else next(mine) for grad in grads):
            if each is not None:
                unit = torch.ones_like(each.before) if each.unit is None else each.unit
                table[:, i] = torch.cat([*each.tensors(), unit])
        self.comm.sum_([table], self.group)
        return [TransformNorms(*row.to(dtype)[:, None].unbind()) for row in table.unbind(1)]

    def _own(self, layer: Layer, grad: Joint) -> Joint:
        part = Part.of(layer, layer.weight)
        weight = self._cut(part, layer.from_matrix(grad.weight[0], torch.empty(part.shape, device="meta")))
        if layer.bias is None or grad.bias is None:
            return Joint(weight, None)
        return Joint(weight, self._cut(Part.of(layer, layer.bias), grad.bias[0]))

    def _cut(self, part: Part, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor, [1, length]; a copy, so that the whole can be freed."""
        mine = part.of_span(self.spans(part.parameter)[self.rank])
        return whole.reshape(1, -1)[:, mine.start : mine.start + mine.length].clone()

    def write(self, group: list[Layer], grad: Joint) -> None:
        """Into the pieces."""
        scale = self.loss_scale
        for i, layer in enumerate(group):
            for parameter, new in ((layer.weight, grad.weight), (layer.bias, grad.bias)):
                if parameter is not None and new is not None:
                    piece = self._piece(Part.of(layer, parameter))
                    if piece.data_ptr() != new[i].data_ptr():  # else it was changed in place
                        piece.copy_((new[i] * scale if scale != 1.0 else new[i]).reshape(piece.shape))

    def biases(self, layers: Sequence[Layer]) -> list[Tensor]:
        """One message."""
        return self._gather([Part.of(layer, layer.bias) for layer in layers if layer.bias is not None])

    def sum_(self, groups: Groups, tensors: Sequence[Tensor]) -> None:
        """One message, if the groups were read by rows."""
        if self.by_rows(groups[0][0]):
            self.comm.sum_(tensors, self.group)

    def gather(self, layer: Layer, rows: Tensor) -> Tensor:
        """One message, if the layer is read by rows."""
        if not self.by_rows(layer):
            return rows
        width = math.prod(full_shape(layer.weight)[1:])
        own_width = math.prod(rows.shape[1:])
        spans = [
            Span(span.start // width * own_width, span.length // width * own_width) for span in self.spans(layer.weight)
        ]
        (whole,) = self.assemble([rows], [spans])
        return whole.view(-1, *rows.shape[1:])

    def _piece(self, part: Part) -> Tensor:
        """What this rank stores of a part's gradient."""
        piece = self.piece(part.parameter)
        if part.all:
            return piece
        mine = self.spans(part.parameter)[self.rank]
        own = part.of_span(mine)
        first = part.start + own.start - mine.start if own.length else 0
        return piece.view(-1)[first : first + own.length]

    def _gather(self, parts: Sequence[Part]) -> list[Tensor]:
        """Whole gradients in the accumulation dtype, free of the loss scale, in one message."""
        if not parts:
            return []
        whole = self.assemble([self._free(part) for part in parts], [self._part_spans(part) for part in parts])
        return [tensor.view(part.shape) for tensor, part in zip(whole, parts, strict=True)]

    def assemble(self, pieces: Sequence[Tensor], spans: Sequence[list[Span]]) -> list[Tensor]:
        """Flat whole tensors from the pieces of all ranks.

        Args:
            pieces: this rank's, one of each tensor.
            spans: of each tensor, the piece of each rank.
        """
        slots = [_slots(each) for each in spans]
        lengths = [sum(slot[rank] for slot in slots) for rank in range(self.size)]
        dtype = reduce(torch.promote_types, (piece.dtype for piece in pieces))
        message = pieces[0].new_zeros(max(lengths), dtype=dtype)
        offset = 0
        for piece, slot in zip(pieces, slots, strict=True):
            message[offset : offset + piece.numel()] = piece.reshape(-1)
            offset += slot[self.rank]
        gathered = self.comm.gather(message, self.group, self.size)
        offsets = [0] * self.size
        whole = []
        for each, slot in zip(spans, slots, strict=True):
            whole.append(_joined(gathered, offsets, each))
            offsets = [offset + length for offset, length in zip(offsets, slot, strict=True)]
        return whole


def parts_of(layers: Sequence[Layer]) -> list[Part]:
    """Those of the weight, and of the bias if there is one, layer by layer."""
    return [Part.of(layer, p) for layer in layers for p in (layer.weight, layer.bias) if p is not None]


def _joint(layer: Layer, whole: Iterator[Tensor]) -> Joint:
    """A layer's gradient from the next of its ``_parts``."""
    weight = layer.as_matrix(next(whole))[None]
    return Joint(weight, None if layer.bias is None else next(whole)[None])


def _dtype(layers: Sequence[Layer]) -> torch.dtype:
    """That holds the gradients of all layers."""
    return reduce(torch.promote_types, (accumulation_dtype(layer.weight.dtype) for layer in layers))


def _cut_evenly(spans: list[Span]) -> bool:
    """Whether all pieces but the last ones, which may be shorter or empty, have one length and follow one another."""
    longest, total = max(span.length for span in spans), sum(span.length for span in spans)
    return all(span.start == min(rank * longest, total) for rank, span in enumerate(spans))


def _slots(spans: list[Span]) -> list[int]:
    """The room of each rank's piece in a message: equal for all if the tensor is cut evenly."""
    lengths = [span.length for span in spans]
    return [max(lengths)] * len(lengths) if _cut_evenly(spans) else lengths


def _joined(gathered: Tensor, offsets: list[int], spans: list[Span]) -> Tensor:
    """One flat tensor out of a message, [numel]; in one copy if it was cut evenly and its pieces lie alike."""
    total = sum(span.length for span in spans)
    if _cut_evenly(spans) and len(set(offsets)) == 1:
        return gathered[:, offsets[0] : offsets[0] + spans[0].length].reshape(-1)[:total]
    whole = gathered.new_empty(total)
    for rank, span in enumerate(spans):
        whole[span.start : span.start + span.length] = gathered[rank, offsets[rank] : offsets[rank] + span.length]
    return whole


def _computed(tensor: Tensor) -> Tensor:
    """A tensor in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor.dtype))

"""Tensors that lie in pieces and are made whole at one rank each: which rank's, what that sends, and the work there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from hf_soo.engine.layers import Layer
from hf_soo.engine.pieces.exchange import Cut, Span, deal, row_spans
from hf_soo.engine.pieces.fragments import parts_of
from hf_soo.optimizers.matrices import matrix_shape
from hf_soo.optimizers.muon import Muon
from hf_soo.optimizers.orthogonal import Orthogonaliser
from hf_soo.plan.method_on_model import MethodOnModel
from hf_soo.plan.model_shape import ModelShape
from hf_soo.plan.request import Layout

_FLOAT = 4


@dataclass(frozen=True)
class Share:
    """A rank's.

    Args:
        to_owners: bytes of its pieces that it sends to where they are made whole, its own among them.
        back: bytes of the results that it sends to where their pieces lie, its own among them.
        flops: of its results.
    """

    to_owners: int
    back: int
    flops: float


def gathered(method: MethodOnModel, layout: Layout) -> list[Layer]:
    """The layers whose gradients lie in pieces that the method cannot work on."""
    transform = method.preconditioner
    if transform is None or not layout.sharded or layout.ranks == 1:
        return []
    if layout.strategy != "fsdp2":
        return method.layers
    return [layer for layer in method.layers if not layer.rows_first or transform.row_sums(layer) is None]


def shares_of_transform(method: MethodOnModel, layout: Layout) -> list[Share]:
    """Of each rank, of G -> P of the layers that are ``gathered``."""
    transform, layers, W = method.preconditioner, gathered(method, layout), layout.ranks
    if transform is None or not layers:
        return []
    grid = method.grid(W)
    allowed = [range(W) if grid is None else grid.column(grid.owner[layer.name]) for layer in layers]
    costs = [transform.flops(layer)[0] for layer in layers]
    owners = deal(costs, W, allowed)
    parts = [(part, owner) for layer, owner in zip(layers, owners, strict=True) for part in parts_of([layer])]
    spans = _spans([tuple(part.parameter.shape) for part, _ in parts], layout, W)
    cuts = [
        Cut(part.shape, [part.of_span(span) for span in each]) for (part, _), each in zip(parts, spans, strict=True)
    ]
    sent = _sent(cuts, [owner for _, owner in parts], W)
    return [
        Share(out * _FLOAT, back * _FLOAT, sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank))
        for rank, (out, back) in enumerate(sent)
    ]


def shares_of_muon(method: MethodOnModel, shape: ModelShape, layout: Layout) -> list[Share]:
    """Of each rank, of Muon's polar factors; empty for another base."""
    if method.base != "muon":
        return []
    given = dict(method.pair.settings) if method.preconditioner is None else {}
    if given.get("ns_dtype", "auto") == "auto":
        given["ns_dtype"] = layout.iteration_dtype
    like = torch.empty(1, 1, device="meta")
    muon = Muon([like], matrices=[like], **given)
    rule = Orthogonaliser.of(muon.param_groups[0], like, torch.zeros((), device="meta"))
    dealt = layout.ranks if layout.sharded or muon.share else 1
    spans = _spans(shape.matrices, layout, dealt)
    whole = [Cut(matrix_shape(matrix), each) for matrix, each in zip(shape.matrices, spans, strict=True)]
    costs = [rule.cost(cut.shape) for cut in whole]
    owners, width = deal(costs, dealt), rule.prototype.element_size()
    cuts = [cut if rule.row_beta is None else cut.widened(1) for cut in whole]
    found = [
        Share(
            out * _FLOAT,
            back * width if dealt > 1 else 0,
            sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank),
        )
        for rank, (out, back) in enumerate(_sent(cuts, owners, dealt))
    ]
    return found * (layout.ranks // dealt)


def _sent(cuts: Sequence[Cut], owners: Sequence[int], ranks: int) -> Iterator[tuple[int, int]]:
    """Elements that each rank sends to owners, and back."""
    for rank in range(ranks):
        out = sum(cut.sent(rank, owner).length for cut, owner in zip(cuts, owners, strict=True))
        mine = (cut for cut, owner in zip(cuts, owners, strict=True) if owner == rank)
        yield out, sum(span.length for cut in mine for span in cut.spans)


def _spans(shapes: Iterable[Sequence[int]], layout: Layout, ranks: int) -> list[list[Span]]:
    """How each tensor lies on the ranks: whole, by rows, or in even slices of all (ZeRO-1, 2) or each (ZeRO-3)."""
    sizes = [math.prod(shape) for shape in shapes]
    if layout.strategy == "fsdp2":
        return [row_spans(shape, ranks) for shape in shapes]
    if not layout.sharded:
        return [[Span(0, size)] * ranks for size in sizes]
    found, start = [], 0
    for size in sizes:
        part, begun = (-(-size // ranks), 0) if layout.strategy == "zero3" else (-(-sum(sizes) // ranks), start)
        ends = [min(max(rank * part - begun, 0), size) for rank in range(ranks + 1)]
        found.append([Span(a, b - a) for a, b in pairwise(ends)])
        start += size
    return found

"""What Muon's matrices cost each rank: which it makes whole, what that sends, and its products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from hf_soo.engine.pieces.exchange import Cut, Span, deal, row_spans
from hf_soo.optimizers.matrices import matrix_shape
from hf_soo.optimizers.muon import Muon
from hf_soo.optimizers.orthogonal import Orthogonaliser
from hf_soo.plan.method_on_model import MethodOnModel
from hf_soo.plan.model_shape import ModelShape
from hf_soo.plan.request import Layout

_MOMENTUM_BYTES = 4


@dataclass(frozen=True)
class Share:
    """A rank's.

    Args:
        to_owners: bytes of its pieces that it sends to where they are made whole, its own among them.
        back: bytes of the results that it sends to where their pieces lie, its own among them.
        flops: of its matrices' iterations.
    """

    to_owners: int
    back: int
    flops: float


def shares_of_muon(method: MethodOnModel, shape: ModelShape, layout: Layout) -> list[Share]:
    """Of each rank; empty for another base."""
    if method.base != "muon":
        return []
    given = dict(method.pair.settings) if method.preconditioner is None else {}
    if given.get("ns_dtype", "auto") == "auto":
        given["ns_dtype"] = layout.iteration_dtype
    like = torch.empty(1, 1, device="meta")
    muon = Muon([like], matrices=[like], **given)
    rule, W = Orthogonaliser.of(muon.param_groups[0], like, torch.zeros((), device="meta")), layout.ranks
    dealt = W if layout.sharded or muon.share else 1
    cuts = list(_cuts(shape, layout, dealt))
    costs = [rule.cost(cut.shape) for cut in cuts]
    owners = deal(costs, dealt)
    width = rule.prototype.element_size()
    columns = [(cut.shape[-1] + (rule.row_beta is not None)) / cut.shape[-1] for cut in cuts]
    found = []
    for rank in range(dealt):
        mine = [i for i, owner in enumerate(owners) if owner == rank]
        sent = sum(
            columns[i] * cut.sent(rank, owner).length for i, (cut, owner) in enumerate(zip(cuts, owners, strict=True))
        )
        back = sum(columns[i] * sum(span.length for span in cuts[i].spans) for i in mine)
        flops = sum(costs[i] for i in mine)
        found.append(Share(round(sent * _MOMENTUM_BYTES), round(back * width) if dealt > 1 else 0, flops))
    return found * (W // dealt)


def _cuts(shape: ModelShape, layout: Layout, ranks: int) -> Iterator[Cut]:
    """How each matrix lies on the ranks: whole, by rows, or in even slices of all (ZeRO-1, 2) or each (ZeRO-3)."""
    whole = sum(math.prod(matrix) for matrix in shape.matrices)
    start = 0
    for matrix in shape.matrices:
        size = math.prod(matrix)
        if layout.strategy == "fsdp2":
            spans = row_spans(matrix, ranks)
        elif layout.sharded:
            part = -(-(size if layout.strategy == "zero3" else whole) // ranks)
            begun = 0 if layout.strategy == "zero3" else start
            ends = [min(max(rank * part - begun, 0), size) for rank in range(ranks + 1)]
            spans = [Span(a, b - a) for a, b in pairwise(ends)]
        else:
            spans = [Span(0, size)] * ranks
        start += size
        yield Cut(matrix_shape(matrix), spans)

"""What a rank sends in a step, by kind: the collectives that torch, DeepSpeed and this library ask for.

Bytes are those of the message handed to the collective, whatever algorithm moves it: the tensor of an all-reduce,
reduce or broadcast (of every one that the rank takes part in), the whole result of an all-gather, the whole input of a
reduce-scatter or all-to-all.

========== ==========================================================================================================
kind       what
========== ==========================================================================================================
gradients  the average over ranks: all-reduce (DDP, ZeRO-0), reduce-scatter (ZeRO-1 once a step; ZeRO-2 and 3 for each
           micro-batch; FSDP2 once a step, as accelerate's no_sync has it)
parameters all-gathers: FSDP2 and ZeRO-3 before each forward and each backward pass, ZeRO-1 and 2 after the step
statistics what hooks summed, on update steps: one flat all-reduce; K-FAC: packed triangles, reduced to each owner, and
           what became of each layer, in a small all-reduce
inverses   K-FAC: owner to its column, on refresh steps
directions K-FAC: P from a layer's column to the rest of each row, in every step
shards     whole gradients gathered, or what replaces it (thin products and scalars), where gradients are sharded
base       the norms of a LAMB whose tensors are sharded; Muon's matrices to the ranks that make them whole, and back
loss       MKOR-H: the loss of the global batch
========== ==========================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_soo.bench.step_kinds import Kind
from hf_soo.engine.capture import GradientRecorder
from hf_soo.engine.layers import Layer
from hf_soo.engine.placement import Plan
from hf_soo.engine.preconditioner import Preconditioner
from hf_soo.engine.sums import SumRecorder
from hf_soo.plan.method_on_model import MethodOnModel, bytes_of
from hf_soo.plan.model_shape import ModelShape
from hf_soo.plan.owners import Share, gathered, shares_of_muon, shares_of_transform
from hf_soo.plan.request import Layout

Collective = Literal["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all"]
When = Literal["step", "micro_batch", "update", "refresh"]
KINDS = ("gradients", "parameters", "statistics", "inverses", "directions", "shards", "base", "loss")
FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Message:
    """Messages of one kind.

    Args:
        kind: of ``KINDS``.
        collective: how it is sent.
        bytes: of all of them together, for the rank with the most; see the module's docstring.
        count: how many.
        ranks: how many ranks take part in each.
        stride: the distance between those ranks; 1: neighbours, which may share a node.
        when: in which steps, or in each micro-batch.
        received: bytes that come from another rank, for the rank with the most.
    """

    kind: str
    collective: Collective
    bytes: int
    ranks: int
    count: int = 1
    stride: int = 1
    when: When = "step"
    received: int | None = None

    def times(self, kind: Kind, accumulation: int) -> int:
        """How often in a step of a kind."""
        of = {"step": 1, "micro_batch": accumulation, "update": int(kind.updates), "refresh": int(kind.refreshes)}
        return of[self.when]


def messages(method: MethodOnModel, shape: ModelShape, layout: Layout, rank: int | None = None) -> list[Message]:
    """All messages of a rank (None: for each kind of message, the one with the most bytes); a rank alone sends none."""
    if layout.ranks == 1:
        return []
    found = [*_training(shape, layout), *_second_order(method, layout, rank)]
    if layout.sharded:
        found += _of_shards(method, layout, rank)
    found += _of_base(method, shape, layout, rank)
    return [message for message in found if message.bytes]


def sent(found: list[Message], kind: Kind, accumulation: int = 1) -> dict[str, int]:
    """Bytes of each kind of message in a step of a kind."""
    return {name: sum(m.bytes * m.times(kind, accumulation) for m in found if m.kind == name) for name in KINDS}


def _training(shape: ModelShape, layout: Layout) -> Iterator[Message]:
    """What the strategy itself sends, whatever the optimizer."""
    W, whole = layout.ranks, shape.count * layout.sent_bytes
    if layout.strategy in ("ddp", "zero0"):
        yield Message("gradients", "all_reduce", whole, W)
        return
    if layout.strategy == "fsdp2":
        units, padded = len(shape.blocks) + 1, padded_elements(shape.parameters.values(), W) * layout.sent_bytes
        blocks = padded_elements((shape.parameters[name] for block in shape.blocks for name in block), W)
        yield Message("parameters", "all_gather", padded, W, count=units, when="micro_batch")
        yield Message(  # the rest of the model is not resharded between the passes
            "parameters", "all_gather", blocks * layout.sent_bytes, W, count=units - 1, when="micro_batch"
        )
        yield Message("gradients", "reduce_scatter", padded, W, count=units)
        return
    scatters: When = "step" if layout.strategy == "zero1" else "micro_batch"
    yield Message("gradients", "reduce_scatter", whole, W, when=scatters)
    if layout.strategy == "zero3":
        yield Message("parameters", "all_gather", 2 * whole, W, count=2, when="micro_batch")
    else:
        yield Message("parameters", "all_gather", whole, W)


def padded_elements(shapes: Iterable[Sequence[int]], ranks: int) -> int:
    """Of tensors that are each cut into row shards of one length, the last ones padded."""
    return sum(-(-rows // ranks) * ranks * math.prod(rest) for rows, *rest in shapes)


def _second_order(method: MethodOnModel, layout: Layout, rank: int | None) -> Iterator[Message]:
    """Statistics, inverses and directions; see ``placement.Plan``."""
    transform, W = method.preconditioner, layout.ranks
    if transform is None:
        return
    if transform.watches_loss:
        yield Message("loss", "all_reduce", DOUBLE, W)
    buffers = method.buffers
    grid = method.grid(W)
    if grid is None:
        yield Message("statistics", "all_reduce", sum(t.nbytes for each in buffers for t in each), W, when="update")
        return
    counts = sum(each[i].nbytes for each in buffers for i in (0, 3))
    triangles = sum((t.nbytes + math.prod(t.shape[:-1]) * t.element_size()) // 2 for each in buffers for t in each[1:3])
    outcomes = 2 * DOUBLE * len(method.layers) * len(transform.side_names)
    owners = len(set(grid.owner.values()))
    yield Message("statistics", "all_reduce", counts + outcomes, W, count=2, when="update")
    yield Message("statistics", "reduce", triangles, W, count=owners, when="update")
    yield Message("statistics", "all_reduce", outcomes, W, when="refresh")
    apart = {layer.name for layer in gathered(method, layout)}  # their P comes back from one rank in pieces
    moved = [layer for layer in method.layers if layer.name not in apart]
    yield from _of_grid(method.layers, moved, transform, grid, range(grid.columns) if rank is None else [rank])


def _of_grid(
    layers: Sequence[Layer], whole: Sequence[Layer], transform: Preconditioner, grid: Plan, ranks: Sequence[int]
) -> Iterator[Message]:
    """Inverses down the columns, and directions of the ``whole`` layers along the rows, for the rank with the most."""
    k, columns = grid.workers, grid.columns
    if k > 1:
        shared = {layer.name: bytes_of(transform.init(layer), transform.shared) for layer in layers}
        most = max(sum(b for name, b in shared.items() if grid.is_gradient_worker(rank, name)) for rank in ranks)
        yield Message("inverses", "broadcast", most, k, count=k, stride=columns, when="refresh", received=most)
    if columns > 1:
        moved = {layer.name: FLOAT * (math.prod(layer.matrix) + 3) for layer in whole}
        away = max(sum(b for name, b in moved.items() if not grid.is_gradient_worker(rank, name)) for rank in ranks)
        yield Message("directions", "broadcast", sum(moved.values()), columns, count=columns, received=away)


def _of_shards(method: MethodOnModel, layout: Layout, rank: int | None) -> Iterator[Message]:
    """What a method needs of gradients that other ranks hold: sums over row shards, or whole ones at one rank each."""
    transform, W, layers = method.preconditioner, layout.ranks, method.layers
    if transform is None:
        return
    apart, recorder = gathered(method, layout), transform.recorder
    if apart:
        yield from _exchanged("shards", shares_of_transform(method, layout), rank)
        yield Message("shards", "all_reduce", 4 * DOUBLE * len(apart), W)  # the norms that their owners measure
    if apart and isinstance(recorder, GradientRecorder):  # factors that learn from them are everybody's
        whole = sum(math.prod(layer.matrix) for layer in apart)
        if layout.strategy == "fsdp2":  # an expert lies on a rank or two
            whole = padded_elements((layer.matrix for layer in apart if not layer.stack), W)
            whole += sum(math.prod(layer.matrix) for layer in apart if layer.stack)
        yield Message("shards", "all_gather", FLOAT * whole, W, when="update")
    if layout.strategy != "fsdp2":
        return
    if isinstance(recorder, SumRecorder) and recorder.outputs and recorder.output_parts == 1:  # b = bias.grad
        biases = sum(layer.shape[0] for layer in layers if layer.bias is not None)
        yield Message("shards", "all_gather", FLOAT * biases, W, when="update")
    thin = [layer for layer in layers if layer not in apart]
    sums = [each for layer in thin if (each := transform.row_sums(layer)) is not None]
    if not thin:
        return
    for numbers in zip(*(each.update for each in sums), strict=True):  # all layers in one message
        yield Message("shards", "all_reduce", FLOAT * sum(numbers), W, when="update")
    if transform.measures:  # |G|, for the unit of its square
        yield Message("shards", "all_reduce", FLOAT * len(thin), W)
    for numbers in zip(*(each.every for each in sums), strict=True):
        yield Message("shards", "all_reduce", FLOAT * sum(numbers), W)


def _of_base(method: MethodOnModel, shape: ModelShape, layout: Layout, rank: int | None) -> Iterator[Message]:
    """LAMB's norms: room for |w|² and |u|² of each tensor, and two numbers for its clip; Muon's two all-to-alls."""
    W = layout.ranks
    if method.base == "lamb" and layout.sharded:
        yield Message("base", "all_reduce", FLOAT * 2 * len(shape.parameters), W)
        yield Message("base", "all_reduce", FLOAT * 2, W)
    yield from _exchanged("base", shares_of_muon(method, shape, layout), rank)


def _exchanged(kind: str, shares: Sequence[Share], rank: int | None) -> Iterator[Message]:
    """To the owners, and back."""
    for sent in ([share.to_owners for share in shares], [share.back for share in shares]) if shares else ():
        yield Message(kind, "all_to_all", max(sent) if rank is None else sent[rank], len(shares))

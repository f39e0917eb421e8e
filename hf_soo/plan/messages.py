"""What a rank sends in a step, by kind: the collectives that torch, DeepSpeed and this library ask for.

Bytes are those of the message handed to the collective, whatever algorithm moves it: the tensor of an all-reduce,
reduce or broadcast (of every one that the rank takes part in), the whole result of an all-gather, the whole input of a
reduce-scatter.

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
base       the norms of a LAMB whose tensors are sharded
loss       MKOR-H: the loss of the global batch
========== ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_soo.bench.step_kinds import Kind
from hf_soo.engine.layers import RowLayer
from hf_soo.engine.placement import Plan
from hf_soo.engine.preconditioner import Side
from hf_soo.engine.sums import SumRecorder
from hf_soo.plan.method_on_model import Place, Subject, bytes_of, matrix_of
from hf_soo.plan.model_shape import ModelFacts
from hf_soo.plan.request import Layout
from hf_soo.preconditioners.eva_s import EvaS
from hf_soo.preconditioners.rmsprop import RMSProp

Collective = Literal["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter"]
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


def messages(subject: Subject, facts: ModelFacts, layout: Layout, rank: int | None = None) -> list[Message]:
    """All messages of a rank; none if there is one rank.

    Args:
        subject: the method.
        facts: the model.
        layout: the ranks.
        rank: which one; None: for each kind of message, the one with the most bytes.
    """
    if layout.ranks == 1:
        return []
    found = [*training(facts, layout), *second_order(subject, layout, rank)]
    if layout.sharded:
        found += [*of_shards(subject, layout), *of_base(subject, facts, layout)]
    return [message for message in found if message.bytes]


def sent(found: list[Message], kind: Kind, accumulation: int = 1) -> dict[str, int]:
    """Bytes of each kind of message in a step of a kind."""
    return {name: sum(m.bytes * m.times(kind, accumulation) for m in found if m.kind == name) for name in KINDS}


def training(facts: ModelFacts, layout: Layout) -> Iterator[Message]:
    """What the strategy itself sends, whatever the optimizer."""
    W, whole = layout.ranks, facts.count * layout.sent_bytes
    if layout.strategy in ("ddp", "zero0"):
        yield Message("gradients", "all_reduce", whole, W)
        return
    if layout.strategy == "fsdp2":
        units, padded = len(facts.blocks) + 1, padded_bytes(facts, layout)
        blocks = sum(padded_elements(facts.parameters[name], W) for block in facts.blocks for name in block)
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


def padded_elements(shape: tuple[int, ...], ranks: int) -> int:
    """Of a parameter cut into row shards of one length, the last ones padded."""
    rows, rest = (shape[0], 1) if len(shape) == 1 else (shape[0], _product(shape[1:]))
    return -(-rows // ranks) * ranks * rest


def padded_bytes(facts: ModelFacts, layout: Layout) -> int:
    """Of all parameters on FSDP2's wire."""
    return sum(padded_elements(shape, layout.ranks) for shape in facts.parameters.values()) * layout.sent_bytes


def second_order(subject: Subject, layout: Layout, rank: int | None = None) -> Iterator[Message]:
    """Statistics, inverses and directions; see ``placement.Grid``."""
    transform, W = subject.preconditioner, layout.ranks
    if transform is None:
        return
    if transform.watches_loss:
        yield Message("loss", "all_reduce", DOUBLE, W)
    buffers = [
        transform.recorder.allocate(layer)
        for layer in subject.layers
        if transform.recorder.hooks and isinstance(layer, RowLayer)
    ]
    grid = subject.grid(W)
    if grid is None:
        yield Message("statistics", "all_reduce", sum(t.nbytes for each in buffers for t in each), W, when="update")
        return
    counts = sum(each[i].nbytes for each in buffers for i in (0, 3))
    triangles = sum(len(t) * (len(t) + 1) // 2 * t.element_size() for each in buffers for t in each[1:3])
    outcomes = 2 * DOUBLE * len(subject.layers) * len(transform.side_names)
    owners = len(set(grid.owner.values()))
    yield Message("statistics", "all_reduce", counts + outcomes, W, count=2, when="update")
    yield Message("statistics", "reduce", triangles, W, count=owners, when="update")
    yield Message("statistics", "all_reduce", outcomes, W, when="refresh")
    yield from _of_grid(subject, grid, range(grid.columns) if rank is None else [rank])


def _of_grid(subject: Subject, grid: Plan, ranks: Sequence[int]) -> Iterator[Message]:
    """Inverses down the columns and directions along the rows, for those of ``ranks`` with the most."""
    transform, k, columns = subject.preconditioner, grid.workers, grid.columns
    assert transform is not None
    places = [Place(grid, rank) for rank in ranks]
    if k > 1:
        shared = {layer.name: bytes_of(transform.init(layer), transform.shared) for layer in subject.layers}
        most = max(sum(b for name, b in shared.items() if place.is_gradient_worker(name)) for place in places)
        yield Message("inverses", "broadcast", most, k, count=k, stride=columns, when="refresh", received=most)
    if columns > 1:
        moved = {layer.name: FLOAT * (_product(matrix_of(layer)) + 3) for layer in subject.layers}
        away = max(sum(b for name, b in moved.items() if not place.is_gradient_worker(name)) for place in places)
        yield Message("directions", "broadcast", sum(moved.values()), columns, count=columns, received=away)


def of_shards(subject: Subject, layout: Layout) -> Iterator[Message]:
    """What a method needs of gradients that other ranks hold."""
    transform, W, L = subject.preconditioner, layout.ranks, len(subject.layers)
    if transform is None:
        return
    sizes = [matrix_of(layer) for layer in subject.layers]
    if layout.strategy != "fsdp2":  # flat fragments that end anywhere: whole gradients
        yield Message("shards", "all_gather", FLOAT * sum(n * m for n, m in sizes), W)
        return
    recorder = transform.recorder
    if isinstance(recorder, SumRecorder) and recorder.outputs and recorder.groups == 1:
        biases = sum(layer.shape[0] for layer in subject.layers if layer.bias is not None)
        yield Message("shards", "all_gather", FLOAT * biases, W, when="update")
    yield from _row_sums(subject, L, sizes, W)


def _row_sums(subject: Subject, L: int, sizes: list[tuple[int, int]], W: int) -> Iterator[Message]:
    """Sums over row shards, all layers in one message; or whole gradients, for a method that needs all rows."""
    transform = subject.preconditioner
    if subject.history is not None:
        sides = getattr(transform, "sides", ())
        products = subject.history * sum(m for _, m in sizes) if Side.OUTPUT in sides else 0
        yield Message("shards", "all_reduce", FLOAT * (products + 2 * L), W)
        yield Message("shards", "all_reduce", FLOAT * L, W)
    elif subject.rank_one:
        yield Message("shards", "all_reduce", FLOAT * 2 * L, W)
    elif isinstance(transform, EvaS) and transform.config.form == "joint":  # |G|² and two axes' sums, then as Eva
        yield Message("shards", "all_reduce", FLOAT * (L + sum(n + m for n, m in sizes)), W, when="update")
        yield Message("shards", "all_reduce", FLOAT * 2 * L, W)
    elif isinstance(transform, RMSProp):
        yield Message("shards", "all_reduce", FLOAT * L, W, when="update")
        yield Message("shards", "all_reduce", FLOAT * 3 * L, W)
    elif subject.input_side_alone:
        yield Message("shards", "all_reduce", FLOAT * 3 * L, W)
    else:
        whole = FLOAT * sum(padded_elements((n, m), W) for n, m in sizes)
        yield Message("shards", "all_gather", whole, W)
        if subject.learns_from_gradients:
            yield Message("shards", "all_gather", whole, W, when="update")


def of_base(subject: Subject, facts: ModelFacts, layout: Layout) -> Iterator[Message]:
    """LAMB's norms: room for |w|² and |u|² of each tensor, and one number for its clip."""
    if subject.base == "lamb":
        yield Message("base", "all_reduce", FLOAT * 2 * len(facts.parameters), layout.ranks)
        yield Message("base", "all_reduce", FLOAT, layout.ranks)


def _product(lengths: tuple[int, ...]) -> int:
    total = 1
    for length in lengths:
        total *= length
    return total

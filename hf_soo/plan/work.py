"""Floating-point operations of a rank in a step, and the bytes its optimizer moves, averaged over a cycle.

Forward and backward pass: 6 for each token and parameter that is no embedding (2 forward, 4 backward; Kaplan et al.,
arXiv 2001.08361), and 12 s h for each token and block for the attention scores and their products; 8 and 16 under
gradient checkpointing. A tied vocabulary decoder is an embedding here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.flops import Factorisation, Product
from hf_soo.engine.layers import Layer
from hf_soo.engine.preconditioner import Preconditioner, Side
from hf_soo.optimizers.bases import BASES
from hf_soo.plan.messages import FLOAT
from hf_soo.plan.method_on_model import Place, Subject, matrix_of
from hf_soo.plan.model_shape import ModelFacts
from hf_soo.plan.request import Layout

Operations = Iterable[Product | Factorisation]
ELEMENTWISE = 10  # operations on an entry of a gradient by a method without matrix products, about
BASE_OPERATIONS = {"lamb": 20, "adamw": 14, "sgd": 4, "rmsprop": 8, "muon": 4}  # on a parameter, about
BACKWARD = 2 / 3  # of the two passes
NEWTON_SCHULZ = 5  # Muon's iterations, each three products


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a rank in a step, and bytes moved.

    Args:
        passes: the forward and backward passes of all micro-batches.
        precondition: G -> P, the rank with the most.
        statistics: what the hooks sum, averaged over steps.
        update: the factors, averaged over steps, the rank with the most.
        inverse: factorisations, averaged over steps, the rank with the most.
        base: the base optimizer.
        traffic: bytes that the optimizer step reads and writes.
    """

    passes: float
    precondition: float
    statistics: float
    update: float
    inverse: float
    base: float
    traffic: float


def work(subject: Subject, facts: ModelFacts, layout: Layout) -> Work:
    """The work of a step."""
    transform, passes = subject.preconditioner, _passes(facts, layout)
    own = layout.share(facts.count, "zero1", "zero2", "zero3", "fsdp2")
    base = own * float(BASE_OPERATIONS[subject.base])
    # The base reads gradient, parameter and state, and writes the latter two; LAMB writes its update too, and reads it.
    moved = own * (FLOAT * (5 if subject.base == "lamb" else 3) + 2 * BASES[subject.base].state_bytes)
    if subject.base == "muon":
        base += sum(6 * NEWTON_SCHULZ * min(shape) * shape.numel() for shape in facts.matrices)
    if transform is None or subject.cycle is None:
        return Work(passes, 0.0, 0.0, 0.0, 0.0, base, float(moved))
    counts = subject.cycle.counts
    updates, refreshes = counts["updates"] / counts["steps"], counts["refreshes"] / counts["steps"]
    share = _rows_share(subject, layout)
    sampled = transform.recorder.fisher_pass is not None  # labels drawn from the model: one more backward pass
    return Work(
        passes=passes * (1 + updates * BACKWARD if sampled else 1),
        precondition=_of_workers(subject, layout) * share,
        statistics=updates * sum(statistics_of(layer, transform, layout.tokens) for layer in subject.layers),
        update=updates * share * sum(update_of(layer, subject) for layer in subject.layers),
        inverse=refreshes * _of_owners(subject, layout),
        base=base,
        traffic=float(moved) + share * _traffic(subject, layout),
    )


def _passes(facts: ModelFacts, layout: Layout) -> float:
    again = layout.checkpointing
    dense = (8 if again else 6) * (facts.count - facts.embeddings)
    attention = (16 if again else 12) * len(facts.blocks) * facts.hidden * layout.seq
    return float(layout.tokens * (dense + attention))


def _rows_share(subject: Subject, layout: Layout) -> float:
    """The part of each layer's thin work that a rank does: FSDP2's shards are moved where they lie."""
    local = subject.preconditioner is not None and subject.preconditioner.row_wise
    return 1 / layout.ranks if local and layout.strategy == "fsdp2" else 1.0


def precondition_of(layer: Layer, subject: Subject) -> float:
    """G -> P of one layer."""
    transform = subject.preconditioner
    assert transform is not None
    bare = transform.minimal_products(layer)
    if bare is not None:
        return float(bare.flops[0])
    n, m = matrix_of(layer)
    if subject.history is not None:  # X = C_b G and Y = G C_a, then the correction of G by both
        return 4.0 * len(getattr(transform, "sides", ())) * subject.history * n * m
    return float(ELEMENTWISE * n * m)


def statistics_of(layer: Layer, transform: Preconditioner, rows: int) -> float:
    """What the hooks of one layer do with so many rows."""
    recorder = transform.recorder
    n, m = matrix_of(layer)
    if isinstance(recorder, FactorRecorder):
        return 2.0 * rows * (m * m + (n * n if recorder.outputs else 0))
    return float(rows * (m + n)) if recorder.hooks else 0.0


def update_of(layer: Layer, subject: Subject) -> float:
    """The factors of one layer from its statistics."""
    transform = subject.preconditioner
    assert transform is not None
    sizes = dict(zip((Side.OUTPUT, Side.INPUT), matrix_of(layer), strict=True))
    sides = getattr(transform, "sides", ())
    if subject.history is not None:  # VCᵀ, times C, and the columns that stay scaled
        return float(sum(5 * subject.history * sizes[side] for side in sides))
    if isinstance(transform.recorder, FactorRecorder):  # S ← ρS + (1-ρ)F
        return float(sum(3 * sizes[side] ** 2 for side in sides))
    bare = transform.minimal_products(layer)
    if bare is not None:  # dense MKOR lists none: VM, and the rank-one correction
        return float(bare.flops[1]) or float(sum(8 * sizes[side] ** 2 for side in sides))
    return float(ELEMENTWISE * sum(sizes.values()))


def _of_workers(subject: Subject, layout: Layout) -> float:
    grid = subject.grid(layout.ranks)
    each = {layer.name: precondition_of(layer, subject) for layer in subject.layers}
    if grid is None:
        return sum(each.values())
    return max(
        sum(f for n, f in each.items() if Place(grid, rank).is_gradient_worker(n)) for rank in range(grid.columns)
    )


def _of_owners(subject: Subject, layout: Layout) -> float:
    transform, grid = subject.preconditioner, subject.grid(layout.ranks)
    assert transform is not None
    each = {}
    for layer in subject.layers:
        bare = transform.minimal_products(layer)
        each[layer.name] = float(bare.flops[2]) if bare is not None else 0.0
    if grid is None:
        return sum(each.values())
    return max(sum(f for n, f in each.items() if grid.owner[n] == rank) for rank in range(layout.ranks))


def _traffic(subject: Subject, layout: Layout) -> float:
    """Bytes of G -> P: the gradient read and written some times, and every factor that is applied read once."""
    passes = 6 if subject.history is not None else 4
    transform = subject.preconditioner
    assert transform is not None
    names = transform.shared
    factors = sum(
        t.nbytes for layer in subject.layers for f in transform.init(layer).values() for k, t in f.items()
        if names is None or k in names
    )  # fmt: skip
    grid = subject.grid(layout.ranks)
    own = 1.0 if grid is None else 1 / grid.columns
    return own * (passes * FLOAT * sum(n * m for n, m in map(matrix_of, subject.layers)) + factors)

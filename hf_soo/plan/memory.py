"""Bytes of a rank: parameters, gradients, optimizer state, factors, what a step copies, and an estimate of activations.

Left out: the few temporaries of a product or factorisation (at most some times the largest layer), the allocator's
fragmentation, the CUDA context, and NCCL's buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hf_soo.engine.gradients import groups_of
from hf_soo.engine.layers import RowLayer
from hf_soo.optimizers.bases import BASES
from hf_soo.plan.messages import FLOAT, padded_elements
from hf_soo.plan.method_on_model import Subject, bytes_of, matrix_of
from hf_soo.plan.model_shape import ModelFacts
from hf_soo.plan.request import Layout

ADAMW_BYTES = 8  # what Muon's second optimizer keeps for a parameter that is no hidden matrix
MAX_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
MASKED = 0.15  # of BERT's tokens go through the decoder
TRANSIENT = ("capture_transient", "gradient_copies", "gathered_parameters", "activations")


def memory(subject: Subject, facts: ModelFacts, layout: Layout, rank: int | None = None) -> dict[str, int]:
    """Bytes of the rank with the most, by kind; those of ``TRANSIENT`` are held for a part of a step alone.

    ``capture`` are the buffers that a window is summed in and that stay, ``capture_transient`` those of windows that
    update (K-FAC's). ``gradient_copies`` are the stacks of gradients of one shape that a GPU works on, or the whole
    gradients gathered from shards.

    Args:
        subject: the method.
        facts: the model.
        layout: the ranks.
        rank: which one; None: the one with the most factors.
    """
    stored = _stored(facts, layout)
    buffers = _buffers(subject)
    transient = subject.preconditioner is not None and subject.preconditioner.recorder.transient
    ddp = layout.strategy == "ddp" and layout.ranks > 1
    master = layout.deepspeed and layout.bf16
    return {
        "parameters": stored("zero3") * layout.weight_bytes,
        "gradients": _gradients(facts, layout, stored),
        "ddp_buckets": facts.count * layout.weight_bytes if ddp else 0,
        "master_weights": layout.share(facts.count, "zero1", "zero2", "zero3") * FLOAT if master else 0,
        "base_state": base_state(subject, facts, layout),
        "factors": factors(subject, layout)[1] if rank is None else dict(_factors(subject, layout))[rank],
        "capture": 0 if transient else buffers,
        "capture_transient": buffers if transient else 0,
        "gradient_copies": _copies(subject, layout),
        "gathered_parameters": _gathered(facts, layout),
        "activations": activations(facts, layout),
    }


def peak(held: Mapping[str, int]) -> int:
    """The most at one time: in a backward pass, or in the optimizer's step.

    Args:
        held: what ``memory`` returned.
    """
    steady = sum(size for kind, size in held.items() if kind not in TRANSIENT) + held["capture_transient"]
    return steady + max(held["gathered_parameters"] + held["activations"], held["gradient_copies"])


def factors(subject: Subject, layout: Layout) -> tuple[int, int]:
    """The rank that keeps the most bytes of factors (the lowest one of several), and how many."""
    return max(_factors(subject, layout), key=lambda each: (each[1], -each[0]))


def _factors(subject: Subject, layout: Layout) -> Iterator[tuple[int, int]]:
    """(rank, bytes of its factors)."""
    transform = subject.preconditioner
    by_rows = transform.row_state if transform is not None and layout.strategy == "fsdp2" else frozenset[str]()
    for rank, states in subject.states(layout.ranks):
        sharded = sum(t.nbytes for s in states for f in s.values() for key, t in f.items() if key in by_rows)
        yield rank, sum(map(bytes_of, states)) - sharded + -(-sharded // layout.ranks)


def _stored(facts: ModelFacts, layout: Layout) -> Callable[..., int]:
    """Elements of the parameters on a rank, sharded under FSDP2 and the given stages of ZeRO."""

    def of(*stages: str) -> int:
        if layout.strategy == "fsdp2":
            return sum(padded_elements(shape, layout.ranks) for shape in facts.parameters.values()) // layout.ranks
        return layout.share(facts.count, *stages)

    return of


def _gradients(facts: ModelFacts, layout: Layout, stored: Callable[..., int]) -> int:
    own = stored("zero2", "zero3") * layout.weight_bytes
    if layout.strategy == "fsdp2" and layout.accumulation > 1:  # no_sync: whole gradients until the last micro-batch
        return own + facts.count * layout.sent_bytes
    return own


def base_state(subject: Subject, facts: ModelFacts, layout: Layout) -> int:
    """Bytes of the base optimizer's state."""
    each = float(BASES[subject.base].state_bytes)
    if subject.base == "muon":
        hidden = sum(shape.numel() for shape in facts.matrices)
        each += (ADAMW_BYTES - each) * (1 - hidden / facts.count)
    return round(each * _stored(facts, layout)("zero1", "zero2", "zero3"))


def _buffers(subject: Subject) -> int:
    transform = subject.preconditioner
    if transform is None or not transform.recorder.hooks:
        return 0
    rows = [layer for layer in subject.layers if isinstance(layer, RowLayer)]
    return sum(tensor.nbytes for layer in rows for tensor in transform.recorder.allocate(layer))


def _copies(subject: Subject, layout: Layout) -> int:
    """The largest copy of gradients that a step makes on a GPU."""
    transform = subject.preconditioner
    if transform is None:
        return 0
    whole = FLOAT * sum(n * m for n, m in map(matrix_of, subject.layers))
    if layout.sharded:
        local = layout.strategy == "fsdp2" and transform.row_wise
        return -(-whole // layout.ranks) if local else whole
    if not transform.stacks:
        return 0
    groups = [FLOAT * sum(n * m for n, m in map(matrix_of, group)) for group in groups_of(subject.layers, True)]
    return sum(groups) if transform.rescale.joint else max(groups)


def _gathered(facts: ModelFacts, layout: Layout) -> int:
    """Parameters of other ranks that are held during a pass: FSDP2 the rest of the model and two blocks."""
    if layout.strategy == "zero3":
        return min(facts.count, MAX_LIVE) * layout.weight_bytes
    if layout.strategy != "fsdp2":
        return 0
    blocks = [sum(facts.parameters[name].numel() for name in block) for block in facts.blocks]
    return (facts.count - sum(blocks) + 2 * max(blocks, default=0)) * layout.sent_bytes


def activations(facts: ModelFacts, layout: Layout) -> int:
    """An estimate of what the forward pass keeps for the backward pass, at the end of a micro-batch's forward pass.

    Korthikanti et al., "Reducing activation recomputation in large transformer models" (arXiv 2205.05198), eq. 1: a
    block of width h keeps sbh(34 + 5as/h) bytes in half precision. That is, in numbers of e bytes and dropout masks of
    one byte: 8 + 2i/h vectors of h for an intermediate layer of i (i = 4h: 16), and 2 masks. Attention is fused here
    (SDPA), so the scores, 5as/h, are not kept. Under gradient checkpointing each block keeps its input, and one block
    at a time the rest. The vocabulary decoder's logits are kept twice in fp32, for 15 % of the tokens in a BERT.
    """
    tokens, e, h = layout.micro_batch * layout.seq, 2 if layout.bf16 else 4, facts.hidden
    vectors = 8 + 2 * facts.intermediate / h
    block = round(tokens * h * (vectors * e + 2))
    blocks = len(facts.blocks)
    body = blocks * tokens * h * e + block if layout.checkpointing else blocks * block
    decoded = round(tokens * (MASKED if facts.masked else 1.0))
    return body + 2 * FLOAT * decoded * facts.vocabulary

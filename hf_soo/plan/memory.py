"""Bytes of a rank: parameters, gradients, optimizer state, factors, what a step copies, and an estimate of activations.

Left out: the few temporaries of a product or factorisation (at most some times the largest layer), the allocator's
fragmentation, the CUDA context, and NCCL's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from hf_soo.engine.capture import GradientRecorder
from hf_soo.engine.layers import Layer, groups_of
from hf_soo.optimizers.bases import BASES
from hf_soo.optimizers.wrappers import state_bytes
from hf_soo.plan.messages import FLOAT, padded_elements
from hf_soo.plan.method_on_model import MethodOnModel, bytes_of
from hf_soo.plan.model_shape import ModelShape
from hf_soo.plan.owners import gathered, shares_of_transform
from hf_soo.plan.request import Layout

ADAMW_BYTES = 8  # what Muon's second optimizer keeps for a parameter that is no hidden matrix
MAX_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
MASKED = 0.15  # of BERT's tokens go through the decoder
TRANSIENT = ("capture_transient", "gradient_copies", "gathered_parameters", "activations")


def memory(method: MethodOnModel, shape: ModelShape, layout: Layout, rank: int | None = None) -> dict[str, int]:
    """Bytes of a rank (None: the one with the most factors), by kind; ``TRANSIENT`` ones are held for a part of a step.

    ``capture`` are the buffers that a window is summed in and that stay, ``capture_transient`` those of windows that
    update (K-FAC's). ``gradient_copies`` are the stacks of gradients of one shape that a GPU works on, or the whole
    gradients that a rank gathers, or the weights before the step, for cautious decay.
    """
    buffers = sum(tensor.nbytes for each in method.buffers for tensor in each)
    transient = method.preconditioner is not None and method.preconditioner.recorder.transient
    ddp = layout.strategy == "ddp" and layout.ranks > 1
    master = layout.deepspeed and layout.bf16
    return {
        "parameters": _stored(shape, layout, "zero3") * layout.weight_bytes,
        "gradients": _gradients(shape, layout),
        "ddp_buckets": shape.count * layout.weight_bytes if ddp else 0,
        "master_weights": layout.share(shape.count, "zero1", "zero2", "zero3") * FLOAT if master else 0,
        "base_state": _base_state(method, shape, layout),
        "factors": factors(method, layout)[1] if rank is None else dict(_factors(method, layout))[rank],
        "capture": 0 if transient else buffers,
        "capture_transient": buffers if transient else 0,
        "gradient_copies": max(_copies(method, layout), _weights_before(method, shape, layout)),
        "gathered_parameters": _gathered(shape, layout),
        "activations": _activations(shape, layout),
    }


def peak(held: Mapping[str, int]) -> int:
    """The most bytes of ``memory`` at one time: in a backward pass, or in the optimizer's step."""
    steady = sum(size for kind, size in held.items() if kind not in TRANSIENT) + held["capture_transient"]
    return steady + max(held["gathered_parameters"] + held["activations"], held["gradient_copies"])


def factors(method: MethodOnModel, layout: Layout) -> tuple[int, int]:
    """The rank that keeps the most bytes of factors (the lowest one of several), and how many."""
    return max(_factors(method, layout), key=lambda each: (each[1], -each[0]))


def _factors(method: MethodOnModel, layout: Layout) -> Iterator[tuple[int, int]]:
    """(rank, bytes of its factors)."""
    transform = method.preconditioner
    by_rows = transform.row_state if transform is not None and layout.strategy == "fsdp2" else frozenset[str]()
    for rank, states in method.states(layout.ranks):
        sharded = sum(bytes_of(state, by_rows) for state in states)
        yield rank, sum(map(bytes_of, states)) - sharded + -(-sharded // layout.ranks)


def _stored(shape: ModelShape, layout: Layout, *stages: str) -> int:
    """Elements of the parameters on a rank, cut under FSDP2 and the given stages of DeepSpeed."""
    if layout.strategy == "fsdp2":
        return padded_elements(shape.parameters.values(), layout.ranks) // layout.ranks
    return layout.share(shape.count, *stages)


def _gradients(shape: ModelShape, layout: Layout) -> int:
    own = _stored(shape, layout, "zero2", "zero3") * layout.weight_bytes
    if layout.strategy == "fsdp2" and layout.accumulation > 1:  # no_sync: whole gradients until the last micro-batch
        return own + shape.count * layout.sent_bytes
    return own


def _base_state(method: MethodOnModel, shape: ModelShape, layout: Layout) -> int:
    each = float(BASES[method.base].state_bytes)
    if method.base == "muon":
        hidden = sum(matrix.numel() for matrix in shape.matrices)
        each += (ADAMW_BYTES - each) * (1 - hidden / shape.count)
    each += state_bytes(method.around)
    return round(each * _stored(shape, layout, "zero1", "zero2", "zero3"))


def _copies(method: MethodOnModel, layout: Layout) -> int:
    """The largest copy of gradients that a step makes on a GPU."""
    transform = method.preconditioner
    if transform is None:
        return 0

    def copied(layers: Iterable[Layer]) -> int:
        return FLOAT * sum(math.prod(layer.matrix) for layer in layers)

    if layout.sharded:
        if isinstance(transform.recorder, GradientRecorder):  # in steps that update
            return copied(method.layers)
        apart = gathered(method, layout)
        most = max((share.back for share in shares_of_transform(method, layout)), default=0)
        return most + -(-copied(layer for layer in method.layers if layer not in apart) // layout.ranks)
    if not transform.stacks:
        return 0
    groups = [copied(group) for group in groups_of(method.layers, True)]
    return sum(groups) if transform.rescale.joint else max(groups)


def _weights_before(method: MethodOnModel, shape: ModelShape, layout: Layout) -> int:
    stepped = FLOAT if layout.deepspeed else layout.weight_bytes
    return stepped * _stored(shape, layout, "zero1", "zero2", "zero3") if method.around.get("cautious") else 0


def _gathered(shape: ModelShape, layout: Layout) -> int:
    """Parameters of other ranks that are held during a pass: FSDP2 the rest of the model and two blocks."""
    if layout.strategy == "zero3":
        return min(shape.count, MAX_LIVE) * layout.weight_bytes
    if layout.strategy != "fsdp2":
        return 0
    blocks = [sum(shape.parameters[name].numel() for name in block) for block in shape.blocks]
    return (shape.count - sum(blocks) + 2 * max(blocks, default=0)) * layout.sent_bytes


def _activations(shape: ModelShape, layout: Layout) -> int:
    """An estimate of what the forward pass keeps for the backward pass, at the end of a micro-batch's forward pass.

    Korthikanti et al., "Reducing activation recomputation in large transformer models" (arXiv 2205.05198), eq. 1: a
    block of width h keeps sbh(34 + 5as/h) bytes in half precision. That is, in numbers of e bytes and dropout masks of
    one byte: 8 + 2i/h vectors of h for an intermediate layer of i (i = 4h: 16), and 2 masks. Attention is fused here
    (SDPA), so the scores, 5as/h, are not kept. Under gradient checkpointing each block keeps its input, and one block
    at a time the rest. The vocabulary decoder's logits are kept twice in fp32, for 15 % of the tokens in a BERT.
    """
    tokens, e, h = layout.micro_batch * layout.seq, 2 if layout.bf16 else 4, shape.hidden
    vectors = 8 + 2 * shape.intermediate / h
    block = round(tokens * h * (vectors * e + 2))
    blocks = len(shape.blocks)
    body = blocks * tokens * h * e + block if layout.checkpointing else blocks * block
    decoded = round(tokens * (MASKED if shape.masked else 1.0))
    return body + 2 * FLOAT * decoded * shape.vocabulary

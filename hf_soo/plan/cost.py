"""Floating-point operations of a rank in a step, the bytes its optimizer moves, and a prediction of the step's seconds.

Forward and backward pass: 6 for each token and parameter that is no embedding (2 forward, 4 backward; Kaplan et al.,
arXiv 2001.08361), and 12 s h for each token and block for the attention scores and their products; 8 and 16 under
gradient checkpointing. A tied vocabulary decoder is an embedding here. All is averaged over a method's steps.

Seconds follow from a hardware profile. Compute at a sustained rate; the optimizer's traffic at the memory's bandwidth;
each message by bandwidth and latency of the links its ranks share, as a ring: an all-reduce moves 2(g-1)/g of its bytes
in 2(g-1) hops, an all-gather or reduce-scatter half of that, a broadcast or reduction its bytes once. Nothing overlaps:
an upper bound for training loops that hide messages behind the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_soo import machine
from hf_soo.engine.checks import Checked, Count, Positive, unknown_key
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.layers import Layer
from hf_soo.engine.preconditioner import Preconditioner
from hf_soo.optimizers.bases import BASES
from hf_soo.optimizers.wrappers import state_bytes
from hf_soo.plan.messages import FLOAT, Message
from hf_soo.plan.method_on_model import MethodOnModel, bytes_of
from hf_soo.plan.model_shape import ModelShape
from hf_soo.plan.owners import gathered, shares_of_muon, shares_of_transform
from hf_soo.plan.request import MEASURE, Layout
from hf_soo.runs.recipes import read_mapping

_BASE_OPERATIONS = {"lamb": 20, "adamw": 14, "sgd": 4, "rmsprop": 8, "muon": 4}  # on a parameter, about
_BACKWARD = 2 / 3  # of the two passes


@dataclass(frozen=True)
class _Work:
    """Floating-point operations of a rank in a step, and bytes moved."""

    passes: float  # the forward and backward passes of all micro-batches
    precondition: float  # G -> P, the rank with the most
    statistics: float  # what the hooks sum, averaged over steps
    update: float  # the factors, averaged over steps, the rank with the most
    inverse: float  # factorisations, averaged over steps, the rank with the most
    base: float  # the base optimizer
    traffic: float  # bytes that the optimizer step reads and writes


def work(method: MethodOnModel, shape: ModelShape, layout: Layout) -> _Work:
    """The work of a step of the rank with the most."""
    transform, passes = method.preconditioner, _passes(shape, layout)
    own = layout.share(shape.count, "zero1", "zero2", "zero3", "fsdp2")
    base = own * float(_BASE_OPERATIONS[method.base])
    # The base reads gradient, parameter and state, and writes the latter two; LAMB writes its update too, and reads it.
    state = BASES[method.base].state_bytes + state_bytes(method.around)
    moved = own * (FLOAT * (5 if method.base == "lamb" else 3) + 2 * state)
    base += max((share.flops for share in shares_of_muon(method, shape, layout)), default=0.0)
    if transform is None or method.step_kinds is None:
        return _Work(passes, 0.0, 0.0, 0.0, 0.0, base, float(moved))
    counts = method.step_kinds.counts
    updates, refreshes = counts["updates"] / counts["steps"], counts["refreshes"] / counts["steps"]
    # the part of each layer's thin work that a rank does: FSDP2's rows are moved where they lie
    share = 1 / layout.ranks if transform.row_wise and layout.strategy == "fsdp2" else 1.0
    sampled = transform.recorder.fisher_pass is not None  # labels drawn from the model: one more backward pass
    flops = {layer.name: transform.flops(layer) for layer in method.layers}
    grid, ranks = method.grid(layout.ranks), range(layout.ranks)
    apart = {layer.name for layer in gathered(method, layout)}
    where = {name: f[0] for name, f in flops.items() if name not in apart}  # G -> P where the gradients lie
    if grid is None:
        precondition, inverse = share * sum(where.values()), sum(f[2] for f in flops.values())
    else:
        workers = range(grid.columns)  # one of each column
        precondition = max(sum(f for n, f in where.items() if grid.is_gradient_worker(r, n)) for r in workers)
        inverse = max(sum(f[2] for n, f in flops.items() if grid.owner[n] == r) for r in ranks)
    precondition += max((each.flops for each in shares_of_transform(method, layout)), default=0.0)
    return _Work(
        passes=passes * (1 + updates * _BACKWARD if sampled else 1),
        precondition=precondition,
        statistics=updates
        * sum(
            _statistics(layer, transform, layout.tokens * (shape.used if layer.stack else 1)) for layer in method.layers
        ),
        update=updates * share * sum(update for _, update, _ in flops.values()),
        inverse=refreshes * inverse,
        base=base,
        traffic=float(moved) + share * _traffic(method.layers, transform, 1.0 if grid is None else 1 / grid.columns),
    )


def _passes(shape: ModelShape, layout: Layout) -> float:
    again = layout.checkpointing
    dense = (8 if again else 6) * (shape.count - shape.embeddings - shape.idle)
    attention = (16 if again else 12) * len(shape.blocks) * shape.hidden * layout.seq
    return float(layout.tokens * (dense + attention))


def _statistics(layer: Layer, transform: Preconditioner, rows: float) -> float:
    """What the hooks of one layer do with so many rows."""
    recorder = transform.recorder
    if isinstance(recorder, FactorRecorder):
        return 2.0 * rows * sum(moments.numel() for moments in recorder.allocate(layer)[1:3])
    return float(rows * sum(layer.matrix)) if recorder.hooks else 0.0


def _traffic(layers: list[Layer], transform: Preconditioner, part: float) -> float:
    """Bytes of G -> P of a part of the layers: the gradient some times, and once every factor that is applied."""
    factors = sum(bytes_of(transform.init(layer), transform.shared) for layer in layers)
    passes = transform.gradient_passes
    return part * (passes * FLOAT * sum(math.prod(layer.matrix) for layer in layers) + factors)


@dataclass(frozen=True)
class Profile(Checked):
    """What a rank's hardware sustains.

    Args:
        name: of the profile.
        source: where the numbers are from.
        flops_bf16: FLOP/s of bfloat16 products.
        flops_fp32: FLOP/s of fp32 products, the preconditioner's.
        flops_factorisation: FLOP/s of Cholesky inverses and eigenvectors.
        memory_bandwidth: bytes/s.
        gpus_per_node: ranks that share a node.
        node_bandwidth: bytes/s that a rank sends to another one of its node.
        network_bandwidth: bytes/s that a node sends to another one, over all its ranks.
        latency: seconds of a hop.
    """

    name: str
    source: str
    flops_bf16: Positive
    flops_fp32: Positive
    flops_factorisation: Positive
    memory_bandwidth: Positive
    gpus_per_node: Count
    node_bandwidth: Positive
    network_bandwidth: Positive
    latency: Positive


PROFILES = {
    # NVIDIA A100 80GB SXM datasheet: 312 TFLOP/s bf16 dense, 19.5 TFLOP/s fp32 (no TF32), 2,039 GB/s, NVLink 600 GB/s
    # both ways. Efficiencies, all assumed: 50 % of bf16 (large transformers report 40-60 %), 80 % of fp32, of the
    # memory and of 300 GB/s one way; 1 TFLOP/s for factorisations of some thousand rows, whose kernels are small; one
    # HDR InfiniBand card (200 Gbit/s) a node at 80 %; 10 µs a hop.
    "a100-80gb-4": Profile(
        name="a100-80gb-4",
        source="NVIDIA's A100 80GB SXM datasheet times stated efficiencies; 4 GPUs and one HDR InfiniBand card a node",
        flops_bf16=0.5 * 312e12,
        flops_fp32=0.8 * 19.5e12,
        flops_factorisation=1e12,
        memory_bandwidth=0.8 * 2039e9,
        gpus_per_node=4,
        node_bandwidth=0.8 * 300e9,
        network_bandwidth=0.8 * 25e9,
        latency=10e-6,
    ),
    # One core of a server CPU with AVX2: 2 FMA units x 8 lanes x 2 x 3 GHz = 96 GFLOP/s at 70 %; half precision is no
    # faster without AMX; 20 GB/s is what one core sustains of eight DDR4-3200 channels; gloo over loopback 1 GB/s.
    "cpu": Profile(
        name="cpu",
        source="one AVX2 core at 3 GHz, 70 % of its peak; ranks on one machine over gloo",
        flops_bf16=0.7 * 96e9,
        flops_fp32=0.7 * 96e9,
        flops_factorisation=0.35 * 96e9,
        memory_bandwidth=20e9,
        gpus_per_node=64,
        node_bandwidth=1e9,
        network_bandwidth=1e9,
        latency=50e-6,
    ),
}


def load_profile(name: str) -> Profile:
    """A profile by name (``PROFILES``), "measure"d here, or from a YAML or JSON file with the fields of ``Profile``.

    Raises:
        ValueError: there is none, or a field is unknown, missing or out of range.
    """
    if name in PROFILES:
        return PROFILES[name]
    if name == MEASURE:
        return _measure()
    if not Path(name).is_file():
        raise ValueError(f"profile={name!r} is no file; give one, or one of {', '.join([*PROFILES, MEASURE])}.")
    known = [field.name for field in dataclasses.fields(Profile)]
    values = {"name": name, "source": name, **read_mapping(Path(name), "profile")}
    for key in values:
        if key not in known:
            raise ValueError(unknown_key("field of a profile", str(key), known))
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(f"profile={name!r} lacks {', '.join(missing)}; give all of {', '.join(known)}.")
    return Profile(**{key: value if key in {"name", "source"} else _number(value) for key, value in values.items()})


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e9 as a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _measure() -> Profile:
    """What this machine sustains on one rank: products, a factorisation, a copy. Links are the ``cpu`` profile's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    d = 4096 if device.type == "cuda" else 1024

    def products(dtype: torch.dtype) -> float:
        left, right = torch.randn(2, d, d, device=device).to(dtype)
        return 2 * d**3 / _seconds(lambda: left @ right, device)

    rows = torch.randn(d, d, device=device)
    positive = rows @ rows.mT / d + torch.eye(d, device=device)
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    links = PROFILES["cpu" if device.type == "cpu" else "a100-80gb-4"]
    return dataclasses.replace(
        links,
        name=MEASURE,
        source=f"measured on {machine.device_name(device)}; links are those of {links.name}",
        flops_bf16=products(torch.bfloat16),
        flops_fp32=products(torch.float32),
        flops_factorisation=d**3 / _seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(positive)), device),
        memory_bandwidth=2 * source.nbytes / _seconds(lambda: target.copy_(source), device),
    )


def _seconds(call: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The least of some times, after one that does not count."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _seconds_of(message: Message, profile: Profile, world: int) -> float:
    """One occurrence of all messages of an entry, among ``world`` ranks."""
    g, per_node = message.ranks, profile.gpus_per_node
    span = g * message.stride  # ranks from a group's first one to the next group's
    inside = span <= per_node and (per_node % span == 0 or span == world)
    # A node's card is shared by the groups that leave the node: one, or one for each rank of it where ranks stride.
    bandwidth = profile.node_bandwidth if inside else profile.network_bandwidth / min(message.stride, per_node)
    moved, hops = {
        "all_reduce": (2 * (g - 1) / g, 2 * (g - 1)),
        "all_gather": ((g - 1) / g, g - 1),
        "reduce_scatter": ((g - 1) / g, g - 1),
        "all_to_all": ((g - 1) / g, g - 1),
        "broadcast": (1.0, g - 1),
        "reduce": (1.0, g - 1),
    }[message.collective]
    return moved * message.bytes / bandwidth + message.count * hops * profile.latency


def predict(
    method: MethodOnModel, amount: _Work, found: Iterable[Message], layout: Layout, profile: Profile
) -> dict[str, float]:
    """Seconds of a step, averaged over a method's steps, by part and in all: a prediction.

    Returns:
        "passes", "precondition" (with statistics and update), "inverse", "base", "communication" and "step".
    """
    rate = profile.flops_bf16 if layout.bf16 else profile.flops_fp32
    traffic = amount.traffic / profile.memory_bandwidth
    transform = (amount.precondition + amount.statistics + amount.update) / profile.flops_fp32
    parts = {
        "passes": amount.passes / rate,
        "precondition": transform,
        "inverse": amount.inverse / profile.flops_factorisation,
        "base": amount.base / profile.flops_fp32 + traffic,
        "communication": sum(frequency(m, method, layout) * _seconds_of(m, profile, layout.ranks) for m in found),
    }
    return {**parts, "step": sum(parts.values())}


def frequency(message: Message, method: MethodOnModel, layout: Layout) -> float:
    """How often a message is sent in a step, on average."""
    if message.when in ("step", "micro_batch"):
        return float(layout.accumulation if message.when == "micro_batch" else 1)
    assert method.step_kinds is not None
    counts = method.step_kinds.counts
    return counts["updates" if message.when == "update" else "refreshes"] / counts["steps"]

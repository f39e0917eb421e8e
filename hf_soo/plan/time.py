"""A prediction of a step's seconds from a hardware profile.

Compute at a sustained rate; the optimizer's traffic at the memory's bandwidth; each message by bandwidth and latency of
the links its ranks share, as a ring: an all-reduce moves 2(g-1)/g of its bytes in 2(g-1) hops, an all-gather or
reduce-scatter half of that, a broadcast or reduction its bytes once. Nothing overlaps: an upper bound for training
loops that hide messages behind the backward pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_soo.engine.checks import require_count, require_range, unknown_key
from hf_soo.plan.messages import Message
from hf_soo.plan.method_on_model import Subject
from hf_soo.plan.request import Layout
from hf_soo.plan.work import Work
from hf_soo.runs import machine


@dataclass(frozen=True)
class Profile:
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
    flops_bf16: float
    flops_fp32: float
    flops_factorisation: float
    memory_bandwidth: float
    gpus_per_node: int
    node_bandwidth: float
    network_bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one is not positive.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "gpus_per_node":
                require_count(f"profile: {field.name}", value, 1)
            elif field.name not in ("name", "source"):
                require_range(f"profile: {field.name}", value, 0, float("inf"), open_low=True)


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
MEASURE = "measure"


def load_profile(name: str) -> Profile:
    """A profile by name, from a file, or measured.

    Args:
        name: of ``PROFILES``, "measure", or a YAML or JSON file with the fields of ``Profile``.

    Raises:
        ValueError: there is none, or a field is unknown, missing or out of range.
    """
    if name in PROFILES:
        return PROFILES[name]
    if name == MEASURE:
        return measure()
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"profile={name!r} is no file; give one, or one of {', '.join([*PROFILES, MEASURE])}.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"profile={name!r} is neither YAML nor JSON; write it as NAME: NUMBER lines.") from error
    return _from_values(name, values)


def _from_values(name: str, values: Any) -> Profile:
    known = [field.name for field in dataclasses.fields(Profile)]
    if not isinstance(values, dict):
        raise ValueError(f"profile={name!r} holds no table; its keys are {', '.join(known)}.")
    values = {"name": name, "source": name, **values}
    for key in values:
        if key not in known:
            raise ValueError(unknown_key("field of a profile", str(key), known))
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(f"profile={name!r} lacks {', '.join(missing)}; give all of {', '.join(known)}.")
    numbers = {k: _number(v) for k, v in values.items()}  # YAML 1.1 reads 3e9 as a word
    return Profile(**numbers)


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def measure() -> Profile:
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


def seconds_of(message: Message, profile: Profile, world: int) -> float:
    """One occurrence of all messages of an entry."""
    g, per_node = message.ranks, profile.gpus_per_node
    span = g * message.stride  # ranks from a group's first one to the next group's
    inside = span <= per_node and (per_node % span == 0 or span == world)
    # A node's card is shared by the groups that leave the node: one, or one for each rank of it where ranks stride.
    bandwidth = profile.node_bandwidth if inside else profile.network_bandwidth / min(message.stride, per_node)
    moved, hops = {
        "all_reduce": (2 * (g - 1) / g, 2 * (g - 1)),
        "all_gather": ((g - 1) / g, g - 1),
        "reduce_scatter": ((g - 1) / g, g - 1),
        "broadcast": (1.0, g - 1),
        "reduce": (1.0, g - 1),
    }[message.collective]
    return moved * message.bytes / bandwidth + message.count * hops * profile.latency


def predict(
    subject: Subject, amount: Work, found: Iterable[Message], layout: Layout, profile: Profile
) -> dict[str, float]:
    """Seconds of a step, averaged over a cycle, by part and in all: a prediction.

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
        "communication": sum(frequency(m, subject, layout) * seconds_of(m, profile, layout.ranks) for m in found),
    }
    return {**parts, "step": sum(parts.values())}


def frequency(message: Message, subject: Subject, layout: Layout) -> float:
    """How often a message is sent in a step, on average."""
    if message.when in ("step", "micro_batch"):
        return float(layout.accumulation if message.when == "micro_batch" else 1)
    assert subject.cycle is not None
    counts = subject.cycle.counts
    return counts["updates" if message.when == "update" else "refreshes"] / counts["steps"]

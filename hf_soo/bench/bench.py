"""What an optimizer costs, as ratios to AdamW(foreach=True) stepped in the same process and the same round.

Absolute times drift with whatever else the machine does; ratios within a round (rounds.py) hold.

On one CPU thread the clock is the process's CPU time, else wall time after a synchronisation.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.bench.rounds import Stepper, ratios
from hf_soo.bench.workload import BenchConfig, Clock, Workload
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.optimizers.bases import decay_groups
from hf_soo.registry import METHODS, build_optimizer
from hf_soo.runs import machine

LEARNING_RATE = 1e-5  # the cost does not depend on it; a small one keeps the weights sane
WEIGHT_DECAY = 0.01
RECORDED = ("threads", "rounds", "steps", "batch_size", "seq_length", "autocast")


@dataclass(frozen=True)
class Pair:
    """A method, its base (None: its own) and its settings."""

    name: str
    base: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def build(self, model: nn.Module) -> PreconditionedOptimizer:
        """Build it for a model."""
        return build_optimizer(
            self.name, model, lr=LEARNING_RATE, base=self.base, weight_decay=WEIGHT_DECAY, **dict(self.settings)
        )


def parse_pairs(text: str, base: str | None = None) -> list[Pair]:
    """Read `NAME[:key=value...][+BASE],...`.

    Args:
        text: the flag's value.
        base: for methods that name no base and take one.

    Returns:
        The pairs.

    Raises:
        ValueError: if a name is unknown or a setting is not `key=value`.
    """
    pairs = []
    for item in text.split(","):
        method, _, own_base = item.strip().partition("+")
        name, *settings = method.split(":")
        if name not in METHODS:
            raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(METHODS)}.")
        if not all("=" in setting for setting in settings):
            raise ValueError(f"{method!r}: settings are written NAME:key=value:key=value.")
        values = tuple((key, yaml.safe_load(value)) for key, value in (s.split("=", 1) for s in settings))
        takes_base = METHODS[name].config is not None
        pairs.append(Pair(name, own_base or (base if takes_base else None), values))
    return pairs


def run(config: BenchConfig, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure all methods of a configuration.

    Args:
        config: what to measure.
        report: called with the results so far after each method, so that an interruption loses one method at most.

    Returns:
        The results, as the JSON file has them.

    Raises:
        ValueError: if a method or a setting is unknown.
    """
    torch.set_num_threads(config.threads)
    pairs = parse_pairs(config.optim, config.base)
    work = Workload(config)
    for pair in pairs:  # a wrong setting shows now, not after half an hour
        pair.build(work.model).remove_hooks()
    settings = {name: getattr(config, name) for name in RECORDED}
    results: dict[str, Any] = {
        "kind": "bench",
        "workload": {"preset": config.preset, **settings},
        "device": machine.device_name(work.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "preset": config.preset,
        "parameters": sum(p.numel() for p in work.parameters),
        "settings": settings,
        "reference": _measure_reference(work, config),
        "rows": [],
    }
    reference_memory = peak_memory_apart(config, None)
    for pair in pairs:
        row = _measure(work, config, pair)
        memory = peak_memory_apart(config, pair)
        row["peak_memory_ratio"] = None if memory is None or reference_memory is None else memory / reference_memory
        results["rows"].append(row)
        report(results)
    return results


def adamw(model: nn.Module, **kind: bool) -> Optimizer:
    """The reference: AdamW over decay and no-decay groups, `foreach=True` or `fused=True`."""
    return torch.optim.AdamW(decay_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, **kind)  # type: ignore[arg-type]


def _measure_reference(work: Workload, config: BenchConfig) -> dict[str, float]:
    """Time AdamW(foreach) alone, and AdamW(fused) relative to it."""
    clock, optimizers = Clock(work.device), [adamw(work.twin, foreach=True), adamw(work.twin, fused=True)]
    work.forward_backward(work.twin)
    work.keep_gradients()
    rounds = []
    for _ in range(config.rounds + 1):
        seconds = []
        for optimizer in optimizers:
            work.restore_gradients()
            seconds.append(clock(optimizer.step))
        rounds.append(seconds)
    return {
        "adamw_foreach_seconds": statistics.median(foreach for foreach, _ in rounds[1:]),
        "adamw_fused_ratio": statistics.median(fused / foreach for foreach, fused in rounds[1:]),
    }


def _measure(work: Workload, config: BenchConfig, pair: Pair) -> dict[str, Any]:
    """Time one method: its row, without the memory ratio."""
    optimizer = pair.build(work.model)
    try:
        stepper, reference = Stepper(work, optimizer), adamw(work.twin, foreach=True)
        stepper.round(reference, 2)  # allocate, and let kernels choose themselves
        rounds = [stepper.round(reference, config.steps) for _ in range(config.rounds)]
        return {
            "optimizer": pair.name,
            "base": type(optimizer.base).__name__.lower(),
            "config": {**optimizer.config, **dict(pair.settings)},
            "set": dict(pair.settings),
            "cycle": stepper.cycle.counts,
            **ratios(rounds, stepper.cycle),
            "state_bytes_per_parameter": state_bytes(optimizer) / sum(p.numel() for p in work.parameters),
        }
    finally:
        optimizer.remove_hooks()
        optimizer.zero_grad()


def state_bytes(optimizer: PreconditionedOptimizer) -> int:
    """Bytes of the base's state, the preconditioner's factors and the capture's buffers."""
    buffers = [tensor for each in optimizer.stages.capture.buffers.values() for tensor in each]
    return sum(
        t.numel() * t.element_size() for t in [*tensors_in([optimizer.state, optimizer.stages.states]), *buffers]
    )


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings and lists (keys are not looked at)."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        yield from tensors_in(list(nest.values()))
    elif isinstance(nest, (list, tuple)):
        for each in nest:
            yield from tensors_in(each)


def peak_memory_apart(config: BenchConfig, pair: Pair | None) -> int | None:
    """`peak_memory` in a process of its own, where nothing else has left its mark; None if it is not wanted."""
    if not config.memory:
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, config, pair).result()


def peak_memory(config: BenchConfig, pair: Pair | None) -> int:
    """Bytes that three whole train steps need over what the process held before the model was built.

    Args:
        config: the model and batch.
        pair: the method, or None for AdamW(foreach).

    Returns:
        Bytes.
    """
    torch.set_num_threads(config.threads)
    before = machine.peak_memory_bytes(torch.device(config.device))
    work = Workload(config)
    optimizer = adamw(work.model, foreach=True) if pair is None else pair.build(work.model)
    for index in range(3):
        optimizer.zero_grad()
        work.forward_backward(work.model)
        if isinstance(optimizer, PreconditionedOptimizer):
            optimizer.report_loss(-float(index))
        optimizer.step()
    return machine.peak_memory_bytes(work.device) - before

"""Times of optimizers relative to AdamW(foreach=True): a row a method, with its limit and its memory."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo import machine
from hf_soo.bench import roofline
from hf_soo.bench.rounds import Stepper, ratios
from hf_soo.bench.workload import BenchConfig, Clock, Workload, place_on, predictions_of
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.files import jsonable, parse_json
from hf_soo.integrations.arguments import parse_settings
from hf_soo.optimizers.bases import build_base
from hf_soo.optimizers.groups import decay_groups
from hf_soo.progress import Progress
from hf_soo.registry import METHODS, build_optimizer, hidden_weights

_LEARNING_RATE = 1e-5  # the cost does not depend on it; a small one keeps the weights sane
_WEIGHT_DECAY = 0.01
_RECORDED = ("threads", "rounds", "steps", "batch_size", "seq_length", "autocast")
_RECORDED_IF_SET = ("width", "layers", "vocabulary", "ranks", "peer", "launches")
_SAME = ("workload", "device", "versions", "commit", "parameters")  # of rows that one file may hold


@dataclass(frozen=True)
class Pair:
    """A method, its base (None: its own) and its settings."""

    name: str
    base: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def build(self, model: nn.Module, lr: float = _LEARNING_RATE) -> PreconditionedOptimizer:
        """Build it for a model."""
        return build_optimizer(
            self.name, model, lr=lr, base=self.base, weight_decay=_WEIGHT_DECAY, **dict(self.settings)
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
        values = tuple(parse_settings(f"optim: {name}", ",".join(settings)).items())
        takes_base = METHODS[name].config is not None
        pairs.append(Pair(name, own_base or (base if takes_base else None), values))
    return pairs


def run(config: BenchConfig, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure all methods of a configuration.

    Args:
        config: what to measure.
        show: called with the results so far after each method, so that an interruption loses one method at most.

    Returns:
        The results, as the JSON file has them.

    Raises:
        ValueError: if a method or a setting is unknown.
        RuntimeError: with ``resume``, if a method failed; the others were measured.
    """
    torch.set_num_threads(config.threads)
    pairs = parse_pairs(config.optim, config.base)
    work = Workload(config)
    for pair in pairs:  # a wrong setting shows now, not after half an hour
        pair.build(work.model).remove_hooks()
    results = _begun(work, config)
    reference = _measure_reference(work, config)
    results.setdefault("reference", reference)
    rates = roofline.Rates(work.device, Clock(work.device), results["parameters"])
    results["rates"] = rates.found
    reference_memory = _peak_memory_apart(config, None)
    kept = [_identity(row) for row in results["rows"]]
    failed: list[str] = []
    left = [p for p in pairs if _identity({"optimizer": p.name, "base": p.base, "set": dict(p.settings)}) not in kept]
    show_bar = not dist.is_initialized() or dist.get_rank() == 0
    rounds = len(left) * (config.rounds + 1)
    with Progress(desc="bench", unit="round", total=rounds, disable=not show_bar) as bar:
        for pair in left:
            try:
                row = _measure(work, config, pair, reference["adamw_foreach_seconds"], rates, bar)
                memory = _peak_memory_apart(config, pair)
            except RuntimeError as error:  # among them what CUDA raises, out of memory or not
                if not config.resume:
                    raise
                failed.append(f"{pair.name}: {' '.join(str(error).split())[:500]}")
                gc.collect()
                torch.cuda.empty_cache()
                continue
            row["peak_memory_ratio"] = None if memory is None or reference_memory is None else memory / reference_memory
            row["peak_memory_bytes"] = memory
            results["rows"].append(row)
            show(results)
    if failed:
        raise RuntimeError("; ".join(failed))
    return results


def _begun(work: Workload, config: BenchConfig) -> dict[str, Any]:
    """The results without any row, or with those of the file that is gone on with, if they are of the same."""
    more = {name: getattr(config, name) for name in _RECORDED_IF_SET}
    default = {each.name: each.default for each in fields(config)}
    settings = {name: getattr(config, name) for name in _RECORDED}
    settings |= {name: value for name, value in more.items() if value != default[name]}
    results: dict[str, Any] = {
        "kind": "bench",
        "workload": {"preset": config.preset, **settings},
        "device": machine.device_name(work.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "preset": config.preset,
        "parameters": sum(p.numel() for p in work.parameters),
        "settings": settings,
    }
    if config.curve is not None:
        results["curve"] = {"over": config.curve, "at": place_on(config.curve, config)}
    if config.resume and config.json and Path(config.json).is_file():
        found = parse_json(Path(config.json).read_text(encoding="utf-8"))
        if all(found.get(key) == jsonable(results)[key] for key in _SAME):
            return dict(found)
    return {**results, "rows": []}


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row from the others of its file."""
    own = None if METHODS[row["optimizer"]].config is None else METHODS[row["optimizer"]].base
    return row["optimizer"], None if row["base"] == row["optimizer"] else row["base"] or own, sorted(row["set"].items())


def _adamw(model: nn.Module, **kind: bool) -> Optimizer:
    """The reference: AdamW over decay and no-decay groups, `foreach=True` or `fused=True`."""
    return torch.optim.AdamW(decay_groups(model, _WEIGHT_DECAY), lr=_LEARNING_RATE, **kind)  # type: ignore[arg-type]


def _measure_reference(work: Workload, config: BenchConfig) -> dict[str, float]:
    """Time AdamW(foreach) alone, and AdamW(fused) relative to it."""
    clock, optimizers = Clock(work.device), [_adamw(work.twin, foreach=True), _adamw(work.twin, fused=True)]
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


@dataclass(frozen=True)
class _Peer:
    """An optimizer of somebody else on the hidden matrices, and AdamW(fused) on the rest, as one."""

    parts: tuple[Optimizer, ...]

    @classmethod
    def of(cls, name: str, model: nn.Module) -> _Peer:
        hidden = hidden_weights(model)
        chosen = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        parts = ((name, hidden), ("adamw", rest))
        return cls(tuple(build_base(base, [{"params": params}], _LEARNING_RATE, {}, hidden) for base, params in parts))

    def step(self) -> None:
        for each in self.parts:
            each.step()


def _measure(
    work: Workload, config: BenchConfig, pair: Pair, adamw_seconds: float, rates: roofline.Rates, bar: Progress
) -> dict[str, Any]:
    """Time one method: its row, without the memory."""
    optimizer = pair.build(work.model)
    try:
        stepper, reference = Stepper(work, optimizer, config.bare), _adamw(work.twin, foreach=True)
        peer = None if config.peer is None else _Peer.of(config.peer, work.twin)
        rounds = []
        for number in range(config.rounds + 1):
            bar.set_postfix_str(pair.name, refresh=False)
            # the first one is to allocate, and to let kernels choose themselves
            rounds.append(stepper.round(reference, config.steps if number else min(2, config.steps), peer))
            bar.update()
        found, limit = ratios(rounds[1:], stepper.kinds), roofline.limit(optimizer, stepper.kinds, rates)
        # the seconds of the limit and of AdamW are of one moment, as the step's and AdamW's of one round are
        for part in ("memory", "arithmetic"):
            limit[f"{part}_ratio"] = limit[f"{part}_seconds"] / adamw_seconds
        limit["step_to_limit_ratio"] = (found["step_ratio"] or 0.0) * adamw_seconds / limit["limit_seconds"]
        return {
            "optimizer": pair.name,
            "base": type(optimizer.base).__name__.lower(),
            "config": {**optimizer.config, **dict(pair.settings)},
            "set": dict(pair.settings),
            "cycle": stepper.kinds.counts,
            **found,
            "roofline": limit,
            **_throughput(work, config, found["train_step_seconds"] or 0.0, rates),
            "launches": stepper.launches() if config.launches else None,
            "state_bytes_per_parameter": _state_bytes(optimizer) / sum(p.numel() for p in work.parameters),
        }
    finally:
        optimizer.remove_hooks()
        optimizer.zero_grad()


def _throughput(work: Workload, config: BenchConfig, seconds: float, rates: roofline.Rates) -> dict[str, float]:
    """Tokens a second of whole train steps, and their share of the product rate measured in the passes' dtype (MFU)."""
    shape = (config.batch_size, config.seq_length, predictions_of(config.seq_length))
    rate = rates.operations_per_second("bfloat16" if config.autocast else "float32")
    tokens = config.ranks * config.batch_size * config.seq_length
    return {"tokens_per_second": tokens / seconds, "mfu": roofline.pass_flops(work.size, shape) / seconds / rate}


def _state_bytes(optimizer: PreconditionedOptimizer) -> int:
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


def _peak_memory_apart(config: BenchConfig, pair: Pair | None) -> int | None:
    """`peak_memory` in a process of its own, where nothing else has left its mark; None if it is not wanted."""
    if not config.memory or config.ranks > 1:
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, config, pair).result()


def _peak_memory(config: BenchConfig, pair: Pair | None) -> int:
    """Bytes that two whole train steps need over what the process held before the model was built.

    Args:
        config: the model and batch.
        pair: the method, or None for AdamW(foreach).

    Returns:
        Bytes.
    """
    torch.set_num_threads(config.threads)
    before = machine.peak_memory_bytes(torch.device(config.device))
    work = Workload(config)
    optimizer = _adamw(work.model, foreach=True) if pair is None else pair.build(work.model)
    for index in range(2):
        optimizer.zero_grad()
        work.forward_backward(work.model)
        if isinstance(optimizer, PreconditionedOptimizer):
            optimizer.report_loss(-float(index))
        optimizer.step()
    return machine.peak_memory_bytes(work.device) - before

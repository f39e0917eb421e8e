"""The least seconds of a step: what it must move and multiply, at the rates that the device sustains.

    bytes        base     |g| + 2|w| + 2|state|, and once more |w| for each pass that `BaseWork.again` counts
                 method   `least_passes` |G|; the factors that are applied, read; all of them read and written by a
                          step that updates or refreshes
    operations   products and factorisations: `minimal_products` (`flops` where they are thin), `BaseWork.products`
    limit        max(bytes / rate of a copy, Σ operations / rate of their kind), of each kind of step, then the mean

Elementwise arithmetic is not counted, it hides behind its own bytes; nor are temporaries, which could stay in a cache.
The rates are measured in the same run with the same threads. A step can be below its limit where a model fits a cache.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_soo.bench.minimal_work import factorised
from hf_soo.bench.step_kinds import Kind, StepKinds
from hf_soo.bench.workload import Clock
from hf_soo.engine.flops import Factorisation, Product, work_of_base
from hf_soo.engine.layers import Layer
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.preconditioner import LayerState

_COPIED = (1 << 20, 1 << 28)  # numbers in a copy: as many as the model has, within these
_SQUARE = {"cpu": 1024, "cuda": 4096}  # rows of the matrices that are multiplied; at most so many are factorised
_TIMES = 4


@dataclass(frozen=True, slots=True)
class _Load:
    """What a step must move and do.

    Args:
        bytes: read and written.
        operations: floating-point operations by what does them: products by their dtype, "eigh", "cholesky_inverse".
    """

    bytes: float = 0.0
    operations: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: _Load) -> _Load:
        return _Load(self.bytes + other.bytes, self.operations + other.operations)


def _load_of(optimizer: PreconditionedOptimizer, kind: Kind) -> _Load:
    """Of a step of a kind, after one that has made all state; parameters without a gradient are left out."""
    base, whole = optimizer.base, _Load()
    for group in base.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            work, state = work_of_base(base, param, group), base.state.get(param, {})
            held = sum(tensor.nbytes for tensor in state.values() if isinstance(tensor, Tensor))
            moved = param.grad.nbytes + (2 + work.again) * param.nbytes + 2 * held
            whole += _Load(moved, _counted(work.products, work.dtype or param.dtype))
    for layer in optimizer.layers:
        whole += _of_layer(optimizer, layer, kind)
    return whole


def _of_layer(optimizer: PreconditionedOptimizer, layer: Layer, kind: Kind) -> _Load:
    """G -> P and the factors of one layer."""
    method, dtype = optimizer.preconditioner, layer.weight.dtype
    state: LayerState = optimizer.stages.states[layer.name]
    factors = [(key, tensor.nbytes) for factor in state.values() for key, tensor in factor.items()]
    applied = sum(size for key, size in factors if method.shared is None or key in method.shared)
    renewed = 2 * sum(size for _, size in factors)
    moved = method.least_passes * math.prod(layer.matrix) * dtype.itemsize
    moved += renewed if kind.updates or kind.refreshes else applied
    happens = (True, kind.updates, kind.refreshes)
    minimal = method.minimal_products(layer)
    if minimal is None:
        thin = sum(flops for flops, does in zip(method.flops(layer), happens, strict=True) if does)
        return _Load(moved, Counter({_name(dtype): round(thin)}))
    parts = (minimal.every, minimal.update, minimal.refresh)
    done = [each for part, does in zip(parts, happens, strict=True) if does for each in part]
    return _Load(moved, _counted(done, dtype))


def _counted(operations: Iterable[Product | Factorisation], dtype: torch.dtype) -> Counter[str]:
    found: Counter[str] = Counter()
    for each in operations:
        found[_name(dtype) if isinstance(each, Product) else each.kind] += each.flops
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Rates:
    """What the device sustains, each measured when it is first asked for; the best of a few."""

    def __init__(self, device: torch.device, clock: Clock, numbers: int) -> None:
        """Measure nothing yet; a copy will be of about ``numbers`` numbers."""
        self.device, self._clock = device, clock
        self._numbers = min(max(numbers, _COPIED[0]), _COPIED[1])
        self.found: dict[str, float] = {}

    def bytes_per_second(self) -> float:
        """Read and written, by a copy or a pass in place, whichever moves more."""
        if "bytes" not in self.found:
            source = torch.ones(self._numbers, device=self.device)
            target = torch.ones_like(source)
            seconds = min(self._best(lambda: target.copy_(source)), self._best(lambda: target.mul_(0.5)))
            self.found["bytes"] = 2 * source.nbytes / seconds
        return self.found["bytes"]

    def operations_per_second(self, name: str) -> float:
        """Of square products in a dtype, or of factorisations."""
        if name not in self.found:
            d = _SQUARE[self.device.type]
            if name in ("eigh", "cholesky_inverse", "qr"):
                d //= 2  # seconds, where it is done once
                of = Factorisation(name, d)  # type: ignore[arg-type]
                self.found[name] = of.flops / self._best(factorised(of, torch.empty(0, device=self.device)))
            else:
                left, right = torch.randn(2, d, d, device=self.device).to(getattr(torch, name))
                self.found[name] = 2 * d**3 / self._best(lambda: left @ right)
        return self.found[name]

    def _best(self, call: Callable[[], Any]) -> float:
        return min([self._clock(call) for _ in range(_TIMES)][1:])


def limit(optimizer: PreconditionedOptimizer, kinds: StepKinds, rates: Rates) -> dict[str, Any]:
    """The least seconds of a step, averaged over a method's kinds, and what they come from.

    Returns:
        "bytes", "operations" by what does them, "memory_seconds", "arithmetic_seconds", "limit_seconds", and "bound":
        which of the two, "memory" or "arithmetic", is the larger part of the limit.
    """
    loads = {kind: _load_of(optimizer, kind) for kind in kinds.distinct}
    memory = {kind: load.bytes / rates.bytes_per_second() for kind, load in loads.items()}
    arithmetic = {
        kind: sum(flops / rates.operations_per_second(name) for name, flops in load.operations.items())
        for kind, load in loads.items()
    }
    limits = {kind: max(memory[kind], arithmetic[kind]) for kind in loads}
    names = sorted(set().union(*(load.operations for load in loads.values())))
    means = [kinds.mean(each) or 0.0 for each in (memory, arithmetic, limits)]
    return {
        "bytes": kinds.mean({kind: load.bytes for kind, load in loads.items()}),
        "operations": {
            name: kinds.mean({kind: load.operations[name] for kind, load in loads.items()}) for name in names
        },
        **dict(zip(("memory_seconds", "arithmetic_seconds", "limit_seconds"), means, strict=True)),
        "bound": "memory" if means[0] >= means[1] else "arithmetic",
    }


def pass_flops(config: Any, shape: Sequence[int]) -> float:
    """Of BERT's forward and backward pass: 6 for each weight that an input row meets, and 12 T h for the attention.

    Tokens meet the blocks, masked positions the transform and the decoder, sequences the pooler and its head; Kaplan et
    al. (arXiv 2001.08361) count so. What checkpointing does twice is not counted, as usual for the model FLOPs of MFU.

    Args:
        config: a ``BertConfig``.
        shape: (sequences, tokens in each, predictions in each).
    """
    rows, length, predictions = shape
    h, wide = config.hidden_size, config.intermediate_size
    block = 6 * (4 * h * h + 2 * h * wide) + 12 * length * h
    heads = predictions * (h * h + h * config.vocab_size) + h * h + 2 * h
    return float(rows * (length * config.num_hidden_layers * block + 6 * heads))

"""One round of a benchmark, and what the rounds say.

A round interleaves the reference's steps with the method's, of every kind that occurs among its steps: plain steps,
updates on the statistics of a real forward and backward pass, refreshes. Between steps the gradients and statistics of
that pass are copied back, outside the clock. A refresh may take seconds, so it is timed once a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from hf_soo.bench.minimal_work import MinimalProducts, Part, seconds_of
from hf_soo.bench.step_kinds import Kind, StepKinds, step_kinds_of
from hf_soo.bench.workload import Clock, Workload
from hf_soo.engine.optimizer import PreconditionedOptimizer


@dataclass(slots=True)
class _Round:
    """Seconds of one round; None where the method has no such pass."""

    reference: float
    forward_backward: float  # without any hook
    steps: dict[Kind, float]
    capturing: float | None = None  # forward and backward of a step that updates from what hooks collect
    idle: float | None = None  # the same with hooks that do not collect
    minimal: dict[Part, float] = field(default_factory=dict)  # the method's minimal products
    peer: float | None = None  # a step of the optimizer that is timed beside

    def step(self, kinds: StepKinds) -> float:
        """Seconds of an optimizer step, averaged over the kinds."""
        return kinds.mean(self.steps) or 0.0

    def minimal_seconds(self, kinds: StepKinds) -> float | None:
        """Seconds of a step's minimal products, averaged over the kinds; None without any."""
        return kinds.mean({kind: seconds_of(kind, self.minimal) for kind in self.steps}) if self.minimal else None

    def train_step(self, kinds: StepKinds) -> float:
        """Seconds of a whole train step, averaged over the kinds."""
        passes = {kind: self.capturing if kind.updates else self.idle for kind in self.steps}
        whole = {kind: self.steps[kind] + (seconds or self.forward_backward) for kind, seconds in passes.items()}
        return kinds.mean(whole) or 0.0

    @property
    def reference_train_step(self) -> float:
        """Seconds of a whole train step with the reference."""
        return self.forward_backward + self.reference


class _Stepping(Protocol):
    """What can be stepped."""

    def step(self) -> Any:
        """Take a step."""


def _launches_of(call: Callable[[], object], device: torch.device) -> int:
    """Kernels and copies that a call starts on a GPU; on a CPU, torch's operations that call no others."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    events = profiled.events() or []
    if cuda:
        return sum(event.device_type.name == "CUDA" and not event.is_user_annotation for event in events)
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in events)


class Stepper:
    """One optimizer over the workload, moved between the kinds of its steps."""

    def __init__(self, work: Workload, optimizer: PreconditionedOptimizer, bare: bool = True) -> None:
        """Look at the kinds of the method's steps; nothing is timed yet. ``bare``: time its minimal products too."""
        self.work, self.optimizer = work, optimizer
        self.clock = Clock(work.device)
        self.kinds = step_kinds_of(optimizer.preconditioner)
        self.minimal = MinimalProducts(
            optimizer.layers if bare else [], optimizer.preconditioner, optimizer.base if bare else None
        )
        self._statistics: list[Tensor] = []

    def round(self, reference: Optimizer, steps: int, peer: _Stepping | None = None) -> _Round:
        """Take a round: the passes, then a step of each kind in turn with the reference's, again and again.

        Args:
            reference: stepped between the others.
            steps: steps of each kind; those that refresh are taken once.
            peer: stepped once beside them.

        Returns:
            Its times.
        """
        kinds = self.kinds.distinct
        unhooked, idle, capturing = self._passes(kinds)
        references: list[float] = []
        seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
        products: dict[Part, list[float]] = {part: [] for part in self.minimal.parts(kinds)}
        for index in range(steps):
            references.append(self._timed(reference))
            for kind in kinds:
                if index == 0 or not kind.refreshes:
                    seconds[kind].append(self._step(kind))
            for part in products:
                if index == 0 or part != "refresh":
                    products[part].append(self.clock(lambda part=part: self.minimal.run(part)))  # type: ignore[misc]
        return _Round(
            reference=statistics.median(references),
            forward_backward=unhooked,
            steps={kind: statistics.median(times) for kind, times in seconds.items()},
            capturing=capturing,
            idle=idle,
            minimal={part: statistics.median(times) for part, times in products.items()},
            peer=None if peer is None else self._timed(peer),
        )

    def launches(self) -> int:
        """Of the commonest kind of step: kernels on a GPU, torch's innermost operations on a CPU."""
        self._step(kind := max(set(self.kinds.kinds), key=self.kinds.kinds.count))
        self._prepare(kind)
        self.work.restore_gradients()
        return _launches_of(self.optimizer.step, self.work.device)

    def _passes(self, kinds: list[Kind]) -> tuple[float, float | None, float | None]:
        """Forward and backward: without hooks, with idle ones, with collecting ones; the last is remembered."""
        hooked = bool(self.optimizer.stages.capture.buffers)
        unhooked = self._pass(self.work.twin)
        plain = next((kind for kind in kinds if not kind.updates), None)
        update = next((kind for kind in kinds if kind.updates), None)
        idle = self._pass(self.work.model, plain) if hooked and plain else None
        capturing = self._pass(self.work.model, update) if hooked and update else None
        self.work.keep_gradients()
        self._statistics = [buffer.clone() for buffer in self._buffers()] if hooked and update else []
        return unhooked, idle, capturing

    def _pass(self, model: nn.Module, kind: Kind | None = None) -> float:
        """Time a pass of either model, as before a step of a kind."""
        if kind is not None:
            self._go_to(kind)
        self.optimizer.zero_grad()
        return self.clock(lambda: self.work.forward_backward(model))

    def _step(self, kind: Kind) -> float:
        self._prepare(kind)
        return self._timed(self.optimizer)

    def _prepare(self, kind: Kind) -> None:
        """Make the next step one of a kind, with the statistics of the last pass."""
        self._go_to(kind)
        if kind.updates:
            for buffer, kept in zip(self._buffers(), self._statistics, strict=True):
                buffer.copy_(kept)
        self.optimizer.report_loss(0.0)  # level from the start: no rate falls behind another, so MKOR-H does not switch

    def _timed(self, optimizer: _Stepping) -> float:
        self.work.restore_gradients()
        return self.clock(optimizer.step)

    def _go_to(self, kind: Kind) -> None:
        """Make the next step one of a kind; what the forward pass collects follows from it."""
        self.optimizer.steps = self.kinds.step(kind)
        self.optimizer._schedule()

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffers in self.optimizer.stages.capture.buffers.values() for buffer in buffers]


def ratios(rounds: list[_Round], kinds: StepKinds) -> dict[str, float | None]:
    """Medians over the rounds of each ratio, and the spread of the step's; None where a method has no such step.

    Plain steps neither update nor refresh, update steps update alone, refresh steps refresh, with an update or without.

    Returns:
        The row's ratios.
    """

    def median(of: Callable[[_Round], float | None]) -> float | None:
        values = [value for value in map(of, rounds) if value is not None]
        return statistics.median(values) if values else None

    def step(which: Callable[[Kind], bool]) -> float | None:
        return median(lambda r: _over(kinds.mean(r.steps, which), r.reference))

    steps = [r.step(kinds) / r.reference for r in rounds]
    return {
        "step_ratio": statistics.median(steps),
        "step_ratio_min": min(steps),
        "step_ratio_max": max(steps),
        "plain_step_ratio": step(lambda kind: not (kind.updates or kind.refreshes)),
        "update_step_ratio": step(lambda kind: kind.updates and not kind.refreshes),
        "refresh_step_ratio": step(lambda kind: kind.refreshes),
        "bare_products_ratio": median(lambda r: _over(r.minimal_seconds(kinds), r.reference)),
        "step_to_bare_ratio": median(lambda r: _over(r.step(kinds), r.minimal_seconds(kinds))),
        "capture_ratio": median(lambda r: _over(r.capturing, r.forward_backward)),
        "train_step_ratio": median(lambda r: r.train_step(kinds) / r.reference_train_step),
        "forward_backward_seconds": median(lambda r: r.forward_backward),
        "step_seconds": median(lambda r: r.step(kinds)),
        "train_step_seconds": median(lambda r: r.train_step(kinds)),
        "peer_ratio": median(lambda r: _over(r.peer, r.reference)),
        "step_to_peer_ratio": median(lambda r: _over(r.step(kinds), r.peer)),
    }


def _over(a: float | None, b: float | None) -> float | None:
    """The ratio, None where there is none."""
    return a / b if a is not None and b else None

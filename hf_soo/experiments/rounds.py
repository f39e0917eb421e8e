"""One round of a benchmark, and what the rounds say.

A round interleaves the reference's steps with the method's, and takes an update step on the statistics of a real
forward and backward pass. Between steps the gradients of that pass are copied back, outside the clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.experiments.workload import Clock, Workload

SETTLED = 1000  # optimizer steps after which no method is in its warm-up


@dataclass(slots=True)
class Round:
    """Seconds of one round; None where the method has no such step."""

    reference: float
    forward_backward: float  # without any hook
    plain: float | None
    update: float | None
    capturing: float | None  # forward and backward of an update step
    idle: float | None  # the same with hooks that do not collect

    def amortised(self, period: int | None) -> float:
        """Seconds of an optimizer step, averaged over a period."""
        return _average(self.plain, self.update, period)

    def train_step(self, period: int | None) -> float:
        """Seconds of a whole train step, averaged over a period."""
        plain = self.forward_backward if self.idle is None else self.idle
        return _average(plain, self.capturing, period) + self.amortised(period)

    @property
    def reference_train_step(self) -> float:
        """Seconds of a whole train step with the reference."""
        return self.forward_backward + self.reference


def _average(plain: float | None, update: float | None, period: int | None) -> float:
    if period is None or update is None:
        assert plain is not None
        return plain
    return update if plain is None else (update + (period - 1) * plain) / period


class Stepper:
    """One optimizer over the workload, moved between its plain and its update steps."""

    def __init__(self, work: Workload, optimizer: PreconditionedOptimizer) -> None:
        """Take the first steps, up to an update outside the warm-up."""
        self.work, self.optimizer = work, optimizer
        self.clock = Clock(work.device)
        updates = (t for t in range(SETTLED, 3 * SETTLED) if optimizer.preconditioner.updates_at(t))
        self.next_update = next(updates, None)
        self.period = None if self.next_update is None else next(updates) - self.next_update
        for last in (0, 0, 1):  # allocate, and let kernels choose themselves
            self._pass(work.model)
            self._jump(last)
            optimizer.step()

    def round(self, reference: Optimizer, steps: int) -> Round:
        """Take a round: the passes and an update step, then plain steps in turn with the reference's.

        Args:
            reference: Stepped between the plain steps.
            steps: Plain steps, at most; the period allows no more than period - 1.

        Returns:
            Its times.
        """
        bare = self._pass(self.work.twin)
        capturing = update = idle = None
        allowed = steps if self.period is None else min(steps, self.period - 1)
        if self.period is not None:
            capturing = self._pass(self.work.model)
        self.work.keep_gradients()
        if self.period is not None:
            update = self.clock(self.optimizer.step)
            idle = self._pass(self.work.model) if allowed else None
            self._jump(allowed)
        plain, references = [], []
        for index in range(steps):
            references.append(self._timed(reference))
            if index < allowed:
                plain.append(self._timed(self.optimizer))
        between = statistics.median(plain) if plain else None
        return Round(statistics.median(references), bare, between, update, capturing, idle)

    def _pass(self, model: nn.Module) -> float:
        self.optimizer.zero_grad()
        return self.clock(lambda: self.work.forward_backward(model))

    def _timed(self, optimizer: Optimizer) -> float:
        self.work.restore_gradients()
        return self.clock(optimizer.step)

    def _jump(self, steps: int) -> None:
        """Move on to `steps` plain steps before the next update; 0 stays, the next step is one."""
        if steps and self.next_update is not None and self.period is not None:
            self.optimizer.steps = self.next_update - steps
            self.next_update += self.period


def ratios(rounds: list[Round], period: int | None) -> dict[str, float | None]:
    """Medians over the rounds of each ratio, and the spread of the step's; None where a method has no such step.

    Args:
        rounds: At least one.
        period: Steps from update to update, None without updates.

    Returns:
        The row's ratios.
    """

    def median(of: Callable[[Round], float | None]) -> float | None:
        values = [value for value in map(of, rounds) if value is not None]
        return statistics.median(values) if values else None

    steps = [r.amortised(period) / r.reference for r in rounds]
    return {
        "step_ratio": statistics.median(steps),
        "step_ratio_min": min(steps),
        "step_ratio_max": max(steps),
        "plain_step_ratio": median(lambda r: r.plain and r.plain / r.reference),
        "update_step_ratio": median(lambda r: r.update and r.update / r.reference),
        "capture_ratio": median(lambda r: r.capturing and r.capturing / r.forward_backward),
        "train_step_ratio": median(lambda r: r.train_step(period) / r.reference_train_step),
        "forward_backward_seconds": median(lambda r: r.forward_backward),
    }

"""What is put around a base, in numpy float64, from the papers' equations; it shares no code with hf_soo.

`Wrapped` is a base for `training.simulate`, and a base in halves for `directions.simulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.oracles.core import Array


@dataclass
class Wrapped:
    """Two time scales, then a base without decay, cautious decay, an average, and EMA-Nesterov's look-ahead.

    Args:
        base: steps, or takes and moves.
        slow: β₃ and α of m₂ ← β₃m₂ + (1-β₃)g, g + αm₂ (AdEMAMix).
        cautious: λ of x ← x - η(u + λ 1[u x >= 0] x) (cautious weight decay), of each parameter.
        ema: δ of e ← δe + (1-δ)x.
        lookahead: β and γ of x⁺ = A(x + βm), m ← γm + (1-γ)(x⁺ - x) (EMA-Nesterov); the parameters are x + βm.
    """

    base: Any
    slow: tuple[float, float] | None = None
    cautious: Sequence[float] | None = None
    ema: float | None = None
    lookahead: tuple[float, float] | None = None
    m2: list[Array] = field(default_factory=list)
    x: list[Array] = field(default_factory=list)
    m: list[Array] = field(default_factory=list)
    average: list[Array] = field(default_factory=list)

    def step(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        """One step of the whole."""
        mixed, at = self._mix(grads), self._begin(params)
        self.base.step(params, mixed, lr)
        self._finish(params, at, lr)

    def take(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        """The first half."""
        taken: list[Array] = self.base.take(params, self._mix(grads))
        return taken

    def move(self, params: Sequence[Array], directions: Sequence[Array], lr: float) -> None:
        """The second."""
        at = self._begin(params)
        self.base.move(params, directions, lr)
        self._finish(params, at, lr)

    def shown(self, params: Sequence[Array]) -> list[Array]:
        """What the model is evaluated with."""
        if self.ema is not None:
            return self.average
        return list(params) if self.lookahead is None else self.x

    def _mix(self, grads: Sequence[Array]) -> list[Array]:
        if self.slow is None:
            return list(grads)
        beta, alpha = self.slow
        before = self.m2 or [np.zeros_like(g) for g in grads]
        self.m2 = [beta * m + (1 - beta) * g for m, g in zip(before, grads, strict=True)]
        return [g + alpha * m for m, g in zip(self.m2, grads, strict=True)]

    def _begin(self, params: Sequence[Array]) -> list[Array]:
        if not self.x:
            self.x = [p.copy() for p in params]
            self.average = [p.copy() for p in params]
            self.m = [np.zeros_like(p) for p in params]
        return [p.copy() for p in params]

    def _finish(self, params: Sequence[Array], at: Sequence[Array], lr: float) -> None:
        for i, (p, y) in enumerate(zip(params, at, strict=True)):
            if self.cautious is not None:
                u = (y - p) / lr
                p[...] = y - lr * (u + self.cautious[i] * (u * y >= 0) * y)
            x, before = p.copy(), self.x[i]
            self.x[i] = x
            if self.ema is not None:
                self.average[i] = self.ema * self.average[i] + (1 - self.ema) * x
            if self.lookahead is not None:
                beta, gamma = self.lookahead
                self.m[i] = gamma * self.m[i] + (1 - gamma) * (x - before)
                p += beta * self.m[i]

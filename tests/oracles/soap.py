"""Textbook SOAP in numpy float64, from Algorithm 3 of Vyas et al. (2409.11321), sharing no code with hf_soo.

Letters as there: L the factor of an axis, Q its basis, V the second moment in the bases, M the gradients' average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.oracles.core import Array
from tests.oracles.rootfree import along_all, unfold


def untied(L: Array, ties: float) -> Array:
    """L with a part of its mean eigenvalue on the diagonal, falling to 0 from the first entry to the last."""
    return L + np.diag(ties * np.trace(L) / len(L) * np.linspace(1, 0, len(L)))


@dataclass
class Soap:
    """Algorithm 3 for one tensor: a step gives N, what the weights move along, from the gradient G and the average M.

    The first step takes the gradient into L and makes the bases, and its N is 0. An axis beyond `max_dim` has none.
    """

    decay: float = 0.95
    moment_decay: float = 0.95
    eps: float = 1e-8
    period: int = 10
    max_dim: int = 10000
    ties: float = 1e-6
    t: int = 0
    updates: int = 0
    V: Array | float = 0.0
    L: list[Array] = field(default_factory=list)
    Q: list[Array] = field(default_factory=list)

    def step(self, G: Array, M: Array) -> Array:
        N = np.zeros_like(G)
        if self.t > 0:
            N = self.normalised(G, M)
        old = self.L or [np.zeros((d, d)) for d in G.shape]
        self.L = [self.decay * L + (1 - self.decay) * unfold(G, n) @ unfold(G, n).T for n, L in enumerate(old)]
        if self.t == 0:
            self.Q = [np.linalg.eigh(untied(L, self.ties))[1][:, ::-1] for L in self.L]
            self.Q = [Q if len(Q) <= self.max_dim else np.eye(len(Q)) for Q in self.Q]
        elif self.t % self.period == 0:
            self.rotate()
        self.t += 1
        return N

    def normalised(self, G: Array, M: Array) -> Array:
        G_, M_ = (along_all(X, [Q.T for Q in self.Q]) for X in (G, M))
        self.updates += 1
        self.V = self.moment_decay * self.V + (1 - self.moment_decay) * G_**2
        return along_all(M_ / (np.sqrt(self.V / (1 - self.moment_decay**self.updates)) + self.eps), self.Q)

    def rotate(self) -> None:
        """Q ← QR(LQ), the columns and V in the order of QᵀLQ's diagonal."""
        for n, (L, Q) in enumerate(zip(self.L, self.Q, strict=True)):
            if len(L) <= self.max_dim:
                order = np.argsort(-np.diag(Q.T @ untied(L, self.ties) @ Q))
                self.V = np.take(self.V, order, axis=n)
                self.Q[n] = np.linalg.qr(untied(L, self.ties) @ Q[:, order])[0]


@dataclass
class SoapAndAdamW:
    """Tensors with two axes or more by SOAP, with AdamW's average and decoupled decay; vectors by AdamW."""

    rules: Sequence[Soap | None]
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    decay: Sequence[float] = ()
    t: int = 0
    M: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)

    def step(self, W: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        (beta1, beta2), self.t = self.betas, self.t + 1
        self.M, self.v = self.M or [np.zeros_like(w) for w in W], self.v or [np.zeros_like(w) for w in W]
        for i, (w, G, rule) in enumerate(zip(W, grads, self.rules, strict=True)):
            self.M[i] = beta1 * self.M[i] + (1 - beta1) * G
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * G**2
            M_hat = self.M[i] / (1 - beta1**self.t)
            N = M_hat / (np.sqrt(self.v[i] / (1 - beta2**self.t)) + self.eps) if rule is None else rule.step(G, M_hat)
            w *= 1 - lr * self.decay[i]
            w -= lr * N

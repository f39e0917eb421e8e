"""Textbook K-FAC (expand, reduce) and FOOF in numpy float64, dense and slow, to hold the library against.

Nothing here is imported from hf_soo. Rows come in the weight-sharing format: `a` [N, S, m] (1 last where there is a
bias) and `g` [N, S, n], the gradient of the differentiated scalar by what came out; S positions share the weights
within one of N examples, and [N, d] stands for [N, 1, d]. R is the number of loss terms the scalar is the mean of.

    A = mean of a aᵀ, B = R Σ g gᵀ, vec(P) = (B ⊗ A + λI)⁻¹ vec(G), G = Σ g aᵀ [n, m], vec row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.oracles.core import Array, norm_match

FLOOR = 1e-8
"""Lowest damping of a factor in the π split, in units of its mean eigenvalue."""


def shared(rows: Any) -> Array:
    """[N, S, d] from [N, d], [N, S, d] or [N, S1, S2, d], of numpy or torch."""
    data = np.asarray(rows.detach().numpy() if hasattr(rows, "detach") else rows, dtype=np.float64)
    return data.reshape(len(data), -1, data.shape[-1])


def gradient(a: Array, g: Array) -> Array:
    """G = Σ g aᵀ, [n, m]."""
    return np.einsum("isn,ism->nm", shared(g), shared(a))


def seen(g: Array, row_filter: str = "grad") -> Array:
    """Which rows count for A, [N, S]: those with a gradient that is not exactly zero, or "all"."""
    return np.any(shared(g) != 0, axis=-1) if row_filter == "grad" else np.ones(shared(g).shape[:2], dtype=bool)


# ---- factors (spec sections 1, 2) ------------------------------------------------------------------------------------


def factors(
    a: Any,
    g: Any,
    terms: int | None = None,
    approx: str = "expand",
    row_filter: str = "grad",
    factor_scale: str = "loss",
) -> tuple[Array, Array]:
    """A [m, m] and B [n, n] of one window; `terms` is R, by default the rows of `g` that are not zero.

    Expand takes each row for itself. Reduce takes, for each example, the mean of its counted rows of `a` and the sum
    of its rows of `g`; an example without a counted row is none. "published" divides Σ g gᵀ by the number of rows.
    """
    a, g = shared(a), shared(g)
    counted = seen(g, row_filter)
    terms = int(seen(g).sum()) if terms is None else terms
    if approx == "reduce":
        of_example = counted.sum(1)
        some = of_example > 0
        a = np.einsum("is,ism->im", counted, a)[some] / of_example[some, None]
        g = g.sum(1)[some]
    else:
        a, g = a[counted], g[counted]
    scale = {"loss": float(terms), "published": 1.0 / len(g)}[factor_scale]
    return sum(np.outer(v, v) for v in a) / len(a), scale * sum(np.outer(v, v) for v in g)


def one_hot_columns(p: Array) -> Array:
    """Columns √p_c (e_c - p) of a root of the softmax Hessian diag(p) - ppᵀ, [C, C]."""
    return (np.eye(len(p)) - p[:, None]) * np.sqrt(p)


def running(stream: Sequence[Array], rho: float, start: str = "corrected") -> tuple[Array, Array]:
    """S_u = ρ S + (1-ρ) F over a stream of factors, and the estimate: S_u / (1 - ρ^u), or S_u itself from S_0 = I."""
    S = np.eye(len(stream[0])) if start == "identity" else np.zeros_like(stream[0])
    for F in stream:
        S = rho * S + (1 - rho) * F
    return S, S if start == "identity" else S / (1 - rho ** len(stream))


# ---- inverses (spec section 4) ---------------------------------------------------------------------------------------


def mean_eigenvalue(F: Array) -> float:
    return float(np.trace(F)) / len(F)


def curvature(A: Array, B: Array) -> float:
    """k̄ = (tr A / m)(tr B / n), the mean eigenvalue of B ⊗ A."""
    return mean_eigenvalue(A) * mean_eigenvalue(B)


def split_damping(A: Array, B: Array, damping: float, mode: str) -> tuple[float, float]:
    """What the factored inverse adds to A and to B.

    "absolute": π√λ and √λ/π with π² = (tr A / m) / (tr B / n), floored. "relative", λ = damping · k̄, is the same with
    π√λ = √damping · tr A / m.
    """
    of_a, of_b = mean_eigenvalue(A), mean_eigenvalue(B)
    if mode == "relative":
        return math.sqrt(damping) * of_a, math.sqrt(damping) * of_b
    pi = math.sqrt(of_a / of_b)
    return max(pi * math.sqrt(damping), FLOOR * of_a), max(math.sqrt(damping) / pi, FLOOR * of_b)


def factored(A: Array, B: Array, G: Array, damping: float, mode: str = "relative") -> Array:
    """(B + β I)⁻¹ G (A + α I)⁻¹ with the π split."""
    alpha, beta = split_damping(A, B, damping, mode)
    return np.linalg.inv(B + beta * np.eye(len(B))) @ G @ np.linalg.inv(A + alpha * np.eye(len(A)))


def factored_dense(A: Array, B: Array, G: Array, damping: float, mode: str = "relative") -> Array:
    """The same by solving the nm x nm system of the damped factors."""
    alpha, beta = split_damping(A, B, damping, mode)
    system = np.kron(B + beta * np.eye(len(B)), A + alpha * np.eye(len(A)))
    return np.linalg.solve(system, G.flatten()).reshape(G.shape)


def tikhonov_damping(A: Array, B: Array, damping: float, mode: str) -> float:
    return damping * curvature(A, B) if mode == "relative" else damping


def exact(A: Array, B: Array, G: Array, damping: float, mode: str = "relative") -> Array:
    """(B ⊗ A + λI)⁻¹ vec G in the factors' eigenvectors, negative eigenvalues taken for 0."""
    lam = tikhonov_damping(A, B, damping, mode)
    (la, Qa), (lb, Qb) = np.linalg.eigh(A), np.linalg.eigh(B)
    K = np.outer(lb.clip(min=0), la.clip(min=0)) + lam
    return Qb @ ((Qb.T @ G @ Qa) / K) @ Qa.T


def exact_dense(A: Array, B: Array, G: Array, damping: float, mode: str = "relative") -> Array:
    """The same by solving the nm x nm system."""
    K = np.kron(B, A) + tikhonov_damping(A, B, damping, mode) * np.eye(G.size)
    return np.linalg.solve(K, G.flatten()).reshape(G.shape)


def foof(A: Array, G: Array, damping: float, mode: str = "relative") -> Array:
    """G (A + λI)⁻¹; "relative" is λ = damping · tr A / m."""
    lam = damping * mean_eigenvalue(A) if mode == "relative" else damping
    return G @ np.linalg.inv(A + lam * np.eye(len(A)))


def foof_least_squares(a: Array, g: Array, lam: float) -> Array:
    """argmin over D of mean over rows |D a - M g|² + λ|D|², M rows: the regression FOOF is derived from."""
    a, g = (shared(x).reshape(-1, shared(x).shape[-1]) for x in (a, g))
    M, m = a.shape
    design = np.vstack([a / math.sqrt(M), math.sqrt(lam) * np.eye(m)])
    aims = np.vstack([math.sqrt(M) * g, np.zeros((m, g.shape[1]))])
    return np.linalg.lstsq(design, aims, rcond=None)[0].T


def kl_scale(pairs: Sequence[tuple[Array, Array]], lr: float, kl_clip: float) -> float:
    """ν = min(1, √(κ / (lr² |Σ ⟨P, G⟩|))) over all layers; 1 when the sum is 0."""
    total = lr**2 * abs(sum(float((P * G).sum()) for G, P in pairs))
    return 1.0 if total == 0 else min(1.0, math.sqrt(kl_clip / total))


def rescaled(pairs: Sequence[tuple[Array, Array]], lr: float, rule: str, kl_clip: float | None) -> list[Array]:
    """P of each layer by one of the rules "none", "kl_clip", "norm" (layer by layer) and "global" (one for all)."""
    if rule == "norm":
        return [norm_match(G, P) for G, P in pairs]
    scale = 1.0
    if rule == "kl_clip" and kl_clip is not None:
        scale = kl_scale(pairs, lr, kl_clip)
    elif rule == "global":
        scale = math.sqrt(sum((G**2).sum() for G, _ in pairs) / sum((P**2).sum() for _, P in pairs))
    return [scale * P for _, P in pairs]


# ---- whole runs ------------------------------------------------------------------------------------------------------


@dataclass
class Kfac:
    """K-FAC, or FOOF where `input_only`, for `oracle_training.simulate`; `config` has the library's names.

    `streams` holds, for each layer, every A and every B there was; `estimates` what the inverses are made from.
    """

    config: dict[str, Any] = field(default_factory=dict)
    input_only: bool = False
    approx: str = "expand"
    t: int = 0
    streams: list[tuple[list[Array], list[Array]]] = field(default_factory=list)
    estimates: list[tuple[Array, Array]] = field(default_factory=list)

    def transform(self, layers: Sequence[tuple[Array, Array]], lr: float) -> list[Array]:
        """G of each layer -> P."""
        cfg = {**DEFAULTS, **self.config}
        self.streams = self.streams or [([], []) for _ in layers]
        if self._turn(cfg, "update_period"):
            terms = cfg["loss_terms"] or int(seen(layers[-1][1]).sum())
            for (a, g), stream in zip(layers, self.streams, strict=True):
                new = factors(a, g, terms, self.approx, cfg["row_filter"], cfg["factor_scale"])
                for side, F in zip(stream, new, strict=True):
                    side.append(F)
        if self._turn(cfg, "inverse_period"):
            self.estimates = [
                tuple(running(side, cfg["factor_decay"], cfg["factor_start"])[1] for side in stream)
                for stream in self.streams
            ]
        self.t += 1
        pairs = []
        for (a, g), (A, B) in zip(layers, self.estimates, strict=True):
            G, damping = gradient(a, g), (cfg["damping"], cfg["damping_mode"])
            solve = {"cholesky": factored, "eigen": exact}[cfg["inverse"]]
            pairs.append((G, foof(A, G, *damping) if self.input_only else solve(A, B, G, *damping)))
        return rescaled(pairs, lr, cfg["rescale"], cfg["kl_clip"])

    def _turn(self, cfg: dict[str, Any], period: str) -> bool:
        return self.t < cfg["warmup_updates"] or self.t % cfg[period] == 0


@dataclass
class NewtonMuon:
    """Newton-Muon's part before Muon, block by block: G ← G (K + ρI)⁻¹, ρ = .2 tr K / d + 1e-8 (muon.md, section 5).

    K ← .95 K + .05 (1/N) Σ a aᵀ from K = I / 1000, in steps 0, period, 2 · period ..., and the inverses with it. An
    input wider than the output is cut into four; there a bias's 1, whose K is 1, is a block of its own.
    """

    bias: bool
    period: int = 32
    decay: float = 0.95
    blocks: int = 4
    t: int = 0
    K: list[list[Array]] = field(default_factory=list)

    def transform(self, layers: Sequence[tuple[Array, Array]], lr: float) -> list[Array]:
        moved = []
        for i, (a, g) in enumerate(layers):
            P, inputs = gradient(a, g), a.shape[1] - self.bias
            parts = [slice(0, a.shape[1])]
            if inputs > g.shape[1] and inputs % self.blocks == 0:
                d = inputs // self.blocks
                parts = [slice(start, start + d) for start in range(0, inputs, d)]
                P[:, inputs:] /= 1 + 0.2 + 1e-8
            if self.t == 0:
                self.K.append([1e-3 * np.eye(part.stop - part.start) for part in parts])
            for j, part in enumerate(parts):
                if self.t % self.period == 0:
                    rows = a[:, part]
                    self.K[i][j] = self.decay * self.K[i][j] + (1 - self.decay) * rows.T @ rows / len(rows)
                K = self.K[i][j]
                P[:, part] = P[:, part] @ np.linalg.inv(K + (0.2 * np.trace(K) / len(K) + 1e-8) * np.eye(len(K)))
            moved.append(P)
        self.t += 1
        return moved


DEFAULTS: dict[str, Any] = {
    "damping": 0.1,
    "damping_mode": "relative",
    "inverse": "cholesky",
    "factor_decay": 0.95,
    "update_period": 10,
    "inverse_period": 100,
    "warmup_updates": 10,
    "rescale": "kl_clip",
    "kl_clip": 1e-3,
    "row_filter": "grad",
    "loss_terms": None,
    "factor_scale": "loss",
    "factor_start": "corrected",
}

PUBLISHED: dict[str, Any] = {
    "factor_scale": "published",
    "factor_start": "identity",
    "row_filter": "all",
    "inverse": "eigen",
    "damping_mode": "absolute",
    "damping": 3e-3,
}
"""The released kfac-pytorch on linear layers."""

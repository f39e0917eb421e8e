"""Textbook Shampoo, Eva-s and MKOR-H's switch in numpy float64.

As `oracles.py`: written from the equations, sharing no code with hf_soo, nothing made fast.

Letters: L a factor (the sum or average of G₍ₙ₎G₍ₙ₎ᵀ), e the exponent, ε what is added to L, v a mode mean, γ Eva's
damping, ξ the share of the new vector, κ the KL clip, l a loss, S its average, r and R its rates of decrease.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.oracles.core import Array, kl_scale, norm_match
from tests.oracles.rootfree import PerBlock, along_all, block_slices, kron_all, unfold

# ----------------------------------------------------------------------------------------------- Shampoo (section 3.1)


def merge_dims(shape: Sequence[int], threshold: int, target: int) -> tuple[int, ...]:
    """From the last axis on, neighbours are merged while the product is at most the threshold and axes > target."""
    left, merged = [d for d in shape if d != 1] or [1], []
    while left:
        d = left.pop()
        if merged and merged[0] * d <= threshold and len(left) + 1 + len(merged) > target:
            merged[0] *= d
        else:
            merged.insert(0, d)
    return tuple(merged)


def matrix_power(A: Array, exponent: float) -> Array:
    """A^exponent of a symmetric positive definite A."""
    values, Q = np.linalg.eigh(A)
    return (Q * values**exponent) @ Q.T


@dataclass
class Shampoo:
    """Preconditioner and graft of one block."""

    decay: float = 0.9
    update_period: int = 1
    inverse_period: int = 10
    exponent: float | None = None
    grafting: str = "sgd"
    graft_decay: float = 0.999
    epsilon: float = 1e-6
    trace_scaling: bool = False
    t: int = 0
    updates: int = 0
    L: list[Array] = field(default_factory=list)
    roots: list[Array] = field(default_factory=list)
    v: Array | float = 0.0

    def direction(self, G: Array) -> Array:
        if self.t % self.update_period == 0:
            self.update(G)
        if self.t % self.inverse_period == 0:
            self.roots = [self.root(L) for L in self.L]
        self.t += 1
        P = along_all(G, self.roots)
        norm = self.graft_norm(G)
        return P if norm is None else P * norm / (np.linalg.norm(P) + 1e-16)

    def update(self, G: Array) -> None:
        """L ← β₂L + (1-β₂) G₍ₙ₎G₍ₙ₎ᵀ; the plain sum for β₂ = 1."""
        self.updates += 1
        weight = 1 - self.decay if self.decay < 1 else 1.0
        new = [unfold(G, n) @ unfold(G, n).T for n in range(G.ndim)]
        self.L = [self.decay * L + weight * M for L, M in zip(self.L or [0.0] * G.ndim, new, strict=True)]

    def root(self, L: Array) -> Array:
        """(L̂ + εI)^-e, L̂ free of the start at zero and, if asked, divided by its mean eigenvalue."""
        corrected = L / (1 - self.decay**self.updates) if self.decay < 1 else L
        if self.trace_scaling:
            corrected = corrected / (np.trace(corrected) / len(L))
        exponent = 1 / (2 * len(self.L)) if self.exponent is None else self.exponent
        return matrix_power(corrected + self.epsilon * np.eye(len(L)), -exponent)

    def graft_norm(self, G: Array) -> float | None:
        """The length that P takes."""
        if self.grafting == "none":
            return None
        if self.grafting == "sgd":
            return float(np.linalg.norm(G))
        if self.grafting == "adam":
            self.v = self.graft_decay * self.v + (1 - self.graft_decay) * G**2
            v_hat = self.v / (1 - self.graft_decay**self.t)  # t has been counted up: the first step has t = 1
            return float(np.linalg.norm(G / (np.sqrt(v_hat) + 1e-8)))
        n, m = G.shape  # muon
        return math.sqrt(min(n, m)) * math.sqrt(max(1.0, n / m))


def shampoo(shape: Sequence[int], max_dim: int = 1024, target: int = 2, **config: object) -> PerBlock:
    """The rule for a parameter of this shape: axes merged, then cut into blocks."""
    merged = merge_dims(shape, max_dim, target)
    where = block_slices(merged, max_dim)
    return PerBlock(merged, where, [Shampoo(**config) for _ in where])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- Eva-s (mkor_eva.md, section 3)


def mode_vectors(G: Array, kv_scale: str) -> list[Array]:
    """For each axis the mean ("mean") or sum ("sum") of G over all others; "unit": stretched to |v|² = d."""
    vectors = []
    for n, d in enumerate(G.shape):
        v = unfold(G, n).sum(1) if kv_scale == "sum" else unfold(G, n).mean(1)
        if kv_scale == "unit" and np.any(v):
            v = v * math.sqrt(d) / np.linalg.norm(v)
        vectors.append(v)
    return vectors


def outer_all(vectors: Sequence[Array]) -> Array:
    """v₁ ⊗ … ⊗ v_k as a tensor of order k."""
    product = np.ones(())
    for v in vectors:
        product = np.multiply.outer(product, v)
    return product


def eva_s_joint(G: Array, vectors: Sequence[Array], damping: float) -> Array:
    """(1/γ)[G - ⟨G, V⟩ / (γ + Π|vₙ|²) V], V = v₁ ⊗ … ⊗ v_k."""
    V = outer_all(vectors)
    return (G - (G * V).sum() / (damping + (V**2).sum()) * V) / damping


def eva_s_joint_dense(G: Array, vectors: Sequence[Array], damping: float) -> Array:
    """The same by building and solving ((v₁v₁ᵀ) ⊗ … ⊗ (v_kv_kᵀ) + γI) vec P = vec G."""
    C = kron_all([np.outer(v, v) for v in vectors]) + damping * np.eye(G.size)
    return np.linalg.solve(C, G.ravel()).reshape(G.shape)


def rank_one_root(v: Array, damping: float, power: float) -> Array:
    """(vvᵀ + γI)^-p = γ^-p [I + ((1 + |v|²/γ)^-p - 1) vvᵀ/|v|²], equation (6)."""
    size = v @ v
    shrink = ((1 + size / damping) ** -power - 1) / size if size > 0 else 0.0
    return damping**-power * (np.eye(len(v)) + shrink * np.outer(v, v))


def eva_s_separable(G: Array, vectors: Sequence[Array], damping: float, power: float) -> Array:
    """G ×ₙ (vₙvₙᵀ + γI)^-p for every axis."""
    return along_all(G, [rank_one_root(v, damping, power) for v in vectors])


@dataclass
class EvaS:
    """Eva-s over several tensors, which the KL clip and the global norm couple."""

    form: str = "joint"
    damping: float = 0.03
    kv_new_weight: float = 0.95
    rescale: str = "kl_clip"
    kl_clip: float = 1e-3
    update_period: int = 1
    warmup_updates: int = 0
    kv_scale: str = "mean"
    exponent: float = 0.25
    t: int = 0
    vectors: list[list[Array]] = field(default_factory=list)

    def directions(self, grads: Sequence[Array], lr: float) -> list[Array]:
        squeezed = [G.squeeze() for G in grads]
        if self.t < self.warmup_updates or self.t % self.update_period == 0:
            new = [mode_vectors(G, self.kv_scale) for G in squeezed]
            xi, old = self.kv_new_weight, self.vectors or new  # the first vectors are taken whole
            self.vectors = [
                [(1 - xi) * v + xi * w for v, w in zip(*pair, strict=True)] for pair in zip(old, new, strict=True)
            ]
        self.t += 1
        moved = []
        for G, vectors in zip(squeezed, self.vectors, strict=True):
            if self.form == "joint":
                moved.append(eva_s_joint(G, vectors, self.damping))
            else:
                moved.append(eva_s_separable(G, vectors, self.damping, self.exponent))
        scales = rescales(list(zip(squeezed, moved, strict=True)), lr, self.rescale, self.kl_clip)
        return [(nu * P).reshape(G.shape) for G, P, nu in zip(grads, moved, scales, strict=True)]


def rescales(pairs: Sequence[tuple[Array, Array]], lr: float, rule: str, kl_clip: float) -> list[float]:
    """The factor on each P, for the pairs (G, P): one for all, or with "norm" each its own."""
    if rule == "norm":
        return [float(np.linalg.norm(norm_match(G, P)) / np.linalg.norm(P)) for G, P in pairs]
    if rule == "global":
        total = sum((G**2).sum() for G, _ in pairs) / sum((P**2).sum() for _, P in pairs)
        return [math.sqrt(total)] * len(pairs)
    return [kl_scale(pairs, lr, kl_clip if rule == "kl_clip" else None)] * len(pairs)


# ------------------------------------------------------------------------------ MKOR-H (mkor_eva.md, section 1.7)


@dataclass
class Average:
    """A bias-corrected exponential average."""

    decay: float
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.count += 1
        return self.total / (1 - self.decay**self.count)


@dataclass
class Switch:
    """Switch when r < βR in `patience` checks in a row and t >= t_min; t is the index of the step, from 0.

    r is the average of S's decrease in a step, R its decrease in a step since the first loss. Losses come in every
    step, checks are made in steps that update the factors.
    """

    rate_decay: float = 0.98
    rate_fraction: float = 0.3
    patience: int = 20
    min_steps: int = 100
    first: tuple[int, float] | None = None
    last: float = 0.0
    below: int = 0
    switched: bool = False

    def __post_init__(self) -> None:
        self.S, self.r = Average(self.rate_decay), Average(self.rate_decay)

    def feed(self, t: int, loss: float, checks: bool) -> bool:
        S = self.S.add(loss)
        if self.first is None:
            self.first, self.last = (t, S), S
            return False
        r = self.r.add(self.last - S)
        self.last = S
        R = (self.first[1] - S) / (t - self.first[0])
        if checks and not self.switched:
            self.below = self.below + 1 if r < self.rate_fraction * R else 0
            self.switched = t >= self.min_steps and self.below >= self.patience
        return self.switched


def switch_step(losses: Sequence[float], update_period: int, warmup_updates: int = 0, **config: float) -> int | None:
    """The step after which MKOR-H has switched, or None."""
    rule = Switch(**config)  # type: ignore[arg-type]
    for t, loss in enumerate(losses):
        if rule.feed(t, loss, t < warmup_updates or t % update_period == 0):
            return t
    return None

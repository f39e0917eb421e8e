"""Textbook root-free RMSProp, inverse-free Shampoo and inverse-free K-FAC in numpy float64.

As `oracles.py`: written from the equations, sharing no code with hf_soo, nothing made fast. Every factor K is a dense
matrix, whatever structure it has: a diagonal axis is the dense rule with the off-diagonal entries of H set to zero, an
identity axis is one whose K never leaves I.

Letters: B the number of averaged loss terms, β the step of the factors, a the Riemannian momentum, λ the damping,
T₍ₙ₎ the axis-n unfolding [dₙ, Πd/dₙ], ×ₙ the product along axis n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.oracles.core import Array

# ------------------------------------------------------------------------------------------------------ tensor algebra


def unfold(T: Array, n: int) -> Array:
    """T₍ₙ₎, the other axes in row-major order."""
    return np.moveaxis(T, n, 0).reshape(T.shape[n], -1)


def along(T: Array, M: Array, n: int) -> Array:
    """T ×ₙ M: every axis-n fibre x becomes Mx."""
    return np.moveaxis(np.tensordot(M, T, axes=(1, n)), 0, n)


def along_all(T: Array, matrices: Sequence[Array]) -> Array:
    """T ×₁ M₁ ×₂ M₂ …"""
    for n, M in enumerate(matrices):
        T = along(T, M, n)
    return T


def kron_all(matrices: Sequence[Array]) -> Array:
    """M₁ ⊗ M₂ ⊗ …, which acts on a tensor raveled in row-major order."""
    product = np.eye(1)
    for M in matrices:
        product = np.kron(product, M)
    return product


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without axes of size 1; (1,) if nothing is left."""
    return tuple(d for d in shape if d != 1) or (1,)


def block_slices(shape: Sequence[int], max_dim: int) -> list[tuple[slice, ...]]:
    """Every axis cut into pieces of `max_dim` and a shorter last one; the blocks in row-major order."""
    cuts = [[slice(i, min(i + max_dim, d)) for i in range(0, d, max_dim)] for d in shape]
    return list(itertools.product(*cuts))


@dataclass
class PerBlock:
    """One rule for each block of a tensor that is looked at in another shape."""

    shape: tuple[int, ...]
    where: list[tuple[slice, ...]]
    rules: list[Any]

    def direction(self, G: Array) -> Array:
        T = G.reshape(self.shape)
        P = np.empty_like(T)
        for block, rule in zip(self.where, self.rules, strict=True):
            P[block] = rule.direction(T[block])
        return P.reshape(G.shape)


# --------------------------------------------------------------------------------- RMSProp without root (section 1.1)


@dataclass
class RootFree:
    """ŝ ← (1-β)ŝ + βBg², u = g / (ŝ + ε); ŝ is B times the second moment and starts at 1."""

    batch_size: int
    beta: float
    eps: float
    s: Array | float = 1.0

    def direction(self, G: Array) -> Array:
        self.s = (1 - self.beta) * self.s + self.beta * self.batch_size * G**2
        return G / (self.s + self.eps)


@dataclass
class Rooted:
    """The same with the root, u = g / (√ŝ + ε): what must fail where the root-free rule has an invariance."""

    batch_size: int
    beta: float
    eps: float
    s: Array | float = 1.0

    def direction(self, G: Array) -> Array:
        self.s = (1 - self.beta) * self.s + self.beta * self.batch_size * G**2
        return G / (np.sqrt(self.s) + self.eps)


# ------------------------------------------------------------------------- inverse-free Shampoo (sections 2.1 to 2.5)


def every(period: int) -> Callable[[int], bool]:
    """Steps 0, T, 2T, …"""
    return lambda t: t % period == 0


def prototype_steps(limit: int) -> Iterator[int]:
    """The prototype's refreshes: after step t comes t + clamp(⌊log₄(t+1)⌋, 1, T), T the limit."""
    t = 0
    while True:
        yield t
        log4 = ((t + 1).bit_length() - 1) // 2  # exact at the powers of 4
        t += min(max(log4, 1), limit)


def prototype(limit: int, steps: int = 10_000) -> Callable[[int], bool]:
    """Whether the prototype refreshes at step t < `steps`."""
    chosen = set(itertools.takewhile(lambda t: t < steps, prototype_steps(limit)))
    return chosen.__contains__


@dataclass
class InverseFree:
    """⊗KₙKₙᵀ ≈ (⊗Sₙ)⁻¹ for one tensor; `kinds` has "dense", "diagonal" or "identity" for each axis."""

    batch_size: int
    beta: float
    momentum: float
    damping: float
    kinds: tuple[str, ...]
    K: list[Array]
    refreshes: Callable[[int], bool] = field(default=lambda t: True)
    t: int = 0
    m: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.m = self.m or [np.zeros_like(K) for K in self.K]

    def curvature(self, G: Array) -> list[Array]:
        """Hₙ = (1/Pₙ) Y₍ₙ₎Y₍ₙ₎ᵀ + λ (Π_{j≠n} τⱼ) KₙᵀKₙ, all from the K's before the refresh."""
        Y = math.sqrt(self.batch_size) * along_all(G, [K.T for K in self.K])
        tau = [np.trace(K.T @ K) / len(K) for K in self.K]
        H = []
        for n, K in enumerate(self.K):
            rest = math.prod(tau[:n] + tau[n + 1 :])
            full = unfold(Y, n) @ unfold(Y, n).T / (Y.size // len(K)) + self.damping * rest * K.T @ K
            H.append(np.diag(np.diag(full)) if self.kinds[n] == "diagonal" else full)
        return H

    def refresh(self, H: Sequence[Array]) -> None:
        """m ← am + (1-a)½(H - I), K ← K(I - (β / max(1, |m|)) m)."""
        for n, kind in enumerate(self.kinds):
            if kind == "identity":
                continue
            d = len(self.K[n])
            self.m[n] = self.momentum * self.m[n] + (1 - self.momentum) * (H[n] - np.eye(d)) / 2
            step = self.beta / max(1.0, np.linalg.norm(self.m[n]))
            self.K[n] = self.K[n] @ (np.eye(d) - step * self.m[n])

    def precondition(self, G: Array) -> Array:
        """G ×ₙ KₙKₙᵀ for every axis."""
        return along_all(G, [K @ K.T for K in self.K])

    def direction(self, G: Array) -> Array:
        """Refresh first if it is the turn, then precondition with the fresh K."""
        if self.refreshes(self.t):
            self.refresh(self.curvature(G))
        self.t += 1
        return self.precondition(G)


def inverse_free(
    shape: Sequence[int],
    *,
    batch_size: int,
    beta: float,
    momentum: float,
    damping: float,
    max_dim: int = 1024,
    large: str = "diagonal",
    vector: str = "diagonal",
    refreshes: Callable[[int], bool] = lambda t: True,
) -> PerBlock:
    """The rule for a parameter of this shape, every K at I.

    A tensor with one axis has a `vector` axis; an axis longer than `max_dim` is of kind `large`, or with "block" every
    block of the tensor has its own dense factors.
    """
    shape = squeezed(shape)
    where = block_slices(shape, max_dim) if large == "block" else [tuple(slice(0, d) for d in shape)]
    rules = []
    for block in where:
        sizes = [s.stop - s.start for s in block]
        if len(shape) == 1:
            kinds: tuple[str, ...] = (vector,)
        else:
            kinds = tuple(large if d > max_dim else "dense" for d in sizes)
        rules.append(
            InverseFree(batch_size, beta, momentum, damping, kinds, [np.eye(d) for d in sizes], refreshes=refreshes)
        )
    return PerBlock(shape, where, rules)


# ------------------------------------------------------------------------------------ inverse-free K-FAC (section 2.9)


def ikfac_step(K: Array, A: Array, beta: float, damping: float) -> Array:
    """K(I - ½β(KᵀAK + λKᵀK - I)), which one side of a layer does with its own covariance A alone."""
    m = (K.T @ A @ K + damping * K.T @ K - np.eye(len(K))) / 2
    return K @ (np.eye(len(K)) - beta * m)


def dense_ema(S: Array, A: Array, beta: float, damping: float) -> Array:
    """K-FAC's average of damped covariances."""
    return (1 - beta) * S + beta * (A + damping * np.eye(len(S)))


def gram_inverse(K: Array) -> Array:
    """S = (KKᵀ)⁻¹, the curvature that a factor K stands for."""
    return np.linalg.inv(K @ K.T)

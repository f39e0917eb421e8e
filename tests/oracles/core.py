"""Textbook versions of every rule in hf_soo, in numpy float64, to hold the library against.

Nothing here is imported from hf_soo and nothing is made fast: factors are dense matrices and a ring buffer is a Python
list. Tests named `test_oracles_agree_*` hold these functions against each other and against plain matrix inversion, so
that they can be trusted before the library is measured with them. Whole training runs are in `oracle_training.py`.

Letters: F a factor's inverse (I at the start), v a Kronecker vector, γ the share of the old factor, G a weight gradient
[n, m] with the bias gradient as last column, a the mean input (1 last where there is a bias), b the output gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute expected entry (the difference itself where that is 0)."""
    actual, expected = _array(actual), _array(expected)
    scale = np.abs(expected).max(initial=0.0)
    return float(np.abs(actual - expected).max(initial=0.0) / (scale if scale > 0 else 1.0))


def assert_close_report(actual: Any, expected: Any, rtol: float, what: str = "value") -> None:
    """Fail, naming the worst entry and its ratio, unless `relative_error(actual, expected) <= rtol`."""
    actual, expected = _array(actual), _array(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    error = relative_error(actual, expected)
    if error <= rtol:  # False for NaN, which is meant
        return
    difference = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    got, want = float(actual[worst]), float(expected[worst])
    ratio = got / want if want else math.nan
    raise AssertionError(
        f"{what}: relative error {error:.3e} > {rtol:.1e}; worst entry {tuple(int(i) for i in worst)}: "
        f"got {got:.17g}, expected {want:.17g}, ratio {ratio:.12g}, "
        f"{int((difference > rtol * np.abs(expected).max()).sum())} of {difference.size} entries off"
    )


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


# ---------------------------------------------------------------- factor updates (mkor_eva.md 1.2, mkor_lowrank.md 1)


def blend(F: Array, v: Array, gamma: float) -> Array:
    """inv(inv(γF + (1-γ)I) + vvᵀ) by Sherman-Morrison; `v` is [d], or [d, r] for r vectors at once (Woodbury)."""
    V = v.reshape(len(F), -1)
    M = gamma * F + (1 - gamma) * np.eye(len(F))
    U = M @ V
    return M - U @ np.linalg.solve(np.eye(V.shape[1]) + V.T @ U, U.T)


def blend_by_inversion(F: Array, v: Array, gamma: float) -> Array:
    """What `blend` means: two dense inversions."""
    V = v.reshape(len(F), -1)
    M = gamma * F + (1 - gamma) * np.eye(len(F))
    return np.linalg.inv(np.linalg.inv(M) + V @ V.T)


def exact(F: Array, v: Array, gamma: float) -> Array:
    """inv(γ inv(F) + (1-γ)vvᵀ) by Sherman-Morrison."""
    u = F @ v
    return (F - (1 - gamma) / (gamma + (1 - gamma) * (v @ u)) * np.outer(u, u)) / gamma


def paper(F: Array, v: Array, gamma: float) -> Array:
    """Equation 5 as printed, with its plus sign: not an inverse of anything."""
    u = F @ v
    return gamma * F + (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * (v @ u))) * np.outer(u, u)


def paper_growth(cq: float, gamma: float) -> float:
    """Factor by which one `paper` update multiplies vᵀFv / |v|², given cq = vᵀFv."""
    return gamma + (1 - gamma) * cq / (gamma**2 * (1 + gamma * (1 - gamma) * cq))


def stabilized(F: Array, threshold: float, keep: float) -> Array:
    """ζF + (1-ζ)I when an entry exceeds the threshold, else F; ζ is `keep`."""
    return keep * F + (1 - keep) * np.eye(len(F)) if np.abs(F).max() > threshold else F


def blend_fixed_point(q: float, gamma: float) -> float:
    """The eigenvalue along a constant v, |v|² = q, where `blend` comes to rest; all others come to 1."""
    linear = (1 - gamma) * (1 + q)
    return (-linear + math.sqrt(linear**2 + 4 * gamma * q * (1 - gamma))) / (2 * gamma * q)


def lowrank_columns(vectors: Sequence[Array], gamma: float, history: int) -> list[Array]:
    """The columns c of F = I - Σccᵀ after blending in `vectors` one by one, oldest first, at most `history` of them."""
    columns: list[Array] = []
    for v in vectors:
        u = v - gamma * sum((c * (c @ v) for c in columns), np.zeros_like(v))
        columns = [math.sqrt(gamma) * c for c in columns] + [u / math.sqrt(1 + v @ u)]
        columns = columns[-history:]
    return columns


def from_columns(columns: Sequence[Array], dim: int) -> Array:
    """I - Σccᵀ, dense."""
    return np.eye(dim) - sum((np.outer(c, c) for c in columns), np.zeros((dim, dim)))


def power(F: Array, exponent: float) -> Array:
    """F^p of a dense positive semi-definite F, by its own eigenvalues."""
    values, vectors = np.linalg.eigh(F)
    return (vectors * np.maximum(values, 0.0) ** exponent) @ vectors.T


# -------------------------------------------------------------------------------- preconditioning (mkor_eva.md 3, 1.3)


def kronecker_product(L: Array, G: Array, R: Array) -> Array:
    """unvec((R ⊗ L) vec G), columns stacked: what L G R means for symmetric R."""
    return (np.kron(R, L) @ G.reshape(-1, order="F")).reshape(G.shape, order="F")


def eva(G: Array, a: Array, b: Array, damping: float) -> Array:
    """((aaᵀ) ⊗ (bbᵀ) + λI)⁻¹ vec G by Sherman-Morrison, equation (4)."""
    return (G - (b @ G @ a) / (damping + (a @ a) * (b @ b)) * np.outer(b, a)) / damping


def eva_dense(G: Array, a: Array, b: Array, damping: float) -> Array:
    """The same by building and solving the nm x nm system."""
    C = np.kron(np.outer(a, a), np.outer(b, b)) + damping * np.eye(G.size)
    return np.linalg.solve(C, G.reshape(-1, order="F")).reshape(G.shape, order="F")


def eva_f(G: Array, a: Array, damping: float) -> Array:
    """G (aaᵀ + λI)⁻¹, equation (5)."""
    return (G - np.outer(G @ a, a) / (damping + a @ a)) / damping


def norm_match(G: Array, P: Array) -> Array:
    """P at the Frobenius norm of G; G itself where P has no usable norm."""
    norm = np.linalg.norm(P)
    return P * (np.linalg.norm(G) / norm) if np.isfinite(norm) and norm > 0 else G


def kl_scale(pairs: Sequence[tuple[Array, Array]], lr: float, kl_clip: float | None) -> float:
    """ν = min(1, sqrt(κ / Σ lr²⟨P, G⟩)) over all layers; 1 when off or when the sum is 0."""
    total = sum(lr**2 * float((P * G).sum()) for G, P in pairs)
    return 1.0 if kl_clip is None or total <= 0 else min(1.0, math.sqrt(kl_clip / total))


def agreement(rows_e: Array) -> float:
    """max(0, cos) of the sums over the first and the second half of the rows; 0 where a half has no sum."""
    b1, b2 = (half.sum(0) for half in np.array_split(rows_e, 2))
    lengths = math.sqrt((b1 @ b1) * (b2 @ b2))
    return max(0.0, float(b1 @ b2) / lengths) if lengths > 0 else 0.0


def kronecker_vectors(
    rows_a: Array, rows_e: Array, clip: float, kv_scale: str, target: float = 1.0, rank: int = 1
) -> list[Array]:
    """[a, b], each [d, rank]: the means of `rank` consecutive groups of rows, b times all N rows unless "mean".

    Entries are clamped to ±clip, then "unit" stretches each vector to |v|² = dτ, τ the target; each is divided by
    √rank, so that VVᵀ is a mean over groups.
    """
    rows = {"sum": len(rows_e), "unit": len(rows_e), "mean": 1}[kv_scale]
    vectors = []
    for data, factor in ((rows_a, 1), (rows_e, rows)):
        V = np.stack([factor * group.mean(0) for group in np.array_split(data, rank)], axis=1)
        V = np.clip(V, -clip, clip)
        if kv_scale == "unit":
            V = V * np.sqrt(len(V) * target / (V**2).sum(0))
        vectors.append(V / math.sqrt(rank))
    return vectors


JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz(G: Array, steps: int = 5, eps: float = 1e-7, coefficients: Sequence[Any] = (JORDAN,)) -> Array:
    """Odd polynomials of degree five towards the polar factor; the last coefficients stand for all that follow.

    By default Keller Jordan's, as torch.optim.Muon runs them (there in bfloat16, here in float64).
    """
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / max(np.linalg.norm(X), eps)
    for step in range(steps):
        k0, k1, k2 = coefficients[min(step, len(coefficients) - 1)]
        A = X @ X.T
        X = k0 * X + (k1 * A + k2 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def best_quintic(low: float, high: float) -> Array:
    """(a, b, c) for which ax + bx³ + cx⁵ is nearest to 1 on [low, high] in the maximum norm, by Remez' exchange."""
    inner = np.array([low + (high - low) / 4, low + 3 * (high - low) / 4])
    for _ in range(200):
        x = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        a, b, c, _error = np.linalg.solve(np.stack([x, x**3, x**5, signs], axis=1), np.ones(4))
        squares = np.roots([5 * c, 3 * b, a]).real  # extrema: a + 3bx² + 5cx⁴ = 0
        inner = np.sort(np.sqrt(squares))
    return np.array([a, b, c])


def polar_express(steps: int, low: float = 1e-3, cushion: float = 0.02407327424182761) -> list[Array]:
    """Amsel et al. 2025, Algorithm 1 with its cushion: each polynomial is the best for where the one before left x.

    Where the lower end is far below the upper one the polynomial is made for ``cushion`` times the upper end, and then
    centred, so that the smallest and the largest value are as far from 1.
    """
    found, high = [], 1.0
    for _ in range(steps):
        if 1 - low < 1e-7:  # the limit, for x at 1 to rounding
            found.append(np.array([1.875, -1.25, 0.375]))
            continue
        p = best_quintic(max(low, cushion * high), high)
        ends = [p @ np.array([x, x**3, x**5]) for x in (low, high)]
        p = p * 2 / sum(ends)
        found.append(p)
        low = p @ np.array([low, low**3, low**5])
        high = 2 - low
    return found


def poly_warmup(step: int, total: int, warmup: int, degree: float = 0.5) -> float:
    """NVIDIA's PolyWarmUp, p = (step+1)/total: linear up to the warm-up, then (1-p)^degree with no rescaling there."""
    progress = (step + 1) / total
    return progress / (warmup / total) if step + 1 < warmup else (1 - progress) ** degree


def drifting(rng: np.random.Generator, count: int, d: int, size: float = 1.0) -> list[Array]:
    """Vectors with |v|² about `size`, whose mean direction turns slowly, as a layer's means do."""
    mean, vectors = rng.normal(size=d), []
    for _ in range(count):
        mean = 0.97 * mean + 0.25 * rng.normal(size=d)
        v = mean + 0.3 * rng.normal(size=d)
        vectors.append(v * math.sqrt(size / (v @ v)))
    return vectors

"""The products of Eva-s: G -> P on rows of gradients (see engine/partial.py), in the forms of eva_s.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soo.engine import products
from hf_soo.engine.gradients import RowSums, TransformNorms, squared_norm
from hf_soo.preconditioners.axes import inner, put_back, unfolded


def joint_steps(G: Tensor, vectors: Sequence[Tensor], damping: float, rows: slice) -> RowSums[TransformNorms]:
    """In place: Eva's formula with b the first axis's vector and a the others', multiplied out.

    Args:
        G: rows of gradients, [L, d, d_2, …, d_k], k >= 2.
        vectors: k tensors [L, d_i].
        damping: γ.
        rows: which rows of the first axis these are.

    Yields:
        Sums over rows.
    """
    a = vectors[1]
    for v in vectors[2:]:
        a = (a[..., None] * v[:, None]).flatten(1)
    matrix = G.flatten(2)
    moved = yield from products.eva_steps(matrix, None, a, vectors[0], damping, rows)
    put_back(G, matrix)
    return moved


def shrinking(v: Tensor, damping: float, exponent: float) -> Tensor:
    """The e of (vvᵀ + γI)⁻ᵖ = γ⁻ᵖ(I + e vvᵀ), [L]; 0 where v is 0.

    Args:
        v: [L, d].
        damping: γ.
        exponent: p.
    """
    size = v.square().sum(-1)
    e = ((1 + size / damping) ** -exponent - 1) / size
    return torch.where(size > 0, e, 0.0)


def separable_matrix_steps(
    G: Tensor, r: Tensor, c: Tensor, damping: float, exponent: float, rows: slice
) -> RowSums[TransformNorms]:
    """In place: γ⁻²ᵖ(I + e rrᵀ) G (I + f ccᵀ), as one rank-2 step.

    Args:
        G: rows of gradients, [L, ·, m].
        r: [L, n].
        c: [L, m].
        damping: γ.
        exponent: p.
        rows: which of the n rows these are.

    Yields:
        Sums over rows: Gᵀr, and the parts of the norms.

    Returns:
        Norms and inner product, from |G|², |Gᵀr|², |Gc|² and rᵀGc alone.
    """
    e, f, alpha = shrinking(r, damping, exponent), shrinking(c, damping, exponent), damping ** (-2 * exponent)
    mine = r[:, rows]
    x, y = (mine[:, None] @ G).squeeze(1), (G @ c[..., None]).squeeze(-1)  # Gᵀr, Gc
    g_norm, y_norm, z = inner(G, G), inner(y, y), inner(y, mine)  # z = rᵀGc
    yield [x, g_norm, y_norm, z]
    parts = (g_norm, inner(x, x), y_norm, z.square())
    after = quadratic(*parts, *(2 * each + each.square() * inner(v, v) for each, v in ((e, r), (f, c))))
    columns = torch.stack([e[:, None] * mine, f[:, None] * y + (e * f * z)[:, None] * mine], -1)
    G.baddbmm_(columns, torch.stack([x, c], -2), beta=alpha, alpha=alpha)
    return TransformNorms(parts[0], alpha**2 * after, alpha * quadratic(*parts, e, f))


def quadratic(g: Tensor, x: Tensor, y: Tensor, z: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """⟨G, (I + e rrᵀ) G (I + f ccᵀ)⟩ from |G|², |Gᵀr|², |Gc|² and (rᵀGc)²."""
    return g + e * x + f * y + e * f * z


def separable_steps(
    G: Tensor, vectors: Sequence[Tensor], damping: float, exponent: float, rows: slice
) -> RowSums[TransformNorms]:
    """In place: one rank-1 step for each axis of a tensor with more than two.

    Args:
        G: rows of gradients, [L, d, d_2, …, d_k].
        vectors: k tensors [L, d_i].
        damping: γ.
        exponent: p.
        rows: which rows of the first axis these are.

    Yields:
        Sums over rows: the first axis's product; then the norms.
    """
    P = G.clone()
    for axis, v in enumerate(vectors):
        matrix = unfolded(P, axis).contiguous()
        e, mine = shrinking(v, damping, exponent), v[:, rows] if axis == 0 else v
        x = mine[:, None] @ matrix
        if axis == 0:
            yield [x]
        matrix.baddbmm_((e[:, None] * mine)[..., None], x)
        shape = P.movedim(axis + 1, 1).shape
        P = matrix.view(shape).movedim(1, axis + 1)
    P = P.contiguous().mul_(damping ** (-len(vectors) * exponent))
    moved = TransformNorms(inner(G, G), squared_norm(P), inner(P, G))
    yield list(moved.tensors())
    G.copy_(P)
    return moved

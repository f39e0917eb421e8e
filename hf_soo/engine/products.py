"""The methods' products: G -> P in place, on whole gradients or on some rows; leading batch dimensions are allowed.

``*_steps`` are computations on rows (see partial.py), ``*_product`` the same on all rows. A low-rank factor's columns
are stored by rows, as in linalg.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_soo.engine.gradients import RowSums, TransformNorms, run_whole, squared_norm


def lowrank_product(G: Tensor, bias: Tensor | None, C_left: Tensor | None, C_right: Tensor | None) -> TransformNorms:
    """``lowrank_steps`` on all rows."""
    return run_whole(lowrank_steps(G, bias, C_left, C_right))


def lowrank_steps(
    G: Tensor, bias: Tensor | None, C_left: Tensor | None, C_right: Tensor | None
) -> RowSums[TransformNorms]:
    """In place: [G | bias] ← (I - C_leftᵀC_left) [G | bias] (I - C_rightᵀC_right), in thin products.

    With X = C_left Ĝ, Y = Ĝ C_rightᵀ, Z = X C_rightᵀ and Ĝ = [G | bias]:
    P = Ĝ - [C_leftᵀ, Y] [X - Z C_right ; C_right], and ⟨P, Ĝ⟩ = |Ĝ|² - |X|² - |Y|² + |Z|². All of it is local to rows
    but X, a sum over them, and the norms.

    Args:
        G: rows of weight gradients, [L, n, m].
        bias: those of bias gradients, [L, n], or None.
        C_left: the columns that belong to these rows, [L, K, n], or None for the identity.
        C_right: [L, K', m + 1] with a bias, [L, K', m] without, or None for the identity.

    Yields:
        Sums over rows: |Ĝ|², |Y|² and X; then |P|².

    Returns:
        Squared norms and inner product of the joint gradient.
    """
    m = G.shape[-1]
    before = squared_norm(G, bias)
    Y = None if C_right is None else G @ C_right[..., :m].mT
    if Y is not None and C_right is not None and bias is not None:
        Y = Y + bias[..., None] * C_right[..., None, :, m]
    X = None if C_left is None else C_left @ G
    x_bias = None if C_left is None or bias is None else torch.einsum("...kn,...n->...k", C_left, bias)
    y_norm = torch.zeros_like(before) if Y is None else squared_norm(Y)
    yield [before, y_norm, *(t for t in (X, x_bias) if t is not None)]

    inner = before - y_norm
    thin: list[Tensor] = []  # [L, n, ·]
    wide: list[Tensor] = []  # [L, ·, m]
    bias_steps: list[Tensor] = []  # [L, n] each
    if Y is not None and C_right is not None:
        thin.append(Y)
        wide.append(C_right[..., :m])
        if bias is not None:
            bias_steps.append(torch.einsum("...nk,...k->...n", Y, C_right[..., m]))
    if X is not None and C_left is not None:
        inner = inner - squared_norm(X, x_bias)
        if C_right is not None:
            A = C_right[..., :m]
            Z = X @ A.mT
            if x_bias is not None:
                Z = Z + x_bias[..., None] * C_right[..., None, :, m]
                x_bias = x_bias - torch.einsum("...kj,...j->...k", Z, C_right[..., m])
            X = X - Z @ A
            inner = inner + squared_norm(Z)
        thin.append(C_left.mT)
        wide.append(X)
        if x_bias is not None:
            bias_steps.append(torch.einsum("...kn,...k->...n", C_left, x_bias))
    if thin:
        G.baddbmm_(torch.cat(thin, dim=-1), torch.cat(wide, dim=-2), alpha=-1)
    if bias is not None:
        for step in bias_steps:
            bias.sub_(step)
    after = squared_norm(G, bias)
    yield [after]
    return TransformNorms(before, after, inner)


def dense_product(G: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None) -> TransformNorms:
    """``dense_steps`` on all rows."""
    return run_whole(dense_steps(G, bias, left, right))


def dense_steps(G: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None) -> RowSums[TransformNorms]:
    """In place: [G | bias] ← left [G | bias] right; a result that is not finite leaves that gradient as it was.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        left: [L, n, n], or None for the identity; it needs all rows.
        right: [L, m + 1, m + 1] with a bias, [L, m, m] without, or None for the identity.

    Yields:
        Sums over rows.

    Returns:
        Squared norms and inner product of the joint gradient; ``after`` is not finite where G was kept.
    """
    joint = G if bias is None else torch.cat([G, bias[..., None]], dim=-1)
    P = joint if left is None else left @ joint
    P = P if right is None else P @ right
    return (yield from replace_steps(G, bias, joint, P))


def eigen_steps(
    G: Tensor,
    bias: Tensor | None,
    left: tuple[Tensor, Tensor] | None,
    right: tuple[Tensor, Tensor],
    damping: Tensor,
) -> RowSums[TransformNorms]:
    """In place: [G | bias] ← Q_b [(Q_bᵀ [G | bias] Q_a) / (l_b l_aᵀ + λ)] Q_aᵀ; not finite: as ``dense_steps``.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        left: eigenvectors Q_b [L, n, n] and values l_b [L, n]; or None for B = I, which works on any rows.
        right: Q_a and l_a, with m + 1 for m where there is a bias.
        damping: λ, [L].

    Yields:
        Sums over rows.

    Returns:
        Squared norms and inner product of the joint gradient; ``after`` is not finite where G was kept.
    """
    joint = G if bias is None else torch.cat([G, bias[..., None]], dim=-1)
    Q_a, l_a = right
    T = joint @ Q_a if left is None else left[0].mT @ joint @ Q_a
    curvature = l_a[:, None, :] if left is None else left[1][:, :, None] * l_a[:, None, :]
    T = T / (curvature + damping[:, None, None])
    P = T @ Q_a.mT if left is None else left[0] @ T @ Q_a.mT
    return (yield from replace_steps(G, bias, joint, P))


def replace_steps(G: Tensor, bias: Tensor | None, joint: Tensor, P: Tensor) -> RowSums[TransformNorms]:
    """Write P [L, n, m (+ 1)] into [G | bias] where it is finite, in all rows.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        joint: what [G | bias] is now.
        P: what it becomes.

    Yields:
        Sums over rows: |G|², |P|² and ⟨P, G⟩.

    Returns:
        Squared norms and inner product; ``after`` is not finite where G was kept.
    """
    moved = TransformNorms(squared_norm(joint), squared_norm(P), (P * joint).sum((-2, -1)))
    yield list(moved.tensors())
    P = torch.where(moved.after.isfinite()[..., None, None], P, joint)
    G.copy_(P[..., : G.shape[-1]])
    if bias is not None:
        bias.copy_(P[..., -1])
    return moved


def eva_product(G: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, damping: float) -> TransformNorms:
    """``eva_steps`` on all rows."""
    return run_whole(eva_steps(G, bias, a, b, damping))


def eva_steps(
    G: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, damping: float, rows: slice = slice(None)
) -> RowSums[TransformNorms]:
    """In place: Eva, Ĝ ← (aaᵀ ⊗ bbᵀ + γI)⁻¹ vec(Ĝ) = (1/γ)[Ĝ - (bᵀĜa) / (γ + |a|²|b|²) b aᵀ].

    Args:
        G: rows of weight gradients, [L, n, m].
        bias: those of bias gradients, [L, n], or None.
        a: input vectors, [L, m + 1] with a bias, [L, m] without.
        b: output-gradient vectors over all rows, [L, ·].
        damping: γ > 0.
        rows: which rows these are.

    Yields:
        Sums over rows: |Ĝ|² and bᵀĜa.

    Returns:
        Squared norms and inner product, from the same scalars.
    """
    before = squared_norm(G, bias)
    s = (b[..., rows] * times_input_vector(G, bias, a)).sum(-1)  # bᵀĜa
    yield [before, s]
    q = a.square().sum(-1) * b.square().sum(-1)
    c = s / (damping + q)
    rank_one_step(G, bias, c[..., None] * b[..., rows], a, damping)
    inner = (before - c * s) / damping
    return TransformNorms(before, (before - 2 * c * s + c * c * q) / damping**2, inner)


def eva_f_product(G: Tensor, bias: Tensor | None, a: Tensor, damping: float) -> TransformNorms:
    """``eva_f_steps`` on all rows."""
    return run_whole(eva_f_steps(G, bias, a, damping))


def eva_f_steps(G: Tensor, bias: Tensor | None, a: Tensor, damping: float) -> RowSums[TransformNorms]:
    """In place: vectorised FOOF, Ĝ ← Ĝ(aaᵀ + γI)⁻¹ = (1/γ)[Ĝ - (Ĝa)aᵀ / (γ + |a|²)], row by row.

    Args:
        G: rows of weight gradients, [L, n, m].
        bias: those of bias gradients, [L, n], or None.
        a: input vectors, [L, m + 1] with a bias, [L, m] without.
        damping: γ > 0.

    Yields:
        Sums over rows: |Ĝ|² and |Ĝa|².

    Returns:
        Squared norms and inner product, from the same scalars.
    """
    before = squared_norm(G, bias)
    u = times_input_vector(G, bias, a)
    q = a.square().sum(-1)
    s = u.square().sum(-1)
    rank_one_step(G, bias, u / (damping + q)[..., None], a, damping)
    yield [before, s]
    inner = (before - s / (damping + q)) / damping
    return TransformNorms(before, (before - 2 * s / (damping + q) + s * q / (damping + q).square()) / damping**2, inner)


def rank_one_step(G: Tensor, bias: Tensor | None, u: Tensor, a: Tensor, damping: float) -> None:
    """In place: [G | bias] ← ([G | bias] - u aᵀ) / γ.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        u: [L, n].
        a: [L, m + 1] with a bias, [L, m] without.
        damping: γ.
    """
    m = G.shape[-1]
    G.baddbmm_(u[..., None], a[..., None, :m], beta=1 / damping, alpha=-1 / damping)
    if bias is not None:
        bias.sub_(u * a[..., m, None]).div_(damping)


def times_input_vector(G: Tensor, bias: Tensor | None, a: Tensor) -> Tensor:
    """[G | bias] a: [L, n]."""
    product = (G @ a[..., : G.shape[-1], None]).squeeze(-1)
    return product if bias is None else product + bias * a[..., -1, None]

"""Pure tensor functions of the methods; leading batch dimensions are allowed everywhere.

A low-rank factor is stored by rows: ``C`` [..., K, d] holds the K columns of the paper's d x K matrix, so that
``F = I - CᵀC`` in this file's letters, and a ring buffer's slot is a contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Moved:
    """What a transform did to a batch of gradients, in squared norms over weight and bias; each of shape [...].

    Args:
        before: |G|².
        after: |P|².
        inner: ⟨P, G⟩.
    """

    before: Tensor
    after: Tensor
    inner: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> Moved:
        """Zeros for the layers of ``like`` [L, ...]: somebody else moves them."""
        return cls(*like.new_zeros(3, like.shape[0]).unbind())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three."""
        return self.before, self.after, self.inner

    def cosine(self) -> Tensor:
        """cos(G, P); 1 where a norm is 0, since nothing was turned there."""
        norms = self.before.sqrt() * self.after.sqrt()
        return torch.where(norms > 0, self.inner / norms, 1.0).clamp(max=1.0)


def squared_norm(*tensors: Tensor | None) -> Tensor:
    """Sum of squares over all but the first dimension of all tensors, [L]."""
    total: Tensor | float = 0.0
    for tensor in tensors:
        if tensor is not None:
            each = tensor if tensor.ndim == 1 else torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)))
            total = each.square() + total
    assert isinstance(total, Tensor)
    return total


# ---- low-rank MKOR: F = I - CᵀC -------------------------------------------------------------------------------------


def lowrank_update(C: Tensor, head: Tensor, V: Tensor, factor_decay: float, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The blend rule on F = I - CᵀC, exactly: M = γF + (1-γ)I, then F ← (M⁻¹ + VᵀV)⁻¹.

    With U = VM = V - γ(VCᵀ)C and I + VUᵀ = TTᵀ (Cholesky), the r rows T⁻¹U join the ring buffer, and the rows
    that stay are scaled by √γ; the r oldest rows, of weight γ^K, are overwritten.

    Args:
        C: rows of the factor, [..., K, d].
        head: the slot of the oldest row, int64 [...].
        V: the r Kronecker vectors, [..., r, d], r <= K.
        factor_decay: γ in (0, 1).
        valid: bool [...]; where False the factor stays as it is, whatever V holds.

    Returns:
        The new C and head.
    """
    history, r = C.shape[-2], V.shape[-2]
    U = V - factor_decay * ((V @ C.mT) @ C)  # VM, [..., r, d]
    gram = torch.eye(r, dtype=V.dtype, device=V.device) + V @ U.mT
    T, _ = torch.linalg.cholesky_ex(gram)
    fresh = torch.linalg.solve_triangular(T, U, upper=False)
    age = (torch.arange(history, device=C.device) - head[..., None]) % history  # slots in ring order, [..., K]
    replaced = (age < r)[..., None]
    rows = torch.take_along_dim(fresh, age.clamp(max=r - 1)[..., None], dim=-2)
    updated = torch.where(replaced, rows, factor_decay**0.5 * C)
    valid = valid & fresh.isfinite().all(-1).all(-1)
    return torch.where(valid[..., None, None], updated, C), torch.where(valid, (head + r) % history, head)


def lowrank_product(G: Tensor, bias: Tensor | None, C_left: Tensor | None, C_right: Tensor | None) -> Moved:
    """In place: [G | bias] ← (I - C_leftᵀC_left) [G | bias] (I - C_rightᵀC_right), in thin products.

    With X = C_left Ĝ, Y = Ĝ C_rightᵀ, Z = X C_rightᵀ and Ĝ = [G | bias]:
    P = Ĝ - [C_leftᵀ, Y] [X - Z C_right ; C_right], and ⟨P, Ĝ⟩ = |Ĝ|² - |X|² - |Y|² + |Z|².

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        C_left: [L, K, n], or None for the identity.
        C_right: [L, K', m + 1] with a bias, [L, K', m] without, or None for the identity.

    Returns:
        Squared norms and inner product of the joint gradient.
    """
    before = squared_norm(G, bias)
    inner = before
    m = G.shape[-1]
    thin: list[Tensor] = []  # [L, n, ·]
    wide: list[Tensor] = []  # [L, ·, m]
    bias_step = torch.zeros_like(bias) if bias is not None else None
    if C_right is not None:
        A = C_right[..., :m]
        Y = G @ A.mT
        if bias is not None:
            Y = Y + bias[..., None] * C_right[..., None, :, m]
            bias_step = torch.einsum("...nk,...k->...n", Y, C_right[..., m])
        inner = inner - squared_norm(Y)
        thin.append(Y)
        wide.append(A)
    if C_left is not None:
        X = C_left @ G
        x_bias = torch.einsum("...kn,...n->...k", C_left, bias) if bias is not None else None
        inner = inner - squared_norm(X, x_bias)
        if C_right is not None:
            Z = C_left @ Y
            X = X - Z @ A
            x_bias = x_bias - torch.einsum("...kj,...j->...k", Z, C_right[..., m]) if x_bias is not None else None
            inner = inner + squared_norm(Z)
        if bias_step is not None and x_bias is not None:
            bias_step = bias_step + torch.einsum("...kn,...k->...n", C_left, x_bias)
        thin.append(C_left.mT)
        wide.append(X)
    if thin:
        G.baddbmm_(torch.cat(thin, dim=-1), torch.cat(wide, dim=-2), alpha=-1)
    if bias is not None and bias_step is not None:
        bias.sub_(bias_step)
    return Moved(before, squared_norm(G, bias), inner)


# ---- dense MKOR -----------------------------------------------------------------------------------------------------


def blend_update(F: Tensor, V: Tensor, factor_decay: float) -> Tensor:
    """F ← (M⁻¹ + VᵀV)⁻¹ with M = γF + (1-γ)I: what the released MKOR code runs. Stays in 0 < F <= I from F = I.

    Args:
        F: inverse factor, [..., d, d].
        V: Kronecker vectors, [..., r, d].
        factor_decay: γ.
    """
    M = factor_decay * F
    M.diagonal(dim1=-2, dim2=-1).add_(1 - factor_decay)
    U = V @ M
    gram = torch.eye(V.shape[-2], dtype=V.dtype, device=V.device) + U @ V.mT
    T, _ = torch.linalg.cholesky_ex(gram)
    W = torch.linalg.solve_triangular(T, U, upper=False)
    return symmetrize(M - W.mT @ W)


def exact_update(F: Tensor, v: Tensor, factor_decay: float) -> Tensor:
    """F ← (γF⁻¹ + (1-γ)vvᵀ)⁻¹ by Sherman-Morrison; winds up as γ⁻ᵗ where there is no data, so stabilise first.

    Args:
        F: inverse factor, [..., d, d].
        v: Kronecker vector, [..., d].
        factor_decay: γ.
    """
    u = torch.einsum("...ij,...j->...i", F, v)
    s = (v * u).sum(-1)
    scale = (1 - factor_decay) / (factor_decay + (1 - factor_decay) * s)
    return symmetrize((F - scale[..., None, None] * u[..., :, None] * u[..., None, :]) / factor_decay)


def paper_update(F: Tensor, v: Tensor, factor_decay: float) -> Tensor:
    """Eq. 5 of the MKOR paper as printed: γF + (1-γ) / (γ²(1 + γ(1-γ)vᵀFv)) F v vᵀ F.

    This is no inverse update (plus sign, γ for 1/γ): it amplifies the mean direction and diverges or vanishes. It is
    kept for study.

    Args:
        F: inverse factor, [..., d, d].
        v: Kronecker vector, [..., d].
        factor_decay: γ.
    """
    gamma = factor_decay
    u = torch.einsum("...ij,...j->...i", F, v)
    s = (v * u).sum(-1)
    scale = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * s))
    return symmetrize(gamma * F + scale[..., None, None] * u[..., :, None] * u[..., None, :])


def stabilize(F: Tensor, threshold: float, blend: float) -> Tensor:
    """F ← ζF + (1-ζ)I where max|F| > ε (Algorithm 1, line 3); unchanged elsewhere.

    Args:
        F: inverse factor, [..., d, d].
        threshold: ε.
        blend: ζ; below γ it keeps the exact rule bounded.
    """
    eye = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
    large = F.abs().amax((-2, -1), keepdim=True) > threshold
    return torch.where(large, blend * F + (1 - blend) * eye, F)


def symmetrize(F: Tensor) -> Tensor:
    """(F + Fᵀ) / 2."""
    return (F + F.mT) / 2


def dense_product(G: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None) -> Moved:
    """In place: [G | bias] ← left [G | bias] right; a result that is not finite leaves that gradient as it was.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        left: [L, n, n], or None for the identity.
        right: [L, m + 1, m + 1] with a bias, [L, m, m] without, or None for the identity.

    Returns:
        Squared norms and inner product of the joint gradient; ``after`` is not finite where G was kept.
    """
    joint = G if bias is None else torch.cat([G, bias[..., None]], dim=-1)
    P = joint if left is None else left @ joint
    P = P if right is None else P @ right
    return replace(G, bias, joint, P)


# ---- K-FAC ----------------------------------------------------------------------------------------------------------


def eigen_product(
    G: Tensor,
    bias: Tensor | None,
    left: tuple[Tensor, Tensor] | None,
    right: tuple[Tensor, Tensor],
    damping: Tensor,
) -> Moved:
    """In place: [G | bias] ← Q_b [(Q_bᵀ [G | bias] Q_a) / (l_b l_aᵀ + λ)] Q_aᵀ; not finite: as ``dense_product``.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        left: eigenvectors Q_b [L, n, n] and values l_b [L, n], or None for B = I.
        right: Q_a and l_a, with m + 1 for m where there is a bias.
        damping: λ, [L].

    Returns:
        Squared norms and inner product of the joint gradient; ``after`` is not finite where G was kept.
    """
    joint = G if bias is None else torch.cat([G, bias[..., None]], dim=-1)
    Q_a, l_a = right
    T = joint @ Q_a if left is None else left[0].mT @ joint @ Q_a
    curvature = l_a[:, None, :] if left is None else left[1][:, :, None] * l_a[:, None, :]
    T = T / (curvature + damping[:, None, None])
    P = T @ Q_a.mT if left is None else left[0] @ T @ Q_a.mT
    return replace(G, bias, joint, P)


def replace(G: Tensor, bias: Tensor | None, joint: Tensor, P: Tensor) -> Moved:
    """Write P [L, n, m (+ 1)] into [G | bias] where it is finite.

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        joint: what [G | bias] is now.
        P: what it becomes.

    Returns:
        Squared norms and inner product; ``after`` is not finite where G was kept.
    """
    moved = Moved(squared_norm(joint), squared_norm(P), (P * joint).sum((-2, -1)))
    P = torch.where(moved.after.isfinite()[..., None, None], P, joint)
    G.copy_(P[..., : G.shape[-1]])
    if bias is not None:
        bias.copy_(P[..., -1])
    return moved


# ---- Eva family -----------------------------------------------------------------------------------------------------


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


def eva_product(G: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, damping: float) -> Moved:
    """In place: Eva, Ĝ ← (aaᵀ ⊗ bbᵀ + γI)⁻¹ vec(Ĝ) = (1/γ)[Ĝ - (bᵀĜa) / (γ + |a|²|b|²) b aᵀ].

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        a: input vectors, [L, m + 1] with a bias, [L, m] without.
        b: output-gradient vectors, [L, n].
        damping: γ > 0.

    Returns:
        Squared norms and inner product, from the same scalars.
    """
    before = squared_norm(G, bias)
    s = (b * times_input_vector(G, bias, a)).sum(-1)  # bᵀĜa
    q = a.square().sum(-1) * b.square().sum(-1)
    c = s / (damping + q)
    rank_one_step(G, bias, c[..., None] * b, a, damping)
    inner = (before - c * s) / damping
    return Moved(before, (before - 2 * c * s + c * c * q) / damping**2, inner)


def eva_f_product(G: Tensor, bias: Tensor | None, a: Tensor, damping: float) -> Moved:
    """In place: vectorised FOOF, Ĝ ← Ĝ(aaᵀ + γI)⁻¹ = (1/γ)[Ĝ - (Ĝa)aᵀ / (γ + |a|²)].

    Args:
        G: weight gradients, [L, n, m].
        bias: bias gradients, [L, n], or None.
        a: input vectors, [L, m + 1] with a bias, [L, m] without.
        damping: γ > 0.

    Returns:
        Squared norms and inner product, from the same scalars.
    """
    before = squared_norm(G, bias)
    u = times_input_vector(G, bias, a)
    q = a.square().sum(-1)
    s = u.square().sum(-1)
    rank_one_step(G, bias, u / (damping + q)[..., None], a, damping)
    inner = (before - s / (damping + q)) / damping
    return Moved(before, (before - 2 * s / (damping + q) + s * q / (damping + q).square()) / damping**2, inner)

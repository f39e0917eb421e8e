"""Pure tensor functions of the methods; leading batch dimensions are allowed everywhere.

A low-rank factor is stored by rows: ``C`` [..., K, d] holds the K columns of the paper's d x K matrix, so that
``F = I - CᵀC`` in this file's letters, and a ring buffer's slot is a contiguous row.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

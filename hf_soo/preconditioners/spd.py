"""Inverses, roots and eigenvectors of symmetric positive semi-definite matrices that may not decompose at once."""

from __future__ import annotations

import torch
from torch import Tensor

RETRIES = 3
"""Attempts with ten times more damping each, before the arithmetic is changed."""

LARGEST_NEGATIVE = 1e-3
"""An eigenvalue further below zero, relative to the largest, is no rounding: the matrix is no covariance."""


def damped_inverse(M: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(M + λI)⁻¹ by Cholesky. What does not decompose is tried again with 10λ, 100λ, 1000λ, in float64, and by eigh.

    Reads one flag from the device.

    Args:
        M: symmetric, [L, d, d].
        damping: λ > 0, [L].

    Returns:
        The inverses, and whether each succeeded, bool [L]; where not, the inverse is meaningless.
    """
    inverse, info = _by_cholesky(M, damping)
    ok = info == 0
    if not ok.all():
        for i in (~ok).nonzero().flatten().tolist():
            retried = _retry(M[i], damping[i])
            if retried is not None:
                inverse[i], ok[i] = retried, True
    return inverse, ok


def _by_cholesky(M: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    damped = M.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    L, info = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_inverse(L), info


def _retry(M: Tensor, damping: Tensor) -> Tensor | None:
    """One matrix [d, d] that did not decompose; None if nothing helps."""
    if not M.isfinite().all():
        return None
    attempts = [(M, damping * 10.0**power) for power in range(1, RETRIES + 1)] + [(M.double(), damping.double())]
    for matrix, more in attempts:
        inverse, info = _by_cholesky(matrix, more)
        if info == 0 and inverse.isfinite().all():
            return inverse.to(M.dtype)
    decomposed = eigen(M.double().cpu()[None])
    if not decomposed[2].all():
        return None
    values, vectors = decomposed[0][0], decomposed[1][0]
    if values.min() < -LARGEST_NEGATIVE * values.abs().max():
        return None
    inverse = (vectors / (values.clamp(min=0) + damping.double().cpu())) @ vectors.mT
    return inverse.to(M)


def inverse_root(M: Tensor, exponent: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """(M + εI)⁻ᵉ with no eigenvalue below ε: all are shifted where rounding has put one there.

    Args:
        M: symmetric, positive semi-definite but for rounding, [L, d, d]; overwritten.
        exponent: e.
        epsilon: ε.

    Returns:
        [L, d, d], and whether each is good, bool [L].
    """
    M.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    values, Q, ok = eigen(M)
    values = values + (epsilon - values.amin(-1, keepdim=True)).clamp(min=0)
    # ε is lost in the rounding of an M that is 10⁷ times as large
    values = torch.where(values > 0, values, torch.finfo(M.dtype).eps * values.amax(-1, keepdim=True))
    R = (Q * values.pow(-exponent)[:, None]) @ Q.mT
    return R, ok & R.flatten(1).isfinite().all(-1)


def power_columns(C: Tensor, exponent: float) -> Tensor:
    """C_p [..., K, d] with (I - CᵀC)^p = I - C_pᵀC_p, for p in (0, 1] and CᵀC <= I; C itself for p = 1.

    CCᵀ = QΛQᵀ, K x K, gives C_p = diag(√((1 - (1-λ)^p) / λ)) QᵀC, where the root is √p for λ = 0. If CCᵀ does not
    decompose it is 0.
    """
    if exponent == 1:
        return C
    values, Q, _ = eigen(C @ C.mT)
    values = values.clamp(torch.finfo(C.dtype).eps, 1)  # of rounding's; below ε the root is √p to all digits
    scale = (-torch.expm1(exponent * torch.log1p(-values)) / values).sqrt()
    return scale[..., None] * (Q.mT @ C)


def eigen(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [L, d], ascending, and vectors [L, d, d] in columns of symmetric M, and whether each succeeded, [L].

    A matrix on which eigh fails is tried again in float64 on the CPU.
    """
    try:
        values, vectors = torch.linalg.eigh(M)
        return values, vectors, values.isfinite().all(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        parts = [_eigen_in_double(matrix) for matrix in M]
        values, vectors, ok = (torch.stack(list(each)) for each in zip(*parts, strict=True))
        return values, vectors, ok


def _eigen_in_double(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
        return values.to(matrix), vectors.to(matrix), torch.tensor(True, device=matrix.device)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # counted by the caller
        return matrix.new_zeros(len(matrix)), torch.zeros_like(matrix), torch.tensor(False, device=matrix.device)

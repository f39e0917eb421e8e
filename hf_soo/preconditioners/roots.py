"""Inverse roots of symmetric matrices by eigendecomposition, with a second try where that fails."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]


def inverse_root(L: Tensor, exponent: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """(L + εI)⁻ᵉ with no eigenvalue below ε: all are shifted where rounding has put one there.

    Args:
        L: symmetric, positive semi-definite but for rounding, [L, d, d]; overwritten.
        exponent: e.
        epsilon: ε.

    Returns:
        [L, d, d], and whether each is good, bool [L].
    """
    L.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    values, Q, ok = decomposed(L)
    values = values + (epsilon - values.amin(-1, keepdim=True)).clamp(min=0)
    R = (Q * values.pow(-exponent)[:, None]) @ Q.mT
    return R, ok & R.flatten(1).isfinite().all(-1)


def decomposed(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [L, d] and -vectors [L, d, d] of symmetric matrices, and whether each could be had, bool [L]."""
    try:
        values, Q = torch.linalg.eigh(A)
    except LinAlgError:  # one of them did not converge: each alone, in float64 on the CPU
        each = [_decomposed_alone(matrix) for matrix in A]
        return torch.stack([e[0] for e in each]), torch.stack([e[1] for e in each]), torch.stack([e[2] for e in each])
    return values, Q, torch.ones(len(A), dtype=torch.bool, device=A.device)


def _decomposed_alone(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    good = torch.ones((), dtype=torch.bool, device=A.device)
    try:
        values, Q = torch.linalg.eigh(A.to("cpu", torch.float64))
    except LinAlgError:
        return A.new_ones(len(A)), torch.zeros_like(A), ~good
    return values.to(A), Q.to(A), good

"""MKOR's inverse factors as matrices: the released code's rule, the exact one, and the paper's equation 5 as printed.

With γ = factor_decay and a Kronecker vector v, u = Fv and s = vᵀu,

    blend   M = γF + (1-γ)I,  F ← (M⁻¹ + vvᵀ)⁻¹
    exact   F ← (γF⁻¹ + (1-γ)vvᵀ)⁻¹ = (1/γ)[F - (1-γ)/(γ + (1-γ)s) uuᵀ]
    paper   F ← γF + (1-γ)/(γ²(1 + γ(1-γ)s)) uuᵀ

The last two do not stay bounded by themselves, so line 3 of Algorithm 1 is applied before them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.gradients import Joint, RowSums, TransformNorms
from hf_soo.engine.preconditioner import Factor
from hf_soo.preconditioners.kronecker import identity

STABILIZER_THRESHOLD, STABILIZER_BLEND = 100.0, 0.9


class Dense:
    """F as a matrix ``inverse`` [d, d]."""

    def __init__(
        self,
        rule: Literal["blend", "exact", "paper"],
        factor_decay: float,
        threshold: float | None = None,
        blend: float | None = None,
    ) -> None:
        """Choose the rule.

        Args:
            rule: how F follows the vectors.
            factor_decay: γ.
            threshold: ε of ``stabilize``; None: ``STABILIZER_THRESHOLD``.
            blend: ζ of ``stabilize``; None: ``STABILIZER_BLEND``.
        """
        self.rule, self.factor_decay = rule, factor_decay
        self.threshold = STABILIZER_THRESHOLD if threshold is None else threshold
        self.blend = STABILIZER_BLEND if blend is None else blend

    def init(self, d: int, like: Tensor) -> Factor:
        """The identity."""
        return {"inverse": identity(d, like)}

    def update(self, factor: Factor, V: Tensor, valid: Tensor) -> Factor:
        """By the rule, after V [L, r, d] where ``valid`` [L]; "exact" and "paper" are stabilised first."""
        F = factor["inverse"]
        if self.rule == "blend":
            new = blend_update(F, V, self.factor_decay)
        else:
            rule = exact_update if self.rule == "exact" else paper_update
            new = rule(stabilize(F, self.threshold, self.blend), V.squeeze(-2), self.factor_decay)
        valid = valid & new.isfinite().all(-1).all(-1)
        return {"inverse": torch.where(valid[:, None, None], new, F)}

    def transform(self, left: Factor | None, right: Factor | None, grad: Joint) -> RowSums[TransformNorms]:
        """Two full products, on all rows."""
        return grad.multiply_(*(None if factor is None else factor["inverse"] for factor in (left, right)))

    def distance(self, factor: Factor) -> Tensor:
        """|F - I|_F, [L]."""
        F = factor["inverse"]
        distance: Tensor = torch.linalg.matrix_norm(F - identity(F.shape[-1], F))
        return distance


def blend_update(F: Tensor, V: Tensor, factor_decay: float) -> Tensor:
    """F ← (M⁻¹ + VᵀV)⁻¹ with M = γF + (1-γ)I: what the released MKOR code runs. Stays in 0 < F <= I from F = I.

    Args:
        F: inverse factor, [..., d, d].
        V: Kronecker vectors, [..., r, d].
        factor_decay: γ.
    """
    M = factor_decay * F
    M.diagonal(dim1=-2, dim2=-1).add_(1 - factor_decay)
    # (M⁻¹ + VᵀV)⁻¹ = M - UᵀS⁻¹U with U = VM and S = I + UVᵀ = TTᵀ (Cholesky)
    U = V @ M
    S = torch.eye(V.shape[-2], dtype=V.dtype, device=V.device) + U @ V.mT
    T, _ = torch.linalg.cholesky_ex(S)
    W = torch.linalg.solve_triangular(T, U, upper=False)
    return _symmetric(M - W.mT @ W)


def exact_update(F: Tensor, v: Tensor, factor_decay: float) -> Tensor:
    """F ← (γF⁻¹ + (1-γ)vvᵀ)⁻¹ by Sherman-Morrison, F [..., d, d] and v [..., d].

    It winds up as γ⁻ᵗ where there is no data, so stabilise first.
    """
    u = torch.einsum("...ij,...j->...i", F, v)
    s = (v * u).sum(-1)
    scale = (1 - factor_decay) / (factor_decay + (1 - factor_decay) * s)
    return _symmetric((F - scale[..., None, None] * u[..., :, None] * u[..., None, :]) / factor_decay)


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
    return _symmetric(gamma * F + scale[..., None, None] * u[..., :, None] * u[..., None, :])


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


def _symmetric(F: Tensor) -> Tensor:
    """(F + Fᵀ) / 2: rounding alone makes F lose its symmetry."""
    return (F + F.mT) / 2

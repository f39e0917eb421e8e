"""The damped inverse of B ⊗ A: by Cholesky with the damping split between the sides, or exactly by eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_soo.engine.gradients import Joint, RowSums, TransformNorms
from hf_soo.engine.layers import accumulation_dtype
from hf_soo.engine.preconditioner import Factor, LayerState, Side
from hf_soo.preconditioners import spd
from hf_soo.preconditioners.kfac_config import FactorConfig
from hf_soo.preconditioners.kronecker import identity

BySide = dict[Side, Tensor]

LEAST_DAMPING, LEAST_SIDE = 1e-12, 1e-20  # of λ, and of one side's part of it
LEAST_SHARE = 1e-8  # of a factor's mean eigenvalue, under which absolute damping may not fall


class Cholesky:
    """One inverse [d, d] for each side, the damping split between them."""

    names = frozenset({"inverse"})
    matrix = "inverse"

    def __init__(self, config: FactorConfig) -> None:
        """Take the settings."""
        self.config = config

    def init(self, d: int, like: Tensor) -> Factor:
        """The identity."""
        return {"inverse": identity(d, like)}

    def refresh(self, factors: BySide, means: BySide) -> tuple[dict[Side, Factor], BySide]:
        """By Cholesky, with retries, from F̂ [L, d, d] and its mean eigenvalue tr F̂/d [L] of each side.

        Gives the tensors of each side, and whether each layer's succeeded, bool [L].
        """
        damping, new, ok = self._damping(means), {}, {}
        for side, factor in factors.items():
            inverse, ok[side] = spd.damped_inverse(factor, (damping[side] + self.config.epsilon).clamp(min=LEAST_SIDE))
            new[side] = {"inverse": inverse}
        return new, ok

    def _damping(self, mean: BySide) -> BySide:
        """λ of each side."""
        damping = self.config.damping
        if Side.OUTPUT not in mean:  # FOOF
            a = mean[Side.INPUT]
            return {Side.INPUT: damping * a if self.config.damping_mode == "relative" else torch.full_like(a, damping)}
        if self.config.damping_mode == "relative":
            return {side: damping**0.5 * each for side, each in mean.items()}
        pi = (mean[Side.INPUT] / mean[Side.OUTPUT]).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, 1.0)  # a factor that is 0 would take all damping from its side
        split = {Side.INPUT: pi * damping**0.5, Side.OUTPUT: damping**0.5 / pi}
        return {side: torch.maximum(each, LEAST_SHARE * mean[side]) for side, each in split.items()}

    def transform(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """Ĝ ← P, by two products; or by one, where there is no left side, on any rows."""
        left = state[side_key(Side.OUTPUT)]["inverse"] if side_key(Side.OUTPUT) in state else None
        return grad.multiply_(left, state[side_key(Side.INPUT)]["inverse"])

    def solve(self, right: Factor, G: Tensor) -> Tensor:
        """P of Ĝ [L, n, m] without a left side."""
        return G @ right["inverse"]

    def distance(self, factor: Factor) -> Tensor:
        """|F/(tr F/d) - I| of a side's inverse F: how far it is from a mere scale, [L]."""
        F = factor["inverse"]
        scaled = F / F.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        distance: Tensor = torch.linalg.matrix_norm(scaled - identity(F.shape[-1], F))
        return distance


class Eigen:
    """Eigenvectors and eigenvalues of each side, and λ: (B ⊗ A + λI)⁻¹ exactly."""

    names = frozenset({"vectors", "values", "damping"})
    matrix = "vectors"

    def __init__(self, config: FactorConfig) -> None:
        """Take the settings."""
        self.config = config

    def init(self, d: int, like: Tensor) -> Factor:
        """Eigenvalues 1 and no damping."""
        dtype, device = accumulation_dtype(like.dtype), like.device
        return {
            "vectors": identity(d, like),
            "values": torch.ones(d, dtype=dtype, device=device),
            "damping": torch.zeros((), dtype=dtype, device=device),
        }

    def refresh(self, factors: BySide, means: BySide) -> tuple[dict[Side, Factor], BySide]:
        """By eigh; λ is kept with each side. As of ``Cholesky``."""
        mean = torch.stack(list(means.values())).prod(0)
        relative = self.config.damping_mode == "relative"
        damping = self.config.damping * mean if relative else torch.full_like(mean, self.config.damping)
        damping = (damping + self.config.epsilon).clamp(min=LEAST_DAMPING)
        new, ok = {}, {}
        for side, factor in factors.items():
            values, vectors, ok[side] = spd.eigen(factor)
            new[side] = {"vectors": vectors, "values": values.clamp(min=0), "damping": damping}
        return new, ok

    def transform(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """As of ``Cholesky``, by four products or two: P = Q_b [(Q_bᵀ Ĝ Q_a) / (l_b l_aᵀ + λ)] Q_aᵀ."""
        G, right = grad.matrix(), state[side_key(Side.INPUT)]
        if side_key(Side.OUTPUT) not in state:
            return grad.replace_(G, self.solve(right, G))
        left, Q = state[side_key(Side.OUTPUT)], right["vectors"]
        curvature = left["values"][:, :, None] * right["values"][:, None, :]
        T = (left["vectors"].mT @ G @ Q) / (curvature + right["damping"][:, None, None])
        return grad.replace_(G, left["vectors"] @ T @ Q.mT)

    def solve(self, right: Factor, G: Tensor) -> Tensor:
        """As of ``Cholesky``."""
        Q, curvature = right["vectors"], right["values"][:, None, :]
        return (G @ Q / (curvature + right["damping"][:, None, None])) @ Q.mT

    def distance(self, factor: Factor) -> Tensor:
        """As of ``Cholesky``, with √λ as the side's damping."""
        F = 1 / (factor["values"] + factor["damping"].sqrt()[:, None])
        distance: Tensor = torch.linalg.vector_norm(F / F.mean(-1, keepdim=True) - 1, dim=-1)
        return distance


def apart(factor: Factor) -> Factor:
    """The tensors of an inverse of k blocks, [L, k, ...], as those of so many layers, [L·k, ...]."""
    return {name: tensor.flatten(0, 1) for name, tensor in factor.items()}


def side_key(side: Side) -> str:
    """The name of a side in a layer's state."""
    return side.name.lower()

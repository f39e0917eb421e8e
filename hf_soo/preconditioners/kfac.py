"""K-FAC (Martens and Grosse, 2015; expand and reduce: Eschenhagen et al., 2023), FOOF (Benzing, 2022) and KAISA (2021).

For a layer with input rows a (1 appended for a bias) and output gradients g of the mean loss over R terms,

    A = mean of a aᵀ,  B = R Σ g gᵀ                        (expand: over all rows; reduce: one row an example)
    S ← ρS + (1-ρ)F,  F̂ = S/(1-ρᵘ) after u updates         for F = A and F = B
    cholesky   P = (B̂ + λ_B I)⁻¹ G (Â + λ_A I)⁻¹           every `inverse_period` steps new inverses
    eigen      P = unvec((B̂ ⊗ Â + λI)⁻¹ vec G)
    FOOF       P = G (Â + λI)⁻¹                             B = I: no output gradients are needed

then the KL clip or a norm match, and the base optimizer steps on P. With `damping_mode="relative"` and κ = (tr Â/m)(tr
B̂/n), the layer's mean curvature, λ = damping·κ; the Cholesky form splits it, λ_A = √damping·tr Â/m and λ_B alike (FOOF:
λ = damping·tr Â/m). "absolute" is λ = damping, split by π = √((tr Â/m)/(tr B̂/n)) into λ_A = π√λ, λ_B = √λ/π.

===== ============== ================================
paper here           kfac-pytorch, KAISA's released code
===== ============== ================================
λ, γ² damping        damping
ρ     factor_decay   factor_decay (weight of the *old*)
T_cov update_period  factor_update_steps
T_inv inverse_period inv_update_steps
κ     kl_clip        kl_clip
k     grad_workers   grad_worker_fraction x world size
===== ============== ================================

Deviation: B carries the factor R and S starts at 0 with bias correction. The released code divides a mean loss's
gradients by the rows once more, so its B is R² too small on a token loss, and starts at S = I, which is what acts: with
a token loss it is FOOF with damping λ/ρᵘ, and plain gradient descent after some hundred updates.
`factor_scale="published"` with `factor_start="identity"` reproduces that (for linear layers; its convolutions divide by
the positions once more).
Deviation: rows whose output gradient is exactly zero (padding, unlabelled positions) do not count; `row_filter="all"`
counts them in A. R only matters with absolute damping or without a rescale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_soo.engine import linalg, spd
from hf_soo.engine.capture import Phase, Statistics
from hf_soo.engine.checks import require_count, require_in, require_range
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.gradients import Grad
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.linalg import Moved
from hf_soo.engine.preconditioner import Factor, LayerState, Outcome, Preconditioner, Side, Updated, keep_where
from hf_soo.engine.rescale import RescaleName, make_rescale
from hf_soo.preconditioners.config import Periodic

LEAST_DAMPING, LEAST_SIDE = 1e-12, 1e-20  # of λ, and of one side's part of it
LEAST_SHARE = 1e-8  # of a factor's mean eigenvalue, under which absolute damping may not fall


@dataclass(frozen=True)
class FactorConfig(Periodic):
    """Settings that K-FAC and FOOF share.

    Args:
        damping: λ, or λ relative to the layer's mean curvature.
        damping_mode: "relative" or "absolute".
        inverse: "cholesky" (damping split between the sides) or "eigen" (exact).
        factor_decay: ρ, the weight of the old factor.
        inverse_period: optimizer steps between inverses, a multiple of ``update_period``.
        rescale: "kl_clip", "norm" (|P| = |G| in each layer), "global" (over all layers) or "none".
        kl_clip: κ of the KL clip, or None for no clip.
        row_filter: "grad" (rows with an output gradient) or "all".
        max_dim: layers with a longer side are left to the base.
        grad_workers: ranks that precondition a layer, a divisor of the world size: 1 (MEM-OPT), the world size
            (COMM-OPT), or between (HYBRID-OPT). None: the method's default.
        factor_start: "corrected" (S = 0, bias correction) or "identity" (S = I, none).
    """

    damping: float = 0.1
    damping_mode: Literal["relative", "absolute"] = "relative"
    inverse: Literal["cholesky", "eigen"] = "cholesky"
    factor_decay: float = 0.95
    inverse_period: int = 100
    rescale: RescaleName = "kl_clip"
    kl_clip: float | None = 1e-3
    row_filter: Literal["grad", "all"] = "grad"
    max_dim: int = 8192
    grad_workers: int | None = None
    factor_start: Literal["corrected", "identity"] = "corrected"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        Periodic.__post_init__(self)
        require_range("damping", self.damping, 0, float("inf"), open_low=True)
        require_in("damping_mode", self.damping_mode, ("relative", "absolute"))
        require_in("inverse", self.inverse, ("cholesky", "eigen"))
        require_range("factor_decay", self.factor_decay, 0, 1)
        require_count("inverse_period", self.inverse_period, 1)
        if self.inverse_period % self.update_period:
            raise ValueError(
                f"inverse_period={self.inverse_period} is no multiple of update_period={self.update_period}; choose "
                "one that is, so that each inverse is of fresh factors."
            )
        make_rescale(self.rescale, self.kl_clip)
        require_in("row_filter", self.row_filter, ("grad", "all"))
        require_count("max_dim", self.max_dim, 1)
        if self.grad_workers is not None:
            require_count("grad_workers", self.grad_workers, 1)
        require_in("factor_start", self.factor_start, ("corrected", "identity"))


@dataclass(frozen=True)
class KFACConfig(FactorConfig):
    """Settings of K-FAC; see ``FactorConfig`` for the others.

    Args:
        fisher: "empirical" (the training loss's own gradients) or "mc" (labels drawn from the model, one more backward
            pass in windows that collect).
        loss_terms: R, the terms that the loss averages over; None: the rows with a gradient in the last layer that
            has any.
        factor_scale: "loss" (B = R Σ g gᵀ) or "published" (the released code's Σ g gᵀ / rows).
    """

    fisher: Literal["empirical", "mc"] = "empirical"
    loss_terms: int | None = None
    factor_scale: Literal["loss", "published"] = "loss"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        FactorConfig.__post_init__(self)
        require_in("fisher", self.fisher, ("empirical", "mc"))
        require_in("factor_scale", self.factor_scale, ("loss", "published"))
        if self.loss_terms is not None:
            require_count("loss_terms", self.loss_terms, 1)
            if self.factor_scale == "published":
                raise ValueError(f"loss_terms={self.loss_terms} has no effect with factor_scale='published'.")


@dataclass(frozen=True)
class FOOFConfig(FactorConfig):
    """Settings of FOOF: ``FactorConfig`` with each layer's norm kept, since P is about G/λ."""

    rescale: RescaleName = "norm"


@dataclass(frozen=True)
class KAISAConfig(KFACConfig):
    """K-FAC with the settings of KAISA's published BERT run: exact damping, factors every step, inverses every 10."""

    damping: float = 3e-3
    damping_mode: Literal["relative", "absolute"] = "absolute"
    inverse: Literal["cholesky", "eigen"] = "eigen"
    update_period: int = 1
    warmup_updates: int = 0
    inverse_period: int = 10


@dataclass(slots=True)
class Curvature:
    """Both factors of a group of layers, ready to be inverted.

    Args:
        factor: side -> F̂ [L, d, d].
        mean: side -> its mean eigenvalue tr F̂/d, [L].
    """

    factor: dict[Side, Tensor]
    mean: dict[Side, Tensor]


class Inverse(Protocol):
    """How the damped inverse is held: its tensors, how they are made, and how they are applied."""

    names: frozenset[str]

    def init(self, d: int, like: Tensor) -> Factor:
        """P = G."""

    def refresh(self, curvature: Curvature) -> tuple[dict[Side, Factor], dict[Side, Tensor]]:
        """The tensors of each side, and whether each layer's succeeded, bool [L]."""

    def transform(self, state: LayerState, grad: Grad) -> Moved:
        """G -> P in place."""

    def distance(self, factor: Factor) -> Tensor:
        """|F/(tr F/d) - I| of a side's inverse F: how far it is from a mere scale, [L]."""


class Cholesky(Inverse):
    """One inverse [d, d] for each side, the damping split between them."""

    names = frozenset({"inverse"})

    def __init__(self, config: FactorConfig) -> None:
        """Take the settings."""
        self.config = config

    def init(self, d: int, like: Tensor) -> Factor:
        """The identity."""
        return {"inverse": torch.eye(d, dtype=accumulation_dtype(like.dtype), device=like.device)}

    def refresh(self, curvature: Curvature) -> tuple[dict[Side, Factor], dict[Side, Tensor]]:
        """By Cholesky, with retries."""
        damping, new, ok = self._damping(curvature.mean), {}, {}
        for side, factor in curvature.factor.items():
            inverse, ok[side] = spd.damped_inverse(factor, damping[side].clamp(min=LEAST_SIDE))
            new[side] = {"inverse": inverse}
        return new, ok

    def _damping(self, mean: dict[Side, Tensor]) -> dict[Side, Tensor]:
        """λ of each side."""
        damping = self.config.damping
        if Side.OUTPUT not in mean:  # FOOF
            a = mean[Side.INPUT]
            return {Side.INPUT: damping * a if self.config.damping_mode == "relative" else torch.full_like(a, damping)}
        if self.config.damping_mode == "relative":
            return {side: damping**0.5 * each for side, each in mean.items()}
        pi = (mean[Side.INPUT] / mean[Side.OUTPUT]).sqrt()
        split = {Side.INPUT: pi * damping**0.5, Side.OUTPUT: damping**0.5 / pi}
        return {side: torch.maximum(each, LEAST_SHARE * mean[side]) for side, each in split.items()}

    def transform(self, state: LayerState, grad: Grad) -> Moved:
        """Two products."""
        left = state[_key(Side.OUTPUT)]["inverse"] if _key(Side.OUTPUT) in state else None
        return linalg.dense_product(grad.weight, grad.bias, left, state[_key(Side.INPUT)]["inverse"])

    def distance(self, factor: Factor) -> Tensor:
        """See ``Inverse``."""
        F = factor["inverse"]
        scaled = F / F.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        distance: Tensor = torch.linalg.matrix_norm(scaled - torch.eye(F.shape[-1], dtype=F.dtype, device=F.device))
        return distance


class Eigen(Inverse):
    """Eigenvectors and eigenvalues of each side, and λ: (B ⊗ A + λI)⁻¹ exactly."""

    names = frozenset({"vectors", "values", "damping"})

    def __init__(self, config: FactorConfig) -> None:
        """Take the settings."""
        self.config = config

    def init(self, d: int, like: Tensor) -> Factor:
        """Eigenvalues 1 and no damping."""
        dtype, device = accumulation_dtype(like.dtype), like.device
        return {
            "vectors": torch.eye(d, dtype=dtype, device=device),
            "values": torch.ones(d, dtype=dtype, device=device),
            "damping": torch.zeros((), dtype=dtype, device=device),
        }

    def refresh(self, curvature: Curvature) -> tuple[dict[Side, Factor], dict[Side, Tensor]]:
        """By eigh; λ is kept with each side."""
        mean = torch.stack(list(curvature.mean.values())).prod(0)
        relative = self.config.damping_mode == "relative"
        damping = (self.config.damping * mean if relative else torch.full_like(mean, self.config.damping)).clamp(
            min=LEAST_DAMPING
        )
        new, ok = {}, {}
        for side, factor in curvature.factor.items():
            values, vectors, ok[side] = spd.eigen(factor)
            new[side] = {"vectors": vectors, "values": values.clamp(min=0), "damping": damping}
        return new, ok

    def transform(self, state: LayerState, grad: Grad) -> Moved:
        """Four products."""
        right, left = state[_key(Side.INPUT)], state.get(_key(Side.OUTPUT))
        return linalg.eigen_product(
            grad.weight, grad.bias, None if left is None else (left["vectors"], left["values"]),
            (right["vectors"], right["values"]), right["damping"],
        )  # fmt: skip

    def distance(self, factor: Factor) -> Tensor:
        """See ``Inverse``, with √λ as the side's damping."""
        F = 1 / (factor["values"] + factor["damping"].sqrt()[:, None])
        distance: Tensor = torch.linalg.vector_norm(F / F.mean(-1, keepdim=True) - 1, dim=-1)
        return distance


class KFAC(Preconditioner):
    """K-FAC, "expand"; state "input" and "output": "factor" S, "updates" u, and the tensors of the inverse."""

    sides: tuple[Side, ...] = (Side.INPUT, Side.OUTPUT)
    reduce = False

    def __init__(self, config: FactorConfig) -> None:
        """Make the transform.

        Args:
            config: its settings.
        """
        self.config = config
        self.form: Inverse = Cholesky(config) if config.inverse == "cholesky" else Eigen(config)
        self.shared = self.form.names
        self.rescale = make_rescale(config.rescale, config.kl_clip)
        self.recorder = FactorRecorder(
            outputs=Side.OUTPUT in self.sides,
            reduce=self.reduce,
            row_filter=config.row_filter,
            loss_terms=getattr(config, "loss_terms", None),
            published=getattr(config, "factor_scale", "loss") == "published",
            phase=Phase() if getattr(config, "fisher", "empirical") == "mc" else None,
        )

    def updates_at(self, step: int) -> bool:
        """By the period."""
        return self.config.updates_at(step)

    def refreshes_at(self, step: int) -> bool:
        """In the warm-up, then by the inverse period."""
        return step < self.config.warmup_updates or step % self.config.inverse_period == 0

    def refusal(self, layer: Layer) -> str | None:
        """A side longer than ``max_dim``."""
        longest = max(self._sizes(layer).values())
        return f"max_dim={self.config.max_dim} exceeded ({longest})" if longest > self.config.max_dim else None

    def workers(self, world: int) -> int | None:
        """As set; by default all (COMM-OPT)."""
        return self.config.grad_workers or self._default_workers(world)

    def _default_workers(self, world: int) -> int:
        return world

    def cost(self, layer: Layer) -> float:
        """Σ d³ over the sides that are inverted."""
        return float(sum(d**3 for d in self._sizes(layer).values()))

    def _sizes(self, layer: Layer) -> dict[Side, int]:
        d_out, d_in = layer.shape
        sizes = {Side.INPUT: d_in + (layer.bias is not None), Side.OUTPUT: d_out}
        return {side: sizes[side] for side in self.sides}

    def init(self, layer: Layer) -> LayerState:
        """S = 0 (or I), and P = G until the first inverse."""
        like = layer.weight

        def factor(d: int) -> Factor:
            S = torch.zeros(d, d, dtype=accumulation_dtype(like.dtype), device=like.device)
            if self.config.factor_start == "identity":
                S.fill_diagonal_(1)
            updates = torch.zeros((), dtype=torch.int64, device=like.device)
            return {"factor": S, "updates": updates, **self.form.init(d, like)}

        return {_key(side): factor(d) for side, d in self._sizes(layer).items()}

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """S ← ρS + (1-ρ)F, where F is finite and has rows."""
        outcomes = torch.zeros(len(statistics.rows), 2, dtype=torch.int64, device=statistics.rows.device)
        norms = torch.zeros_like(outcomes, dtype=statistics.rows.dtype)
        for side in self.sides:
            F = statistics.inputs if side is Side.INPUT else statistics.outputs
            assert F is not None
            finite = F.isfinite().all(-1).all(-1)
            outcomes[:, side] = torch.where(finite, Outcome.UPDATED.value, Outcome.NOT_FINITE.value)
            outcomes[:, side].masked_fill_(statistics.rows == 0, Outcome.NO_ROWS.value)
            norms[:, side] = F.diagonal(dim1=-2, dim2=-1).sum(-1)
            valid, own = outcomes[:, side] == Outcome.UPDATED.value, state[_key(side)]
            own["factor"].lerp_(keep_where(valid, F, own["factor"]), 1 - self.config.factor_decay)
            own["updates"].add_(valid)
        return state, Updated(outcomes, norms)

    def refresh(self, state: LayerState) -> tuple[LayerState, Tensor]:
        """New inverses of the layers that have been updated; a side that does not decompose keeps its old one."""
        factors = {side: self._corrected(state[_key(side)]) for side in self.sides}
        means = {side: F.diagonal(dim1=-2, dim2=-1).mean(-1) for side, F in factors.items()}
        new, ok = self.form.refresh(Curvature(factors, means))
        outcomes = torch.zeros(len(means[Side.INPUT]), 2, dtype=torch.int64, device=means[Side.INPUT].device)
        for side in self.sides:
            own = state[_key(side)]
            seen = own["updates"] > 0
            outcomes[:, side] = torch.where(ok[side] | ~seen, Outcome.UPDATED.value, Outcome.FAILED.value)
            for name, tensor in new[side].items():
                own[name].copy_(keep_where(ok[side] & seen, tensor, own[name]))
        return state, outcomes

    def _corrected(self, factor: Factor) -> Tensor:
        """F̂; the identity where nothing has been seen."""
        S, u = factor["factor"], factor["updates"]
        if self.config.factor_start == "identity":
            return S
        weight = 1 - torch.pow(torch.full_like(u, self.config.factor_decay, dtype=S.dtype), u)
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        return torch.where((u > 0)[:, None, None], S / weight[:, None, None], eye)

    def transform(self, state: LayerState, grad: Grad) -> Moved:
        """The damped inverse of the Kronecker product, applied to G."""
        return self.form.transform(state, grad)

    def distances(self, state: LayerState) -> Tensor:
        """How far each side's inverse is from a mere scale, [L, 2]."""
        distance = {side: self.form.distance(state[_key(side)]) for side in self.sides}
        zero = torch.zeros_like(distance[Side.INPUT])
        return torch.stack([distance.get(side, zero) for side in Side], dim=-1)


class KFACReduce(KFAC):
    """K-FAC, "reduce": one row an example, the mean of its inputs and the sum of its output gradients."""

    reduce = True


class FOOF(KFAC):
    """FOOF: the input side alone."""

    sides = (Side.INPUT,)


class KAISA(KFAC):
    """K-FAC over half of the ranks for each layer by default (HYBRID-OPT)."""

    def _default_workers(self, world: int) -> int:
        return max((k for k in range(1, world // 2 + 1) if world % k == 0), default=1)


def _key(side: Side) -> str:
    return side.name.lower()

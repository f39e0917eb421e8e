"""Settings of K-FAC, FOOF and KAISA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_soo.engine.capture import FisherPass
from hf_soo.engine.checks import Count, NonNegative, Positive, Share, Whole
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.preconditioner import Periodic
from hf_soo.engine.rescale import RescaleName, make_rescale


@dataclass(frozen=True)
class FactorConfig(Periodic):
    """Settings that K-FAC and FOOF share.

    Args:
        damping: λ, or λ relative to the layer's mean curvature.
        damping_mode: "relative" or "absolute".
        inverse: "cholesky" (damping split between the sides) or "eigen" (exact).
        factor_decay: ρ, the weight of the old factor.
        inverse_period: optimizer steps between inverses, a multiple of ``update_period``.
        rescale: "norm" (|P| = |G| in each layer), "kl_clip", "global" (norms over all layers) or "none".
        kl_clip: κ of the KL clip, or None for no clip.
        row_filter: "grad" (rows with an output gradient) or "all".
        max_dim: layers with a longer side are left to the base.
        grad_workers: ranks that precondition a layer, a divisor of the world size: 1 (MEM-OPT), the world size
            (COMM-OPT), or between (HYBRID-OPT). None: the method's default.
        factor_start: "corrected" (S = 0, bias correction), "identity" (S = I, none), or the number s of S = sI (none).
        epsilon: added to λ, or to λ_A and λ_B.
    """

    damping: Positive = 0.1
    damping_mode: Literal["relative", "absolute"] = "relative"
    inverse: Literal["cholesky", "eigen"] = "cholesky"
    factor_decay: Share = 0.95
    inverse_period: Count = 100
    rescale: RescaleName = "norm"
    kl_clip: Positive | None = 1e-3
    row_filter: Literal["grad", "all"] = "grad"
    max_dim: Count = 8192
    grad_workers: Count | None = None
    factor_start: Literal["corrected", "identity"] | Positive = "corrected"
    epsilon: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        super().__post_init__()
        if self.inverse_period % self.update_period:
            raise ValueError(
                f"inverse_period={self.inverse_period} is no multiple of update_period={self.update_period}; choose "
                "one that is, so that each inverse is of fresh factors."
            )
        make_rescale(self.rescale, self.kl_clip)

    def recorder(self, *, outputs: bool, reduce: bool) -> FactorRecorder:
        """What collects the factors: B too (``outputs``), of one row an example (``reduce``) or of all."""
        return FactorRecorder(outputs, reduce, self.row_filter)


@dataclass(frozen=True)
class KFACConfig(FactorConfig):
    """Settings of K-FAC; see ``FactorConfig`` for the others.

    Args:
        fisher: "empirical" (the training loss's own gradients) or "mc" (labels drawn from the model, one more backward
            pass in windows that collect).
        loss_terms: R, the terms that the loss averages over; None: the rows with a gradient in the last layer that
            has any. With absolute damping and several heads (BERT's pretraining) give it.
        factor_scale: "loss" (B = R Σ g gᵀ) or "published" (the released code's Σ g gᵀ / rows).
    """

    fisher: Literal["empirical", "mc"] = "empirical"
    loss_terms: Count | None = None
    factor_scale: Literal["loss", "published"] = "loss"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        super().__post_init__()
        if self.loss_terms is not None and self.factor_scale == "published":
            raise ValueError(f"loss_terms={self.loss_terms} has no effect with factor_scale='published'.")

    def recorder(self, *, outputs: bool, reduce: bool) -> FactorRecorder:
        """See ``FactorConfig.recorder``."""
        return FactorRecorder(
            outputs,
            reduce,
            self.row_filter,
            loss_terms=self.loss_terms,
            published=self.factor_scale == "published",
            fisher_pass=FisherPass() if self.fisher == "mc" else None,
        )


@dataclass(frozen=True)
class FOOFConfig(FactorConfig):
    """Settings of FOOF; see ``FactorConfig`` for the others.

    Args:
        input_blocks: into so many blocks of its own an input that is wider than the output is cut, where they divide
            it; then a bias, whose input is always 1, is a block too.
    """

    input_blocks: Count = 1

    def recorder(self, *, outputs: bool, reduce: bool) -> FactorRecorder:
        """See ``FactorConfig.recorder``."""
        return FactorRecorder(outputs, reduce, self.row_filter, blocks=self.input_blocks)


@dataclass(frozen=True)
class NewtonMuonConfig(FOOFConfig):
    """FOOF with the settings of Newton-Muon (the other published pair: ``factor_decay=0.8``, periods of 16)."""

    damping: Positive = 0.2
    update_period: Count = 32
    warmup_updates: Whole = 0
    inverse_period: Count = 32
    rescale: RescaleName = "none"
    kl_clip: Positive | None = None
    factor_start: Literal["corrected", "identity"] | Positive = 1e-3
    epsilon: NonNegative = 1e-8
    input_blocks: Count = 4


@dataclass(frozen=True)
class KAISAConfig(KFACConfig):
    """K-FAC with the settings of KAISA's published BERT run: exact damping, factors every step, inverses every 10."""

    damping: Positive = 3e-3
    damping_mode: Literal["relative", "absolute"] = "absolute"
    inverse: Literal["cholesky", "eigen"] = "eigen"
    rescale: RescaleName = "kl_clip"
    update_period: Count = 1
    warmup_updates: Whole = 0
    inverse_period: Count = 10

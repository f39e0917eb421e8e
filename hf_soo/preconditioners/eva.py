"""Eva and Eva-f: second-order directions from Kronecker vectors (Zhang, Shi, Li, ICLR 2023; arXiv 2308.02123).

With a the mean input row (1 appended for a bias) and b the output-gradient vector of a layer,

    Eva     P = (aaᵀ ⊗ bbᵀ + γI)⁻¹ vec(G) = (1/γ)[G - (bᵀGa) / (γ + |a|²|b|²) b aᵀ]
    Eva-f   P = G (aaᵀ + γI)⁻¹            = (1/γ)[G - (Ga)aᵀ / (γ + |a|²)]

then P ← νP with the KL clip ν = min(1, √(κ / Σ η²⟨P, G⟩)) over all layers.

===== ============== =======================================
paper here           the released code
===== ============== =======================================
γ     damping        damping
ξ     kv_new_weight  factor_decay: the weight of the *new* vector
κ     kl_clip        kl_clip; 0 there is `rescale="global"` here, < 0 is None
===== ============== =======================================

Deviation: the released code takes b = mean output gradient of the first 16 rows, with which |a|²|b|² is far below γ on
a transformer and P = G/γ; `kv_scale="mean"` (with all rows) keeps that, and the default "sum" is b = bias.grad. "unit"
sets |v|² = d: then γ damps nothing, and without a norm match such as MKOR's that costs learning-rate range.
Deviation: the running average is taken once for each optimizer step, not for each micro-batch. Eva-f follows the
abstract (it vectorises FOOF); the body of that paper was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import Count, Positive, Weight, Whole
from hf_soo.engine.flops import RowSumSizes
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms, in_range
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import LayerState, Method, Outcome, Periodic, RowWise, Side, Updated
from hf_soo.engine.rescale import DEFAULT_KL_CLIP, RescaleName, make_rescale
from hf_soo.engine.sums import SumRecorder
from hf_soo.preconditioners.kronecker import KVScale, by_side, kronecker_vectors, sizes_of


@dataclass(frozen=True)
class EvaConfig(Periodic):
    """Settings of Eva and Eva-f.

    Args:
        damping: γ.
        kv_new_weight: ξ, the weight of the new vector in the running average; the first vector is taken whole.
        kl_clip: κ, or None for no clip.
        update_period: optimizer steps between updates of the vectors.
        warmup_updates: so many first steps each update.
        kv_scale: "unit", "sum" or "mean"; see ``kronecker_vectors``.
        rescale: "kl_clip"; or |P| = |G| over all layers ("global"), for each layer ("norm"), or "none".
    """

    damping: Positive = 0.03
    kv_new_weight: Weight = 0.95
    kl_clip: Positive | None = DEFAULT_KL_CLIP
    update_period: Count = 1
    warmup_updates: Whole = 0
    kv_scale: KVScale = "sum"
    rescale: RescaleName = "kl_clip"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        make_rescale(self.rescale, self.kl_clip)


def eva_product(grad: Joint, a: Tensor, b: Tensor, damping: float) -> RowSums[TransformNorms]:
    """In place: Eva, Ĝ ← (aaᵀ ⊗ bbᵀ + γI)⁻¹ vec(Ĝ) = (1/γ)[Ĝ - (bᵀĜa) / (γ + |a|²|b|²) b aᵀ].

    Args:
        grad: rows of Ĝ, n x m (the bias's column included).
        a: input vectors, [L, m].
        b: output-gradient vectors over all rows, [L, ·].
        damping: γ > 0.

    Yields:
        Sums over rows: |Ĝ|² and s = bᵀĜa.

    Returns:
        Squared norms and inner product, from the same scalars.
    """
    (a, alpha), (b, beta) = in_range(a), in_range(b)
    mine = b[..., grad.rows]
    before = grad.measured()
    s = (mine * grad.in_unit((grad @ a[..., None]).squeeze(-1))).sum(-1)
    yield [before, s]
    q = a.square().sum(-1) * b.square().sum(-1)
    c = s / (damping / alpha**2 / beta**2 + q)
    grad.subtract_outer_(grad.from_unit(c[..., None] * mine), a, damping)  # (Ĝ - c b aᵀ)/γ
    return _norms(before, before - c * s, before - 2 * c * s + c * c * q, damping)


def eva_f_product(grad: Joint, a: Tensor, damping: float) -> RowSums[TransformNorms]:
    """In place: vectorised FOOF, Ĝ ← Ĝ(aaᵀ + γI)⁻¹ = (1/γ)[Ĝ - (Ĝa)aᵀ / (γ + |a|²)], row by row.

    Args:
        grad: rows of Ĝ, n x m (the bias's column included).
        a: input vectors, [L, m].
        damping: γ > 0.

    Yields:
        Sums over rows: |Ĝ|² and s = |Ĝa|².

    Returns:
        Squared norms and inner product, from the same scalars.
    """
    a, alpha = in_range(a)
    before = grad.measured()
    u = (grad @ a[..., None]).squeeze(-1)
    q = a.square().sum(-1)
    s, d = grad.in_unit(u).square().sum(-1), damping / alpha**2 + q
    grad.subtract_outer_(u / d[..., None], a, damping)  # (Ĝ - u aᵀ/(γ + |a|²))/γ
    yield [before, s]
    return _norms(before, before - s / d, before - 2 * s / d + s * q / d.square(), damping)


def _norms(before: Tensor, inner: Tensor, after: Tensor, damping: float) -> TransformNorms:
    """From |Ĝ|², γ⟨P, Ĝ⟩ and γ²|P|². Rounding leaves of Ĝ at least ε|Ĝ| where nothing of it should be left."""
    least = torch.finfo(before.dtype).eps ** 2 * before
    return TransformNorms(before, torch.maximum(after, least) / damping**2, torch.maximum(inner, least) / damping)


class Eva(RowWise):
    """Eva as a gradient transform; state: the running vectors "input" [d_in + bias] and "output" [d_out]."""

    sides: tuple[Side, ...] = (Side.INPUT, Side.OUTPUT)
    config: EvaConfig

    def __init__(self, config: EvaConfig) -> None:
        """Take the settings."""
        super().__init__(config)
        outputs = Side.OUTPUT in self.sides
        self.recorder = SumRecorder(inputs=True, outputs=outputs, noise=outputs and config.kv_scale == "unit")
        self.rescale = make_rescale(config.rescale, config.kl_clip)

    def init(self, layer: Layer) -> LayerState:
        """Zero vectors: P = G/γ until the first statistics."""
        like, sizes = layer.prototype, sizes_of(layer)
        return {
            _key(side): {
                "vector": like.new_zeros(sizes[side], dtype=accumulation_dtype(like.dtype)),
                "seen": torch.zeros((), dtype=torch.bool, device=like.device),
            }
            for side in self.sides
        }

    def row_sums(self, layer: Layer) -> RowSumSizes:
        """|Ĝ|² and s."""
        return RowSumSizes(every=(2,))

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """V ← (1-ξ)v + ξ v_new; the first v_new as it is."""
        new, outcomes, sizes = dict(state), {}, {}
        for side in Side:
            V, outcomes[side], sizes[side] = kronecker_vectors(statistics, side, self.config.kv_scale)
            if V is not None:
                old, valid = state[_key(side)], outcomes[side] == Outcome.UPDATED.value
                xi = torch.where(old["seen"], V.new_tensor(self.config.kv_new_weight), V.new_ones(()))[:, None]
                mixed = (1 - xi) * old["vector"] + xi * V.squeeze(-2)
                new[_key(side)] = {
                    "vector": torch.where(valid[:, None], mixed, old["vector"]),
                    "seen": old["seen"] | valid,
                }
        return new, Updated(by_side(outcomes), by_side(sizes))

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """See ``eva_product``."""
        return eva_product(grad, state["input"]["vector"], state["output"]["vector"], self.config.damping)

    def distances(self, state: LayerState) -> Tensor:
        """|F - I| of F = I - vvᵀ/(γ + |v|²), each side alone: |v|²/(γ + |v|²), [L, 2]."""
        sizes = {side: state[_key(side)]["vector"].square().sum(-1) for side in self.sides}
        return by_side({side: size / (self.config.damping + size) for side, size in sizes.items()})


class EvaF(Eva):
    """Eva-f: the input side alone, so it needs no output gradients."""

    sides = (Side.INPUT,)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """See ``eva_f_product``."""
        return eva_f_product(grad, state["input"]["vector"], self.config.damping)


def _key(side: Side) -> str:
    return side.name.lower()


METHODS = (
    Method(
        "eva",
        "Eva, rank-1 Kronecker vectors (Zhang, Shi, Li, ICLR 2023)",
        base="sgd",
        config=EvaConfig,
        make=Eva,
        rates=(0.1, 1.0),
    ),
    Method(
        "eva_f",
        "Eva-f, vectorised FOOF (Zhang, Shi, Li, 2023)",
        base="sgd",
        config=EvaConfig,
        make=EvaF,
        rates=(0.1, 1.0),
    ),
)

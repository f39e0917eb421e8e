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

from hf_soo.engine import products
from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import require_in, require_range
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import Factor, LayerState, Outcome, RowWise, Side, Updated
from hf_soo.engine.rescale import DEFAULT_KL_CLIP, RescaleName, make_rescale
from hf_soo.engine.sums import SumRecorder
from hf_soo.preconditioners.config import Periodic
from hf_soo.preconditioners.kronecker import KV_SCALES, KVScale, kronecker_vectors, updated


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

    damping: float = 0.03
    kv_new_weight: float = 0.95
    kl_clip: float | None = DEFAULT_KL_CLIP
    update_period: int = 1
    warmup_updates: int = 0
    kv_scale: KVScale = "sum"
    rescale: RescaleName = "kl_clip"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        Periodic.__post_init__(self)
        require_range("damping", self.damping, 0, float("inf"), open_low=True)
        require_range("kv_new_weight", self.kv_new_weight, 0, 1 + 1e-12, open_low=True)
        require_in("kv_scale", self.kv_scale, KV_SCALES)
        make_rescale(self.rescale, self.kl_clip)


class Eva(RowWise):
    """Eva as a gradient transform; state: the running vectors "input" [d_in + bias] and "output" [d_out]."""

    sides: tuple[Side, ...] = (Side.INPUT, Side.OUTPUT)

    def __init__(self, config: EvaConfig) -> None:
        """Make the transform.

        Args:
            config: its settings.
        """
        self.config = config
        outputs = Side.OUTPUT in self.sides
        self.recorder = SumRecorder(inputs=True, outputs=outputs, noise=outputs and config.kv_scale == "unit")
        self.rescale = make_rescale(config.rescale, config.kl_clip)

    def updates_at(self, step: int) -> bool:
        """By the period."""
        return self.config.updates_at(step)

    def init(self, layer: Layer) -> LayerState:
        """Zero vectors: P = G/γ until the first statistics."""
        d_out, d_in = layer.shape
        sizes = {Side.OUTPUT: d_out, Side.INPUT: d_in + (layer.bias is not None)}
        return {_key(side): self._vector(sizes[side], layer.prototype) for side in self.sides}

    @staticmethod
    def _vector(d: int, like: Tensor) -> Factor:
        return {
            "vector": like.new_zeros(d, dtype=accumulation_dtype(like.dtype)),
            "seen": torch.zeros((), dtype=torch.bool, device=like.device),
        }

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
        return new, updated(outcomes, sizes)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """Equation (4) of the module's docstring, as one rank-1 step in place."""
        a, b = state["input"]["vector"], state["output"]["vector"]
        return products.eva_steps(grad.weight, grad.bias, a, b, self.config.damping, grad.rows)

    def distances(self, state: LayerState) -> Tensor:
        """|F - I| of F = I - vvᵀ/(γ + |v|²), each side alone: |v|²/(γ + |v|²), [L, 2]."""
        sizes = {side: state[_key(side)]["vector"].square().sum(-1) for side in self.sides}
        zero = torch.zeros_like(sizes[Side.INPUT])
        removed = {side: size / (self.config.damping + size) for side, size in sizes.items()}
        return torch.stack([removed.get(side, zero) for side in Side], dim=-1)


class EvaF(Eva):
    """Eva-f: the input side alone, so it needs no output gradients."""

    sides = (Side.INPUT,)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """P = G (aaᵀ + γI)⁻¹, as one rank-1 step in place."""
        return products.eva_f_steps(grad.weight, grad.bias, state["input"]["vector"], self.config.damping)


def _key(side: Side) -> str:
    return side.name.lower()

"""Eva-s: Shampoo with vectors in place of matrices (Zhang, Shi, Li, "Eva", ICLR 2023; arXiv 2308.02123).

It learns from the gradient alone: vᵢ is the running mean of G over all axes but i (row and column means of a matrix,
r = G1/m and c = Gᵀ1/n). With Π|vᵢ|² the product over the axes,

    joint      P = (1/γ)[G - ⟨G, v₁∘…∘vₖ⟩ / (γ + Π|vᵢ|²) v₁∘…∘vₖ],   for a matrix (1/γ)[G - (rᵀGc)/(γ + |r|²|c|²) r cᵀ]
    separable  P = G ×₁ (v₁v₁ᵀ + γI)⁻ᵖ … ×ₖ (vₖvₖᵀ + γI)⁻ᵖ,   (vvᵀ + γI)⁻ᵖ = γ⁻ᵖ(I + ((1 + |v|²/γ)⁻ᵖ - 1) vvᵀ/|v|²)

then the rescale, by default the KL clip of Eva.

===== ============== =================================================
paper here           Eva's released code
===== ============== =================================================
γ     damping        damping
ξ     kv_new_weight  factor_decay: the weight of the *new* vector
κ     kl_clip        kl_clip; 0 there is `rescale="global"`, < 0 is None
p     exponent       none: Eva-s is not in that code
===== ============== =================================================

Deviation: the body of the paper was not at hand; "joint" is Eva's formula on these vectors, "separable" Shampoo's.
Deviation: `kv_scale="unit"` (|vᵢ|² = dᵢ) is the default. The plain "mean" of a gradient is so small that P = G/γ, and
so is "sum" on a transformer: cos(G, P) is 1.000000 in every layer (results/eva_s_scale), a first-order run with a clip.
"unit" turns the direction (median cos .977 there) at any gradient scale, but that is no gain: the loss ends higher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import Count, Positive, Weight, Whole
from hf_soo.engine.flops import RowSumSizes
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms, in_range, inner, norms, run_whole, squared_norm
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import ONE_SIDE, LayerState, Method, Outcome, Periodic, RowWise, Updated
from hf_soo.engine.rescale import DEFAULT_KL_CLIP, RescaleName, make_rescale
from hf_soo.engine.selection import select_parameters
from hf_soo.engine.sums import NOISE_LEVEL
from hf_soo.preconditioners.axes import put_back, squeezed, unfolded
from hf_soo.preconditioners.eva import eva_product
from hf_soo.preconditioners.kronecker import KVScale

EXPONENT = 0.25
"""Shampoo's for a matrix."""


@dataclass(frozen=True)
class EvaSConfig(Periodic):
    """Settings of Eva-s.

    Args:
        form: "joint" or "separable".
        damping: γ.
        kv_new_weight: ξ, the weight of the new vectors in the running average; the first are taken whole.
        rescale: "kl_clip"; or |P| = |G| over all layers ("global"), for each layer ("norm"), or "none".
        kl_clip: κ, or None for no clip.
        update_period: optimizer steps between updates of the vectors.
        warmup_updates: so many first steps each update.
        kv_scale: "mean", "sum" (of G's entries), or "unit": |v|² = d.
        exponent: p of the separable form.
    """

    form: Literal["joint", "separable"] = "joint"
    damping: Positive = 0.03
    kv_new_weight: Weight = 0.95
    rescale: RescaleName = "kl_clip"
    kl_clip: Positive | None = DEFAULT_KL_CLIP
    update_period: Count = 1
    warmup_updates: Whole = 0
    kv_scale: KVScale = "unit"
    exponent: Positive = EXPONENT

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        super().__post_init__()
        make_rescale(self.rescale, self.kl_clip)
        if self.form == "joint" and self.exponent != EXPONENT:
            raise ValueError(f"exponent={self.exponent} has no effect with form='joint'; set form='separable'.")


def _joint_product(G: Tensor, vectors: Sequence[Tensor], damping: float, measured: Joint) -> RowSums[TransformNorms]:
    """In place: Eva's formula with b the first axis's vector and a the others', multiplied out.

    Args:
        G: rows of gradients, [L, d, d_2, …, d_k], k >= 2.
        vectors: k tensors [L, d_i].
        damping: γ.
        measured: the same gradients, with their size, its unit, and which rows of the first axis these are.

    Yields:
        Sums over rows.
    """
    a = vectors[1]
    for v in vectors[2:]:
        a = (a[..., None] * v[:, None]).flatten(1)
    matrix = G.flatten(2)
    grad = replace(measured, weight=matrix, waits=measured.waits and matrix.data_ptr() == measured.weight.data_ptr())
    moved = yield from eva_product(grad, a, vectors[0], damping)
    measured.later = grad.later
    put_back(G, matrix)
    return moved


def _shrinking(v: Tensor, damping: float, exponent: float) -> tuple[Tensor, Tensor]:
    """The e [L] of (vvᵀ + γI)⁻ᵖ = γ⁻ᵖ(I + e vvᵀ), and v [L, d] that it goes with, in range; e = 0 where v is 0."""
    v, unit = in_range(v, limit=4)  # (rᵀGc)² in units is a number
    size = v.square().sum(-1)
    e = ((1 + size / (damping / unit**2)) ** -exponent - 1) / size
    return torch.where(size > 0, e, 0.0), v


def _separable_matrix_product(
    G: Tensor, r: Tensor, c: Tensor, damping: float, exponent: float, measured: Joint
) -> RowSums[TransformNorms]:
    """In place: γ⁻²ᵖ(I + e rrᵀ) G (I + f ccᵀ), as one rank-2 step.

    Args:
        G: rows of gradients, [L, ·, m].
        r: [L, n].
        c: [L, m].
        damping: γ.
        exponent: p.
        measured: the same gradients, with the unit of their size, and which of the n rows these are.

    Yields:
        Sums over rows: Gᵀr, and the parts of the norms.

    Returns:
        Norms and inner product, from |G|², |Gᵀr|², |Gc|² and rᵀGc alone.
    """
    (e, r), (f, c), alpha = (
        _shrinking(r, damping, exponent),
        _shrinking(c, damping, exponent),
        damping ** (-2 * exponent),
    )
    mine, unit = r[:, measured.rows], measured.unit
    x, y = (mine[:, None] @ G).squeeze(1), (G @ c[..., None]).squeeze(-1)  # Gᵀr, Gc
    g_norm, y_norm, z = inner(G, G, unit), inner(y, y, unit), inner(y, mine)  # z = rᵀGc
    yield [x, g_norm, y_norm, z]
    parts = (g_norm, inner(x, x, unit), y_norm, measured.in_unit(z).square())
    after = _quadratic(*parts, *(2 * each + each.square() * inner(v, v) for each, v in ((e, r), (f, c))))
    columns = torch.stack([e[:, None] * mine, f[:, None] * y + (e * f * z)[:, None] * mine], -1)
    G.baddbmm_(columns, torch.stack([x, c], -2), beta=alpha, alpha=alpha)
    return TransformNorms(parts[0], alpha**2 * after, alpha * _quadratic(*parts, e, f))


def _quadratic(g: Tensor, x: Tensor, y: Tensor, z: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """⟨G, (I + e rrᵀ) G (I + f ccᵀ)⟩ from |G|², |Gᵀr|², |Gc|² and (rᵀGc)²."""
    return g + e * x + f * y + e * f * z


def _separable_product(
    G: Tensor, vectors: Sequence[Tensor], damping: float, exponent: float, measured: Joint
) -> RowSums[TransformNorms]:
    """In place: one rank-1 step for each axis of a tensor with more than two.

    Args:
        G: rows of gradients, [L, d, d_2, …, d_k].
        vectors: k tensors [L, d_i].
        damping: γ.
        exponent: p.
        measured: the same gradients, with the unit of their size, and which rows of the first axis these are.

    Yields:
        Sums over rows: the first axis's product; then the norms.
    """
    P, unit = G.clone(), measured.unit
    for axis, v in enumerate(vectors):
        matrix = unfolded(P, axis).contiguous()
        e, v = _shrinking(v, damping, exponent)
        mine = v[:, measured.rows] if axis == 0 else v
        x = mine[:, None] @ matrix
        if axis == 0:
            yield [x]
        matrix.baddbmm_((e[:, None] * mine)[..., None], x)
        shape = P.movedim(axis + 1, 1).shape
        P = matrix.view(shape).movedim(1, axis + 1)
    P = P.contiguous().mul_(damping ** (-len(vectors) * exponent))
    moved = TransformNorms(inner(G, G, unit), squared_norm(P, unit=unit), inner(P, G, unit))
    yield list(moved.tensors())
    G.copy_(P)
    return moved


class EvaS(RowWise):
    """Eva-s as a gradient transform of single tensors; state "axis{i}": an axis's running vector."""

    side_names = ONE_SIDE
    config: EvaSConfig

    def __init__(self, config: EvaSConfig) -> None:
        """Take the settings."""
        super().__init__(config)
        self.rescale = make_rescale(config.rescale, config.kl_clip)

    def skip_reason(self, layer: Layer) -> str | None:
        """A vector has no second axis."""
        return "fewer than two axes" if len(squeezed(layer.shape)) < 2 or 0 in layer.shape else None

    def init(self, layer: Layer) -> LayerState:
        """Zero vectors: P = G/γ (or γ⁻ᵏᵖG) until the first gradient."""
        weight = layer.prototype
        return {
            f"axis{axis}": {
                "vector": weight.new_zeros(d, dtype=accumulation_dtype(weight.dtype)),
                "seen": torch.zeros((), dtype=torch.bool, device=weight.device),
            }
            for axis, d in enumerate(squeezed(layer.shape))
        }

    def row_sums(self, layer: Layer) -> RowSumSizes | None:
        """In an update |G| for its unit, then |G|² and the sums along both axes; then as Eva (joint form)."""
        if self.config.form == "separable":
            return None
        return RowSumSizes(every=(2,), update=(1, 1 + sum(layer.matrix)))

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """``update_rows`` on all rows."""
        return run_whole(self.update_rows(state, statistics))

    def update_rows(self, state: LayerState, statistics: Statistics) -> RowSums[tuple[LayerState, Updated]]:
        """V ← (1-ξ)v + ξ v_new; the first v_new as it is. An axis whose v_new is rounding noise keeps its v."""
        assert statistics.grad is not None
        grad = statistics.grad
        yield from grad.measure_()
        size, G = grad.measured(), _axes(grad.weight, len(state))
        sums = _axis_sums(G, [factor["vector"] for factor in state.values()], grad.rows)
        yield [size, *sums]
        entries = math.prod(v.shape[-1] for v in sums)
        valid, noisy = size.isfinite(), torch.zeros_like(size, dtype=torch.bool)
        for total, factor in zip(sums, state.values(), strict=True):
            v, noise = _axis_vector(total, entries, self.config.kv_scale, grad.from_unit(size.sqrt()))
            noisy = noisy | noise
            xi = torch.where(factor["seen"], v.new_tensor(self.config.kv_new_weight), v.new_ones(()))[:, None]
            mixed = (1 - xi) * factor["vector"] + xi * v
            used = valid & ~noise
            factor["vector"].copy_(torch.where(used[:, None], mixed, factor["vector"]))
            factor["seen"].logical_or_(used)
        updated = Updated.of_gradient(grad.from_unit(grad.from_unit(size)), valid)
        updated.outcomes.copy_(torch.where((valid & noisy)[:, None], Outcome.NOISE.value, updated.outcomes))
        return state, updated

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """The form's equation of the module's docstring, in place."""
        G, vectors = _axes(grad.weight, len(state)), [factor["vector"] for factor in state.values()]
        damping, p = self.config.damping, self.config.exponent
        if self.config.form == "joint":
            moved = yield from _joint_product(G, vectors, damping, grad)
        elif len(vectors) == 2:
            moved = yield from _separable_matrix_product(G, vectors[0], vectors[1], damping, p, grad)
        else:
            moved = yield from _separable_product(G, vectors, damping, p, grad)
        put_back(grad.weight, G)
        return moved

    def distances(self, state: LayerState) -> Tensor:
        """The part that is removed along v₁∘…∘vₖ, [L, 1]: Π|vᵢ|²/(γ + Π|vᵢ|²), or that of the strongest axis."""
        sizes = torch.stack([factor["vector"].square().sum(-1) for factor in state.values()], -1)
        gamma, p = self.config.damping, self.config.exponent
        if self.config.form == "joint":
            q = sizes.prod(-1, keepdim=True)
            return q / (gamma + q)
        return 1 - (1 + sizes.amax(-1, keepdim=True) / gamma) ** -p


def _axis_sums(G: Tensor, like: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """For each axis, the sum of these rows of G over all other axes.

    Args:
        G: rows of gradients, [L, d, d_2, …, d_k].
        like: tensors [L, d_i] of all rows.
        rows: which rows of the first axis these are.

    Returns:
        k tensors [L, d_i]; the first is 0 at the other rows.
    """
    axes = range(1, G.ndim)
    of_rows, *rest = [G.sum([other for other in axes if other != axis]) for axis in axes]
    first = of_rows.new_zeros(like[0].shape)
    first[:, rows] = of_rows
    return [first, *rest]


def _axis_vector(v: Tensor, entries: int, scale: KVScale, size: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of G over all axes but one, and whether it is rounding noise that a scale would blow up.

    Means over inputs that a LayerNorm centres, for one, are 0 but for rounding.

    Args:
        v: the sum of G over the other axes, [L, d].
        entries: of G.
        scale: "mean", "sum", or "unit" for |v|² = d.
        size: |G|, [L].

    Returns:
        [L, d] and bool [L].
    """
    if scale != "unit":
        share = v.shape[-1] / entries if scale == "mean" else 1.0
        return v * share, torch.zeros_like(size, dtype=torch.bool)
    length = norms(v)
    noise = length <= NOISE_LEVEL[v.dtype] * size
    return v * (v.shape[-1] ** 0.5 / torch.where(noise, 1.0, length))[:, None], noise


def _axes(tensor: Tensor, count: int) -> Tensor:
    """[L, the ``count`` axes that are longer than 1]; a view. The first of them may have any number of rows here."""
    rest = [d for d in tensor.shape[2:] if d != 1]
    first = tensor.shape[1:2] if len(rest) < count else ()
    return tensor.reshape(len(tensor), *first, *rest)


METHOD = Method(
    "eva_s",
    "Eva-s, vectorised Shampoo (Zhang, Shi, Li, ICLR 2023)",
    base="sgd",
    config=EvaSConfig,
    make=EvaS,
    select=select_parameters,
    rates=(0.1, 1.0),
)

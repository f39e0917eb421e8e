"""Inverse-free Shampoo without roots (Lin et al., "Can We Remove the Square-Root ...?", ICML 2024; arXiv 2402.03496).

For each tensor G with axes 1 … N of lengths dₙ, D = Πdₙ, G the gradient of the mean over B loss terms,

    Y  = √B G ×₁ K₁ᵀ … ×_N K_Nᵀ,   τₙ = tr(KₙᵀKₙ)/dₙ
    Hₙ = (dₙ/D) Y₍ₙ₎Y₍ₙ₎ᵀ + λ (Π_{j≠n} τⱼ) KₙᵀKₙ
    mₙ ← a mₙ + (1-a) ½(Hₙ - I)
    Kₙ ← Kₙ (I - β/max(1, |mₙ|) mₙ),   K = I and m = 0 at first
    P  = G ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ

KₙKₙᵀ follows the inverse of a running average of Shampoo's factor, whitened by the other axes; only products are
needed. A diagonal axis holds the diagonal k of K alone. The base then steps on P; with torch's SGD, as in the paper.

===== ==================== ============ =====================
paper here                 sirfshampoo  remove-the-square-root
===== ==================== ============ =====================
β     factor_lr            beta2        lr_cov
a     riemannian_momentum  alpha2       beta2
λ     damping              lam          damping
B     batch_size           batch_size   batch_size
T     update_period        T            T; see `schedule`
K, m  root, momentum       K, m_K       K, m
α, κ  of the base          alpha1       momentum
===== ==================== ============ =====================

Deviation: vectors have a diagonal factor (dense there), long axes are cut into blocks, convolution kernels are merged
to matrices; each is a setting. KKᵀ is kept, so a step costs two products, not four.
Deviation: the released code scales K by √d before products; none can overflow here while λ > 0, so it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import Checked, Count, NonNegative, Share
from hf_soo.engine.flops import MinimalWork, Product
from hf_soo.engine.gradients import Joint, TransformNorms, norms
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import ONE_SIDE, Factor, LayerState, Method, Preconditioner, Updated
from hf_soo.engine.selection import select_parameters
from hf_soo.preconditioners.axes import (
    Cut,
    applied,
    layerwise,
    learned,
    others,
    put_back,
    replace,
    squeezed,
    total,
    unfolded,
)
from hf_soo.preconditioners.config import StateDtype, prototype_updates_at, stored_dtype

Kind = Literal["dense", "diagonal", "identity"]


@dataclass(frozen=True)
class IFShampooConfig(Checked):
    """Settings of inverse-free Shampoo.

    Args:
        batch_size: B, the loss terms averaged in a step over all processes; None: Trainer's.
        factor_lr: β, the step of the factors.
        riemannian_momentum: a, the weight of the old m.
        damping: λ.
        update_period: T, optimizer steps between updates of the factors.
        schedule: "period" (each T steps), or "prototype": the next update after step t is in t + clamp(⌊log₄(t+1)⌋,
            1, T), as the authors' first code has it.
        max_dim: the longest dense axis.
        large_axes: what longer axes get: "block" (cut to max_dim), "diagonal" or "identity" (no factor).
        vector_axes: the factor of a tensor with one axis, "diagonal" or "dense".
        merge_kernels: take a tensor with four axes or more (a convolution [O, I, kh, kw]) as a matrix [O, I kh kw].
        state_dtype: of dense factors, "float32" (float64 for a float64 model) or "bfloat16"; diagonals are not cast.
    """

    batch_size: Count | None = None
    factor_lr: Share = 0.1
    riemannian_momentum: Share = 0.5
    damping: NonNegative = 1e-4
    update_period: Count = 2
    schedule: Literal["period", "prototype"] = "period"
    max_dim: Count = 1024
    large_axes: Literal["block", "diagonal", "identity"] = "block"
    vector_axes: Literal["diagonal", "dense"] = "diagonal"
    merge_kernels: bool = True
    state_dtype: StateDtype = "float32"


class IFShampoo(Preconditioner):
    """Inverse-free Shampoo as a gradient transform of single tensors.

    State "axis{j}", or "block{i}.axis{j}" where a tensor is cut: "root" K [d, d] with its "product" KKᵀ, or the
    diagonal k [d]; and "momentum" m of the root's shape. An axis without factor has no entry.
    """

    side_names = ONE_SIDE
    stacks = False
    config: IFShampooConfig

    def __init__(self, config: IFShampooConfig) -> None:
        """Take the settings, with a batch size."""
        super().__init__(config)
        self.batch_size = config.batch_size or 1

    def updates_at(self, step: int) -> bool:
        """By the schedule."""
        if self.config.schedule == "period":
            return step % self.config.update_period == 0
        return prototype_updates_at(step, self.config.update_period)

    def skip_reason(self, layer: Layer) -> str | None:
        """A tensor without any factor."""
        if 0 in layer.shape:
            return "no entries"
        kinds = _kinds_of(_view_shape(layer.shape, self.config), self.config)
        return f"every axis is longer than max_dim={self.config.max_dim}" if set(kinds) == {"identity"} else None

    def minimal_products(self, layer: Layer) -> MinimalWork:
        """Of each dense axis of each block: KKᵀ times G; Y = Kᵀ times G, Y₍ₙ₎Y₍ₙ₎ᵀ, KᵀK, Km and KKᵀ."""
        cut, kinds = _cut_of(tuple(layer.shape), self.config)
        dense = [axis for axis, kind in zip(cut.axes(), kinds * len(cut.blocks), strict=True) if kind == "dense"]
        return MinimalWork(
            every=[Product(d, d, rest) for d, rest in dense],
            update=[
                product
                for d, rest in dense
                for product in (Product(d, d, rest), Product(d, rest, d), *[Product(d, d, d)] * 3)
            ],
        )

    def init(self, layer: Layer) -> LayerState:
        """K = I, m = 0.

        Raises:
            ValueError: a factor could not grow in bfloat16.
        """
        cut, kinds = _cut_of(tuple(layer.shape), self.config)
        dtype = stored_dtype(self.config.state_dtype, layer.prototype.dtype)
        state: LayerState = {}
        for block, sizes in enumerate(cut.sizes()):
            for axis, (d, kind) in enumerate(zip(sizes, kinds, strict=True)):
                if kind == "dense":
                    self._check_growth(layer.name, d)
                    state[cut.name(block, axis)] = _dense(d, layer.prototype, dtype)
                elif kind == "diagonal":
                    state[cut.name(block, axis)] = _diagonal(d, layer.prototype)
        return state

    def _check_growth(self, name: str, d: int) -> None:
        """A bfloat16 K cannot grow where β/√d is below half its spacing at 1, 2⁻⁸."""
        least = math.sqrt(d) / 256
        if self.config.state_dtype == "bfloat16" and self.config.factor_lr <= least:
            raise ValueError(
                f"state_dtype='bfloat16' with factor_lr={self.config.factor_lr} cannot move the factor of an axis of "
                f"length {d} ({name!r}): it needs factor_lr > √d/256 = {least:.4f}; raise factor_lr, lower max_dim, or "
                "use state_dtype='float32'."
            )

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """Every block's K and m, in place; those of a layer whose gradient is not finite stay as they were."""
        assert statistics.grad is not None
        G, size, valid = learned(statistics.grad)
        cut, _ = _cut_of(tuple(G.shape[1:]), self.config)
        for block, part in enumerate(cut.parts(cut.view(G))):
            factors = cut.factors(state, block)
            _update_factors(part, factors, valid, self.batch_size, self.config)
        return state, Updated.of_gradient(size, valid)

    def transform(self, state: LayerState, grad: Joint) -> TransformNorms:
        """P = G ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ, block by block; a block whose P is not finite keeps its G."""
        cut, _ = _cut_of(tuple(grad.weight.shape[1:]), self.config)
        view = cut.view(grad.weight)
        norms = []
        for block, G in enumerate(cut.parts(view)):
            matrices = [None if factor is None else _product(factor) for factor in cut.factors(state, block)]
            norms.append(replace(G, applied(G, matrices).to(G.dtype), grad.unit))
        put_back(grad.weight, view)
        return total(norms)

    def distances(self, state: LayerState) -> Tensor:
        """|F - I| over the factors KKᵀ of all axes, [L, 1]."""
        squares = []
        for factor in state.values():
            F = _product(factor).to(accumulation_dtype(factor["root"].dtype))
            F = F if F.ndim == 3 else torch.diag_embed(F)
            squares.append((F - torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)).square().sum((-2, -1)))
        return torch.stack(squares).sum(0).sqrt()[:, None]


def _view_shape(shape: Sequence[int], config: IFShampooConfig) -> tuple[int, ...]:
    """The axes that get factors: kernels merged, axes of length 1 dropped."""
    if config.merge_kernels and len(shape) >= 4:
        shape = (shape[0], math.prod(shape[1:]))
    return squeezed(shape)


def _kinds_of(shape: tuple[int, ...], config: IFShampooConfig) -> tuple[Kind, ...]:
    """The kind of factor of each axis."""
    if len(shape) == 1 and (shape[0] == 1 or config.vector_axes == "diagonal"):
        return ("diagonal",)
    large: Kind = "dense" if config.large_axes == "block" else config.large_axes
    return tuple("dense" if d <= config.max_dim else large for d in shape)


@lru_cache(maxsize=1024)
def _cut_of(shape: tuple[int, ...], config: IFShampooConfig) -> tuple[Cut, tuple[Kind, ...]]:
    """How a tensor of a shape is seen, and the kind of each axis."""
    seen = _view_shape(shape, config)
    kinds = _kinds_of(seen, config)
    return Cut.of(seen, [config.max_dim if kind == "dense" else math.inf for kind in kinds]), kinds


def _update_factors(
    G: Tensor, factors: Sequence[Factor | None], valid: Tensor, batch_size: int, config: IFShampooConfig
) -> None:
    """One step of all axes' m and K, each from the K before it, in place.

    Args:
        G: a block's gradient, [L, d_1, …, d_N].
        factors: those of its axes.
        valid: layers to update, bool [L].
        batch_size: B.
        config: the settings.
    """
    Y = applied(G, [None if factor is None else factor["root"] for factor in factors], transpose=True)  # / √B
    one = G.new_ones(len(G))
    taus = [
        one if factor is None else _size(factor["root"], G.dtype).square() / G.shape[axis + 1]
        for axis, factor in enumerate(factors)
    ]
    a, moments = config.riemannian_momentum, []
    for axis, factor in enumerate(factors):
        if factor is not None:
            damping = config.damping * torch.stack([one, *taus[:axis], *taus[axis + 1 :]]).prod(0)
            H = _curvature(Y, factor["root"], axis, damping, batch_size / others(G.shape[1:], axis))
            m = H.mul_((1 - a) / 2).add_(factor["momentum"], alpha=a)
            moments.append((factor, m, _size(m, G.dtype)))
    for _, _, size in moments:
        valid = valid & (size < math.inf)
    for factor, m, size in moments:
        _move(factor, m, torch.where(valid, size.clamp(min=1).reciprocal(), 0.0), valid, config.factor_lr)


def _curvature(Y: Tensor, K: Tensor, axis: int, damping: Tensor, weight: float) -> Tensor:
    """H - I with H = weight · Y₍ₙ₎Y₍ₙ₎ᵀ + damping · KᵀK; the diagonal alone for a diagonal K.

    Args:
        Y: the whitened gradient, [L, d_1, …, d_N].
        K: the axis's root, [L, d, d] or [L, d].
        axis: n.
        damping: [L].
        weight: what the Gram matrix is multiplied with.
    """
    Z = unfolded(Y, axis)
    if K.ndim == 2:
        return damping[:, None] * K.square() + weight * Z.to(K.dtype).square().sum(-1) - 1
    # H - I = weight Y₍ₙ₎Y₍ₙ₎ᵀ + damping KᵀK - I
    H = (K.mT @ K).mul_(layerwise(damping, K)).baddbmm_(Z, Z.mT, alpha=weight)
    H.diagonal(dim1=-2, dim2=-1).sub_(1)
    return H


def _move(factor: Factor, m: Tensor, scale: Tensor, valid: Tensor, factor_lr: float) -> None:
    """K ← K(I - β · scale · m) in place, with m kept as the momentum; nothing where not ``valid``.

    Args:
        factor: an axis's tensors.
        m: its new momentum; overwritten.
        scale: 1/max(1, |m|), and 0 where not valid, [L].
        valid: bool [L].
        factor_lr: β.
    """
    K, momentum = factor["root"], factor["momentum"]
    torch.where(layerwise(valid, m), m, momentum, out=momentum)
    step = momentum * layerwise(scale, m).to(m.dtype)
    if K.ndim == 2:
        K.addcmul_(K, step, value=-factor_lr)
        return
    # K ← K - β K m/max(1, |m|)
    K.copy_(torch.baddbmm(K, K, step, alpha=-factor_lr, out=m))
    torch.bmm(K, K.mT, out=factor["product"])


def _product(factor: Factor) -> Tensor:
    """KKᵀ, or its diagonal."""
    return factor["product"] if "product" in factor else factor["root"].square()


def _size(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """|·| of each layer, [L]."""
    return norms(tensor.to(dtype).flatten(1))


def _dense(d: int, like: Tensor, dtype: torch.dtype) -> Factor:
    eye = torch.eye(d, dtype=dtype, device=like.device)
    return {"root": eye, "momentum": torch.zeros_like(eye), "product": eye.clone()}


def _diagonal(d: int, like: Tensor) -> Factor:
    ones = like.new_ones(d, dtype=accumulation_dtype(like.dtype))
    return {"root": ones, "momentum": torch.zeros_like(ones)}


METHOD = Method(
    "if_shampoo",
    "Inverse-free Shampoo, no roots (Lin et al., ICML 2024)",
    base="sgd",
    config=IFShampooConfig,
    make=IFShampoo,
    select=select_parameters,
    rates=(1e-4, 1e-3),
)

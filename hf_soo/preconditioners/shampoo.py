"""Shampoo, as in Distributed Shampoo (Gupta, Koren, Singer, ICML 2018; Shi et al., arXiv 2309.06497).

For each block of a tensor, with axes 1 … N and u updates done,

    Lₙ ← β Lₙ + (1-β) G₍ₙ₎G₍ₙ₎ᵀ   (β = 1: the plain sum),   L̂ₙ = Lₙ/(1-βᵘ)
    Rₙ = (L̂ₙ + εI)⁻ᵉ, e = 1/(2N), anew every `inverse_period` steps; I before the first
    P  = G ×₁ R₁ … ×_N R_N,   P ← P · |P_graft|/|P| for each block

===== ================ =========================================
paper here             Distributed Shampoo
===== ================ =========================================
β     factor_decay     betas[1]
e     exponent         inverse_exponent_override
ε     epsilon          epsilon
      inverse_period   precondition_frequency
      max_dim          max_preconditioner_dim
      grafting         grafting_config
===== ================ =========================================

Deviation: G is not averaged before it is multiplied (β₁, β₃ there): the base has a momentum of its own.
Deviation: defaults are β = .9, ε = 1e-6 and grafting (there: the sum, 1e-12 and none): with 1e-12 in float32 the first
direction is off by 9 to 157 %. Tensors are merged down to two axes, not one, so a small matrix stays a matrix.
"muon" grafts the Frobenius norm of Muon's update, √min(n, m) · √max(1, n/m).
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
from hf_soo.engine.checks import Checked, Count, Positive, Share, Weight
from hf_soo.engine.flops import Factorisation, MinimalWork, Product
from hf_soo.engine.gradients import Joint, TransformNorms, inner
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import ONE_SIDE, Factor, LayerState, Method, Outcome, Preconditioner, Updated
from hf_soo.engine.selection import select_parameters
from hf_soo.preconditioners.axes import (
    Cut,
    add_gram_,
    applied,
    layerwise,
    learned,
    put_back,
    replace,
    squeezed,
    total,
)
from hf_soo.preconditioners.spd import inverse_root

GRAFT = "graft"
GRAFT_DECAY = 0.999
ADAM_EPS, NORM_EPS = 1e-8, 1e-16


@dataclass(frozen=True)
class ShampooConfig(Checked):
    """Settings of Shampoo.

    Args:
        factor_decay: β; 1 is the plain sum.
        update_period: optimizer steps between updates of the factors, and of the graft's second moment.
        inverse_period: optimizer steps between roots.
        exponent: e, or None for 1/(2 · axes).
        grafting: what gives P its length: "sgd" (|G|), "adam", "muon", or "none".
        graft_decay: of Adam's second moment.
        epsilon: ε.
        trace_scaling: divide a factor by its mean eigenvalue before ε is added.
        max_dim: the longest axis; longer ones are cut, and small ones merged up to it.
    """

    factor_decay: Weight = 0.9
    update_period: Count = 1
    inverse_period: Count = 10
    exponent: Positive | None = None
    grafting: Literal["sgd", "adam", "muon", "none"] = "sgd"
    graft_decay: Share = GRAFT_DECAY
    epsilon: Positive = 1e-6
    trace_scaling: bool = False
    max_dim: Count = 1024

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        super().__post_init__()
        if self.grafting != "adam" and self.graft_decay != GRAFT_DECAY:
            raise ValueError(f"graft_decay={self.graft_decay} has no effect with grafting={self.grafting!r}.")


class Shampoo(Preconditioner):
    """Shampoo as a gradient transform of single tensors.

    State "axis{j}", or "block{i}.axis{j}" where a tensor is cut: "factor" L and "root" R [d, d], "updates" u; with
    Adam's graft also "graft": "second_moment" in the tensor's shape and "updates".
    """

    side_names = ONE_SIDE
    stacks = False
    config: ShampooConfig

    def updates_at(self, step: int) -> bool:
        """By the period."""
        return step % self.config.update_period == 0

    def refreshes_at(self, step: int) -> bool:
        """By the inverse period."""
        return step % self.config.inverse_period == 0

    def skip_reason(self, layer: Layer) -> str | None:
        """A vector has no second axis."""
        return "fewer than two axes" if len(squeezed(layer.shape)) < 2 or 0 in layer.shape else None

    def minimal_products(self, layer: Layer) -> MinimalWork:
        """Of each axis of each block: R times G; G₍ₙ₎G₍ₙ₎ᵀ; the eigenvectors and the product that makes R of them."""
        axes = list(_cut_of(tuple(layer.shape), self.config.max_dim).axes())
        return MinimalWork(
            every=[Product(d, d, rest) for d, rest in axes],
            update=[Product(d, rest, d) for d, rest in axes],
            refresh=[each for d, _ in axes for each in (Factorisation("eigh", d), Product(d, d, d))],
        )

    def init(self, layer: Layer) -> LayerState:
        """L = 0, R = I."""
        cut, dtype = _cut_of(tuple(layer.shape), self.config.max_dim), accumulation_dtype(layer.prototype.dtype)
        state = {
            cut.name(block, axis): _axis(d, layer.prototype, dtype)
            for block, sizes in enumerate(cut.sizes())
            for axis, d in enumerate(sizes)
        }
        if self.config.grafting == "adam":
            state[GRAFT] = {
                "second_moment": layer.prototype.new_zeros(layer.shape, dtype=dtype),
                "updates": _count(layer.prototype),
            }
        return state

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """Every factor, and the graft's second moment, in place; nothing for a gradient that is not finite."""
        assert statistics.grad is not None
        config, (G, size, valid) = self.config, learned(statistics.grad)
        cut = _cut_of(tuple(G.shape[1:]), config.max_dim)
        beta, weight = config.factor_decay, 1.0 if config.factor_decay == 1 else 1 - config.factor_decay
        for block, part in enumerate(cut.parts(cut.view(G))):
            for axis, factor in enumerate(cut.factors(state, block)):
                assert factor is not None
                # L ← βL + (1-β) G₍ₙ₎G₍ₙ₎ᵀ
                add_gram_(factor["factor"], part, axis, valid, beta, weight)
                factor["updates"].add_(valid)
        if config.grafting == "adam":
            v = state[GRAFT]["second_moment"]
            # v ← β₂v + (1-β₂)G²
            torch.where(layerwise(valid, v), v.lerp(G.square(), 1 - config.graft_decay), v, out=v)
            state[GRAFT]["updates"].add_(valid)
        return state, Updated.of_gradient(size, valid)

    def refresh(self, state: LayerState) -> tuple[LayerState, Tensor]:
        """New roots, in place. One that cannot be computed stays, and so does I before the first update."""
        axes = [(side, factor) for side, factor in state.items() if side != GRAFT]
        blocks = [side.rpartition("axis")[0] for side, _ in axes]
        exponent = self.config.exponent or 1 / (2 * blocks.count(blocks[0]))
        failed = torch.zeros_like(axes[0][1]["updates"], dtype=torch.bool)
        for _, factor in axes:
            R, ok = inverse_root(_normalised(factor, self.config), exponent, self.config.epsilon)
            due = factor["updates"] > 0
            torch.where(layerwise(ok & due, R), R, factor["root"], out=factor["root"])
            failed |= due & ~ok
        return state, failed[:, None] * Outcome.FAILED.value

    def transform(self, state: LayerState, grad: Joint) -> TransformNorms:
        """P = G ×₁ R₁ … ×_N R_N, with the graft's length, block by block; a block that is not finite keeps its G."""
        cut = _cut_of(tuple(grad.weight.shape[1:]), self.config.max_dim)
        view = cut.view(grad.weight)
        grafts = self._grafts(state, cut, grad)
        moved = []
        for block, (G, graft) in enumerate(zip(cut.parts(view), grafts, strict=True)):
            roots = [factor["root"] for factor in cut.factors(state, block) if factor is not None]
            P = applied(G, roots)
            if graft is not None:
                P = P * layerwise(graft / (inner(P, P, grad.unit).sqrt() + NORM_EPS), P)
            moved.append(replace(G, P, grad.unit))
        put_back(grad.weight, view)
        return total(moved)

    def _grafts(self, state: LayerState, cut: Cut, grad: Joint) -> list[Tensor | None]:
        """|P_graft| of each block in units, [L]; None: P keeps its own length."""
        if self.config.grafting == "none":
            return [None] * len(cut.blocks)
        parts = cut.parts(cut.view(grad.in_unit(grad.weight)))
        if self.config.grafting == "sgd":
            return [inner(G, G).sqrt() for G in parts]
        if self.config.grafting == "muon":
            lengths = [_muon_norm(len(G[0]), G[0].numel() // len(G[0])) for G in parts]
            return [grad.in_unit(G.new_full((len(G),), length)) for G, length in zip(parts, lengths, strict=True)]
        v, u = state[GRAFT]["second_moment"], state[GRAFT]["updates"]
        root = (v / layerwise(_correction(u, self.config.graft_decay, v.dtype), v)).sqrt_().add_(ADAM_EPS)
        steps = [G / r for G, r in zip(parts, cut.parts(cut.view(root)), strict=True)]
        return [grad.in_unit(inner(step, step).sqrt()) for step in steps]

    def distances(self, state: LayerState) -> Tensor:
        """|R - I| over the roots of all axes, [L, 1]."""
        roots = [factor["root"] for side, factor in state.items() if side != GRAFT]
        squares = [(R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).square().sum((-2, -1)) for R in roots]
        return torch.stack(squares).sum(0).sqrt()[:, None]


def _merge_dims(shape: Sequence[int], threshold: int, target: int = 2) -> tuple[int, ...]:
    """Merge neighbouring small axes, from the last one on, as Distributed Shampoo does.

    Args:
        shape: any shape; axes of length 1 are dropped.
        threshold: the longest axis that merging may make.
        target: how many axes are few enough.

    Returns:
        The shape to view the tensor in.
    """
    axes = list(squeezed(shape))
    merged = [axes.pop()]
    while axes:
        few = len(axes) + len(merged) <= target
        if few or merged[0] * axes[-1] > threshold:
            merged.insert(0, axes.pop())
        else:
            merged[0] *= axes.pop()
    return tuple(merged)


@lru_cache(maxsize=1024)
def _cut_of(shape: tuple[int, ...], max_dim: int) -> Cut:
    """How a tensor of a shape is seen: merged, then every axis cut at ``max_dim``."""
    merged = _merge_dims(shape, max_dim)
    return Cut.of(merged, [max_dim] * len(merged))


def _correction(updates: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
    """1 - decayᵘ, by which a running average that began at 0 is divided; 1 for the plain sum, or before an update."""
    weight = 1 - decay ** updates.to(dtype)
    return torch.where((updates > 0) & (weight > 0), weight, 1.0)


def _normalised(factor: Factor, config: ShampooConfig) -> Tensor:
    """L̂ of an axis, divided by its mean eigenvalue with ``trace_scaling``; [L, d, d]."""
    L = factor["factor"]
    L = L / layerwise(_correction(factor["updates"], config.factor_decay, L.dtype), L)
    if config.trace_scaling:
        mean = L.diagonal(dim1=-2, dim2=-1).mean(-1)
        L = L / layerwise(torch.where(mean > 0, mean, 1.0), L)
    return L


def _muon_norm(n: int, m: int) -> float:
    """The Frobenius norm of Muon's update of an n x m matrix."""
    return math.sqrt(min(n, m)) * math.sqrt(max(1.0, n / m))


def _axis(d: int, like: Tensor, dtype: torch.dtype) -> Factor:
    eye = torch.eye(d, dtype=dtype, device=like.device)
    return {"factor": torch.zeros_like(eye), "updates": _count(like), "root": eye}


def _count(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


METHOD = Method(
    "shampoo",
    "Shampoo, blocked and grafted (Gupta et al., ICML 2018; Shi et al., 2023)",
    base="adamw",
    config=ShampooConfig,
    make=Shampoo,
    select=select_parameters,
)

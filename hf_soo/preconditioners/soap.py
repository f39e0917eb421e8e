"""SOAP: Adam in the eigenbasis of Shampoo's factors (Vyas et al., ICLR 2025; arXiv 2409.11321, Algorithm 3).

For each tensor G with axes 1 … N, M the base's average of it (Adam's m̂), and Qₙ the basis of axis n,

    G' = G ×₁ Q₁ᵀ … ×_N Q_Nᵀ,   V ← β₂ V + (1-β₂) G' ⊙ G'
    N' = M' / (√V̂ + ε),         P = N' ×₁ Q₁ … ×_N Q_N        V̂ = V/(1-β₂ᵗ)
    Lₙ ← β Lₙ + (1-β) G₍ₙ₎G₍ₙ₎ᵀ
    Qₙ ← QR(Lₙ Qₙ), after every `inverse_period` steps; the first by eigh, after the first step

and the weights move along P: W ← (1-ηκ)W - ηP over AdamW, which moves all other parameters by itself. The base takes
its average, the method puts the division in front of what follows (`apply_to="numerator"`): over Muon the polar factor,
over LAMB the trust ratio.

===== ============== ======================
paper here           released code
===== ============== ======================
β₁    of the base    betas[0]
β₂    moment_decay   betas[1]
β     factor_decay   shampoo_beta
ε     eps            eps
f     inverse_period precondition_frequency
      max_dim        max_precond_dim
===== ============== ======================

As in the released code no basis knows the gradient that it is used for, nothing moves in the first step, V follows the
columns when a basis is put in the order of its eigenvalues, an axis longer than `max_dim` keeps its own basis, and
vectors and embeddings are the base's.
Deviation: M has the first step's gradient in it, and its own bias correction.
Deviation: `ties` are added to L where a basis is made of it. Eigenvectors of equal eigenvalues (zeros, where a gradient
has fewer rows than columns) would be what rounding makes. In float64 a rounding then stays one; in float32 it grows to
percents of the steps in such directions, unless `ties` are 1e-3 or more, which is felt below that part of the spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import Checked, Count, NonNegative, Share
from hf_soo.engine.flops import Factorisation, MinimalWork, Product
from hf_soo.engine.gradients import Joint, TransformNorms
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import ONE_SIDE, Factor, LayerState, Method, Outcome, Preconditioner, Updated
from hf_soo.engine.selection import select_parameters
from hf_soo.preconditioners.axes import add_gram_, applied, everywhere, layerwise, learned, put_back, replace, squeezed
from hf_soo.preconditioners.spd import eigen

MOMENT = "moment"


@dataclass(frozen=True)
class SOAPConfig(Checked):
    """Settings of SOAP.

    Args:
        factor_decay: β.
        moment_decay: β₂.
        eps: ε.
        inverse_period: f, optimizer steps between bases.
        max_dim: a longer axis gets no basis.
        ties: what is added to L's first diagonal entry, and falls to 0 at its last, in units of the mean eigenvalue.
    """

    factor_decay: Share = 0.95
    moment_decay: Share = 0.95
    eps: NonNegative = 1e-8
    inverse_period: Count = 10
    max_dim: Count = 10000
    ties: NonNegative = 1e-6


class SOAP(Preconditioner):
    """SOAP as a transform of single tensors.

    State "axis{j}": "factor" L and "basis" Q [d, d], 0 before the first; "moment": "second" V̂ in the tensor's shape,
    its "updates" t, and how many "bases" there have been.
    """

    side_names = ONE_SIDE
    stacks = False
    refreshes_first = True
    config: SOAPConfig

    def updates_at(self, step: int) -> bool:
        """Always."""
        return True

    def refreshes_at(self, step: int) -> bool:
        """In the step after every ``inverse_period``-th, from the first on."""
        return step > 0 and (step - 1) % self.config.inverse_period == 0

    def skip_reason(self, layer: Layer) -> str | None:
        """A vector, or a tensor without a basis."""
        if len(squeezed(layer.shape)) < 2 or 0 in layer.shape:
            return "fewer than two axes"
        return None if self._axes(layer) else f"every axis is longer than max_dim={self.config.max_dim}"

    def _axes(self, layer: Layer) -> list[tuple[int, int, int]]:
        """Number and length of each axis with a basis, and the length of all others together."""
        shape = squeezed(layer.shape)
        total = torch.Size(shape).numel()
        return [(axis, d, total // d) for axis, d in enumerate(shape) if d <= self.config.max_dim]

    def minimal_products(self, layer: Layer) -> MinimalWork:
        """Of each axis: Qᵀ times M, Q times N'; Qᵀ times G, G₍ₙ₎G₍ₙ₎ᵀ; the product L Q and its decomposition."""
        axes = [(d, rest) for _, d, rest in self._axes(layer)]
        return MinimalWork(
            every=[Product(d, d, rest) for d, rest in axes] * 2,
            update=[each for d, rest in axes for each in (Product(d, d, rest), Product(d, rest, d))],
            refresh=[each for d, _ in axes for each in (Product(d, d, d), Factorisation("qr", d))],
        )

    def init(self, layer: Layer) -> LayerState:
        """L = 0, V = 0, and no basis."""
        like, dtype = layer.prototype, accumulation_dtype(layer.prototype.dtype)
        state: LayerState = {}
        for axis, d, _ in self._axes(layer):
            state[f"axis{axis}"] = {name: like.new_zeros((d, d), dtype=dtype) for name in ("factor", "basis")}
        counts = {name: torch.zeros((), dtype=torch.int64, device=like.device) for name in ("updates", "bases")}
        return state | {MOMENT: {"second": like.new_zeros(layer.shape, dtype=dtype), **counts}}

    def refresh(self, state: LayerState) -> tuple[LayerState, Tensor]:
        """New bases, in place; reads from the device which layers have one. One that cannot be computed stays."""
        moment, failed = state[MOMENT], torch.zeros_like(state[MOMENT]["bases"], dtype=torch.bool)
        known = moment["bases"].tolist()
        for axis, factor in _factors(state).items():
            L, Q = factor["factor"], factor["basis"]
            ramp = torch.linspace(1, 0, L.shape[-1], dtype=L.dtype, device=L.device)
            ties = self.config.ties * L.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) * ramp
            for i, bases in enumerate(known):
                new, order, ok = _rotated(L[i], Q[i], ties[i]) if bases else _first(L[i] + ties[i].diag())
                Q[i] = torch.where(ok, new, Q[i])
                V = moment["second"][i].view(squeezed(moment["second"].shape[1:]))
                V.copy_(V.index_select(axis, torch.where(ok, order, torch.arange(len(order), device=order.device))))
                failed[i] |= ~ok
        moment["bases"].add_(~failed)
        return state, failed[:, None] * Outcome.FAILED.value

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """V̂ in the bases as they are, then every L, in place; nothing for a gradient that is not finite."""
        assert statistics.grad is not None
        config, moment, (G, size, valid) = self.config, state[MOMENT], learned(statistics.grad)
        view = G.reshape(len(G), *squeezed(G.shape[1:]))
        V = moment["second"].view(view.shape)
        moment["updates"].add_(valid & (moment["bases"] > 0))
        # V̂ ← V̂ + (1-β₂)/(1-β₂ᵗ) (G' ⊙ G' - V̂); zero as long as there is no basis
        left = 1 - config.moment_decay ** moment["updates"].to(V.dtype)
        share = layerwise((1 - config.moment_decay) / torch.where(left > 0, left, 1.0), V)
        G_ = _rotate(state, view).square_()
        if everywhere(valid):
            V.lerp_(G_, share)
        else:
            torch.where(layerwise(valid, V), V.lerp(G_, share), V, out=V)
        for axis, factor in _factors(state).items():
            # L ← βL + (1-β) G₍ₙ₎G₍ₙ₎ᵀ
            add_gram_(factor["factor"], view, axis, valid, config.factor_decay, 1 - config.factor_decay)
        return state, Updated.of_gradient(size, valid)

    def transform(self, state: LayerState, grad: Joint) -> TransformNorms:
        """P = Q [M' / (√V̂ + ε)]; a P that is not finite leaves M."""
        moment, M = state[MOMENT], grad.weight.reshape(len(grad.weight), *squeezed(grad.weight.shape[1:]))
        N = _rotate(state, M).div_(moment["second"].view(M.shape).sqrt().add_(self.config.eps))
        moved = replace(M, _rotate(state, N, back=True).to(M.dtype), grad.unit)
        put_back(grad.weight, M)
        return moved

    def distances(self, state: LayerState) -> Tensor:
        """|Q - I| over the bases of all axes, [L, 1]."""
        bases = [factor["basis"] for factor in _factors(state).values()]
        squares = [(Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).square().sum((-2, -1)) for Q in bases]
        return torch.stack(squares).sum(0).sqrt()[:, None]


def _factors(state: LayerState) -> dict[int, Factor]:
    """The factors by axis."""
    return {int(side.removeprefix("axis")): factor for side, factor in state.items() if side != MOMENT}


def _rotate(state: LayerState, X: Tensor, back: bool = False) -> Tensor:
    """X in the bases, X ×₁ Q₁ᵀ …, or back; [L, *shape], never X itself."""
    factors = _factors(state)
    bases = [factors[axis]["basis"] if axis in factors else None for axis in range(X.ndim - 1)]
    return applied(X, bases, transpose=not back)


def _first(L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of L [d, d], the largest eigenvalue's first; the order that V keeps; whether there are any."""
    _, Q, ok = eigen(L[None])
    return Q[0].flip(-1), torch.arange(len(L), device=L.device), ok[0]


def _rotated(L: Tensor, Q: Tensor, ties: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """QR((L + diag(ties)) Q), the columns in the order of their Rayleigh quotients; that order; whether it is finite.

    The transposed product has the columns as rows, which are put in order, and read by LAPACK, without a copy more.
    """
    St = (Q.mT @ L).addcmul_(Q.mT, ties)
    order = (Q.mT * St).sum(1).argsort(descending=True, stable=True)
    Q = torch.linalg.qr(St[order].mT).Q
    return Q, order, Q.isfinite().all()


METHOD = Method(
    "soap",
    "SOAP, Adam in Shampoo's eigenbasis (Vyas et al., ICLR 2025)",
    base="adamw",
    config=SOAPConfig,
    make=SOAP,
    select=select_parameters,
    base_args={"betas": (0.95, 0.95)},
    apply_to="numerator",
    rates=(1e-3, 1e-2),
)

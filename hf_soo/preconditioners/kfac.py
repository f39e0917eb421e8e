"""K-FAC (Martens and Grosse, 2015; expand and reduce: Eschenhagen et al., 2023), FOOF (Benzing, 2022) and KAISA (2021).

For a layer with input rows a (1 appended for a bias) and output gradients g of the mean loss over R terms,

    A = mean of a aᵀ,  B = R Σ g gᵀ                        (expand: over all rows; reduce: one row an example)
    S ← ρS + (1-ρ)F,  F̂ = S/(1-ρᵘ) after u updates         for F = A and F = B
    cholesky   P = (B̂ + λ_B I)⁻¹ G (Â + λ_A I)⁻¹           every `inverse_period` steps new inverses
    eigen      P = unvec((B̂ ⊗ Â + λI)⁻¹ vec G)
    FOOF       P = G (Â + λI)⁻¹                             B = I: no output gradients are needed

With `input_blocks` a wide input is cut, and FOOF done block by block. Newton-Muon (Du, Su, 2026, arXiv 2604.01472) is
FOOF with four blocks, λ = .2 tr Â/m + 1e-8, S = I/1000 at first and a period of 32, on the gradient, and then Muon.

Then comes a norm match or the KL clip, and the base optimizer steps on P. With `damping_mode="relative"` and κ = (tr
Â/m)(tr B̂/n), the layer's mean curvature, λ = damping·κ; the Cholesky form splits it, λ_A = √damping·tr Â/m and λ_B
alike (FOOF: λ = damping·tr Â/m). "absolute" is λ = damping, split by π = √((tr Â/m)/(tr B̂/n)) into λ_A = π√λ, λ_B =
√λ/π.

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
Deviation: |P| = |G| is the default, not the KL clip (KAISA keeps it): with relative damping, attention's query and key
projections, whose curvature is almost 0 at the start, get steps of 10³ times their weights within the clip's bound, and
a tiny BERT diverges in 30 steps (results/kfac_kl_clip).
Deviation: in "reduce" an example's sum of output gradients that is rounding noise (attention's key projection, where
it is zero analytically) does not enter B.
Deviation: rows whose output gradient is exactly zero (padding, unlabelled positions) do not count; `row_filter="all"`
counts them in A. R only matters with absolute damping or without a rescale.
Deviation: Newton-Muon's paper has no biases; a trained one is one more input here, which is always 1, and an input that
the query, key and value layers share has a factor in each of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.flops import Factorisation, MinimalWork, Product, RowSumSizes
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import Factor, LayerState, Method, Outcome, RowWise, Side, Updated
from hf_soo.engine.rescale import make_rescale
from hf_soo.preconditioners.axes import layerwise
from hf_soo.preconditioners.kfac_config import FactorConfig, FOOFConfig, KAISAConfig, KFACConfig, NewtonMuonConfig
from hf_soo.preconditioners.kfac_inverse import Cholesky, Eigen, apart, side_key
from hf_soo.preconditioners.kronecker import by_side, sizes_of


class KFAC(RowWise):
    """K-FAC, "expand"; state "input" and "output": "factor" S, "updates" u, and the tensors of the inverse."""

    sides: tuple[Side, ...] = (Side.INPUT, Side.OUTPUT)
    config: FactorConfig
    recorder: FactorRecorder
    reduce = False
    stacks = False

    def __init__(self, config: FactorConfig) -> None:
        """Take the settings."""
        super().__init__(config)
        self.row_wise = self.sides == (Side.INPUT,)  # the output side's inverse needs all rows
        self.form: Cholesky | Eigen = Cholesky(config) if config.inverse == "cholesky" else Eigen(config)
        start = config.factor_start
        self.start = None if start == "corrected" else 1.0 if start == "identity" else start
        self.shared = self.form.names
        self.rescale = make_rescale(config.rescale, config.kl_clip)
        self.recorder = config.recorder(outputs=Side.OUTPUT in self.sides, reduce=self.reduce)

    def refreshes_at(self, step: int) -> bool:
        """In the warm-up, then by the inverse period."""
        return step < self.config.warmup_updates or step % self.config.inverse_period == 0

    def skip_reason(self, layer: Layer) -> str | None:
        """A side longer than ``max_dim``."""
        longest = max(d for _, d in self._sizes(layer))
        return f"max_dim={self.config.max_dim} exceeded ({longest})" if longest > self.config.max_dim else None

    def workers(self, world: int) -> int | None:
        """As set; by default all (COMM-OPT)."""
        return self.config.grad_workers or self._default_workers(world)

    def _default_workers(self, world: int) -> int:
        return world

    def cost(self, layer: Layer) -> float:
        """Σ d³ over the sides that are inverted."""
        return float(sum(d**3 for _, d in self._sizes(layer)))

    def minimal_products(self, layer: Layer) -> MinimalWork:
        """G times each side's inverse, or twice each side's eigenvectors, and at a refresh the factorisations."""
        n, m = sizes_of(layer)[Side.OUTPUT], sizes_of(layer)[Side.INPUT]
        once = [Product(n, d, m if side is Side.OUTPUT else d) for side, d in self._sizes(layer)]
        kind: Literal["cholesky_inverse", "eigh"] = "cholesky_inverse" if self.config.inverse == "cholesky" else "eigh"
        return MinimalWork(
            every=once if kind == "cholesky_inverse" else once * 2,
            refresh=[Factorisation(kind, d) for _, d in self._sizes(layer)],
        )

    def flops(self, layer: Layer) -> tuple[float, float, float]:
        """The products', and S ← ρS + (1-ρ)F."""
        every, _, refresh = super().flops(layer)
        return every, 3 * sum(d * d for _, d in self._sizes(layer)), refresh

    def row_sums(self, layer: Layer) -> RowSumSizes | None:
        """|G|², |P|² and ⟨P, G⟩, of the input side alone."""
        return RowSumSizes(every=(3,)) if self.row_wise else None

    def _sizes(self, layer: Layer) -> list[tuple[Side, int]]:
        """The side and the length of every matrix that is inverted."""
        sizes, k = sizes_of(layer), self.recorder.cut(layer)
        blocks = [(Side.INPUT, layer.shape[1] // k)] * k if k > 1 else [(Side.INPUT, sizes[Side.INPUT])]
        return blocks + [(side, sizes[side]) for side in self.sides if side is Side.OUTPUT]

    def init(self, layer: Layer) -> LayerState:
        """S = 0 (or sI), and P = G until the first inverse."""
        like, sizes = layer.prototype, self._sizes(layer)

        def factor(side: Side, d: int) -> Factor:
            S = torch.zeros(d, d, dtype=accumulation_dtype(like.dtype), device=like.device)
            if self.start is not None:
                S.fill_diagonal_(self.start)
            tensors, k = {"factor": S, **self.form.init(d, like)}, [each for each, _ in sizes].count(side)
            if k > 1:
                tensors = {name: tensor.expand(k, *tensor.shape).clone() for name, tensor in tensors.items()}
            return tensors | {"updates": torch.zeros((), dtype=torch.int64, device=like.device)}

        return {side_key(side): factor(side, d) for side, d in dict(sizes).items()}

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """S ← ρS + (1-ρ)F, where F is finite and has rows."""
        outcomes = torch.zeros(len(statistics.samples), 2, dtype=torch.int64, device=statistics.samples.device)
        norms = torch.zeros_like(outcomes, dtype=statistics.samples.dtype)
        for side in self.sides:
            F = statistics.inputs if side is Side.INPUT else statistics.outputs
            assert F is not None
            finite = F.flatten(1).isfinite().all(-1)
            outcomes[:, side] = torch.where(finite, Outcome.UPDATED.value, Outcome.NOT_FINITE.value)
            if side is Side.OUTPUT and statistics.noise is not None:
                outcomes[:, side].masked_fill_(statistics.noise & finite, Outcome.NOISE.value)
            outcomes[:, side].masked_fill_(statistics.samples == 0, Outcome.NO_ROWS.value)
            norms[:, side] = F.diagonal(dim1=-2, dim2=-1).flatten(1).sum(-1)
            valid, own = outcomes[:, side] == Outcome.UPDATED.value, state[side_key(side)]
            # S ← ρS + (1-ρ)F
            own["factor"].lerp_(_keep_where(valid, F, own["factor"]), 1 - self.config.factor_decay)
            own["updates"].add_(valid)
        return state, Updated(outcomes, norms)

    def refresh(self, state: LayerState) -> tuple[LayerState, Tensor]:
        """New inverses of the layers that have been updated; a side that does not decompose keeps its old one."""
        factors = {side: self._corrected(state[side_key(side)]).flatten(0, -3) for side in self.sides}
        means = {side: F.diagonal(dim1=-2, dim2=-1).mean(-1) for side, F in factors.items()}
        new, ok = self.form.refresh(factors, means)
        updates = state[side_key(Side.INPUT)]["updates"]
        outcomes = torch.zeros(len(updates), 2, dtype=torch.int64, device=updates.device)
        for side in self.sides:
            own = state[side_key(side)]
            seen, good = own["updates"] > 0, ok[side].view(len(updates), -1).all(-1)
            outcomes[:, side] = torch.where(good | ~seen, Outcome.UPDATED.value, Outcome.FAILED.value)
            for name, tensor in new[side].items():
                own[name].copy_(_keep_where(good & seen, tensor.view(own[name].shape), own[name]))
        return state, outcomes

    def _corrected(self, factor: Factor) -> Tensor:
        """F̂; the identity where nothing has been seen."""
        S, u = factor["factor"], factor["updates"]
        if self.start is not None:
            return S
        weight = 1 - torch.pow(torch.full_like(u, self.config.factor_decay, dtype=S.dtype), u)
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        return _keep_where(u > 0, S / layerwise(weight, S), eye)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """The damped inverse of the Kronecker product, applied to G."""
        return self.form.transform(state, grad)

    def distances(self, state: LayerState) -> Tensor:
        """How far each side's inverse is from a mere scale, [L, 2]."""
        return by_side({side: self.form.distance(state[side_key(side)]) for side in self.sides})


class KFACReduce(KFAC):
    """K-FAC, "reduce": one row an example, the mean of its inputs and the sum of its output gradients."""

    reduce = True


class FOOF(KFAC):
    """FOOF: the input side alone."""

    sides = (Side.INPUT,)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """Block by block where the input is cut: [L, k, n, d] times [L, k, d, d]."""
        (own,) = state.values()
        *layers, d, _ = own[self.form.matrix].shape
        if len(layers) == 1:
            return super().transform_rows(state, grad)
        G, m = grad.matrix(), layers[1] * d
        L, n, _ = G.shape
        blocks = G[..., :m].reshape(L, n, -1, d).transpose(1, 2).flatten(0, 1)
        P = self.form.solve(apart(own), blocks).view(L, -1, n, d).transpose(1, 2).flatten(2)
        bias = G[..., m:] / (1 + self.config.damping + self.config.epsilon)
        return grad.replace_(G, torch.cat([P, bias], dim=-1))

    def distances(self, state: LayerState) -> Tensor:
        """As of ``KFAC``, over all blocks."""
        (own,) = state.values()
        *layers, _, _ = own[self.form.matrix].shape
        if len(layers) == 1:
            return super().distances(state)
        blocks = self.form.distance(apart(own)).view(layers)
        return by_side({Side.INPUT: torch.linalg.vector_norm(blocks, dim=-1)})


class KAISA(KFAC):
    """K-FAC over half of the ranks for each layer by default (HYBRID-OPT)."""

    def _default_workers(self, world: int) -> int:
        return max((k for k in range(1, world // 2 + 1) if world % k == 0), default=1)


def _keep_where(valid: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the layers where ``valid`` [L], ``old`` elsewhere; both [L, ...]."""
    return torch.where(layerwise(valid, new), new, old)


METHODS = (
    Method(
        "kfac_expand",
        "K-FAC, expand (Martens, Grosse, 2015; Eschenhagen et al., 2023)",
        base="sgd",
        config=KFACConfig,
        make=KFAC,
    ),
    Method(
        "kfac_reduce",
        "K-FAC, reduce (Eschenhagen et al., NeurIPS 2023)",
        base="sgd",
        config=KFACConfig,
        make=KFACReduce,
    ),
    Method(
        "kaisa",
        "KAISA: K-FAC over a grid of ranks (Pauloski et al., SC 2021)",
        base="lamb",
        config=KAISAConfig,
        make=KAISA,
    ),
    Method("foof", "FOOF, the input factor alone (Benzing, ICML 2022)", base="sgd", config=FOOFConfig, make=FOOF),
    Method(
        "newton_muon",
        "Newton-Muon: FOOF before Muon (Du and Su, 2026)",
        base="muon",
        config=NewtonMuonConfig,
        make=FOOF,
    ),
)

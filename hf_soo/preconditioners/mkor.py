"""MKOR: momentum-enabled Kronecker-factor-based optimizer with rank-1 updates (Mozaffari et al., NeurIPS 2023).

Algorithm 1 of the paper, for each layer with gradient Ĝ = [G | bias], lines 1 to 4 every `update_period` steps:

    line                                                           here
    1, 2  a = mean input row, b = Σ dL/dy, over all ranks          `SumRecorder`, `kronecker_vectors`
    3     F ← ζF + (1-ζ)I where max|F| > ε                         `mkor_dense.stabilize`
    4     F ← its update with v; v = b for L⁻¹, v = a for R⁻¹      `lowrank_update`, or a rule of `mkor_dense`
    5     P = L⁻¹ Ĝ R⁻¹                                            `lowrank_product`; dense: `Joint.multiply_`
    6     P ← P·|Ĝ|/|P|                                            `MatchNorm`
    7     the base steps on P, or on G of a layer left to it       the base; `MKOR.skip_reason`

========= ==================== ======================================================
paper     here                 the released code
========= ==================== ======================================================
γ         factor_decay         0.95, hard-wired (its `stat_decay` is not used)
f         update_period        inv_freq
L⁻¹, R⁻¹  left, right          GG_inv, AA_inv
ε         stabilizer_threshold 2, never reached
ζ         stabilizer_blend     1 - stabilization_factor, dead code there
========= ==================== ======================================================

Deviation: eq. 5 as printed is no inverse update; `update_rule="blend"` is what the released code runs,
F ← (M⁻¹ + vvᵀ)⁻¹ with M = γF + (1-γ)I, "exact" is Sherman-Morrison for γJ + (1-γ)vvᵀ, "paper" the printed equation.
Deviation: the factors live in low-rank form, F = I - CᵀC with the last `history` vectors as rows of C, the same factor
up to γ^history; reason: K thin vectors cost 8K·nm flops a step against 4·nm(n+m), and never lose definiteness.
Deviation: the first statistics are used (the released code discards them), averages are taken once, and
`kv_scale="unit"` makes both sides act whatever the batch size; "sum" is the released scale.
Deviation: two options of our own, off by default. With `exponent` p the factors act as F^p (1: K-FAC, 1/4: Shampoo).
`gate` scales b by g = max(0, cos(b₁, b₂)), b₁ and b₂ being Σ dL/dy over two halves of the rows of each micro-batch on
each rank; where they disagree, g = 0, b is left out as noise is.
Deviation: queries and keys that the model rotates by their positions are the base's (`queries_and_keys`): there damping
the mean input costs more than MKOR gains elsewhere, see `muon_mkor`. The paper's models have learnt positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import Bounds, Count, OpenShare, Positive, Share, Weight
from hf_soo.engine.flops import MinimalWork, Product, RowSumSizes
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms, squared_norm
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import Factor, LayerState, Method, Outcome, Periodic, RowWise, Side, Updated
from hf_soo.engine.rescale import make_rescale
from hf_soo.engine.selection import SCORES
from hf_soo.engine.sums import HalvesRecorder, SumRecorder
from hf_soo.preconditioners.kronecker import KVScale, by_side, gated, kronecker_vectors, sizes_of
from hf_soo.preconditioners.mkor_dense import Dense
from hf_soo.preconditioners.spd import power_columns

DEFAULT_HISTORY = 32
SIDE_NAMES = {Side.INPUT: "right", Side.OUTPUT: "left"}


@dataclass(frozen=True)
class MKORConfig(Periodic):
    """Settings of MKOR.

    Args:
        factor_decay: γ, the weight of the old factor.
        representation: "lowrank" (F = I - CᵀC) or "dense".
        history: K, the columns of the low-rank factor that are kept (rows of C here); low-rank only.
        update_rule: "blend", or with the dense representation "exact" or "paper".
        clip_value: bound on a Kronecker vector's entries, before scaling.
        kv_scale: "unit", "sum" (as released) or "mean"; see ``kronecker_vectors``.
        kv_target: τ of the unit scale, |v|² = dτ.
        rank: vectors for each update, the means of so many groups of rows.
        sides: "both", "input", "output" or "none".
        stabilizer_threshold: ε of the exact and paper rules (None: 100).
        stabilizer_blend: ζ of the exact and paper rules (None: 0.9).
        exponent: p, the power of the factors that acts; low-rank only.
        gate: scale b by how far two halves of the batch agree on it; with rank=1 only.
        queries_and_keys: act on attention's too (with values where fused); "auto": in models without rotary positions.
        rescale: "norm" (line 6), or "none": P as it is, for a base that sees no norms (Muon).
    """

    factor_decay: OpenShare = 0.95
    representation: Literal["lowrank", "dense"] = "lowrank"
    history: Count = DEFAULT_HISTORY
    update_rule: Literal["blend", "exact", "paper"] = "blend"
    clip_value: Positive = 100.0
    kv_scale: KVScale = "unit"
    kv_target: Positive = 1.0
    rank: Count = 1
    sides: Literal["both", "input", "output", "none"] = "both"
    stabilizer_threshold: Annotated[float, Bounds(1)] | None = None
    stabilizer_blend: Share | None = None
    exponent: Weight = 1.0
    gate: bool = False
    queries_and_keys: Literal["auto"] | bool = "auto"
    rescale: Literal["norm", "none"] = "norm"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.history < self.rank:
            raise ValueError(f"history={self.history} is less than rank={self.rank}, the columns of one update.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.update_rule != "blend" and self.representation != "dense":
            raise ValueError(
                f"update_rule={self.update_rule!r} needs representation='dense', got 'lowrank', which holds the blend "
                "rule's factor alone; set representation='dense'."
            )
        if self.update_rule != "blend" and self.rank != 1:
            raise ValueError(f"rank={self.rank} works with update_rule='blend'; {self.update_rule!r} allows rank=1.")
        if self.representation == "dense" and self.history != DEFAULT_HISTORY:
            raise ValueError(f"history={self.history} has no effect with representation='dense'; leave it out.")
        if self.exponent != 1 and self.representation == "dense":
            raise ValueError(f"exponent={self.exponent} needs representation='lowrank', got 'dense'; leave it out.")
        if self.gate and (self.rank != 1 or self.sides in ("input", "none")):
            raise ValueError(
                f"gate=True needs rank=1 and sides='both' or 'output', got rank={self.rank}, sides={self.sides!r}."
            )
        if self.kv_scale != "unit" and self.kv_target != 1.0:
            raise ValueError(f"kv_target={self.kv_target} has no effect with kv_scale={self.kv_scale!r}; leave it out.")
        stabilizer = {"stabilizer_threshold": self.stabilizer_threshold, "stabilizer_blend": self.stabilizer_blend}
        for name, value in stabilizer.items():
            if value is not None and self.update_rule == "blend":
                raise ValueError(f"{name}={value} has no effect with update_rule='blend', which is always bounded.")


def lowrank_update(C: Tensor, head: Tensor, V: Tensor, factor_decay: float, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The blend rule on F = I - CᵀC, exactly: M = γF + (1-γ)I, then F ← (M⁻¹ + VᵀV)⁻¹.

    With U = VM and I + VUᵀ = TTᵀ (Cholesky), the r rows T⁻¹U join the ring buffer, and the rows that stay are scaled
    by √γ; the r oldest rows, of weight γ^K, are overwritten.

    Args:
        C: rows of the factor, [..., K, d].
        head: the slot of the oldest row, int64 [...].
        V: the r Kronecker vectors, [..., r, d], r <= K.
        factor_decay: γ in (0, 1).
        valid: bool [...]; where False the factor stays as it is, whatever V holds.

    Returns:
        The new C and head.
    """
    history, r = C.shape[-2], V.shape[-2]
    U = V - factor_decay * ((V @ C.mT) @ C)  # VM = V - γ(VCᵀ)C
    T, _ = torch.linalg.cholesky_ex(torch.eye(r, dtype=V.dtype, device=V.device) + V @ U.mT)
    fresh = torch.linalg.solve_triangular(T, U, upper=False)
    age = (torch.arange(history, device=C.device) - head[..., None]) % history  # slots in ring order, [..., K]
    replaced = (age < r)[..., None]
    rows = torch.take_along_dim(fresh, age.clamp(max=r - 1)[..., None], dim=-2)
    updated = torch.where(replaced, rows, factor_decay**0.5 * C)
    valid = valid & fresh.isfinite().all(-1).all(-1)
    return torch.where(valid[..., None, None], updated, C), torch.where(valid, (head + r) % history, head)


def lowrank_product(grad: Joint, C_b: Tensor, C_a: Tensor) -> RowSums[TransformNorms]:
    """In place: Ĝ ← (I - C_bᵀC_b) Ĝ (I - C_aᵀC_a), in thin products; a C without rows is the identity.

    Args:
        grad: rows of Ĝ, n x m (the bias's column included).
        C_b: of the left factor, the columns that belong to these rows, [L, K, n].
        C_a: of the right factor, [L, K', m].

    Yields:
        Sums over rows: |Ĝ|², |Y|² and X; then |P|².

    Returns:
        Squared norms and inner product of Ĝ and P.
    """
    before, right = grad.measured(), grad.split(C_a)
    Y, X = grad @ C_a.mT, grad.from_left(C_b)  # ĜC_aᵀ, local to rows; C_bĜ, a sum over them
    y_norm = squared_norm(Y, unit=grad.unit)
    yield [before, y_norm, *X.tensors()]
    Z = X @ C_a.mT
    # ⟨P, Ĝ⟩ = |Ĝ|² - |X|² - |Y|² + |Z|²
    inner = before - y_norm - X.squared_norm() + squared_norm(Z, unit=grad.unit)
    W = X.minus(Z, right)
    if grad.waits:
        after = _length(before - 2 * y_norm, Y, W, C_b, C_a)
        grad.waits = grad.unit is None and _is_sure(after, before)
    # P = Ĝ - Y C_a - C_bᵀ(X - Z C_a)
    grad.subtract_((Y, right), (C_b.mT, W))
    if not grad.waits:
        after = grad.squared_norm()
    yield [after]
    return TransformNorms(before, after, inner)


def _length(rest: Tensor, Y: Tensor, W: Joint, C_b: Tensor, C_a: Tensor) -> Tensor:
    """|P|² from thin products: |Ĝ|² - 2|Y|² + ⟨YᵀY, C_aC_aᵀ⟩ is |ĜF_a|², and less 2|W|² - ⟨WWᵀ, C_bC_bᵀ⟩ that of P.

    Args:
        rest: |Ĝ|² - 2|Y|².
        Y: ĜC_aᵀ.
        W: C_bĜF_a.
        C_b: see ``lowrank_product``.
        C_a: see there.
    """
    gram = W.weight @ W.weight.mT
    if W.bias is not None:
        gram.baddbmm_(W.bias[..., None], W.bias[..., None, :])
    right = (Y.mT @ Y * (C_a @ C_a.mT)).sum((-2, -1))
    return rest + right - 2 * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + (gram * (C_b @ C_b.mT)).sum((-2, -1))


def _is_sure(after: Tensor, before: Tensor) -> bool:
    """Whether a difference of squares is large enough to have few rounding errors. Asked on a CPU alone."""
    pairs = zip(after.tolist(), before.tolist(), strict=True) if after.device.type == "cpu" else [(0.0, 1.0)]
    return all(long > short / 16 for long, short in pairs)


class _LowRank:
    """F^p for F = I - CᵀC; ``columns`` [K, d] holds C, ``head`` the slot of its oldest row, ``power`` C_p if p < 1."""

    def __init__(self, history: int, factor_decay: float, exponent: float = 1.0) -> None:
        """Choose K, γ and p."""
        self.history, self.factor_decay, self.exponent = history, factor_decay, exponent
        self.acting = "columns" if exponent == 1 else "power"

    def init(self, d: int, like: Tensor) -> Factor:
        """C = 0."""
        C = like.new_zeros(self.history, d, dtype=accumulation_dtype(like.dtype))
        head = torch.zeros((), dtype=torch.int64, device=like.device)
        return {"columns": C, "head": head, self.acting: torch.zeros_like(C)}

    def update(self, factor: Factor, V: Tensor, valid: Tensor) -> Factor:
        """See ``lowrank_update``."""
        columns, head = lowrank_update(factor["columns"], factor["head"], V, self.factor_decay, valid)
        return {"columns": columns, "head": head, self.acting: power_columns(columns, self.exponent)}

    def transform(self, left: Factor | None, right: Factor | None, grad: Joint) -> RowSums[TransformNorms]:
        """See ``lowrank_product``."""
        C_b = _no_rows(grad, grad.shape[1]) if left is None else left[self.acting][..., grad.rows]
        C_a = _no_rows(grad, grad.shape[2]) if right is None else right[self.acting]
        return lowrank_product(grad, C_b, C_a)

    def distance(self, factor: Factor) -> Tensor:
        """|CᵀC|_F = |CCᵀ|_F, or that of C_p."""
        C = factor[self.acting]
        distance: Tensor = torch.linalg.matrix_norm(C @ C.mT)
        return distance


def _no_rows(grad: Joint, d: int) -> Tensor:
    """The C of an identity, [L, 0, d]."""
    return grad.weight.new_zeros(len(grad.weight), 0, d)


class MKOR(RowWise):
    """MKOR as a gradient transform; state "left" [d_out] and "right" [d_in + bias] for each layer."""

    config: MKORConfig

    def __init__(self, config: MKORConfig) -> None:
        """Take the settings."""
        super().__init__(config)
        self.rescale = make_rescale(config.rescale, None)
        self.stacks = self.row_wise = config.representation == "lowrank"
        self.form: _LowRank | Dense = _LowRank(config.history, config.factor_decay, config.exponent)
        self.gradient_passes = 6 if config.representation == "lowrank" else 4
        self.least_passes = 2 if config.rescale == "norm" else 1  # |G| and X; then |P|
        if config.representation == "dense":
            self.form = Dense(
                config.update_rule, config.factor_decay, config.stabilizer_threshold, config.stabilizer_blend
            )
        if config.exponent != 1:
            self.shared = frozenset({"power"})
        used = {"both": (Side.INPUT, Side.OUTPUT), "input": (Side.INPUT,), "output": (Side.OUTPUT,), "none": ()}
        self.sides: tuple[Side, ...] = used[config.sides]
        outputs = Side.OUTPUT in self.sides
        self.recorder = (HalvesRecorder if config.gate else SumRecorder)(
            inputs=Side.INPUT in self.sides,
            outputs=outputs,
            groups=config.rank,
            noise=outputs and config.kv_scale == "unit",
        )

    def updates_at(self, step: int) -> bool:
        """By the period, and never without a side."""
        return bool(self.sides) and super().updates_at(step)

    def skip_reason(self, layer: Layer) -> str | None:
        """One output or input: a factor is then a number, the other damps the mean row alone; scores, if not wanted."""
        keep = self.config.queries_and_keys
        if layer.scores and (layer.rotary if keep == "auto" else not keep):
            return SCORES
        return f"one output or input {list(layer.shape)}" if min(layer.shape) < 2 else None

    def init(self, layer: Layer) -> LayerState:
        """Identity factors."""
        return {SIDE_NAMES[side]: self.form.init(sizes_of(layer)[side], layer.prototype) for side in self.sides}

    def minimal_products(self, layer: Layer) -> MinimalWork | None:
        """F_b Ĝ and (F_b Ĝ) F_a of the dense form; the low-rank form's products are thin."""
        if self.config.representation == "lowrank":
            return None
        m, n = sizes_of(layer).values()
        both = {Side.OUTPUT: Product(n, n, m), Side.INPUT: Product(n, m, m)}
        return MinimalWork(every=[product for side, product in both.items() if side in self.sides])

    def flops(self, layer: Layer) -> tuple[float, float, float]:
        """Thin products, X = C_b Ĝ and Y = Ĝ C_aᵀ and the correction by both; an update is VCᵀ, times C, √γC, C_p."""
        sizes = [sizes_of(layer)[side] for side in self.sides]
        if self.config.representation == "lowrank":
            K, (n, m) = self.config.history, layer.matrix
            C_p = 4 * K**2 * sum(sizes) + 9 * len(sizes) * K**3 if self.config.exponent != 1 else 0
            return 4 * len(sizes) * K * n * m, 5 * K * sum(sizes) + C_p, 0
        every, _, refresh = super().flops(layer)
        return every, 8 * sum(d * d for d in sizes), refresh  # VM, and the rank-one correction

    def row_sums(self, layer: Layer) -> RowSumSizes | None:
        """|Ĝ|², |Y|² and X = C_b Ĝ [K, m]; then |P|²."""
        if self.config.representation == "dense":
            return None
        X = self.config.history * layer.matrix[1] if Side.OUTPUT in self.sides else 0
        return RowSumSizes(every=(X + 2, 1))

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """One rank-r update of each side."""
        config, new, outcomes, sizes = self.config, dict(state), {}, {}
        for side in Side:
            V, outcomes[side], sizes[side] = kronecker_vectors(
                statistics, side, config.kv_scale, config.kv_target, config.clip_value
            )
            if side is Side.OUTPUT and V is not None and statistics.agreement is not None:
                V, outcomes[side] = gated(V, outcomes[side], statistics.agreement)
            if V is not None:
                name, valid = SIDE_NAMES[side], outcomes[side] == Outcome.UPDATED.value
                new[name] = self.form.update(state[name], V, valid)
        return new, Updated(by_side(outcomes), by_side(sizes))

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """P = F_b Ĝ F_a."""
        return self.form.transform(state.get("left"), state.get("right"), grad)

    def distances(self, state: LayerState) -> Tensor:
        """|F_a - I| and |F_b - I|, [L, 2]."""
        return by_side({side: self.form.distance(state[SIDE_NAMES[side]]) for side in self.sides})


METHOD = Method(
    "mkor",
    "MKOR, low-rank form (Mozaffari et al., NeurIPS 2023)",
    base="lamb",
    config=MKORConfig,
    make=MKOR,
    rates=(4e-3, 4e-2),
)

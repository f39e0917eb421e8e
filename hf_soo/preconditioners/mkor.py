"""MKOR: momentum-enabled Kronecker-factor-based optimizer with rank-1 updates (Mozaffari et al., NeurIPS 2023).

For each layer with gradient G [d_out, d_in (+ 1)], mean input a and output-gradient sum b, every `update_period` steps

    blend:  M = γF + (1-γ)I,   F ← (M⁻¹ + vvᵀ)⁻¹            v = b for the left factor, v = a for the right one

and in every step  P = F_b G F_a,  P ← P·|G|/|P|,  then the base optimizer steps on P.

========= ================ ======================================================
paper     here             the released code
========= ================ ======================================================
γ         factor_decay     0.95, hard-wired (its `stat_decay` is not used)
f         update_period    inv_freq
L⁻¹, R⁻¹  left, right      GG_inv, AA_inv
ε         stabilizer_threshold  2, never reached
ζ         stabilizer_blend 1 - stabilization_factor, dead code there
========= ================ ======================================================

Deviation: the factors live in low-rank form, F = I - CCᵀ with the last `history` columns, which is the same factor up
to γ^history; reason: K thin columns cost 8K·nm flops a step against 4·nm(n+m), and never lose definiteness.
Deviation: eq. 5 as printed is no inverse update; `update_rule="blend"` is what the released code runs, "exact" is
Sherman-Morrison for γJ + (1-γ)vvᵀ, "paper" the printed equation, for study.
Deviation: the first statistics are used (the released code discards them), averages are taken once, and
`kv_scale="unit"` makes both sides act whatever the batch size; "sum" is the released scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_soo.engine import linalg, products
from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import require_count, require_in, require_range
from hf_soo.engine.flops import MinimalWork, Product
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import Factor, LayerState, Outcome, RowWise, Side, Updated
from hf_soo.engine.rescale import MatchNorm
from hf_soo.engine.sums import SumRecorder
from hf_soo.preconditioners.config import Periodic
from hf_soo.preconditioners.kronecker import KV_SCALES, KVScale, kronecker_vectors, updated

DEFAULT_HISTORY = 32
STABILIZER_THRESHOLD, STABILIZER_BLEND = 100.0, 0.9


@dataclass(frozen=True)
class MKORConfig(Periodic):
    """Settings of MKOR.

    Args:
        factor_decay: γ, the weight of the old factor.
        representation: "lowrank" (F = I - CCᵀ) or "dense".
        history: columns of C kept, K; low-rank only.
        update_rule: "blend", or with the dense representation "exact" or "paper".
        clip_value: bound on a Kronecker vector's entries, before scaling.
        kv_scale: "unit", "sum" (as released) or "mean"; see ``kronecker_vectors``.
        kv_target: τ of the unit scale, |v|² = dτ.
        rank: vectors for each update, the means of so many groups of rows.
        sides: "both", "input", "output" or "none".
        stabilizer_threshold: ε of the exact and paper rules (None: 100).
        stabilizer_blend: ζ of the exact and paper rules (None: 0.9).
    """

    factor_decay: float = 0.95
    representation: Literal["lowrank", "dense"] = "lowrank"
    history: int = DEFAULT_HISTORY
    update_rule: Literal["blend", "exact", "paper"] = "blend"
    clip_value: float = 100.0
    kv_scale: KVScale = "unit"
    kv_target: float = 1.0
    rank: int = 1
    sides: Literal["both", "input", "output", "none"] = "both"
    stabilizer_threshold: float | None = None
    stabilizer_blend: float | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or two contradict each other.
        """
        Periodic.__post_init__(self)
        require_range("factor_decay", self.factor_decay, 0, 1, open_low=True)
        require_in("representation", self.representation, ("lowrank", "dense"))
        require_in("update_rule", self.update_rule, ("blend", "exact", "paper"))
        require_in("kv_scale", self.kv_scale, KV_SCALES)
        require_in("sides", self.sides, ("both", "input", "output", "none"))
        require_count("rank", self.rank, 1)
        require_count("history", self.history, self.rank)
        require_range("clip_value", self.clip_value, 0, float("inf"), open_low=True)
        require_range("kv_target", self.kv_target, 0, float("inf"), open_low=True)
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
        if self.kv_scale != "unit" and self.kv_target != 1.0:
            raise ValueError(f"kv_target={self.kv_target} has no effect with kv_scale={self.kv_scale!r}; leave it out.")
        stabilizer = {"stabilizer_threshold": self.stabilizer_threshold, "stabilizer_blend": self.stabilizer_blend}
        for name, value in stabilizer.items():
            if value is not None and self.update_rule == "blend":
                raise ValueError(f"{name}={value} has no effect with update_rule='blend', which is always bounded.")
        if self.stabilizer_threshold is not None:
            require_range("stabilizer_threshold", self.stabilizer_threshold, 1, float("inf"))
        if self.stabilizer_blend is not None:
            require_range("stabilizer_blend", self.stabilizer_blend, 0, 1)


class Representation(Protocol):
    """How an inverse factor F is held: its tensors, its update with vectors V [L, r, d], and P = F_b G F_a."""

    def init(self, d: int, like: Tensor) -> Factor:
        """F = I."""

    def update(self, factor: Factor, V: Tensor, valid: Tensor) -> Factor:
        """The factor after V, where ``valid`` [L]."""

    def transform(self, left: Factor | None, right: Factor | None, grad: Joint) -> RowSums[TransformNorms]:
        """G -> P in place; a side that is None is the identity."""

    def distance(self, factor: Factor) -> Tensor:
        """|F - I|_F, [L]."""


class LowRank(Representation):
    """F = I - CCᵀ; ``columns`` [K, d] holds the columns of C by rows, ``head`` the slot of the oldest."""

    def __init__(self, config: MKORConfig) -> None:
        """Take the settings of MKOR."""
        self.config = config

    def init(self, d: int, like: Tensor) -> Factor:
        """No columns."""
        return {
            "columns": like.new_zeros(self.config.history, d, dtype=accumulation_dtype(like.dtype)),
            "head": torch.zeros((), dtype=torch.int64, device=like.device),
        }

    def update(self, factor: Factor, V: Tensor, valid: Tensor) -> Factor:
        """One more block of columns."""
        columns, head = linalg.lowrank_update(factor["columns"], factor["head"], V, self.config.factor_decay, valid)
        return {"columns": columns, "head": head}

    def transform(self, left: Factor | None, right: Factor | None, grad: Joint) -> RowSums[TransformNorms]:
        """Thin products, on any rows."""
        C_left = None if left is None else left["columns"][..., grad.rows]
        return products.lowrank_steps(grad.weight, grad.bias, C_left, None if right is None else right["columns"])

    def distance(self, factor: Factor) -> Tensor:
        """|CCᵀ|_F = |CᵀC|_F."""
        C = factor["columns"]
        distance: Tensor = torch.linalg.matrix_norm(C @ C.mT)
        return distance


class Dense(Representation):
    """F as a matrix ``inverse`` [d, d]."""

    def __init__(self, config: MKORConfig) -> None:
        """Take the settings of MKOR."""
        self.config = config
        self.threshold = STABILIZER_THRESHOLD if config.stabilizer_threshold is None else config.stabilizer_threshold
        self.blend = STABILIZER_BLEND if config.stabilizer_blend is None else config.stabilizer_blend

    def init(self, d: int, like: Tensor) -> Factor:
        """The identity."""
        return {"inverse": torch.eye(d, dtype=accumulation_dtype(like.dtype), device=like.device)}

    def update(self, factor: Factor, V: Tensor, valid: Tensor) -> Factor:
        """By the update rule; "exact" and "paper" are stabilised first."""
        F, gamma = factor["inverse"], self.config.factor_decay
        if self.config.update_rule == "blend":
            new = linalg.blend_update(F, V, gamma)
        else:
            rule = linalg.exact_update if self.config.update_rule == "exact" else linalg.paper_update
            new = rule(linalg.stabilize(F, self.threshold, self.blend), V.squeeze(-2), gamma)
        valid = valid & new.isfinite().all(-1).all(-1)
        return {"inverse": torch.where(valid[:, None, None], new, F)}

    def transform(self, left: Factor | None, right: Factor | None, grad: Joint) -> RowSums[TransformNorms]:
        """Two full products, on all rows."""
        inverses = [None if factor is None else factor["inverse"] for factor in (left, right)]
        return products.dense_steps(grad.weight, grad.bias, *inverses)

    def distance(self, factor: Factor) -> Tensor:
        """|F - I|_F."""
        F = factor["inverse"]
        distance: Tensor = torch.linalg.matrix_norm(F - torch.eye(F.shape[-1], dtype=F.dtype, device=F.device))
        return distance


SIDE_NAMES = {Side.INPUT: "right", Side.OUTPUT: "left"}


class MKOR(RowWise):
    """MKOR as a gradient transform; state "left" [d_out] and "right" [d_in + bias] for each layer."""

    rescale = MatchNorm()

    def __init__(self, config: MKORConfig) -> None:
        """Make the transform.

        Args:
            config: its settings.
        """
        self.config = config
        self.stacks = self.row_wise = config.representation == "lowrank"
        self.form: Representation = LowRank(config) if config.representation == "lowrank" else Dense(config)
        self.sides = [
            side
            for side, kinds in {Side.INPUT: ("both", "input"), Side.OUTPUT: ("both", "output")}.items()
            if config.sides in kinds
        ]
        outputs = Side.OUTPUT in self.sides
        self.recorder = SumRecorder(
            inputs=Side.INPUT in self.sides,
            outputs=outputs,
            groups=config.rank,
            noise=outputs and config.kv_scale == "unit",
        )

    def updates_at(self, step: int) -> bool:
        """By the period, and never without a side."""
        return bool(self.sides) and self.config.updates_at(step)

    def skip_reason(self, layer: Layer) -> str | None:
        """A single output or input: one factor is then a number, and the other only damps the mean row."""
        return f"one output or input {list(layer.shape)}" if min(layer.shape) < 2 else None

    def init(self, layer: Layer) -> LayerState:
        """Identity factors."""
        sizes = _sizes(layer)
        return {SIDE_NAMES[side]: self.form.init(sizes[side], layer.prototype) for side in self.sides}

    def minimal_products(self, layer: Layer) -> MinimalWork | None:
        """F_b G and (F_b G) F_a of the dense form; the low-rank form's products are thin."""
        if not isinstance(self.form, Dense):
            return None
        n, m = _sizes(layer)[Side.OUTPUT], _sizes(layer)[Side.INPUT]
        both = {Side.OUTPUT: Product(n, n, m), Side.INPUT: Product(n, m, m)}
        return MinimalWork(every=[product for side, product in both.items() if side in self.sides])

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """One rank-r update of each side."""
        config, new, outcomes, sizes = self.config, dict(state), {}, {}
        for side in Side:
            V, outcomes[side], sizes[side] = kronecker_vectors(
                statistics, side, config.kv_scale, config.kv_target, config.clip_value
            )
            if V is not None:
                name, valid = SIDE_NAMES[side], outcomes[side] == Outcome.UPDATED.value
                new[name] = self.form.update(state[name], V, valid)
        return new, updated(outcomes, sizes)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """P = F_b G F_a."""
        return self.form.transform(state.get("left"), state.get("right"), grad)

    def distances(self, state: LayerState) -> Tensor:
        """|F_a - I| and |F_b - I|."""
        distance = {side: self.form.distance(state[SIDE_NAMES[side]]) for side in self.sides}
        zero = torch.zeros_like(next(iter(distance.values()), torch.zeros(1)))
        return torch.stack([distance.get(side, zero) for side in Side], dim=-1)


def _sizes(layer: Layer) -> dict[Side, int]:
    """The dimensions of [G | bias]."""
    d_out, d_in = layer.shape
    return {Side.OUTPUT: d_out, Side.INPUT: d_in + (layer.bias is not None)}

"""Root-free RMSProp (Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024; 2402.03496).

For each entry of every parameter, with g the gradient of the mean over B loss terms,

    ŝ ← (1-β)ŝ + βB g²,   ŝ₀ = 1
    P = g / (ŝ + ε)

then the base steps on P: with torch's SGD, buf ← α buf + (P + κW) and W ← W - η buf, as in the paper.

===== ============== =====================================
paper here           the released code
===== ============== =====================================
ŝ     second_moment  B times its state (it starts at 1/B)
β     factor_lr      1 - alpha
ε     eps            eps
B     batch_size     batch_size
α, κ  of the base    momentum, weight_decay
===== ============== =====================================

B makes βBg² the curvature of the mean loss whatever the batch size. ŝ₀ = 1 makes the first steps those of SGD; the
learning rate is therefore one of SGD's, not of Adam's, and a clipped gradient lengthens P (no square root).
Deviation: the state is float32; the released runs keep it in bfloat16, where it never moves if β < 2⁻⁹ (refused here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.checks import Checked, Count, NonNegative, Share
from hf_soo.engine.chunks import piece_size
from hf_soo.engine.flops import RowSumSizes
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms, inner, run_whole, squared_norm
from hf_soo.engine.layers import Layer
from hf_soo.engine.preconditioner import ONE_SIDE, LayerState, Method, RowWise, Updated
from hf_soo.engine.selection import select_all_parameters
from hf_soo.preconditioners.axes import layerwise
from hf_soo.preconditioners.config import StateDtype, stored_dtype

BF16_LOWEST_RATE = 2.0**-9
"""Below it (1-β)ŝ rounds back to ŝ in bfloat16."""


@dataclass(frozen=True)
class RMSPropConfig(Checked):
    """Settings of root-free RMSProp.

    Args:
        batch_size: B, the loss terms averaged in a step over all processes; None: Trainer's.
        factor_lr: β, the weight of the new squared gradient.
        eps: ε; a large one turns the method into SGD.
        state_dtype: of ŝ, "float32" (float64 for a float64 model) or "bfloat16".
    """

    batch_size: Count | None = None
    factor_lr: Share = 0.01
    eps: NonNegative = 1e-4
    state_dtype: StateDtype = "float32"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is out of range, or the state could not move.
        """
        super().__post_init__()
        if self.state_dtype == "bfloat16" and self.factor_lr < BF16_LOWEST_RATE:
            raise ValueError(
                f"state_dtype='bfloat16' with factor_lr={self.factor_lr} would never change: (1-β)ŝ rounds to ŝ below "
                f"{BF16_LOWEST_RATE:.5f}; use state_dtype='float32'."
            )


class RMSProp(RowWise):
    """Root-free RMSProp as a gradient transform of single parameters; state "gradient": ŝ in the parameter's shape."""

    side_names = ONE_SIDE
    row_state = frozenset({"second_moment"})
    measures = False  # what it divides by has the square of g in it already
    cpu_stack = 1 << 14  # a few passes over a layer cost less than to stack it
    least_passes = 0  # each entry of P is its own gradient's
    config: RMSPropConfig

    def __init__(self, config: RMSPropConfig) -> None:
        """Take the settings, with a batch size."""
        super().__init__(config)
        self.batch_size = config.batch_size or 1

    def updates_at(self, step: int) -> bool:
        """In every step."""
        return True

    def init(self, layer: Layer) -> LayerState:
        """ŝ = 1."""
        dtype = stored_dtype(self.config.state_dtype, layer.prototype.dtype)
        return {"gradient": {"second_moment": layer.prototype.new_ones(layer.shape, dtype=dtype)}}

    def row_sums(self, layer: Layer) -> RowSumSizes:
        """The unit of |g| and |g|² in the update; then |g|², |P|² and ⟨P, g⟩."""
        return RowSumSizes(every=(3,), update=(1, 1))

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """``update_rows`` on all rows."""
        return run_whole(self.update_rows(state, statistics))

    def update_rows(self, state: LayerState, statistics: Statistics) -> RowSums[tuple[LayerState, Updated]]:
        """ŝ ← (1-β)ŝ + βBg², in place; β = 0 for a layer whose gradient is not finite."""
        assert statistics.grad is not None
        grad, rate = statistics.grad.weight, self.config.factor_lr
        yield from statistics.grad.measure_()
        size = statistics.grad.measured()
        yield [size]
        valid = size.isfinite()
        used = valid.to(grad.dtype)
        keep, root = 1 - rate * used, (rate * self.batch_size) ** 0.5 * used
        for g, s, scratch in _chunks(grad, state["gradient"]["second_moment"]):
            wide = s.to(g.dtype)
            if statistics.grad.unit is None:  # all are finite, and so are their squares: ŝ ← (1-β)ŝ + βBg²
                wide.mul_(1 - rate).addcmul_(g, g, value=rate * self.batch_size)
            else:  # ŝ ← (1-β)ŝ + (√(βB) g)²
                torch.mul(g, layerwise(root, g), out=scratch).nan_to_num_(0.0, 0.0, 0.0)  # 0 x inf is nan
                wide.mul_(layerwise(keep, g)).addcmul_(scratch, scratch).clamp_(max=torch.finfo(s.dtype).max)
            if wide.dtype != s.dtype:
                s.copy_(wide)
        return state, Updated.of_gradient(statistics.grad.from_unit(statistics.grad.from_unit(size)), valid)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """P = g / (ŝ + ε), in place; finite wherever g is, since ŝ >= 0 and the divisor is at least the least float."""
        eps = max(self.config.eps, torch.finfo(grad.weight.dtype).tiny)
        squares: list[Tensor] = []
        for g, s, scratch in _chunks(grad.weight, state["gradient"]["second_moment"]):
            P = torch.div(g, torch.add(s.to(g.dtype), eps, out=scratch), out=scratch)
            squares += [inner(g, g), inner(P, P), inner(P, g)]
            g.copy_(P)
        moved = TransformNorms(*torch.stack(squares).view(-1, 3, len(grad.weight)).sum(0).unbind())
        yield list(moved.tensors())
        return moved

    def distances(self, state: LayerState) -> Tensor:
        """|F - I| of the diagonal F = 1/(ŝ + ε), [L, 1]."""
        s = state["gradient"]["second_moment"].float()
        return squared_norm(1 / (s + self.config.eps) - 1).sqrt()[:, None]


def _chunks(grad: Tensor, second_moment: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Walk a gradient and its ŝ together: one large layer in chunks that fit the cache, anything else whole.

    Args:
        grad: [L, ...].
        second_moment: [L, ...].

    Yields:
        Views of both of one shape, and scratch of that shape and the gradient's dtype.
    """
    pair, size = [grad, second_moment], piece_size(grad)
    if grad.shape[0] == 1 and grad.numel() > size and all(tensor.is_contiguous() for tensor in pair):
        parts = list(zip(*(torch.split(tensor.view(1, -1), size, 1) for tensor in pair), strict=True))
    else:
        parts = [(grad, second_moment)]
    scratch = torch.empty_like(parts[0][0])
    for g, s in parts:
        yield g, s, scratch if scratch.shape == g.shape else scratch[:, : g.shape[1]]


METHOD = Method(
    "rf_rmsprop",
    "Root-free RMSProp (Lin et al., ICML 2024)",
    base="sgd",
    config=RMSPropConfig,
    make=RMSProp,
    select=select_all_parameters,
)

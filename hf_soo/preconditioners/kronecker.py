"""What methods with a factor for each side of a gradient matrix share: its sides, and Kronecker vectors.

Those are the means of a layer's inputs and output gradients, in the scale a method wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.capture import Statistics
from hf_soo.engine.gradients import norms
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import Outcome, Side

KVScale = Literal["unit", "sum", "mean"]


def kronecker_vectors(
    statistics: Statistics, side: Side, scale: KVScale, target: float = 1.0, clip: float | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The r vectors of one side, whether they can be used, and their size as they came.

    ``"mean"``: mean input row a, mean output gradient b (the released Eva). ``"sum"``: a as before, b = Σ dL/dy =
    ``bias.grad`` (the released MKOR). ``"unit"``: each vector v rescaled to |v|² = d·target, so that neither batch
    size, loss scale nor clipping change the curvature's strength; then rounding noise must not be scaled up, and a
    side that is noise is not used.

    Args:
        statistics: of a group of layers.
        side: which side.
        scale: see above.
        target: τ of the unit scale.
        clip: bound on the entries before the unit scaling, or None.

    Returns:
        V [L, r, d], each vector scaled by 1/√r so that VᵀV is a mean over groups, or None if the side has no
        statistics; an ``Outcome`` for each layer, int64 [L]; and the squared norm of the mean over groups, in
        the "sum" or "mean" scale, [L].
    """
    means = statistics.inputs if side is Side.INPUT else statistics.outputs
    if means is None:
        zeros = torch.zeros_like(statistics.samples)
        return None, zeros.long(), zeros
    v = means * statistics.samples[:, None, None] if side is Side.OUTPUT and scale != "mean" else means
    size = v.mean(-2).square().sum(-1)
    if clip is not None:
        v = v.clamp(-clip, clip)
    if scale == "unit":  # v ← v √(dτ)/|v|
        length = norms(v.flatten(0, 1)).view(*v.shape[:-1], 1)
        v = v * ((v.shape[-1] * target) ** 0.5 / torch.where(length > 0, length, 1.0))
    outcome = _outcomes(v, statistics, noise_matters=scale == "unit" and side is Side.OUTPUT)
    return v / means.shape[-2] ** 0.5, outcome, size


def _outcomes(v: Tensor, statistics: Statistics, noise_matters: bool) -> Tensor:
    zero = (v == 0).all(-1).all(-1)
    noise = zero if statistics.noise is None or not noise_matters else zero | statistics.noise
    outcome = torch.where(noise, Outcome.NOISE.value, Outcome.UPDATED.value)
    outcome = torch.where(v.isfinite().all(-1).all(-1), outcome, Outcome.NOT_FINITE.value)
    return torch.where(statistics.samples > 0, outcome, Outcome.NO_ROWS.value)


def gated(V: Tensor, outcome: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
    """V ← gV with g = max(0, agreement), [L]; g = 0 makes noise of what could be used."""
    g = agreement.clamp(min=0)
    lost = (outcome == Outcome.UPDATED.value) & (g == 0)
    return V * g[:, None, None], torch.where(lost, Outcome.NOISE.value, outcome)


def sizes_of(layer: Layer) -> dict[Side, int]:
    """The columns and the rows of a layer's [G | bias]."""
    d_out, d_in = layer.shape
    return {Side.INPUT: d_in + (layer.bias is not None), Side.OUTPUT: d_out}


def identity(d: int, like: Tensor) -> Tensor:
    """A factor [d, d] that changes nothing, on a parameter's device and in its accumulation dtype."""
    return torch.eye(d, dtype=accumulation_dtype(like.dtype), device=like.device)


def by_side(values: Mapping[Side, Tensor]) -> Tensor:
    """A number for each layer and side, [L, 2], in the order of ``Side``; 0 for a side that is not there."""
    zero = torch.zeros_like(next(iter(values.values()), torch.zeros(1)))
    return torch.stack([values.get(side, zero) for side in Side], dim=-1)

"""A window's statistics, summed over micro-batches and ranks, as the methods read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.capture import Capture
from hf_soo.engine.comm import Communicator
from hf_soo.engine.gradients import PlainGradients, stack
from hf_soo.engine.layers import Layer, accumulation_dtype


@dataclass(slots=True)
class Statistics:
    """Means over the rows of a global batch, for layers of one shape, stacked.

    Args:
        rows: N, the rows of the window over all ranks, [L].
        inputs: mean input row of each group, [L, groups, d_in (+ 1)] with the constant 1 of the bias last; or None.
        outputs: mean of dL/dy over the rows of each group, L the mean loss of the global batch, [L, groups, d_out];
            or None.
        noise: whether Σ dL/dy is rounding noise, [L]; or None.
    """

    rows: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    noise: Tensor | None


def collect(
    capture: Capture,
    layers: Sequence[Layer],
    gradients: PlainGradients,
    comm: Communicator,
    loss_scale: Callable[[], float],
) -> Callable[[Sequence[Layer]], Statistics]:
    """Sum the buffers over ranks in one flat all-reduce, and hand out the statistics group by group.

    Args:
        capture: the buffers of this window; they hold global sums afterwards.
        layers: all layers, in the same order on every rank.
        gradients: where ``bias.grad`` is read: averaged over ranks, and without the loss scale.
        comm: sums over ranks.
        loss_scale: what the loss was multiplied by before the backward pass.

    Returns:
        A function from layers of one shape to their statistics.
    """
    capture.to_weights(layers)
    comm.sum_([tensor for layer in layers for tensor in capture.buffers[layer.name].tensors() if tensor.numel()])
    # Captured output gradients are of each rank's own mean loss, times the loss scale; bias.grad is free of both.
    unit = 1.0 / (comm.world_size * loss_scale()) if capture.needs.outputs else 1.0

    def of(group: Sequence[Layer]) -> Statistics:
        buffers = [capture.buffers[layer.name] for layer in group]
        rows = stack([b.rows for b in buffers])
        needs = capture.needs
        return Statistics(
            rows=rows.sum(-1),
            inputs=_input_means(group, stack([b.inputs for b in buffers]), rows) if needs.inputs else None,
            outputs=stack([_output_mean(layer, capture, gradients, unit) for layer in group])
            if needs.outputs
            else None,
            noise=_is_noise(stack([b.noise for b in buffers])) if needs.noise else None,
        )

    return of


def _input_means(group: Sequence[Layer], sums: Tensor, rows: Tensor) -> Tensor:
    means = sums / rows.clamp(min=1)[..., None]  # a group without rows is a zero vector
    if group[0].bias is None:
        return means
    return torch.cat([means, (rows > 0).to(means)[..., None]], dim=-1)


def _output_mean(layer: Layer, capture: Capture, gradients: PlainGradients, unit: float) -> Tensor:
    """Mean output gradient of each group of rows, [groups, d_out]; zeros where the layer has no gradient."""
    buffers = capture.buffers[layer.name]
    if buffers.outputs.numel():
        return buffers.outputs * unit / buffers.rows.clamp(min=1)[:, None]
    if not gradients.has(layer) or layer.bias is None or layer.bias.grad is None:
        return torch.zeros(1, layer.shape[0], dtype=buffers.rows.dtype, device=buffers.rows.device)
    bias_grad = layer.bias.grad
    return bias_grad.to(accumulation_dtype(bias_grad.dtype))[None] / buffers.rows.clamp(min=1)[:, None]


def _is_noise(noise: Tensor) -> Tensor:
    return noise[..., 0] <= noise[..., 1]

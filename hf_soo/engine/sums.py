"""Sums of the rows that flow into and out of a layer: what rank-1 methods learn from.

The forward pass reduces the input to sums over its rows, so nothing of size [N, d] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hf_soo.engine.capture import Buffers, Statistics, Window
from hf_soo.engine.gradients import Groups, norms, unit_of
from hf_soo.engine.layers import Layer, RowLayer, accumulation_dtype, group_sums, stack
from hf_soo.engine.passes.backward import Target, accumulates, gate
from hf_soo.engine.passes.padding import Padding, first_without_gradient
from hf_soo.engine.strategy import Strategy

NOISE_LEVEL = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7, torch.float32: 2.0**-9, torch.float64: 2.0**-43}
"""δ by the gradient's dtype: a sum of rows with |Σe|² <= δ² Σ|e|² is rounding noise.

Where Σe is zero analytically (attention's key projection), |Σe|²/Σ|e|² was measured at 1e-4 in bf16 and 2e-12 in fp32
(20 times the unit roundoff u: the rows are differences themselves), and at 0.03 and more in every other layer of BERT.
So δ = 16u for the half precisions. fp32 rows may come from TF32 products, with 11 bits: 2⁻⁹ covers them too.
"""


def noise_level(layer: Layer, dtype: torch.dtype) -> float:
    """δ of a layer's gradients in a dtype: a bf16 model's, for an adapter that is fp32 and gets what it rounds."""
    return max(NOISE_LEVEL[dtype], NOISE_LEVEL.get(layer.coarsest or dtype, 0.0))


_SQUARES = (-56, 32)
"""Rows whose largest entry is not between these powers of two count as if it were: the square of no other is a number.

So no output gradient that is finite makes a second moment that is not; what is larger still outweighs all others.
"""


@dataclass(frozen=True)
class SumRecorder:
    """Sums of input and output-gradient rows.

    A layer's buffers, all in the accumulation dtype:

    0. samples (rows that are no padding) of each group, [groups];
    1. Σ input rows, [groups, d_in], empty if not asked for;
    2. Σ output gradients, [groups, d_out], empty if not asked for or given by ``bias.grad``;
    3. Σ over micro-batches of |Σe|² and of δ² Σ|e|² (``NOISE_LEVEL``), [2], empty if not asked for.

    Args:
        inputs: sum the input rows.
        outputs: sum the output-gradient rows (taken from ``bias.grad`` where that is the same).
        groups: each sum is split into this many consecutive groups of rows.
        noise: tell a sum of output gradients that is rounding noise from one that is data.
    """

    inputs: bool = False
    outputs: bool = False
    groups: int = 1
    noise: bool = False
    transient = False
    fisher_pass = None

    @property
    def needs(self) -> str:
        """See ``Recorder``."""
        if self.inputs and self.outputs:
            return "input and output means"
        return "input mean" if self.inputs else "output mean" if self.outputs else "nothing"

    @property
    def hooks(self) -> bool:
        """Whether anything is asked for."""
        return self.inputs or self.outputs

    @property
    def output_parts(self) -> int:
        """Into how many parts of the rows a sum of output gradients is split; ``bias.grad`` may tell that of one."""
        return self.groups

    def allocate(self, layer: Layer) -> Buffers:
        """See ``Recorder``."""
        d_out, d_in = layer.shape
        weight, groups, parts = layer.prototype, self.groups, self.output_parts
        from_bias = layer.bias is not None and parts == 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)

        return [
            zeros(groups),
            zeros(groups, d_in if self.inputs else 0),
            zeros(parts, d_out if self.outputs and not from_bias else 0),
            zeros(2 if self.noise else 0),
        ]

    def commit(
        self, layer: RowLayer, x: Tensor, output: Tensor, buffers: Buffers, padding: Padding, target: Target
    ) -> Tensor:
        """See ``Recorder``; output gradients of padding are zero, so their sum is that of the real rows."""
        masks, x = padding.masks(layer, x), x.detach()
        if not masks:
            inputs, count = layer.input_sums(x, self.groups)
            samples = _group_sizes(count, self.groups, buffers[0])
        else:
            each = [layer.input_sums(x * mask[..., None].to(x.dtype), self.groups)[0] for mask in masks]
            counts = [group_sums(mask.reshape(-1, 1).to(buffers[0].dtype), self.groups)[:, 0] for mask in masks]
            inputs, samples = (each[0], counts[0]) if len(masks) == 1 else (torch.stack(each), torch.stack(counts))
        several = torch.stack(masks) if len(masks) > 1 else None
        level = noise_level(layer, output.dtype)
        return cast(
            Tensor,
            _CommitSums.apply(output, inputs, samples, several, target, layer.channel_dim, level, *buffers),  # type: ignore[no-untyped-call]
        )

    def ready(self, layers: Sequence[Layer], strategy: Strategy) -> list[Layer]:
        """All: a layer without rows is told so."""
        return list(layers)

    def collect(self, window: Window) -> Callable[[Groups], list[Statistics]]:
        """Sum the buffers over ranks in one flat all-reduce, and hand out means group by group.

        ``inputs`` is [L, groups, d_in (+ 1)] with the constant 1 of the bias last, ``outputs`` [L, groups, d_out].
        """
        window.placement.sum_([tensor for layer in window.layers for tensor in window.buffers[layer.name]])
        outputs = self._output_means(window) if self.outputs else {}

        def of(group: Sequence[Layer]) -> Statistics:
            buffers = [window.buffers[layer.name] for layer in group]
            samples = stack([b[0] for b in buffers])
            return Statistics(
                samples=samples.sum(-1),
                inputs=_input_means(group, stack([b[1] for b in buffers]), samples) if self.inputs else None,
                outputs=stack([outputs[layer.name] for layer in group]) if self.outputs else None,
                noise=_is_noise(stack([b[3] for b in buffers])) if self.noise else None,
            )

        return lambda groups: [of(group) for group in groups]

    def _output_means(self, window: Window) -> dict[str, Tensor]:
        """Mean output gradient of each group of rows, [groups, d_out]; zeros where a layer has no gradient."""
        means = {}
        for layer in window.layers:
            samples, _, outputs, _ = window.buffers[layer.name]
            means[layer.name] = outputs * window.unit if outputs.numel() else samples.new_zeros(1, layer.shape[0])
        of_bias = [
            layer for layer in window.layers if not window.buffers[layer.name][2].numel() and window.strategy.has(layer)
        ]
        for layer, bias in zip(of_bias, window.strategy.biases(of_bias), strict=True):
            means[layer.name] = bias[None]
        return {name: mean / window.buffers[name][0].clamp(min=1)[:, None] for name, mean in means.items()}


@dataclass(frozen=True)
class HalvesRecorder(SumRecorder):
    """Sums of rows that tell how far to trust Σ dL/dy: by the cosine between those of two halves of the batch.

    Halves are made as ``groups`` are (of which there is one): of the rows of each micro-batch on each rank.
    """

    @property
    def output_parts(self) -> int:
        """The halves."""
        return 2

    def collect(self, window: Window) -> Callable[[Groups], list[Statistics]]:
        """As ``SumRecorder``, with ``agreement``."""
        statistics_of = super().collect(window)
        return lambda groups: [_compared(halves) for halves in statistics_of(groups)]


def _compared(statistics: Statistics) -> Statistics:
    """Those of the whole batch, of statistics whose ``outputs`` [L, 2, d_out] are its halves' shares of the mean."""
    halves = statistics.outputs
    assert halves is not None
    length = norms(halves.flatten(0, 1)).view(-1, 2, 1)
    first, second = (halves / torch.where(length > 0, length, 1.0)).unbind(1)
    return replace(statistics, outputs=halves.sum(1, keepdim=True), agreement=(first * second).sum(-1))


class _CommitSums(torch.autograd.Function):
    """The identity on the layer's output; its backward commits the sums of this micro-batch."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        samples: Tensor,
        masks: Tensor | None,
        target: Target,
        channel_dim: int,
        level: float,
        *buffers: Tensor,
    ) -> Tensor:
        # Not saved but where a compiler asks for it: a checkpoint would sum anew what it saved, by the masks of then.
        sums = (inputs, samples) if masks is None else (inputs, samples, masks)
        ctx.sums = None if torch.compiler.is_compiling() else sums
        if ctx.sums is None:
            ctx.save_for_backward(*sums)
        ctx.target, ctx.channel_dim, ctx.level, ctx.buffers = target, channel_dim, level, buffers
        # detach, not view_as: an output that is a view of a custom function could not be modified in place (relu_).
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        done = (grad, *[None] * (6 + len(ctx.buffers)))
        if (keep := accumulates(ctx.target, grad)) is False:
            return done
        # detached: under create_graph the buffers would join the graph of the second backward pass
        g = grad.detach().movedim(ctx.channel_dim, -1)
        inputs, samples, *masks = ctx.saved_tensors if ctx.sums is None else ctx.sums
        if masks:
            index = first_without_gradient(masks[0], g)
            inputs, samples = inputs.index_select(0, index)[0], samples.index_select(0, index)[0]
        inputs, samples, g = gate(keep, inputs, samples, g)
        sample_buffer, input_buffer, output_buffer, noise_buffer = ctx.buffers
        sample_buffer.add_(samples)
        if input_buffer.numel():
            input_buffer.add_(inputs)
        if output_buffer.numel() or noise_buffer.numel():
            _commit_outputs(g, output_buffer, noise_buffer, ctx.level)
        return done


def in_squares_range(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor over the power of two, in ``dtype``, that brings its largest entry into ``_SQUARES``.

    It is the tensor itself where that is 1: asked on a CPU alone, where nothing waits for an answer.
    """
    low, high = torch.aminmax(tensor)
    unit = unit_of(torch.maximum(-low, high).to(dtype), *_SQUARES)
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and bool(unit == 1):
        return tensor
    return tensor / unit


def _commit_outputs(grad: Tensor, outputs: Tensor, noise: Tensor, level: float) -> None:
    """Add the sums of output gradients [..., d_out] to the buffers."""
    rows = grad.reshape(-1, grad.shape[-1])
    if outputs.numel():
        outputs.add_(group_sums(rows, outputs.shape[0]))
    if noise.numel() and rows.numel():
        dtype = noise.dtype
        rows = in_squares_range(rows, dtype)
        total = rows.sum(0, dtype=dtype).square().sum()
        energy = torch.linalg.vector_norm(rows, dtype=dtype).square()
        noise.add_(torch.stack([total, level**2 * energy]))


def _group_sizes(samples: int, groups: int, like: Tensor) -> Tensor:
    """How many of the samples each of ``groups`` parts holds, as ``torch.tensor_split`` does it: [groups]."""
    part = torch.arange(groups, device=like.device)
    return samples // groups + (part < samples % groups).to(like.dtype)


def _input_means(group: Sequence[Layer], sums: Tensor, samples: Tensor) -> Tensor:
    means = sums / samples.clamp(min=1)[..., None]  # a group without samples is a zero vector
    if group[0].bias is None:
        return means
    return torch.cat([means, (samples > 0).to(means)[..., None]], dim=-1)


def _is_noise(noise: Tensor) -> Tensor:
    return noise[..., 0] <= noise[..., 1]

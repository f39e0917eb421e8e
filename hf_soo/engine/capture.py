"""What flows into and out of a layer, reduced at once and committed by the backward pass.

A forward hook reduces the input to sums over its rows and passes the output through ``_Commit``, whose backward adds
the sums to the layer's buffers. So there is exactly one commit for each micro-batch under gradient checkpointing of
both kinds, under torch.compile (the state is tensors changed in place: no graph break) and under autocast, and none
in evaluation. Nothing of size [N, d] is ever kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_soo.engine.layers import Layer, accumulation_dtype, group_sums

NOISE_LEVEL = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7, torch.float32: 2.0**-9, torch.float64: 2.0**-43}
"""δ by the gradient's dtype: a sum of rows with |Σe|² <= δ² Σ|e|² is rounding noise.

Where Σe is zero analytically (attention's key projection), |Σe|²/Σ|e|² was measured at 1e-4 in bf16 and 2e-12 in fp32
(20 times the unit roundoff u: the rows are differences themselves), and at 0.03 and more in every other layer of BERT.
So δ = 16u for the half precisions. fp32 rows may come from TF32 products, with 11 bits: 2⁻⁹ covers them too.
"""


@dataclass(frozen=True, slots=True)
class Needs:
    """The statistics a method asks for.

    Args:
        inputs: sums of input rows.
        outputs: sums of output-gradient rows (taken from ``bias.grad`` where that is the same).
        groups: each sum is split into this many consecutive groups of rows.
        noise: tell a sum of output gradients that is rounding noise from one that is data.
    """

    inputs: bool = False
    outputs: bool = False
    groups: int = 1
    noise: bool = False

    @property
    def any(self) -> bool:
        """Whether hooks are needed at all."""
        return self.inputs or self.outputs


@dataclass(slots=True)
class Buffers:
    """Sums over the rows of one layer in the current window; all in the accumulation dtype.

    Args:
        rows: number of rows of each group, [groups].
        inputs: Σ input rows, [groups, d_in]; empty if not needed.
        outputs: Σ output gradients, [groups, d_out]; empty if not needed or given by ``bias.grad``.
        noise: [2]: Σ over micro-batches of |Σe|², and of δ² Σ|e|² (``NOISE_LEVEL``), below which it is rounding noise.
    """

    rows: Tensor
    inputs: Tensor
    outputs: Tensor
    noise: Tensor

    def tensors(self) -> list[Tensor]:
        """All buffers, in a fixed order."""
        return [self.rows, self.inputs, self.outputs, self.noise]


class _Commit(torch.autograd.Function):
    """The identity on the layer's output; its backward commits the sums of this micro-batch."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, rows: Tensor, channel_dim: int, *buffers: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, rows)
        ctx.channel_dim = channel_dim
        ctx.buffers = buffers
        # detach, not view_as: an output that is a view of a custom function could not be modified in place (relu_).
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        inputs, rows = ctx.saved_tensors
        row_buffer, input_buffer, output_buffer, noise_buffer = ctx.buffers
        row_buffer.add_(rows)
        if input_buffer.numel():
            input_buffer.add_(inputs)
        if output_buffer.numel() or noise_buffer.numel():
            # detached: under create_graph the buffers would join the graph of the second backward pass
            _commit_outputs(grad.detach().movedim(ctx.channel_dim, -1), output_buffer, noise_buffer)
        return grad, None, None, None, None, None, None, None


def _commit_outputs(grad: Tensor, outputs: Tensor, noise: Tensor) -> None:
    """Add the sums of output gradients [..., d_out] to the buffers."""
    rows = grad.reshape(-1, grad.shape[-1])
    if outputs.numel():
        outputs.add_(group_sums(rows, outputs.shape[0]))
    if noise.numel():
        dtype = noise.dtype
        total = rows.sum(0, dtype=dtype).square().sum()
        energy = torch.linalg.vector_norm(rows, dtype=dtype).square()
        noise.add_(torch.stack([total, NOISE_LEVEL[grad.dtype] ** 2 * energy]))


class Capture:
    """The hooks and buffers of all layers.

    ``collecting`` is read by every forward pass; the optimizer flips it at the end of a step, so that all micro-batches
    of a window, and both passes of a checkpointed one, see the same value.
    """

    def __init__(self, layers: Sequence[Layer], needs: Needs) -> None:
        """Install the hooks.

        Args:
            layers: the layers to watch.
            needs: what to collect; nothing is hooked if it asks for nothing.
        """
        self.needs = needs
        self.collecting = False
        self.buffers = {layer.name: self._allocate(layer) for layer in layers} if needs.any else {}
        self._handles = [self._hook(layer) for layer in layers] if needs.any else []

    def _allocate(self, layer: Layer) -> Buffers:
        d_out, d_in = layer.shape
        weight, groups = layer.weight, self.needs.groups
        from_bias = layer.bias is not None and groups == 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)

        return Buffers(
            rows=zeros(groups),
            inputs=zeros(groups, d_in if self.needs.inputs else 0),
            outputs=zeros(groups, d_out if self.needs.outputs and not from_bias else 0),
            noise=zeros(2 if self.needs.noise else 0),
        )

    def _hook(self, layer: Layer) -> torch.utils.hooks.RemovableHandle:
        return layer.module.register_forward_hook(_CommitHook(self, layer), with_kwargs=True)

    def to_weights(self, layers: Sequence[Layer]) -> None:
        """Start the buffers of layers anew whose weights were moved to another device after construction."""
        for layer in layers:
            if self.buffers[layer.name].rows.device != layer.weight.device:
                self.buffers[layer.name] = self._allocate(layer)

    def commit_in_backward(self, layer: Layer, x: Tensor, output: Tensor) -> Tensor:
        """The output, with a node behind it that commits the sums of ``x`` and of its gradient.

        Args:
            layer: the layer that ran.
            x: its input.
            output: its output.
        """
        if self.buffers[layer.name].rows.device != x.device:
            self.to_weights([layer])
        buffers = self.buffers[layer.name]
        inputs, rows = layer.input_sums(x, self.needs.groups)
        counts = group_sizes(rows, self.needs.groups, buffers.rows)
        committed: Tensor = _Commit.apply(output, inputs, counts, layer.channel_dim, *buffers.tensors())  # type: ignore[no-untyped-call]
        return committed

    def clear(self) -> None:
        """Drop what the current window has collected (a skipped step, an out-of-memory retry)."""
        tensors = [tensor for buffers in self.buffers.values() for tensor in buffers.tensors()]
        if tensors:
            torch._foreach_zero_(tensors)

    def remove(self) -> None:
        """Remove the hooks and free the buffers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.buffers = [], {}


class _CommitHook:
    """The forward hook of one layer. A copied or unpickled model takes a hook along that does nothing."""

    def __init__(self, capture: Capture | None = None, layer: Layer | None = None) -> None:
        self.capture, self.layer = capture, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        capture, layer = self.capture, self.layer
        if capture is None or layer is None or not (capture.collecting and module.training):
            return None
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        x = (*args, *kwargs.values())[0].detach()  # layer(x) or layer(input=x): there is one input
        return capture.commit_in_backward(layer, x, output)

    def __reduce__(self) -> tuple[type[_CommitHook], tuple[()]]:
        return _CommitHook, ()


def group_sizes(rows: int, groups: int, like: Tensor) -> Tensor:
    """How many of ``rows`` rows each of ``groups`` parts holds, as ``torch.tensor_split`` does it: [groups]."""
    part = torch.arange(groups, device=like.device)
    return rows // groups + (part < rows % groups).to(like.dtype)

"""Read and write a layer's gradient as one matrix: ``has``, ``read``, ``write``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.layers import Layer, accumulation_dtype


@dataclass(slots=True)
class Grad:
    """Gradients of layers of one shape, stacked.

    Args:
        weight: [L, d_out, d_in], or [L, *shape] of single parameters.
        bias: [L, d_out], or None where the layers train none.
    """

    weight: Tensor
    bias: Tensor | None

    def parts(self, index: int) -> list[Tensor]:
        """The tensors of one layer."""
        return [self.weight[index]] if self.bias is None else [self.weight[index], self.bias[index]]

    def scale_(self, factor: Tensor) -> None:
        """Multiply each layer's weight and bias gradient by its entry of ``factor`` [L], in place."""
        self.weight.mul_(factor.view(-1, *[1] * (self.weight.ndim - 1)))
        if self.bias is not None:
            self.bias.mul_(factor[:, None])


class PlainGradients:
    """Gradients that are whole, ordinary tensors: one process, DistributedDataParallel, ZeRO-0."""

    def has(self, layer: Layer) -> bool:
        """Whether this step produced a gradient for the layer's weight, and for its bias if it trains one."""
        return layer.weight.grad is not None and (layer.bias is None or layer.bias.grad is not None)

    def read(self, layers: Sequence[Layer]) -> Grad:
        """The layers' gradients in the accumulation dtype.

        A single layer in that dtype is a view of ``.grad``: changing it in place writes the gradient.
        """
        weights = [_computed(layer.as_matrix(_grad(layer.weight))) for layer in layers]
        biases = [_computed(_grad(layer.bias)) for layer in layers if layer.bias is not None]
        return Grad(stack(weights), stack(biases) if biases else None)

    def write(self, layers: Sequence[Layer], grad: Grad) -> None:
        """Store the gradients in the layers, in the dtype the layers use."""
        for i, layer in enumerate(layers):
            weight = _grad(layer.weight)
            if layer.as_matrix(weight).data_ptr() != grad.weight[i].data_ptr():  # else it was changed in place
                weight.copy_(layer.from_matrix(grad.weight[i], weight))
            if layer.bias is not None and grad.bias is not None:
                _grad(layer.bias).copy_(grad.bias[i])


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape with a new leading dimension; a view if there is just one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _computed(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))

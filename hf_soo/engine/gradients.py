"""Read and write a layer's gradient as one matrix, wherever it lies: the accessor, and plain gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hf_soo.engine.layers import Layer, accumulation_dtype

ALL_ROWS = slice(None)


@dataclass(slots=True)
class Grad:
    """Gradients of layers of one shape, stacked.

    Args:
        weight: [L, d_out, d_in], or [L, *shape] of single parameters; fewer rows (dimension 1) if they are a shard.
        bias: [L, d_out], or None where the layers train none.
        rows: which rows of the layers these are.
    """

    weight: Tensor
    bias: Tensor | None
    rows: slice = field(default_factory=lambda: ALL_ROWS)  # slices cannot be hashed before Python 3.12

    def parts(self, index: int) -> list[Tensor]:
        """The tensors of one layer."""
        return [self.weight[index]] if self.bias is None else [self.weight[index], self.bias[index]]

    def scale_(self, factor: Tensor) -> None:
        """Multiply each layer's weight and bias gradient by its entry of ``factor`` [L], in place."""
        self.weight.mul_(factor.view(-1, *[1] * (self.weight.ndim - 1)))
        if self.bias is not None:
            self.bias.mul_(factor[:, None])


Groups = list[list[Layer]]
"""Layers that are worked on together, each list of one shape."""


class Gradients(Protocol):
    """Where the averaged gradients are. Every rank makes the same calls in the same order: some communicate."""

    layout: object  # changes when gradients come to lie elsewhere
    row_wise: bool  # whether the method can work on rows; the optimizer says so

    def has(self, layer: Layer) -> bool:
        """Whether this step produced a gradient for the layer's weight, and for its bias if it trains one."""

    def by_rows(self, layer: Layer) -> bool:
        """Whether ``read`` gives the rows of this rank alone."""

    def rows(self, layer: Layer) -> slice:
        """Those rows; all where ``read`` gives the whole gradient."""

    def batches(self, groups: Groups, joined: bool = False) -> list[Groups]:
        """The groups in portions that are read, transformed and written one after the other.

        Args:
            groups: all of them.
            joined: whether a portion costs messages whatever its size, so that few are better.
        """

    def read(self, groups: Groups) -> list[Grad]:
        """The groups' gradients in the accumulation dtype.

        A single layer in that dtype may be a view: changing it in place writes the gradient.
        """

    def own(self, groups: Groups, grads: Sequence[Grad]) -> list[Grad]:
        """What of the whole gradients this rank stores; the rest may be forgotten."""

    def write(self, group: list[Layer], grad: Grad) -> None:
        """Store what ``own`` gave, in the dtype that is stored."""

    def biases(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Whole gradients of the layers' biases in the accumulation dtype, [d_out] each."""

    def sum_(self, groups: Groups, tensors: Sequence[Tensor]) -> None:
        """Sum what was computed from the groups' rows over all rows, in place."""

    def gather(self, layer: Layer, rows: Tensor) -> Tensor:
        """A tensor [rows of this rank, ...] of a layer read by rows, with the rows of all ranks."""


class PlainGradients:
    """Gradients that are whole, ordinary tensors: one process, DistributedDataParallel, ZeRO-0."""

    layout: object = "whole"
    row_wise = False

    def has(self, layer: Layer) -> bool:
        """See ``Gradients``."""
        return layer.weight.grad is not None and (layer.bias is None or layer.bias.grad is not None)

    def by_rows(self, layer: Layer) -> bool:
        """Never."""
        return False

    def rows(self, layer: Layer) -> slice:
        """All."""
        return ALL_ROWS

    def batches(self, groups: Groups, joined: bool = False) -> list[Groups]:
        """One by one: in cache."""
        return [groups] if joined else [[group] for group in groups]

    def read(self, groups: Groups) -> list[Grad]:
        """See ``Gradients``."""
        return [self._read(group) for group in groups]

    def _read(self, layers: Sequence[Layer]) -> Grad:
        weights = [computed(layer.as_matrix(grad_of(layer.weight))) for layer in layers]
        biases = [computed(grad_of(layer.bias)) for layer in layers if layer.bias is not None]
        return Grad(stack(weights), stack(biases) if biases else None)

    def own(self, groups: Groups, grads: Sequence[Grad]) -> list[Grad]:
        """All."""
        return list(grads)

    def write(self, group: list[Layer], grad: Grad) -> None:
        """See ``Gradients``."""
        for i, layer in enumerate(group):
            weight = grad_of(layer.weight)
            if layer.as_matrix(weight).data_ptr() != grad.weight[i].data_ptr():  # else it was changed in place
                weight.copy_(layer.from_matrix(grad.weight[i], weight))
            if layer.bias is not None and grad.bias is not None:
                grad_of(layer.bias).copy_(grad.bias[i])

    def biases(self, layers: Sequence[Layer]) -> list[Tensor]:
        """See ``Gradients``."""
        return [computed(grad_of(layer.bias)) for layer in layers]

    def sum_(self, groups: Groups, tensors: Sequence[Tensor]) -> None:
        """Nothing: all rows are here."""

    def gather(self, layer: Layer, rows: Tensor) -> Tensor:
        """All rows are here."""
        return rows


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape with a new leading dimension; a view if there is just one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def grad_of(parameter: Tensor | None) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter is not None and parameter.grad is not None
    return parameter.grad


def computed(tensor: Tensor) -> Tensor:
    """A tensor in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor.dtype))

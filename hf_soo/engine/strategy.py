"""Read and write a layer's gradient as one matrix, wherever it lies: the accessor, and plain gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hf_soo.engine.gradients import ALL_ROWS, Groups, Joint, computed, grad_of, stack
from hf_soo.engine.layers import Layer


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

    def read(self, groups: Groups) -> list[Joint]:
        """The groups' gradients in the accumulation dtype.

        A single layer in that dtype may be a view: changing it in place writes the gradient.
        """

    def own(self, groups: Groups, grads: Sequence[Joint]) -> list[Joint]:
        """What of the whole gradients this rank stores; the rest may be forgotten."""

    def write(self, group: list[Layer], grad: Joint) -> None:
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

    def read(self, groups: Groups) -> list[Joint]:
        """See ``Gradients``."""
        return [self._read(group) for group in groups]

    def _read(self, layers: Sequence[Layer]) -> Joint:
        weights = [computed(layer.as_matrix(grad_of(layer.weight))) for layer in layers]
        biases = [computed(grad_of(layer.bias)) for layer in layers if layer.bias is not None]
        return Joint(stack(weights), stack(biases) if biases else None)

    def own(self, groups: Groups, grads: Sequence[Joint]) -> list[Joint]:
        """All."""
        return list(grads)

    def write(self, group: list[Layer], grad: Joint) -> None:
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

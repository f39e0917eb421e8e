"""Gradients as the methods see them: one matrix a layer, norms of what was done to it, sums over rows that lie apart.

A computation on the rows of a gradient that lie on this rank is a generator (``RowSums``): it yields the tensors of
which it has summed its own rows, finds them summed over all rows when it goes on, and returns its result. So one piece
of mathematics serves whole gradients, where nothing is left to be summed, and shards; and the computations of all
layers advance together, so that their sums are one message.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from hf_soo.engine.layers import Layer, accumulation_dtype

ALL_ROWS = slice(None)

T = TypeVar("T")

RowSums = Generator[list[Tensor], None, T]
"""Yields tensors to be summed over the row shards, in place; returns the result."""

Groups = list[list[Layer]]
"""Layers that are worked on together, each list of one shape."""


@dataclass(slots=True)
class Joint:
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


@dataclass(slots=True)
class TransformNorms:
    """What a transform did to a batch of gradients, in squared norms over weight and bias; each of shape [...].

    Args:
        before: |G|².
        after: |P|².
        inner: ⟨P, G⟩.
    """

    before: Tensor
    after: Tensor
    inner: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> TransformNorms:
        """Zeros for the layers of ``like`` [L, ...]: somebody else moves them."""
        return cls(*like.new_zeros(3, like.shape[0]).unbind())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three."""
        return self.before, self.after, self.inner

    def cosine(self) -> Tensor:
        """cos(G, P); 1 where a norm is 0, since nothing was turned there."""
        norms = self.before.sqrt() * self.after.sqrt()
        return torch.where(norms > 0, self.inner / norms, 1.0).clamp(max=1.0)


def squared_norm(*tensors: Tensor | None) -> Tensor:
    """Sum of squares over all but the first dimension of all tensors, [L]."""
    total: Tensor | float = 0.0
    for tensor in tensors:
        if tensor is not None:
            each = tensor if tensor.ndim == 1 else torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)))
            total = each.square() + total
    assert isinstance(total, Tensor)
    return total


def run_with_shared_sums(computations: Sequence[RowSums[T]], sum_: Callable[[Sequence[Tensor]], None]) -> list[T]:
    """Run computations side by side, with one sum for all that they yield between two steps.

    Args:
        computations: the same on every rank, in the same order.
        sum_: sums tensors over the ranks that hold the other rows, in place.

    Returns:
        What each returned.
    """
    results: dict[int, T] = {}
    while len(results) < len(computations):
        partial: list[Tensor] = []
        for i, computation in enumerate(computations):
            if i not in results:
                try:
                    partial += next(computation)
                except StopIteration as done:
                    results[i] = done.value
        if partial:
            sum_(partial)
    return [results[i] for i in range(len(computations))]


def run_whole(computation: RowSums[T]) -> T:
    """Run one computation that has all rows.

    Args:
        computation: it.

    Returns:
        What it returned.
    """
    (result,) = run_with_shared_sums([computation], lambda tensors: None)
    return result


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

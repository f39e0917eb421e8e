"""Tensors by axis, for methods with a factor for each axis: cut into blocks, multiplied and contracted along an axis.

All tensors have a leading dimension [L] over layers of one shape, which is no axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.gradients import Joint, TransformNorms, inner, run_whole
from hf_soo.engine.preconditioner import Factor, LayerState

Slices = tuple[slice, ...]


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes longer than 1; (1,) for a tensor with one element."""
    return tuple(d for d in shape if d != 1) or (1,)


@dataclass(frozen=True)
class Cut:
    """How a tensor is seen: in ``shape``, cut into ``blocks`` in row-major order.

    Args:
        shape: the axes.
        blocks: the part of each axis that a block takes.
    """

    shape: tuple[int, ...]
    blocks: tuple[Slices, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], limits: Sequence[float]) -> Cut:
        """Cut every axis that is longer than its limit into parts of that length, and a shorter last one."""
        lengths = [min(d, limit) for d, limit in zip(shape, limits, strict=True)]
        parts = [
            [slice(start, min(start + int(part), d)) for start in range(0, d, int(part))]
            for d, part in zip(shape, lengths, strict=True)
        ]
        return cls(shape, tuple(itertools.product(*parts)))

    def sizes(self) -> Iterator[tuple[int, ...]]:
        """The shape of each block."""
        return (tuple(s.stop - s.start for s in block) for block in self.blocks)

    def axes(self) -> Iterator[tuple[int, int]]:
        """Of each axis of each block: its length, and that of all others together."""
        return ((d, math.prod(sizes) // d) for sizes in self.sizes() for d in sizes)

    def view(self, tensor: Tensor) -> Tensor:
        """``tensor`` [L, ...] as [L, *shape]; a copy if its strides forbid a view."""
        return tensor.reshape(-1, *self.shape)

    def parts(self, view: Tensor) -> list[Tensor]:
        """The blocks of a [L, *shape] tensor, as views."""
        return [view[index] for index in ((slice(None), *block) for block in self.blocks)]

    def name(self, block: int, axis: int) -> str:
        """The side of a layer's state that holds an axis of a block."""
        return f"axis{axis}" if len(self.blocks) == 1 else f"block{block}.axis{axis}"

    def factors(self, state: LayerState, block: int) -> list[Factor | None]:
        """The factors of a block's axes; None for an axis without."""
        return [state.get(self.name(block, axis)) for axis in range(len(self.shape))]


def put_back(tensor: Tensor, view: Tensor) -> None:
    """Copy a view's values back, if it was none but a copy."""
    if view.data_ptr() != tensor.data_ptr():
        tensor.copy_(view.reshape(tensor.shape))


def _times(X: Tensor, factor: Tensor, axis: int) -> Tensor:
    """X ×ₙ M, or the product with a diagonal.

    Args:
        X: [L, d_0, d_1, ...].
        factor: M [L, d, d], or the diagonal [L, d].
        axis: n, not counting [L].
    """
    if factor.ndim == 2:
        return X * _along(factor.to(X.dtype), X, axis)
    if axis > 0 and axis == X.ndim - 2:
        return (X.reshape(len(X), -1, X.shape[-1]) @ factor.mT).reshape(X.shape)
    moved = X.movedim(axis + 1, 1)
    return (factor @ moved.reshape(*moved.shape[:2], -1)).reshape(moved.shape).movedim(1, axis + 1)


def applied(G: Tensor, matrices: Sequence[Tensor | None], transpose: bool = False) -> Tensor:
    """G multiplied along each axis by a matrix (or its transpose) or diagonal, in the dtype of the matrices."""
    X = G.to(next((M.dtype for M in matrices if M is not None and M.ndim == 3), G.dtype))
    for axis, M in enumerate(matrices):
        if M is not None:
            X = _times(X, M.mT if transpose and M.ndim == 3 else M, axis)
    return X


def unfolded(X: Tensor, axis: int) -> Tensor:
    """The unfolding X₍ₙ₎ [L, d, product of the other axes], in some order of its columns."""
    if axis > 0 and axis == X.ndim - 2:
        return X.flatten(1, -2).mT
    moved = X.movedim(axis + 1, 1)
    return moved.reshape(*moved.shape[:2], math.prod(moved.shape[2:]))  # not -1: there may be no rows


def _along(vector: Tensor, X: Tensor, axis: int) -> Tensor:
    """A vector for each layer, [L, d], so that it multiplies X along an axis."""
    shape = [1] * X.ndim
    shape[0], shape[axis + 1] = vector.shape
    return vector.view(shape)


def others(sizes: Sequence[int], axis: int) -> int:
    """The product of the other axes' lengths."""
    return math.prod(sizes) // sizes[axis]


def learned(grad: Joint) -> tuple[Tensor, Tensor, Tensor]:
    """What a method learns of whole gradients: G in units, [L, ...]; |G|² and whether it is finite, [L].

    A second moment is of G in units: the largest and the smallest gradients count as the last one that has a square.
    """
    run_whole(grad.measure_())
    size = grad.measured()
    return grad.in_unit(grad.weight), grad.from_unit(grad.from_unit(size)), size.isfinite()


def everywhere(valid: Tensor) -> bool:
    """Whether a bool holds for all layers [L]. Asked on a CPU alone, where nothing waits for an answer."""
    return valid.device.type == "cpu" and all(valid.tolist())


def add_gram_(L: Tensor, X: Tensor, axis: int, valid: Tensor, beta: float, alpha: float) -> None:
    """L ← βL + α X₍ₙ₎X₍ₙ₎ᵀ in place, for the layers that are ``valid`` [L]; without a copy if all are."""
    Z = unfolded(X, axis)
    if everywhere(valid):
        L.baddbmm_(Z, Z.mT, beta=beta, alpha=alpha)
    else:
        torch.where(layerwise(valid, L), torch.baddbmm(L, Z, Z.mT, beta=beta, alpha=alpha), L, out=L)


def layerwise(values: Tensor, X: Tensor) -> Tensor:
    """A number for each layer, [L], so that it multiplies X."""
    return values.view(-1, *[1] * (X.ndim - 1))


def replace(G: Tensor, P: Tensor, unit: Tensor | None) -> TransformNorms:
    """Write a block's P over its G, unless it is not finite; the squares are in units."""
    moved = TransformNorms(inner(G, G, unit), inner(P, P, unit), inner(P, G, unit))
    torch.where(layerwise(moved.after < math.inf, G), P, G, out=G)
    return moved


def total(blocks: Sequence[TransformNorms]) -> TransformNorms:
    """What was done to all blocks of a layer."""
    if len(blocks) == 1:
        return blocks[0]
    return TransformNorms(
        *(torch.stack(norms).sum(0) for norms in zip(*(moved.tensors() for moved in blocks), strict=True))
    )

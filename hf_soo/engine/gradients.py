"""Gradients as the methods see them: one matrix a layer, norms of what was done to it, sums over rows that lie apart.

A computation on the rows of a gradient that lie on this rank is a generator (``RowSums``): it yields the tensors of
which it has summed its own rows, finds them summed over all rows when it goes on, and returns its result. So one piece
of mathematics serves whole gradients, where nothing is left to be summed, and some rows; and the computations of all
layers advance together, so that their sums are one message.

A norm of 10²⁰ is a number in float32, and its square is none. So squares are counted in a *unit* for each layer, a
power of two, which is 1 for all usual gradients: nothing that is finite becomes infinite or zero on the way to its P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from hf_soo.engine.layers import Layer

ALL_ROWS = slice(None)

T = TypeVar("T")

RowSums = Generator[list[Tensor], None, T]
"""Yields tensors to be summed over all rows, in place; returns the result."""

Groups = list[list[Layer]]
"""Layers that are worked on together, each list of one shape."""

USUAL = 48
"""Norms from 2⁻⁴⁸ to 2⁴⁸ have squares with room on both sides in float32: their unit is 1."""

_DOT = 1 << 18
"""Terms of a product of vectors on a CPU: one of fp32 numbers that is longer has too large a rounding error."""


@dataclass(slots=True)
class Joint:
    """Gradients of layers of one shape, stacked: each the one matrix Ĝ = [G | bias], n x m, or n x (m + 1) with a bias.

    Its two parts are never joined but by ``matrix``: an operation on Ĝ does its share on each, so that no method asks
    whether there is a bias.

    Args:
        weight: [L, n, m], or [L, *shape] of single parameters; fewer rows (dimension 1) where a rank holds some.
        bias: [L, n], or None where the layers train none.
        rows: which rows of the layers these are.
        unit: of squared norms, [L]; None: 1.
        size: |Ĝ|² of these rows as it was measured, in that unit squared, [L].
        waits: a thin change of Ĝ waits for the factor of ``scale_``, which comes in any case: one pass less.
        later: what waits, given the factor.
    """

    weight: Tensor
    bias: Tensor | None
    rows: slice = field(default_factory=lambda: ALL_ROWS)  # slices cannot be hashed before Python 3.12
    unit: Tensor | None = None
    size: Tensor | None = None
    waits: bool = False
    later: Callable[[float], None] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, and the rows and columns of Ĝ."""
        L, n, m = self.weight.shape
        return L, n, m + (self.bias is not None)

    def tensors(self) -> list[Tensor]:
        """Both parts, or the one there is."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def parts(self, index: int) -> list[Tensor]:
        """The tensors of one layer."""
        return [tensor[index] for tensor in self.tensors()]

    def split(self, matrix: Tensor) -> Joint:
        """A matrix [L, k, m (+ 1)] over the columns of Ĝ in the same two parts, as views."""
        m = self.weight.shape[-1]
        return Joint(matrix[..., :m], None if self.bias is None else matrix[..., m])

    def matrix(self) -> Tensor:
        """Ĝ as one tensor, [L, n, m (+ 1)]: a copy where there is a bias."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[..., None]], dim=-1)

    def measure_(self) -> RowSums[None]:
        """Take |Ĝ|², and choose the unit that it is counted in from now on.

        Yields:
            |Ĝ| of these rows: their sum over ranks is as good for a unit. Once more on a CPU where it is unusual.
        """
        on_cpu = self.weight.device.type == "cpu"
        sizes = [_plain_norms(tensor) if on_cpu else norms(tensor) for tensor in self.tensors()]
        yield [size := sum(sizes[1:], sizes[0].clone())]
        usual = _is_usual(size)
        if on_cpu and not usual:
            sizes = [norms(tensor) for tensor in self.tensors()]
            yield [size := sum(sizes[1:], sizes[0].clone())]
        self.unit = None if usual else unit_of(size)
        self.size = _sum_of_squares(sizes, self.unit)

    def measured(self) -> Tensor:
        """|Ĝ|² as ``measure_`` found it, or as it is; in units squared, [L]."""
        return self.squared_norm() if self.size is None else self.size

    def squared_norm(self) -> Tensor:
        """|Ĝ|² of each layer as it is now, in units squared, [L]."""
        return squared_norm(*self.tensors(), unit=self.unit)

    def in_unit(self, tensor: Tensor) -> Tensor:
        """What is linear in Ĝ, [L, ...], in units."""
        return tensor if self.unit is None else tensor / _along(self.unit, tensor)

    def from_unit(self, tensor: Tensor) -> Tensor:
        """The opposite of ``in_unit``."""
        return tensor if self.unit is None else tensor * _along(self.unit, tensor)

    def __matmul__(self, right: Tensor) -> Tensor:
        """Ĝ R for R [L, m (+ 1), k]: [L, n, k], row by row."""
        m = self.weight.shape[-1]
        product = self.weight @ right[..., :m, :]
        return product if self.bias is None else product.baddbmm_(self.bias[..., None], right[..., m:, :])

    def from_left(self, left: Tensor) -> Joint:
        """C Ĝ for C [L, k, n], a sum over rows (a named method: torch takes 25 µs to hand ``@`` over)."""
        bias = None if self.bias is None else (left @ self.bias[..., None]).squeeze(-1)
        return Joint(left @ self.weight, bias, unit=self.unit)

    def minus(self, U: Tensor, V: Joint) -> Joint:
        """Ĝ - U V as a new one, for U [L, n, k] and V over the columns of Ĝ (see ``split``)."""
        bias = self.bias
        if bias is not None and V.bias is not None:
            bias = torch.baddbmm(bias[..., None], U, V.bias[..., None], alpha=-1).squeeze(-1)
        return Joint(torch.baddbmm(self.weight, U, V.weight, alpha=-1), bias, unit=self.unit)

    def subtract_(self, *products: tuple[Tensor, Joint]) -> None:
        """Ĝ ← Ĝ - Σ U V in place, for thin U [L, n, k] and V over the columns of Ĝ, in one product."""
        thin, wide = zip(*products, strict=True)
        U, V = torch.cat(thin, dim=-1), torch.cat([each.weight for each in wide], dim=-2)

        def write(f: float) -> None:
            self.weight.baddbmm_(U, V, beta=f, alpha=-f)
            if self.bias is not None:
                v = torch.cat([each.bias for each in wide], dim=-1)
                self.bias[..., None].baddbmm_(U, v[..., None], beta=f, alpha=-f)

        self._write(write)

    def _write(self, write: Callable[[float], None]) -> None:
        """Change Ĝ now, or in ``scale_``."""
        if self.waits:
            self.later = write
        else:
            write(1.0)

    def subtract_outer_(self, u: Tensor, a: Tensor, divisor: float) -> None:
        """Ĝ ← (Ĝ - u aᵀ) / γ in place, for u [L, n], a [L, m (+ 1)] and the divisor γ."""
        m = self.weight.shape[-1]

        def write(f: float) -> None:
            self.weight.baddbmm_(u[..., None], a[..., None, :m], beta=f / divisor, alpha=-f / divisor)
            if self.bias is not None:
                self.bias.sub_(u * a[..., m, None]).div_(divisor).mul_(f)

        self._write(write)

    def multiply_(self, left: Tensor | None, right: Tensor | None) -> RowSums[TransformNorms]:
        """Ĝ ← B Ĝ A in place, for B [L, n, n], which needs all rows, and A [L, m, m], or None; see ``replace_``."""
        G = self.matrix()
        P = G if left is None else left @ G
        return self.replace_(G, P if right is None else P @ right)

    def replace_(self, G: Tensor, P: Tensor) -> RowSums[TransformNorms]:
        """Ĝ ← P in place, for the layers of which P is finite in all rows.

        Args:
            G: Ĝ as ``matrix`` gave it, [L, n, m (+ 1)].
            P: what it becomes.

        Yields:
            Sums over rows: |G|², |P|² and ⟨P, G⟩.

        Returns:
            Squared norms and inner product; ``after`` is not finite where Ĝ was kept.
        """
        before, after = (squared_norm(each, unit=self.unit) for each in (G, P))
        moved = TransformNorms(before, after, inner(P, G, unit=self.unit))
        yield [moved.before, moved.after, moved.inner]
        if not _is_usual(moved.after, math.inf):
            torch.where(moved.after.isfinite()[..., None, None], P, G, out=P)
        self.weight.copy_(P[..., : self.weight.shape[-1]])
        if self.bias is not None:
            self.bias.copy_(P[..., -1])
        return moved

    def scale_(self, factor: Tensor | None) -> None:
        """Multiply each layer's gradient by its entry of ``factor`` [L] (None: 1), in place."""
        if self.later is not None and self.weight.device.type == "cpu":  # where alone it waits, of one layer
            self.later(1.0 if factor is None else factor.tolist()[0])
            self.later = None
        elif factor is not None:
            self.weight.mul_(_along(factor, self.weight))
            if self.bias is not None:
                self.bias.mul_(factor[:, None])


@dataclass(slots=True)
class TransformNorms:
    """What a transform did to a batch of gradients, in squared norms over weight and bias; each of shape [...].

    Args:
        before: |G|².
        after: |P|².
        inner: ⟨P, G⟩.
        unit: all three are in units squared; None: 1.
    """

    before: Tensor
    after: Tensor
    inner: Tensor
    unit: Tensor | None = None

    @classmethod
    def nothing(cls, like: Tensor) -> TransformNorms:
        """Zeros for the layers of ``like`` [L, ...]: somebody else moves them."""
        return cls(*like.new_zeros(3, like.shape[0]).unbind())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three squares."""
        return self.before, self.after, self.inner

    def cosine(self) -> Tensor:
        """cos(G, P); 1 where a norm is 0, since nothing was turned there."""
        norms = self.before.sqrt() * self.after.sqrt()
        return torch.where(norms > 0, self.inner / norms, 1.0).clamp(max=1.0)


def squared_norm(*tensors: Tensor, unit: Tensor | None = None) -> Tensor:
    """Sum of squares over all but the first dimension of all tensors, in units squared, [L]."""
    return _sum_of_squares([_plain_norms(t) if unit is None else norms(t) for t in tensors], unit)


def _sum_of_squares(sizes: Sequence[Tensor], unit: Tensor | None) -> Tensor:
    return reduce(torch.add, [(size if unit is None else size / unit).square() for size in sizes])


def inner(X: Tensor, Y: Tensor, unit: Tensor | None = None) -> Tensor:
    """⟨X, Y⟩ over all but the first dimension, in units squared, [L]."""
    if unit is not None:
        X, Y = X / _along(unit, X), Y / _along(unit, Y)
    on_cpu = X.device.type == "cpu"
    if len(X) > 1:
        X, Y = X.flatten(1), Y.flatten(1)
        return (X * Y).sum(1) if on_cpu else torch.bmm(X[:, None], Y[..., None]).view(-1)
    X, Y = X.reshape(-1), Y.reshape(-1)
    if not on_cpu or len(X) <= _DOT:
        return torch.dot(X, Y).view(1)
    parts = zip(torch.split(X, _DOT), torch.split(Y, _DOT), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in parts]).sum(0, keepdim=True)


def norms(tensor: Tensor) -> Tensor:
    """Norms over all but the first dimension, [L]; right to rounding for all that is finite."""
    if tensor.device.type == "cuda":  # sums in float64 while it reads float32
        return torch.stack(list(torch._foreach_norm(tensor.unbind(), 2, dtype=torch.float64))).to(tensor.dtype)
    found = _plain_norms(tensor)
    if _is_usual(found) or tensor.ndim == 1 or not tensor.numel():
        return found
    unit = unit_of(tensor.abs().amax(_all_but_first(tensor)), 0, 0)
    return _plain_norms(tensor / _along(unit, tensor)) * unit


def _plain_norms(tensor: Tensor) -> Tensor:
    if len(tensor) == 1 and tensor.ndim > 1 and tensor.device.type == "cpu" and tensor.is_contiguous():
        return inner(tensor, tensor).sqrt()  # torch adds the squares of a large one up with an error of 10⁻⁴
    size: Tensor = tensor.abs() if tensor.ndim == 1 else torch.linalg.vector_norm(tensor, dim=_all_but_first(tensor))
    return size


def _all_but_first(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.ndim))


def _is_usual(sizes: Tensor, limit: float = USUAL) -> bool:
    """Whether all norms have the unit 1. Asked on a CPU alone, where nothing waits for an answer."""
    return sizes.device.type == "cpu" and all(2.0**-limit < size < 2.0**limit for size in sizes.tolist())


def unit_of(sizes: Tensor, least: int = -USUAL, most: int = USUAL) -> Tensor:
    """The powers of two by which sizes are divided to lie between 2ˡᵉᵃˢᵗ and 2ᵐᵒˢᵗ; 1 for 0 and what is not finite."""
    exponents = torch.frexp(torch.where(sizes.isfinite() & (sizes > 0), sizes, 1.0)).exponent
    return torch.ldexp(torch.ones_like(sizes), exponents - exponents.clamp(least, most))


def in_range(vectors: Tensor, limit: int = USUAL // 2) -> tuple[Tensor, Tensor | float]:
    """Vectors [L, d] with norms from 2⁻ˡⁱᵐⁱᵗ to 2ˡⁱᵐⁱᵗ, and the unit [L] that they are in (1.0: they were before)."""
    sizes = norms(vectors)
    if _is_usual(sizes, limit):
        return vectors, 1.0
    unit = unit_of(sizes, -limit, limit)
    return vectors / unit[:, None], unit


def _along(values: Tensor, tensor: Tensor) -> Tensor:
    """A number for each layer, [L], so that it multiplies ``tensor`` [L, ...]."""
    return values.view(-1, *[1] * (tensor.ndim - 1))


def run_with_shared_sums(
    computations: Sequence[RowSums[T]], sum_: Callable[[Sequence[Tensor]], None] | None = None
) -> list[T]:
    """Run computations side by side, with one sum for all that they yield between two steps.

    Args:
        computations: the same on every rank, in the same order.
        sum_: sums tensors over the ranks that hold the other rows, in place; None: all rows are here.

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
        if partial and sum_ is not None:
            sum_(partial)
    return [results[i] for i in range(len(computations))]


def run_whole(computation: RowSums[T]) -> T:
    """What one computation returns that has all rows."""
    (result,) = run_with_shared_sums([computation])
    return result

"""What a method multiplies, factorises and sums over ranks for a layer: its steps are measured and planned by it.

``Preconditioner.minimal_products`` tells the products and factorisations by shape, and ``scripts/bench_step.py`` times
them on random matrices, so that a step can be read as a multiple of its own arithmetic. ``Preconditioner.flops`` and
``Preconditioner.row_sums`` are what ``hf-soo plan`` predicts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Product:
    """[m, k] times [k, n]."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """2mkn."""
        return 2 * self.m * self.k * self.n


@dataclass(frozen=True, slots=True)
class Factorisation:
    """Of a symmetric positive definite [d, d] matrix: its inverse by Cholesky, its eigenvectors, or Q of its QR."""

    kind: Literal["cholesky_inverse", "eigh", "qr"]
    d: int

    @property
    def flops(self) -> int:
        """d³ for the inverse (d³/3 to factorise, 2d³/3 to invert), 8d³/3 for Q, 9d³ for eigenvectors, as usual."""
        return round({"cholesky_inverse": 1, "eigh": 9, "qr": 8 / 3}[self.kind] * self.d**3)


@dataclass(frozen=True, slots=True)
class MinimalWork:
    """What one layer's steps must multiply and factorise; what is done twice is listed twice.

    Args:
        every: in every step.
        update: in a step that updates the factors, besides those.
        refresh: in a step that computes new inverses, besides those.
    """

    every: Sequence[Product | Factorisation] = ()
    update: Sequence[Product | Factorisation] = ()
    refresh: Sequence[Product | Factorisation] = ()

    @property
    def flops(self) -> tuple[int, int, int]:
        """Of the three lists."""
        every, update, refresh = (sum(each.flops for each in part) for part in (self.every, self.update, self.refresh))
        return every, update, refresh


@dataclass(frozen=True, slots=True)
class BaseWork:
    """What a base must do for a parameter besides one pass over it, its gradient and its state.

    A base tells it by a method ``minimal_work(param, group)``; one without, as torch's are, must do no more.

    Args:
        again: how often something of the parameter's size is read or written once more, as a number over all of it
            (a norm) must be known first.
        products: what it multiplies.
        dtype: of the products; None: the parameter's.
    """

    again: int = 0
    products: Sequence[Product] = ()
    dtype: torch.dtype | None = None


def work_of_base(base: Optimizer, param: Tensor, group: dict[str, Any]) -> BaseWork:
    """What a base tells of a parameter of one of its groups."""
    tell = getattr(base, "minimal_work", None)
    return tell(param, group) if tell is not None else BaseWork()


@dataclass(frozen=True, slots=True)
class RowSumSizes:
    """How many numbers of one layer are in each sum over ranks, where each rank has some rows of its gradient.

    Args:
        every: of ``transform_rows``, in every step.
        update: of ``update_rows``, in a step that updates the factors.
    """

    every: Sequence[int] = ()
    update: Sequence[int] = ()


ELEMENTWISE = 10
"""Operations on an entry of a gradient by a method without matrix products, about."""

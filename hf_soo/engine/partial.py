"""Computations on the rows of a gradient that lie on this rank, with sums over all ranks' rows in between.

Such a computation is a generator: it yields the tensors of which it has summed its own rows, finds them summed over all
rows when it goes on, and returns its result. So one piece of mathematics serves whole gradients, where nothing is left
to be summed, and shards; and the computations of all layers advance together, so that their sums are one message.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

Partial = Generator[list[Tensor], None, T]
"""Yields tensors to be summed over the row shards, in place; returns the result."""


def together(computations: Sequence[Partial[T]], sum_: Callable[[Sequence[Tensor]], None]) -> list[T]:
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


def finish(computation: Partial[T]) -> T:
    """Run one computation that has all rows.

    Args:
        computation: it.

    Returns:
        What it returned.
    """
    (result,) = together([computation], lambda tensors: None)
    return result

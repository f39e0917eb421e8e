"""Which rank keeps, inverts and applies which layer's factors (KAISA: Pauloski et al., SC 2021, arXiv 2107.01739).

W ranks stand in a grid of k rows and W/k columns: rank r in row r // (W/k) and column r % (W/k). A layer belongs to one
column, whose k ranks precondition it (its *gradient workers*), and to one rank of that column, its *owner*, which alone
keeps its running factors and inverts them.

    statistics  summed at the owner
    inverses    owner -> its column                       (k = 1: nothing to send, MEM-OPT)
    P           the layer's column -> each row's others   (k = W: nothing to send, COMM-OPT)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_soo.engine.comm import Communicator


@dataclass(frozen=True)
class Plan:
    """Owners and columns of layers; every rank computes the same one from names and costs.

    Args:
        world: W.
        workers: k, a divisor of W.
        owner: layer name -> rank.
    """

    world: int
    workers: int
    owner: dict[str, int]

    @property
    def columns(self) -> int:
        """W / k."""
        return self.world // self.workers

    def column(self, rank: int) -> list[int]:
        """The ranks of ``rank``'s column, ascending."""
        return list(range(rank % self.columns, self.world, self.columns))

    def row(self, rank: int) -> list[int]:
        """The ranks of ``rank``'s row, ascending."""
        first = rank - rank % self.columns
        return list(range(first, first + self.columns))

    def is_gradient_worker(self, rank: int, name: str) -> bool:
        """Whether ``rank`` preconditions the layer."""
        return (rank - self.owner[name]) % self.columns == 0

    def source(self, rank: int, name: str) -> int:
        """The rank of ``rank``'s row that preconditions the layer."""
        return rank - rank % self.columns + self.owner[name] % self.columns


def make_plan(costs: Mapping[str, float], world: int, workers: int) -> Plan:
    """Give each layer to the least loaded column, and there to the least loaded rank, dearest first (LPT).

    Args:
        costs: layer name -> the cost of its inverses.
        world: W.
        workers: k.

    Returns:
        The plan; its largest load is at most the mean load plus twice the dearest layer.

    Raises:
        ValueError: k does not divide W.
    """
    if world % workers:
        divisors = [k for k in range(1, world + 1) if world % k == 0]
        raise ValueError(f"grad_workers={workers} does not divide the world size {world}; use one of {divisors}.")
    columns = world // workers
    load = [0.0] * world
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        column = min(range(columns), key=lambda c: (sum(load[c::columns]), c))
        rank = min(range(column, world, columns), key=lambda r: (load[r], r))
        owner[name] = rank
        load[rank] += costs[name]
    return Plan(world, workers, owner)


class Placement(Protocol):
    """Who holds what, and the communication that follows from it."""

    @property
    def world(self) -> int | None:
        """The world size it is for; None: any."""

    @property
    def everywhere(self) -> bool:
        """Whether every rank preconditions every layer."""

    def is_inverse_worker(self, name: str) -> bool:
        """Whether this rank keeps and inverts the layer's factors."""

    def is_gradient_worker(self, name: str) -> bool:
        """Whether this rank preconditions the layer."""

    def column(self, name: str) -> int:
        """Layers of one column are preconditioned by the same ranks."""

    def gradient_workers(self, name: str) -> Sequence[int] | None:
        """Those ranks; None: all."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place on every rank."""

    def sum_at_owner_(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Sum symmetric matrices of each layer over all ranks, in place at the layer's owner; elsewhere undefined."""

    def broadcast_inverses(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Send each layer's inverses from its owner to its column, in place."""

    def broadcast_preconditioned_gradients(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Send each layer's tensors from its workers to the others, in place."""

    def from_owner(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Send a layer's tensors from its owner to every rank, in place."""


class Replicated:
    """Every rank keeps and does everything; only sums over ranks are communicated."""

    world: int | None = None
    everywhere = True

    def __init__(self, comm: Communicator) -> None:
        """Take the means of communication."""
        self.comm = comm

    def is_inverse_worker(self, name: str) -> bool:
        """Always."""
        return True

    def is_gradient_worker(self, name: str) -> bool:
        """Always."""
        return True

    def column(self, name: str) -> int:
        """There is one."""
        return 0

    def gradient_workers(self, name: str) -> None:
        """All."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """One flat all-reduce."""
        self.comm.sum_([tensor for tensor in tensors if tensor.numel()])

    def sum_at_owner_(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Every rank is an owner."""
        self.sum_([tensor for each in tensors.values() for tensor in each])

    def broadcast_inverses(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Nothing: everybody has them."""

    def broadcast_preconditioned_gradients(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Nothing: everybody has them."""

    def from_owner(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Nothing: everybody has them."""


class Grid:
    """KAISA's grid: one message for each owner, column or row, whatever the number of layers."""

    def __init__(self, comm: Communicator, plan: Plan) -> None:
        """Make the process groups, on every rank in the same order.

        Args:
            comm: the means of communication.
            plan: who owns what.
        """
        self.comm, self.plan, self.rank = comm, plan, comm.rank
        self.world: int | None = plan.world
        self.everywhere = plan.columns == 1
        columns = [plan.column(c) for c in range(plan.columns)]
        rows = [plan.row(r * plan.columns) for r in range(plan.workers)]
        groups = {tuple(ranks): comm.group(ranks) for ranks in (*columns, *rows)}
        self.column_group, self.row_group = (
            groups[tuple(ranks)] for ranks in (plan.column(self.rank), plan.row(self.rank))
        )

    def is_inverse_worker(self, name: str) -> bool:
        """See ``Placement``."""
        return self.plan.owner[name] == self.rank

    def is_gradient_worker(self, name: str) -> bool:
        """See ``Placement``."""
        return self.plan.is_gradient_worker(self.rank, name)

    def column(self, name: str) -> int:
        """See ``Placement``."""
        return self.plan.owner[name] % self.plan.columns

    def gradient_workers(self, name: str) -> Sequence[int]:
        """See ``Placement``."""
        return self.plan.column(self.plan.owner[name])

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See ``Placement``."""
        self.comm.sum_([tensor for tensor in tensors if tensor.numel()])

    def sum_at_owner_(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """One reduction of packed triangles for each owner."""
        for owner, mine in self._by(self.plan.owner, tensors):
            packed = [_pack_triangle(tensor) for tensor in mine]
            self.comm.sum_at_(owner, packed)
            if owner == self.rank:
                for tensor, triangle in zip(mine, packed, strict=True):
                    _unpack_triangle_(tensor, triangle)

    def broadcast_inverses(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """One broadcast in the column for each owner in it."""
        if self.plan.workers > 1:
            for owner, mine in self._by(
                self.plan.owner, {n: t for n, t in tensors.items() if self.is_gradient_worker(n)}
            ):
                self.comm.send_(owner, mine, self.column_group)

    def broadcast_preconditioned_gradients(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """One broadcast in the row for each column."""
        if self.plan.columns > 1:
            sources = {name: self.plan.source(self.rank, name) for name in tensors}
            for source, mine in self._by(sources, tensors):
                self.comm.send_(source, mine, self.row_group)

    def from_owner(self, name: str, tensors: Sequence[Tensor]) -> None:
        """See ``Placement``."""
        self.comm.send_(self.plan.owner[name], tensors, None)

    @staticmethod
    def _by(rank_of: Mapping[str, int], tensors: Mapping[str, list[Tensor]]) -> Iterable[tuple[int, list[Tensor]]]:
        """(rank, the tensors of its layers that are not empty), ranks ascending."""
        for rank in sorted({rank_of[name] for name in tensors}):
            mine = [t for name, each in tensors.items() if rank_of[name] == rank for t in each if t.numel()]
            if mine:
                yield rank, mine


@dataclass(frozen=True, slots=True)
class Assignment:
    """What this rank does for a layer.

    Args:
        column: layers of one column are preconditioned by the same ranks.
        keeps: whether it keeps the running factors and inverts them.
        preconditions: whether it turns the layer's G into P.
    """

    column: int
    keeps: bool
    preconditions: bool

    @classmethod
    def of(cls, placement: Placement, name: str) -> Assignment:
        """From a placement, for the layer of a name."""
        return cls(placement.column(name), placement.is_inverse_worker(name), placement.is_gradient_worker(name))


def _pack_triangle(matrix: Tensor) -> Tensor:
    """The distinct entries of a symmetric matrix [d, d], in a few operations whatever d: [d(d+1)/2].

    With halves p = ⌊d/2⌋ and q = d - p of it, S = [[X, Z], [Zᵀ, Y]], the upper triangle of X fits above the lower one
    of Y in a rectangle [q, p + 1]; Z follows.
    """
    p = len(matrix) // 2
    X, Y, Z = matrix[:p, :p], matrix[p:, p:], matrix[:p, p:]
    rectangle = matrix.new_zeros(len(Y), p + 1)
    rectangle[:p, 1:] = X.triu()
    rectangle[:, : len(Y)] += Y.tril()
    return torch.cat([rectangle.flatten(), Z.flatten()])


def _unpack_triangle_(matrix: Tensor, triangle: Tensor) -> None:
    """The inverse of ``_pack_triangle``, into ``matrix``."""
    d = len(matrix)
    p, q = d // 2, d - d // 2
    rectangle, Z = triangle[: q * (p + 1)].view(q, p + 1), triangle[q * (p + 1) :].view(p, q)
    upper, lower = rectangle[:p, 1:].triu(), rectangle[:, :q].tril()
    matrix[:p, :p] = upper + upper.triu(1).mT
    matrix[p:, p:] = lower + lower.tril(-1).mT
    matrix[:p, p:] = Z
    matrix[p:, :p] = Z.mT

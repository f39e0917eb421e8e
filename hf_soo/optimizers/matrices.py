"""The matrices of a group wherever they lie: pieces on this rank, to be worked on whole at one rank each.

one process     a matrix is its own piece
DDP, ZeRO-0     every rank has every matrix; each works on its share
FSDP2           rows of each
ZeRO-1, 2, 3    ranges of flat tensors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hf_soo.engine.comm import Communicator, Group
from hf_soo.engine.dtensors import full_shape, is_dtensor, local, sharded_dim
from hf_soo.engine.pieces.exchange import Cut, Exchange, Span, row_spans
from hf_soo.engine.strategy import FlatPartition, LocalGradient


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter as matrices: [n, m]; a stack [E, n, m]; a convolution [out, in, h, w] as [out, in·h·w]."""
    return shape if len(shape) < 4 else (shape[0], math.prod(shape[1:]))


@dataclass(frozen=True, slots=True)
class Piece:
    """What this rank holds of a matrix, or of a stack of them.

    Args:
        param: the tensor that the base steps on, by which its state is known.
        cut: how the matrix lies on the ranks, with its ``matrix_shape``.
        part: where the piece lies in a flat ``param``; None: it is all that this rank has of ``param``.
    """

    param: Tensor
    cut: Cut
    part: slice | None = None

    @property
    def weight(self) -> Tensor:
        """Its elements."""
        return self._of(self.param.detach())

    def gradient(self, group: dict[str, Any]) -> LocalGradient:
        """With its gradient, as ``param`` has it."""
        assert self.param.grad is not None
        return LocalGradient(group, self.param, self.weight, self._of(self.param.grad), self.part)

    def _of(self, tensor: Tensor) -> Tensor:
        return local(tensor) if self.part is None else tensor.view(-1)[self.part]


class Matrices:
    """Those of some parameters, with the exchange that makes them whole; every rank of a group builds the same."""

    def __init__(
        self,
        params: Sequence[Tensor],
        partition: FlatPartition | None,
        comm: Communicator,
        share: bool,
        cost: Callable[[tuple[int, ...]], float],
        columns: int = 0,
    ) -> None:
        """Find the pieces and deal the work.

        Args:
            params: matrices, DTensors of rows, or flat tensors.
            partition: what flat tensors are pieces of; None: there are none.
            comm: the means of communication.
            share: whether matrices that every rank has are dealt too.
            cost: a matrix's shape -> what the work on it costs, in any unit.
            columns: that travel beside each matrix.

        Raises:
            NotImplementedError: a DTensor is cut in another way than by rows; or columns beside flat tensors.
        """
        ranks: Group = None
        if partition is not None:
            self.pieces = [Piece(p, cut, part) for p in params for cut, part in partition.matrices_in(p)]
        else:
            size = comm.world_size if share else 1
            if params and is_dtensor(params[0]):
                ranks = params[0].device_mesh.get_group(sharded_dim("a parameter", params[0]))
                size = dist.get_world_size(ranks)
            self.pieces = [Piece(p, _cut_of(p, size)) for p in params]
        cuts = [piece.cut for piece in self.pieces]
        costs = [cost(cut.shape) for cut in cuts]
        if columns:
            cuts = [_widened(cut, columns) for cut in cuts]
        self.exchange = Exchange(comm, ranks, cuts, costs)

    def through(
        self,
        direction: Callable[[Piece], Tensor],
        work: Callable[[list[Tensor]], list[Tensor]],
        prototype: Tensor,
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its piece of what the owner makes of the whole.

        Args:
            direction: a piece -> what is to be made whole.
            work: of whole matrices, see ``Exchange.run``.
            prototype: has the dtype and the device of the results.
        """
        for number, result in self.exchange.run(lambda i: direction(self.pieces[i]), work, prototype):
            yield self.pieces[number], result


def _cut_of(param: Tensor, ranks: int) -> Cut:
    """Of a DTensor by rows; of another tensor every rank has all."""
    shape = full_shape(param)
    spans = row_spans(shape, ranks) if is_dtensor(param) else [Span(0, math.prod(shape))] * ranks
    return Cut(matrix_shape(shape), spans)


def _widened(cut: Cut, columns: int) -> Cut:
    """The cut of a matrix with some columns beside it.

    Raises:
        NotImplementedError: a rank has parts of rows.
    """
    try:
        return cut.widened(columns)
    except ValueError as error:
        raise NotImplementedError(
            "Muon: row_beta under ZeRO stage 1, 2 or 3, whose pieces are parts of rows; leave it out, or use FSDP2 or "
            "DistributedDataParallel."
        ) from error

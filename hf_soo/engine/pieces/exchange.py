"""Whole tensors out of the pieces that ranks hold, each at one rank, and what is made of them back into pieces.

    pieces -> owner      one all-to-all for a bucket of tensors, under way while the bucket before is worked on
    work(whole)          at the owner
    result -> pieces     one all-to-all, under way while the next bucket is worked on

A tensor that its owner holds whole (DistributedDataParallel) sends nothing on the way there. Tensors are dealt dearest
first, each to the rank with the least work so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soo.engine.comm import Communicator, Group

BUCKET_BYTES = 2**26
"""About the most that a rank holds of a bucket's tensors, unless a single one is larger."""

Numbered = Iterator[tuple[int, Tensor]]
"""(number of a tensor, all of it or this rank's piece)."""


@dataclass(frozen=True)
class Span:
    """A piece of a flat tensor: its first element and its length."""

    start: int
    length: int


@dataclass(frozen=True)
class Cut:
    """How a whole tensor lies on the ranks of a group.

    Args:
        shape: of the whole.
        spans: of each rank, what it holds: perhaps nothing, perhaps everything.
    """

    shape: tuple[int, ...]
    spans: Sequence[Span]

    def whole_at(self, rank: int) -> bool:
        """Whether a rank holds everything."""
        return self.spans[rank].length == prod(self.shape)

    def widened(self, columns: int) -> Cut:
        """With some more columns beside the matrix, [..., m] becoming [..., m + columns].

        Raises:
            ValueError: a rank has parts of rows.
        """
        *stack, m = self.shape
        if any(end % m for span in self.spans for end in (span.start, span.length)):
            raise ValueError(f"rows of {m} are cut: {list(self.spans)}.")
        wide = m + columns
        return Cut((*stack, wide), [Span(span.start // m * wide, span.length // m * wide) for span in self.spans])

    def sent(self, rank: int, owner: int) -> Span:
        """What a rank sends to the owner: nothing if that one has everything."""
        return Span(0, 0) if self.whole_at(owner) else self.spans[rank]


def row_spans(shape: Sequence[int], ranks: int) -> list[Span]:
    """The pieces of a tensor whose first dimension is cut as ``torch.chunk`` cuts it."""
    width, chunk = prod(shape[1:]), ceil(shape[0] / ranks)
    cuts = [min(rank * chunk, shape[0]) for rank in range(ranks + 1)]
    return [Span(a * width, (b - a) * width) for a, b in pairwise(cuts)]


def deal(costs: Sequence[float], ranks: int, allowed: Sequence[Sequence[int]] | None = None) -> list[int]:
    """The rank that each piece of work goes to: dearest first, each to the one with the least so far.

    Args:
        costs: of each, in any unit.
        ranks: how many there are.
        allowed: the ranks that can do each; None: all.
    """
    load, owner = [0.0] * ranks, [0] * len(costs)
    for i in _dearest_first(costs):
        owner[i] = min(range(ranks) if allowed is None else allowed[i], key=lambda rank: (load[rank], rank))
        load[owner[i]] += costs[i]
    return owner


def _dearest_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda i: (-costs[i], i))


class Exchange:
    """Owners and messages for some tensors of one group of ranks; every rank builds the same one."""

    def __init__(
        self,
        comm: Communicator,
        group: Group,
        cuts: Sequence[Cut],
        costs: Sequence[float],
        owner: Sequence[int] | None = None,
    ) -> None:
        """Deal the tensors.

        Args:
            comm: the means of communication.
            group: the ranks that hold the pieces.
            cuts: how each tensor lies on them.
            costs: of the work on each, in any unit.
            owner: of each; None: deal them.
        """
        self.comm, self.group, self.cuts = comm, group, cuts
        self.ranks = range(len(cuts[0].spans) if cuts else 1)
        self.rank = dist.get_rank(group) if len(self.ranks) > 1 else 0
        self.owner = deal(costs, len(self.ranks)) if owner is None else list(owner)
        self.buckets = list(self._buckets(_dearest_first(costs)))

    def _buckets(self, order: Sequence[int]) -> Iterator[list[int]]:
        bucket: list[int] = []
        held = 0
        for i in order:
            bytes_ = 4 * max(span.length for span in self.cuts[i].spans)
            if bucket and held + bytes_ > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(i)
            held += bytes_
        if bucket:
            yield bucket

    def _in_order(self, bucket: Sequence[int]) -> list[int]:
        """Rank by rank, as a message has them."""
        return sorted(bucket, key=lambda i: self.owner[i])

    def run(
        self, piece: Callable[[int], Tensor], work: Callable[[list[Tensor]], list[Tensor]], prototype: Tensor
    ) -> Numbered:
        """All tensors, from this rank's pieces to its pieces of the results; every rank must go through all.

        Args:
            piece: tensor number -> what this rank holds of it, in any shape; each is asked for once, when it is needed.
            work: whole tensors -> the owner's result for each, of its shape.
            prototype: has the dtype and the device of the results.

        Yields:
            (tensor number, this rank's piece of the result, in any shape).
        """
        coming = [self.gather(bucket, piece) for bucket in self.buckets[:1]]
        going: list[Numbered] = []
        for number, bucket in enumerate(self.buckets):
            whole = dict(coming.pop())
            coming += [self.gather(following, piece) for following in self.buckets[number + 1 : number + 2]]
            results = dict(zip(whole, work(list(whole.values())), strict=True))
            del whole
            going.append(self.scatter(bucket, results, prototype))
            if number:
                yield from going.pop(0)
        for last in going:
            yield from last

    def gather(self, bucket: Sequence[int], piece: Callable[[int], Tensor]) -> Numbered:
        """Send this rank's pieces of some tensors to the owners; then (number, whole tensor) of those that it owns."""
        bucket = self._in_order(bucket)
        pieces = {i: piece(i) for i in bucket}
        if len(self.ranks) == 1:
            return ((i, each.reshape(self.cuts[i].shape)) for i, each in pieces.items())
        mine = [i for i in bucket if self.owner[i] == self.rank]
        sent = [[self.cuts[i].sent(self.rank, to) for i in bucket if self.owner[i] == to] for to in self.ranks]
        received = [[self.cuts[i].sent(source, self.rank) for i in mine] for source in self.ranks]
        parts = [pieces[i].reshape(-1) for i in bucket if not self.cuts[i].whole_at(self.owner[i])]
        arrive = self._swap(parts, sent, received, pieces[bucket[0]])
        return self._joined({i: pieces[i] for i in mine}, received, arrive)

    def _joined(
        self, own: dict[int, Tensor], received: list[list[Span]], arrive: Callable[[], list[Tensor]]
    ) -> Numbered:
        """Whole tensors from what has arrived, source by source."""
        whole = {}
        for i, piece in own.items():
            there = self.cuts[i].whole_at(self.rank)
            whole[i] = piece.reshape(-1) if there else piece.new_empty(prod(self.cuts[i].shape))
        for spans, flat in zip(received, arrive(), strict=True):
            parts = torch.split(flat, [span.length for span in spans])
            for target, span, part in zip(whole.values(), spans, parts, strict=True):
                target[span.start : span.start + span.length] = part
        for i in list(whole):
            yield i, whole.pop(i).view(self.cuts[i].shape)

    def scatter(self, bucket: Sequence[int], results: dict[int, Tensor], prototype: Tensor) -> Numbered:
        """Send this rank's results for some tensors to where their pieces lie; then (number, this rank's piece).

        Args:
            bucket: their numbers.
            results: of those that this rank owns, in the order of ``bucket``.
            prototype: has the dtype and the device of all results.
        """
        if len(self.ranks) == 1:
            return iter(results.items())
        bucket = self._in_order(bucket)
        sent = [[self.cuts[i].spans[to] for i in results] for to in self.ranks]
        received = [[self.cuts[i].spans[self.rank] for i in bucket if self.owner[i] == source] for source in self.ranks]
        flat = [result.reshape(-1) for result in results.values()]
        parts = [each[cut.start : cut.start + cut.length] for to in sent for each, cut in zip(flat, to, strict=True)]
        return self._pieces(bucket, received, self._swap(parts, sent, received, prototype))

    def _pieces(
        self, bucket: Sequence[int], received: list[list[Span]], arrive: Callable[[], list[Tensor]]
    ) -> Numbered:
        """This rank's pieces from what has arrived, owner by owner: the order of the bucket."""
        lengths = [span.length for spans in received for span in spans]
        yield from zip(bucket, torch.split(torch.cat(arrive()), lengths), strict=True)

    def _swap(
        self, parts: Sequence[Tensor], sent: list[list[Span]], received: list[list[Span]], prototype: Tensor
    ) -> Callable[[], list[Tensor]]:
        """Begin an all-to-all.

        Args:
            parts: what is sent, flat, rank by rank.
            sent: their lengths, to each rank.
            received: the lengths of what comes from each rank.
            prototype: has the dtype and the device.

        Returns:
            Waits, and gives what came from each rank, flat.
        """
        lengths_out, lengths_in = ([sum(span.length for span in spans) for spans in each] for each in (sent, received))
        message = torch.cat(list(parts)) if parts else prototype.new_empty(0)
        arrived = prototype.new_empty(sum(lengths_in))
        finish = self.comm.swap(message, arrived, lengths_out, lengths_in, self.group)

        def arrive() -> list[Tensor]:
            finish()
            return list(torch.split(arrived, lengths_in))

        return arrive

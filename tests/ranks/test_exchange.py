"""Whole tensors out of pieces and back, on four ranks, however they are cut."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hf_soo.engine.comm import Communicator
from hf_soo.engine.pieces import exchange
from hf_soo.engine.pieces.exchange import Cut, Exchange, Span
from tests.ranks.distributed import run_ranks

WORLD = 4


def cuts(kind: str, count: int, draw: random.Random) -> list[Cut]:
    """By rows, some ranks without any; flat, anywhere; whole on every rank; or all mixed."""
    found = []
    for _ in range(count):
        shape = (draw.randint(1, 9), draw.randint(1, 7))
        size = shape[0] * shape[1]
        how = draw.choice(["rows", "flat", "whole"]) if kind == "mixed" else kind
        if how == "whole":
            found.append(Cut(shape, [Span(0, size)] * WORLD))
            continue
        chunk = -(-shape[0] // WORLD)
        ends = [min(rank * chunk, shape[0]) * shape[1] for rank in range(1, WORLD + 1)]
        if how == "flat":
            ends = [*sorted(draw.choices(range(size + 1), k=WORLD - 1)), size]
        found.append(Cut(shape, [Span(a, b - a) for a, b in zip([0, *ends], ends, strict=False)]))
    return found


def exchanged(rank: int, world: int) -> list[tuple[int, dict[str, int]]]:
    """Every case on this rank: (tensors that it worked on, bytes sent)."""
    seen = []
    for number, (kind, count, room) in enumerate(CASES):
        draw = random.Random(number)
        given = cuts(kind, count, draw)
        whole = [torch.randn(cut.shape, generator=torch.Generator().manual_seed(i)) for i, cut in enumerate(given)]
        exchange.BUCKET_BYTES = room
        comm, worked = Communicator(), 0

        def piece(i: int, given: list[Cut] = given, whole: list[Tensor] = whole) -> Tensor:
            span = given[i].spans[rank]
            return whole[i].view(-1)[span.start : span.start + span.length].clone()

        def work(tensors: list[Tensor]) -> list[Tensor]:
            nonlocal worked
            worked += len(tensors)
            return [(2 * tensor + tensor.mean()).double() for tensor in tensors]

        costs = [float(cut.shape[0] * cut.shape[1]) for cut in given]
        prototype = torch.empty(0, dtype=torch.float64)
        back = dict(Exchange(comm, None, given, costs).run(piece, work, prototype))
        assert sorted(back) == list(range(count))
        for i, result in back.items():
            span = given[i].spans[rank]
            expected = (2 * whole[i] + whole[i].mean()).double().view(-1)[span.start : span.start + span.length]
            assert torch.equal(result.reshape(-1), expected), (kind, i)
        seen.append((worked, dict(comm.traffic)))
    return seen


CASES = [
    (kind, count, room) for kind in ("rows", "flat", "whole", "mixed") for count, room in ((9, 300), (7, 2**20), (1, 1))
]


def test_every_piece_comes_back_with_the_owners_result() -> None:
    ranks = run_ranks(WORLD, exchanged)
    for (_, count, _), seen in zip(CASES, zip(*ranks, strict=True), strict=True):
        assert sum(worked for worked, _ in seen) == count  # each at one rank


def test_one_process_sends_nothing_and_copies_nothing() -> None:
    whole = [torch.randn(3, 2), torch.randn(4, 4)]
    given = [Cut(tuple(t.shape), [Span(0, t.numel())]) for t in whole]
    comm = Communicator()
    back = dict(Exchange(comm, None, given, [1.0, 2.0]).run(lambda i: whole[i], list, whole[0]))
    assert [back[i].data_ptr() for i in range(2)] == [tensor.data_ptr() for tensor in whole] and not comm.traffic


@pytest.mark.parametrize(("costs", "loads"), [([9, 8, 7, 6, 5, 4, 3, 2], [11, 11, 11, 11]), ([5.0], [5, 0, 0, 0])])
def test_the_dearest_are_dealt_first(monkeypatch: pytest.MonkeyPatch, costs: list[float], loads: list[float]) -> None:
    monkeypatch.setattr(exchange.dist, "get_rank", lambda group: 0)
    given = [Cut((2, 2), [Span(0, 4), *[Span(4, 0)] * 3]) for _ in costs]
    plan = Exchange(Communicator(), None, given, costs)
    assert [sum(c for c, owner in zip(costs, plan.owner, strict=True) if owner == rank) for rank in plan.ranks] == loads

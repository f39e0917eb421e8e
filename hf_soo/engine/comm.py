"""Communication between the ranks of a data-parallel run; nothing at world size 1."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soo.engine.dtensors import full_shape, is_dtensor

logger = logging.getLogger(__name__)

Group = dist.ProcessGroup | None


class Communicator:
    """Flat messages. The default process group is looked up at each call: it may start after construction.

    Attributes:
        traffic: bytes that this rank has handed to each kind of collective, "all_reduce", "reduce", "broadcast",
            "all_gather" and "all_to_all".
    """

    def __init__(self) -> None:
        """Start with nothing sent."""
        self.traffic: Counter[str] = Counter()

    @property
    def world_size(self) -> int:
        """The number of ranks that share a global batch."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return dist.get_rank() if self.world_size > 1 else 0

    def group(self, ranks: Sequence[int]) -> Group:
        """A process group of some ranks, as patient as the default one; every rank must call it, in the same order."""
        if len(ranks) == self.world_size:
            return None
        # new_group starts from the backend's default, 30 minutes, and torch has no public way to read the user's
        options = dist.distributed_c10d._get_default_group()._get_backend(_default_device()).options
        timeout = options._timeout if options is not None else None  # hf-soo plan's made-up ranks never wait
        group: Group = dist.new_group(list(ranks), timeout=timeout)
        return group

    def sum_(self, tensors: Sequence[Tensor], group: Group = None) -> None:
        """Sum tensors of one device over all ranks (of a group), in place, in one flat all-reduce for each dtype."""
        if self.world_size > 1:
            self._flat("all_reduce", tensors, lambda flat: dist.all_reduce(flat, group=group))

    def sum_at_(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks in one flat reduction, in place; the result is defined at ``rank`` alone."""
        self._flat("reduce", tensors, lambda flat: dist.reduce(flat, dst=rank))

    def send_(self, source: int, tensors: Sequence[Tensor], group: Group) -> None:
        """Give every rank of a group the tensors of ``source``, in place, in one flat broadcast."""
        self._flat("broadcast", tensors, lambda flat: dist.broadcast(flat, src=source, group=group))

    def gather(self, piece: Tensor, group: Group, size: int) -> Tensor:
        """The pieces [d] of a group's ``size`` ranks, all of one length, as [size, d]."""
        pieces = piece.new_empty(size * piece.numel())
        self._count("all_gather", piece)
        dist.all_gather_into_tensor(pieces, piece, group=group)
        return pieces.view(size, -1)

    def swap(
        self, message: Tensor, arrived: Tensor, lengths_out: list[int], lengths_in: list[int], group: Group
    ) -> Callable[[], object]:
        """Begin to send each rank of a group its part of ``message``, and to fill ``arrived`` with theirs.

        Args:
            message: [sum of lengths_out], rank by rank.
            arrived: [sum of lengths_in].
            lengths_out: for each rank.
            lengths_in: of each rank.
            group: the ranks.

        Returns:
            Waits until it is done.
        """
        self._count("all_to_all", message)
        handle = dist.all_to_all_single(arrived, message, lengths_in, lengths_out, group=group, async_op=True)
        wait: Callable[[], object] = handle.wait
        return wait

    def agree(
        self,
        mine: Mapping[str, str],
        whose: str = "the optimizer's",
        way_out: str = "build it alike on every rank, and resume all ranks from one checkpoint.",
    ) -> None:
        """Refuse to go on if ranks were given different things: they would drift apart, or wait for each other.

        One message of 32 bytes where they agree. A rank that does not come is waited for as long as in any other
        message: the process group's time-out.

        Args:
            mine: what must be the same on every rank, by name; every rank must call it.
            whose: what the names are of, for the message.
            way_out: what to do about a difference.

        Raises:
            ValueError: it is not the same, on every rank; the first name that differs, with its values.
        """
        if self.world_size == 1:
            return
        digest = hashlib.sha256(repr(list(mine.items())).encode()).digest()
        own = torch.tensor(list(digest), dtype=torch.uint8, device=_default_device())
        seen = own.new_empty(self.world_size * len(digest))
        dist.all_gather_into_tensor(seen, own)
        if bool((seen.view(self.world_size, -1) == own).all()):
            return
        everybody: list[Mapping[str, str]] = [{}] * self.world_size
        dist.all_gather_object(everybody, dict(mine))
        raise ValueError(f"the ranks disagree on {whose} {_first_disagreement(everybody)}; {way_out}")

    def _flat(self, kind: str, tensors: Sequence[Tensor], message: Callable[[Tensor], object]) -> None:
        """One message for all tensors of a dtype."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            mine = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in mine])
            self._count(kind, flat)
            message(flat)
            for tensor, part in zip(mine, torch.split(flat, [tensor.numel() for tensor in mine]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _count(self, kind: str, message: Tensor) -> None:
        self.traffic[kind] += message.nbytes
        logger.debug("%s of %d bytes (%d %s)", kind, message.nbytes, message.numel(), message.dtype)


def refuse_join(ddp: Any, method: str) -> None:
    """Refuse a step whose messages a rank that has left the loop would not answer.

    Args:
        ddp: the DistributedDataParallel that the model runs in, or None.
        method: the optimizer's name.

    Raises:
        NotImplementedError: it is in torch's ``join()``.
    """
    join = getattr(ddp, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise NotImplementedError(
            f"{method} in join(): its step sums statistics over all ranks, and would wait for one that has no batches "
            "left; give every rank the same number of batches (DistributedSampler does, or drop the rest), or end all "
            "ranks with the first: join(throw_on_early_termination=True)."
        )


def _default_device() -> torch.device:
    """Where a message of the default process group may lie, whatever its backend; torch has no public way to ask."""
    return torch.device(dist.distributed_c10d._get_object_coll_device())


def _first_disagreement(everybody: Sequence[Mapping[str, str]]) -> str:
    """The first name whose value is not the same everywhere, and which ranks have which value."""
    for name in dict.fromkeys(name for theirs in sorted(everybody, key=len, reverse=True) for name in theirs):
        ranks: dict[str, list[str]] = defaultdict(list)
        for rank, theirs in enumerate(everybody):
            ranks[theirs.get(name, "nothing")].append(str(rank))
        if len(ranks) > 1:
            one, *others = ranks
            start = max(0, min(_first_difference(one, other) for other in others) - 60)
            (first, here), *rest = ((_who(holders), repr(text[start : start + 200])) for text, holders in ranks.items())
            return f"{name}: {first} {'has' if len(ranks[one]) == 1 else 'have'} {here}" + "".join(
                f", {who} {there}" for who, there in rest[:3]
            )
    return "the order of what they compare"


def _who(ranks: Sequence[str]) -> str:
    """Some ranks in words."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{' ...' * (len(ranks) > 8)}"


def _first_difference(one: str, other: str) -> int:
    """The position of the first character that differs."""
    pairs = zip(one, other, strict=False)  # one may be the start of the other
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def text_of(value: Any) -> str:
    """A setting as a text that is the same in every process: of an object that is no plain value, its type alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {text_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [text_of(item) for item in value]
        return f"({', '.join(items)})" if isinstance(value, (list, tuple)) else f"{{{', '.join(sorted(items))}}}"
    if isinstance(value, Tensor):
        return str(value.tolist()) if value.numel() <= 1 else f"{value.dtype}{list(value.shape)}"
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size))
    return repr(value) if plain else type(value).__qualname__


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(named: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    """A sum of the bits of each parameter that is whole in this process: exact, whatever the order of the sum.

    Complex numbers are left out, and what a strategy has cut (DTensors, ZeRO-3): no two ranks have the same of it.
    """
    sums = {
        name: p.detach().view(_BITS[p.element_size()]).sum(dtype=_BITS[p.element_size()])
        for name, p in named
        if not (is_dtensor(p) or p.is_meta) and p.numel() == math.prod(full_shape(p)) and p.layout == torch.strided
        and not p.is_complex()
    }  # fmt: skip
    return dict(zip(sums, torch.stack([each.long() for each in sums.values()]).tolist(), strict=True)) if sums else {}

"""Communication between the ranks of a data-parallel run; nothing at world size 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


class Communicator:
    """Flat messages. The default process group is looked up at each call: it may start after construction."""

    @property
    def world_size(self) -> int:
        """The number of ranks that share a global batch."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return dist.get_rank() if self.world_size > 1 else 0

    def group(self, ranks: Sequence[int]) -> Group:
        """A process group of some ranks; every rank must call it, in the same order."""
        return None if len(ranks) == self.world_size else dist.new_group(list(ranks))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype and device over all ranks, in place, in one flat all-reduce."""
        if self.world_size > 1:
            _flat(tensors, dist.all_reduce)

    def sum_at_(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks in one flat reduction, in place; the result is defined at ``rank`` alone."""
        _flat(tensors, lambda flat: dist.reduce(flat, dst=rank))

    def send_(self, source: int, tensors: Sequence[Tensor], group: Group) -> None:
        """Give every rank of a group the tensors of ``source``, in place, in one flat broadcast."""
        _flat(tensors, lambda flat: dist.broadcast(flat, src=source, group=group))


def _flat(tensors: Sequence[Tensor], message: Callable[[Tensor], object]) -> None:
    """One message for all tensors of a dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        mine = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in mine])
        message(flat)
        for tensor, part in zip(mine, torch.split(flat, [tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(part.view_as(tensor))

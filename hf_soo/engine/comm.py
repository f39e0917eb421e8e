"""Communication between the ranks of a data-parallel run; nothing at world size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Communicator:
    """Sums over ranks. The default process group is looked up at each call: it may start after construction."""

    @property
    def world_size(self) -> int:
        """The number of ranks that share a global batch."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype and device over all ranks, in place, in one flat all-reduce."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

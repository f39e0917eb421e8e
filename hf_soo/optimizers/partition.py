"""Norms of whole parameters where an optimizer steps on pieces of them.

FSDP2 leaves each rank a shard of every parameter (a DTensor); ZeRO leaves it one flat tensor that strings together
fragments of several parameters. In both cases a parameter's norm is the root of a sum over ranks:

    ‖w‖² = Σ_ranks ‖the rank's pieces of w‖²

A `Partition` says which elements belong to which whole tensor, and sums over the ranks that hold its pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_soo.engine.chunks import Slot, flat, local, piece_size, wide_dtype

# FSDP2's placements, without and with replication over the first mesh dimension (HSDP).
PLACEMENTS = ((Shard(0),), (Replicate(), Shard(0)))


@dataclass(frozen=True)
class Fragment:
    """Elements `start : start + length` of a flat parameter belong to whole tensor number `tensor`.

    The number is the same on every rank.
    """

    tensor: int
    start: int
    length: int


class Partition(Protocol):
    """How the tensors that an optimizer steps on make up whole parameters.

    All fragments of a whole tensor are stepped on in the same call of `step`, on all ranks.
    """

    tensors: int
    """The number of whole tensors, over all ranks and groups."""

    def fragments(self, param: Tensor) -> Sequence[Fragment]:
        """What a flat 1-D parameter consists of, in order, padding left out."""

    def sum_(self, values: Tensor) -> None:
        """Sum values over the ranks that hold pieces, in place; called once by every rank in every step."""

    def grad_norm(self) -> Tensor:
        """‖g‖ over all whole tensors of all groups and ranks, 0-dim; for the clip.

        Of the gradients as `step` finds them (unscaled, after a clip outside), and the same in every call that makes up
        one step: stepping a group overwrites its gradients, so this is measured before the first.
        """


@dataclass(slots=True)
class Job:
    """Parameters of one group, device, dtype and mesh, all with a gradient."""

    group: dict[str, Any]
    params: list[Tensor]


@dataclass(slots=True)
class Share:
    """Jobs on pieces of tensors, whose norms are summed together; `like` has the sums' device and dtype."""

    partition: Partition
    jobs: list[Job]
    like: Tensor


class MeshPartition:
    """DTensors of one mesh: each rank holds some rows of each, perhaps none."""

    def __init__(self, params: Sequence[DTensor]) -> None:
        """Number the tensors.

        Args:
            params: Parameters with gradients, the same on every rank.
        """
        self.tensors = len(params)
        self._params = params
        self._numbers = {id(param): number for number, param in enumerate(params)}
        mesh = params[0].device_mesh
        self._group = mesh.get_group(mesh.ndim - 1)  # a replicated dimension comes before the sharded one

    def fragments(self, param: Tensor) -> Sequence[Fragment]:
        """The shard of a parameter, as one fragment."""
        return [Fragment(self._numbers[id(param)], 0, local(param).numel())]

    def sum_(self, values: Tensor) -> None:
        """Sum values over the shards, in place."""
        dist.all_reduce(values, group=self._group)

    def grad_norm(self) -> Tensor:
        """‖g‖ over all parameters and shards, 0-dim."""
        total: Tensor = torch.linalg.vector_norm(torch.stack(piece_norms(self._params))).square_()
        self.sum_(total)
        return total.sqrt_()


def divide(groups: list[dict[str, Any]], partition: Partition | None) -> tuple[list[Job], list[Share]]:
    """Tell whole parameters from pieces.

    Args:
        groups: Parameter groups.
        partition: What the parameters are pieces of; None: each is whole, or a DTensor.

    Returns:
        The jobs on whole parameters, and the shares. A partition has its share even if nothing has a gradient here:
        other ranks may wait for this one's sum.
    """
    jobs = [job for group in groups for job in _alike(group)]
    if partition is not None:
        like = next((param for group in groups for param in group["params"]), torch.empty(0))
        return [], [Share(partition, jobs, like)]
    meshes: dict[tuple[DeviceMesh, torch.device, torch.dtype], list[Job]] = {}
    for job in jobs:
        first = job.params[0]
        if isinstance(first, DTensor):
            meshes.setdefault((first.device_mesh, first.device, wide_dtype(first)), []).append(job)
    shares = []
    for together in meshes.values():
        params = [param for job in together for param in job.params if isinstance(param, DTensor)]
        shares.append(Share(MeshPartition(params), together, params[0]))
    return [job for job in jobs if not isinstance(job.params[0], DTensor)], shares


def whole_norms(pieces: Iterable[tuple[list[Slot], Tensor]], share: Share) -> Tensor:
    """Norms of whole tensors, in one sum over ranks.

    Args:
        pieces: Slots that this rank holds, and two norms of each, [2, slots].
        share: Whose pieces these are.

    Returns:
        The norms of every tensor of the partition, [2, tensors]; 0 for those that no rank gave.
    """
    nothing = torch.zeros(2, dtype=wide_dtype(share.like), device=share.like.device)
    held: dict[int, Tensor] = {}  # no index tensor: it would have to be copied to the device
    for slots, norms in pieces:
        for slot, norm in zip(slots, norms.to(nothing).unbind(1), strict=True):
            held[slot.tensor] = torch.hypot(held[slot.tensor], norm) if slot.tensor in held else norm
    squares = torch.stack([held.get(number, nothing) for number in range(share.partition.tensors)], dim=1).square_()
    share.partition.sum_(squares)
    return squares.sqrt_()


def piece_norms(params: Sequence[Tensor]) -> list[Tensor]:
    """Norms of gradients' pieces, as far as this process holds them.

    In pieces, as on CPU one fp32 reduction over 31M elements comes out 1.6e-3 too small.

    Args:
        params: Parameters with gradients, alike in device and width of dtype.

    Returns:
        0-dim tensors, at least one for each parameter.
    """
    size = piece_size(params[0])
    grads = [flat(local(param.grad)) for param in params if param.grad is not None]
    pieces = [piece for grad in grads for piece in torch.split(grad, size)]
    return list(torch._foreach_norm(pieces, 2, dtype=wide_dtype(params[0])))


def _alike(group: dict[str, Any]) -> list[Job]:
    """The parameters that have a gradient, gathered by device, dtype and mesh."""
    gathered: dict[tuple[torch.device, torch.dtype, DeviceMesh | None], Job] = {}
    for param in group["params"]:
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            raise ValueError("Lamb: a sparse gradient is not supported; build the embedding with sparse=False")
        mesh = _checked_mesh(param) if isinstance(param, DTensor) else None
        gathered.setdefault((param.device, param.dtype, mesh), Job(group, [])).params.append(param)
    return list(gathered.values())


def _checked_mesh(param: DTensor) -> DeviceMesh:
    grad = param.grad.placements if isinstance(param.grad, DTensor) else None
    if param.placements not in PLACEMENTS or grad != param.placements:
        raise NotImplementedError(
            f"Lamb: a DTensor with placements {param.placements} and a gradient with {grad} is not supported; both "
            "must be (Shard(0),) or (Replicate(), Shard(0)), as fully_shard makes them: use it, DDP, or base='adamw'"
        )
    return param.device_mesh

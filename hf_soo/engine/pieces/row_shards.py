"""FSDP2's row shards: DTensors whose first dimension is cut over one dimension of the mesh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soo.engine.chunks import piece_norms, root, squares, total_norm, wide_dtype
from hf_soo.engine.comm import Communicator, Group
from hf_soo.engine.dtensors import full_shape, is_dtensor, local, sharded_dim
from hf_soo.engine.layers import Layer
from hf_soo.engine.pieces.exchange import Span, row_spans
from hf_soo.engine.pieces.fragments import Fragment, Fragments
from hf_soo.engine.strategy import Partition


class RowShards(Fragments):
    """Every rank has some rows of each parameter, as ``fully_shard`` makes them."""

    layout = "row shards"
    in_rows = True

    def __init__(self, layers: Sequence[Layer], comm: Communicator) -> None:
        """Look at the layers' parameters.

        Args:
            layers: all of them.
            comm: the means of communication.

        Raises:
            NotImplementedError: some are no DTensors, or sharded in another way, or over several meshes.
        """
        parameters = [(layer.name, p) for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        groups = {p.device_mesh.get_group(sharded_dim(name, p)) for name, p in parameters}  # type: ignore[attr-defined]
        if len(groups) != 1:
            raise NotImplementedError("layers sharded over several device meshes are not supported; use one mesh.")
        super().__init__(comm, groups.pop())
        self._spans: dict[tuple[int, ...], list[Span]] = {}

    def spans(self, parameter: Tensor) -> list[Span]:
        """As ``torch.chunk`` cuts the first dimension."""
        shape = full_shape(parameter)
        if shape not in self._spans:
            self._spans[shape] = row_spans(shape, self.size)
        return self._spans[shape]

    def piece(self, parameter: Tensor) -> Tensor:
        """The local tensor."""
        assert parameter.grad is not None
        return local(parameter.grad)


class _MeshPartition:
    """DTensors of one mesh, for norms of whole parameters: each rank holds some rows of each, perhaps none."""

    def __init__(self, params: Sequence[Tensor], group: Group) -> None:
        """Number the parameters with gradients, the same on every rank of the group that holds their rows."""
        self.tensors = len(params)
        self._params, self._group = params, group
        self._numbers = {id(param): number for number, param in enumerate(params)}

    def parts_of(self, param: Tensor) -> Sequence[Fragment]:
        """The shard of a parameter, as one fragment."""
        return [Fragment(self._numbers[id(param)], 0, local(param).numel())]

    def sum_norms_(self, values: Tensor) -> None:
        """Sum values over the shards, in place."""
        dist.all_reduce(values, group=self._group)

    def grad_norm(self) -> Tensor:
        """‖g‖ over all parameters and shards, 0-d."""
        grads = [local(param.grad) for param in self._params if param.grad is not None]
        summed = squares(total_norm(torch.stack(piece_norms(grads)))[None])
        self.sum_norms_(summed)
        return root(summed)


@dataclass(slots=True)
class Job:
    """Parameters of one group, device and dtype, all with a gradient; ``ranks`` hold the rows of DTensors."""

    group: dict[str, Any]
    params: list[Tensor]
    ranks: Group


@dataclass(slots=True)
class Share:
    """Jobs on pieces of tensors, whose norms are summed together; `prototype` has the sums' device and dtype."""

    partition: Partition
    jobs: list[Job]
    prototype: Tensor


def check_placement(params: Iterable[Tensor]) -> None:
    """Refuse DTensors that are cut in another way than ``RowShards`` takes, as that does."""
    for param in filter(is_dtensor, params):
        sharded_dim("a parameter", param)


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
    sharded: dict[tuple[Group, torch.device, torch.dtype], list[Job]] = {}
    for job in jobs:
        if job.ranks is not None:
            sharded.setdefault((job.ranks, job.params[0].device, wide_dtype(job.params[0])), []).append(job)
    shares = []
    for (ranks, _, _), together in sharded.items():
        params = [param for job in together for param in job.params]
        shares.append(Share(_MeshPartition(params, ranks), together, params[0]))
    return [job for job in jobs if job.ranks is None], shares


def _alike(group: dict[str, Any]) -> list[Job]:
    """The parameters that have a gradient, gathered by device, dtype and the ranks that hold their rows."""
    gathered: dict[tuple[torch.device, torch.dtype, Group], Job] = {}
    for param in group["params"]:
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            raise ValueError("LAMB: a sparse gradient is not supported; build the embedding with sparse=False.")
        ranks = _ranks_of_rows(param) if is_dtensor(param) else None
        gathered.setdefault((param.device, param.dtype, ranks), Job(group, [], ranks)).params.append(param)
    return list(gathered.values())


def _ranks_of_rows(param: Any) -> Group:
    """The ranks that hold the rows of a DTensor."""
    grad = param.grad.placements if is_dtensor(param.grad) else "an ordinary tensor"
    if grad != param.placements:
        raise NotImplementedError(
            f"LAMB: a DTensor with placements {param.placements} and a gradient placed as {grad} is not supported; "
            "both must be cut alike, as fully_shard makes them: use it, DDP, or base='adamw'."
        )
    group: Group = param.device_mesh.get_group(sharded_dim("a parameter", param))
    return group

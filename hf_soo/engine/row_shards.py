"""FSDP2's row shards: DTensors whose first dimension is cut over one dimension of the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soo.engine.chunks import piece_norms
from hf_soo.engine.comm import Communicator, Group
from hf_soo.engine.dtensors import local, sharded_dim
from hf_soo.engine.fragments import Fragment, Fragments, Span
from hf_soo.engine.layers import Layer, full_shape


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

    def has(self, layer: Layer) -> bool:
        """See ``Strategy``; the same on every rank of FSDP2."""
        return layer.weight.grad is not None and (layer.bias is None or layer.bias.grad is not None)

    def spans(self, parameter: Tensor) -> list[Span]:
        """As ``torch.chunk`` cuts the first dimension."""
        shape = full_shape(parameter)
        if shape not in self._spans:
            width, chunk = math.prod(shape[1:]), math.ceil(shape[0] / self.size)
            cuts = [min(rank * chunk, shape[0]) for rank in range(self.size + 1)]
            self._spans[shape] = [Span(a * width, (b - a) * width) for a, b in pairwise(cuts)]
        return self._spans[shape]

    def piece(self, parameter: Tensor) -> Tensor:
        """The local tensor."""
        assert parameter.grad is not None
        return local(parameter.grad)


class MeshPartition:
    """DTensors of one mesh, for norms of whole parameters: each rank holds some rows of each, perhaps none."""

    def __init__(self, params: Sequence[Tensor], group: Group) -> None:
        """Number the tensors.

        Args:
            params: parameters with gradients, the same on every rank.
            group: the ranks that hold their rows.
        """
        self.tensors = len(params)
        self._params, self._group = params, group
        self._numbers = {id(param): number for number, param in enumerate(params)}

    def fragments(self, param: Tensor) -> Sequence[Fragment]:
        """The shard of a parameter, as one fragment."""
        return [Fragment(self._numbers[id(param)], 0, local(param).numel())]

    def sum_norms_(self, values: Tensor) -> None:
        """Sum values over the shards, in place."""
        dist.all_reduce(values, group=self._group)

    def grad_norm(self) -> Tensor:
        """‖g‖ over all parameters and shards, 0-d."""
        grads = [local(param.grad) for param in self._params if param.grad is not None]
        total: Tensor = torch.linalg.vector_norm(torch.stack(piece_norms(grads))).square_()
        self.sum_norms_(total)
        return total.sqrt_()

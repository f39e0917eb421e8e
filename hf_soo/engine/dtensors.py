"""FSDP2's row shards, and which accessor a model's gradients need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_soo.engine.comm import Communicator, Group
from hf_soo.engine.layers import Layer, full_shape
from hf_soo.engine.shards import ShardedGradients, Span
from hf_soo.engine.strategy import Gradients, PlainGradients


class RowShards:
    """DTensors, as FSDP2's ``fully_shard`` makes them: the first dimension is cut, over one dimension of the mesh."""

    layout: object = "row shards"
    in_rows = True
    loss_scale = 1.0

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Look at the layers' parameters.

        Args:
            layers: all of them.

        Raises:
            NotImplementedError: some are no DTensors, or sharded in another way, or over several meshes.
        """
        parameters = [(layer.name, p) for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        groups = {self._group(name, parameter) for name, parameter in parameters}
        if len(groups) != 1:
            raise NotImplementedError("layers sharded over several device meshes are not supported; use one mesh.")
        (self.group,) = groups
        self._spans: dict[tuple[int, ...], list[Span]] = {}

    @staticmethod
    def _group(name: str, parameter: Tensor) -> Group:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        sharded = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        if not isinstance(parameter, DTensor) or len(sharded) != 1 or placements[sharded[0]] != Shard(0):
            raise NotImplementedError(
                f"{name!r} is placed as {tuple(placements) or 'an ordinary tensor'} beside sharded parameters; allowed "
                "are Shard(0) over one dimension of the mesh (FSDP2) and Replicate() over others. Shard all layers "
                "with fully_shard, without tensor parallelism, or exclude them."
            )
        return parameter.device_mesh.get_group(sharded[0])

    def has(self, layer: Layer) -> bool:
        """See ``Gradients``; the same on every rank of FSDP2."""
        return layer.weight.grad is not None and (layer.bias is None or layer.bias.grad is not None)

    def spans(self, parameter: Tensor) -> list[Span]:
        """As ``torch.chunk`` cuts the first dimension."""
        shape = full_shape(parameter)
        if shape not in self._spans:
            size, width = dist.get_world_size(self.group), math.prod(shape[1:])
            chunk = math.ceil(shape[0] / size)
            cuts = [min(rank * chunk, shape[0]) for rank in range(size + 1)]
            self._spans[shape] = [Span(a * width, (b - a) * width) for a, b in pairwise(cuts)]
        return self._spans[shape]

    def piece(self, parameter: Tensor) -> Tensor:
        """The local tensor."""
        assert isinstance(parameter.grad, DTensor)
        return parameter.grad.to_local()


def locate(layers: Sequence[Layer], current: Gradients, comm: Communicator) -> Gradients:
    """The accessor for where the layers' gradients are now.

    Args:
        layers: all layers.
        current: the accessor until now.
        comm: the means of communication.

    Returns:
        ``current``, unless it is for plain gradients and the model has been sharded by FSDP2.

    Raises:
        NotImplementedError: some layers are no DTensors, or sharded in another way, or over several meshes.
    """
    if isinstance(current, PlainGradients) and any(isinstance(layer.weight, DTensor) for layer in layers):
        return ShardedGradients(RowShards(layers), comm)
    return current

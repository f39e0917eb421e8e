"""Parameters that are cut over ranks: DTensors, without importing ``torch.distributed.tensor``, and whole shapes.

The import costs most of a second, and most runs have no DTensor. Whoever has made one has imported the module, so it is
looked up among the imported ones.
"""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import Tensor

MODULE = "torch.distributed.tensor"


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Whether a value is a DTensor; its attributes are untyped here, as its class cannot be named."""
    module = sys.modules.get(MODULE)
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the local part of a DTensor, else all of it."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's parts of all ranks together, another tensor as it is; every rank must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def placed_as(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor on the device of ``target``, and cut as that is; every rank must call it."""
    value = value.to(target.device)
    if is_dtensor(target):
        return sys.modules[MODULE].distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[no-any-return]
    return value


def sharded_dim(name: str, parameter: Tensor) -> int:
    """The dimension of its mesh that cuts a DTensor's rows.

    Args:
        name: the parameter's, for the message.
        parameter: a DTensor.

    Returns:
        The mesh's dimension; over all others the tensor is replicated.

    Raises:
        NotImplementedError: it is no DTensor, or it is cut in another way.
    """
    placements = parameter.placements if is_dtensor(parameter) else ()
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or not placements[cut[0]].is_shard(0):
        raise NotImplementedError(
            f"{name!r} is placed as {tuple(placements) or 'an ordinary tensor'} beside sharded parameters; allowed "
            "are Shard(0) over one dimension of the mesh (FSDP2) and Replicate() over others. Shard all layers "
            "with fully_shard, without tensor parallelism, or exclude them."
        )
    return cut[0]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter; under ZeRO-3 it is (0,) where the parameter is not gathered."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

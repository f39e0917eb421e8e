"""Counting the messages of a dry run: a dispatch mode that sees every collective, and what each one is for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_soo.bench.bench import tensors_in
from hf_soo.engine.placement import Placement

MESSAGES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    # the functional forms, DTensor's
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
}
"""Operation of torch.distributed -> the collective."""

WAITING = ("wait_tensor", "barrier", "monitored_barrier_")
"""Operations that send nothing."""

PASSES = {"all_reduce": "gradients", "reduce_scatter": "gradients", "all_gather": "parameters"}
"""What a collective in the forward and backward pass carries."""


class MessageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation: counts the collectives, and answers what fake tensors cannot."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.label: str | None = None
        self.bytes: Counter[str] = Counter()

    @contextlib.contextmanager
    def labelled(self, label: str | None) -> Iterator[None]:
        """What messages carry from here on; None: by their collective, as in a forward and backward pass."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def take(self) -> dict[str, int]:
        """Bytes by label since the last call."""
        taken = dict(self.bytes)
        self.bytes.clear()
        return taken

    def _count(self, namespace: str, name: str, args: Any) -> None:
        if name not in MESSAGES:
            raise NotImplementedError(
                f"dry_run: {namespace}.{name} is a collective that is not counted; leave --dry-run out."
            )
        collective = MESSAGES[name]
        size = _largest(args)
        if namespace == "_c10d_functional" and collective == "all_gather":  # (shard, ranks, group): no result yet
            size *= args[1]
        self.bytes[self.label or PASSES[collective]] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls, and the slow way tells the same
            return args[0].fake_device
        name = func.__name__.split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in WAITING:
            self._count(func.namespace, name, args)
        if func is torch.ops.aten._local_scalar_dense.default:  # a tensor read by the host: "yes", or 1
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func.namespace == "aten" and name.startswith(
            "_fused_"
        ):  # in place; some have no fake form and would allocate
            return None
        return func(*args, **(kwargs or {}))


def _largest(args: Any) -> int:
    """Bytes of the whole message: the larger one of what goes in and what comes out."""
    sizes = [
        arg.nbytes if isinstance(arg, Tensor) else sum(tensor.nbytes for tensor in tensors_in(arg))
        for arg in args
        if isinstance(arg, (Tensor, list, tuple))
    ]
    return max(sizes)


class Labelled:
    """A placement whose messages are counted under their purpose."""

    def __init__(self, placement: Placement, counter: MessageCounter) -> None:
        """Take the real one."""
        self.real, self.counter = placement, counter

    @property
    def world(self) -> int | None:
        """See ``Placement``."""
        return self.real.world

    @property
    def everywhere(self) -> bool:
        """See ``Placement``."""
        return self.real.everywhere

    def is_inverse_worker(self, name: str) -> bool:
        """See ``Placement``."""
        return self.real.is_inverse_worker(name)

    def is_gradient_worker(self, name: str) -> bool:
        """See ``Placement``."""
        return self.real.is_gradient_worker(name)

    def column(self, name: str) -> int:
        """See ``Placement``."""
        return self.real.column(name)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See ``Placement``."""
        with self.counter.labelled("statistics"):
            self.real.sum_(tensors)

    def sum_at_owner_(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """See ``Placement``."""
        with self.counter.labelled("statistics"):
            self.real.sum_at_owner_(tensors)

    def broadcast_inverses(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """See ``Placement``."""
        with self.counter.labelled("inverses"):
            self.real.broadcast_inverses(tensors)

    def broadcast_preconditioned_gradients(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """See ``Placement``."""
        with self.counter.labelled("directions"):
            self.real.broadcast_preconditioned_gradients(tensors)

    def from_owner(self, name: str, tensors: Sequence[Tensor]) -> None:
        """See ``Placement``."""
        self.real.from_owner(name, tensors)

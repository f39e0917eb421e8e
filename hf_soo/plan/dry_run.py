"""The bytes that a rank really asks for: the model, its wrapper and the optimizer on fake tensors, the ranks made up.

torch's fake process group answers for all other ranks, and fake tensors (meta tensors that say they are on a CPU) have
shapes and no memory, so that 64 ranks of BERT-Large fit a laptop. DistributedDataParallel or FSDP2, the hooks and
``optimizer.step()`` are the real ones; a dispatch mode sees every collective that they call.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_soo.bench.measure import tensors_in
from hf_soo.bench.step_kinds import Kind, StepKinds
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.placement import Placement
from hf_soo.engine.state import Identity
from hf_soo.optimizers.polar import iteration_dtype
from hf_soo.plan.method_on_model import MethodOnModel
from hf_soo.plan.model_shape import blocks_of, build_model
from hf_soo.plan.request import Layout

_COLLECTIVES = {
    "all_reduce": "allreduce_ allreduce_coalesced_ all_reduce all_reduce_coalesced",
    "reduce": "reduce_",
    "broadcast": "broadcast_ broadcast",
    "all_gather": "allgather_ _allgather_base_ allgather_into_tensor_coalesced_ all_gather_into_tensor "
    "all_gather_into_tensor_coalesced",
    "all_to_all": "alltoall_base_",
    "reduce_scatter": "reduce_scatter_ _reduce_scatter_base_ reduce_scatter_tensor_coalesced_ reduce_scatter_tensor "
    "reduce_scatter_tensor_coalesced",
}
"""Collective -> torch's operations: in place, or functional (DTensor's)."""

_OPERATIONS = {operation: collective for collective, names in _COLLECTIVES.items() for operation in names.split()}

_WAITING = ("wait_tensor", "barrier", "monitored_barrier_")
"""Operations that send nothing."""

_PASSES = {"all_reduce": "gradients", "reduce_scatter": "gradients", "all_gather": "parameters"}
"""What a collective in the forward and backward pass carries."""


class _MessageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        if name not in _OPERATIONS:
            raise NotImplementedError(
                f"dry_run: {namespace}.{name} is a collective that is not counted; leave --dry-run out."
            )
        collective = _OPERATIONS[name]
        size = args[1].nbytes if collective == "all_to_all" else _largest(args)  # (what comes in, what goes out)
        if namespace == "_c10d_functional" and collective == "all_gather":  # (shard, ranks, group): no result yet
            size *= args[1]
        self.bytes[self.label or _PASSES[collective]] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls, and the slow way tells the same
            return args[0].fake_device
        name = func.__name__.split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _WAITING:
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


class _LabelledPlacement:
    """A placement whose messages are counted under their purpose."""

    PURPOSES: ClassVar = {
        "sum_": "statistics",
        "sum_at_owner_": "statistics",
        "broadcast_inverses": "inverses",
        "broadcast_preconditioned_gradients": "directions",
    }

    def __init__(self, placement: Placement, counter: _MessageCounter) -> None:
        """Take the real one."""
        self._real, self._counter = placement, counter

    def __getattr__(self, name: str) -> Any:
        """The real one's; what sends is labelled."""
        found = getattr(self._real, name)
        return self._counter.labelled(self.PURPOSES[name])(found) if name in self.PURPOSES else found


@dataclass
class _Counted:
    """What one rank asked for."""

    passes: dict[str, int] = field(default_factory=dict)  # bytes by kind of message, in a micro-batch's two passes
    steps: dict[Kind, dict[str, int]] = field(default_factory=dict)  # of each kind: bytes by kind of message in step()
    memory: dict[str, int] = field(default_factory=dict)  # bytes by kind, of what the rank holds after a step

    def sent(self, kind: Kind) -> dict[str, int]:
        """Bytes by kind of message in a step of a kind with one micro-batch."""
        return dict(Counter(self.passes) + Counter(self.steps[kind]))


def count(method: MethodOnModel, model: str, layout: Layout, rank: int = 0) -> _Counted:
    """Build what a rank of a "ddp" or "fsdp2" layout holds, and take a step of each kind that occurs.

    Raises:
        ValueError: a process group is running already.
    """
    iteration_dtype(torch.device("cpu"))  # it is measured, which no fake can be
    with _fake_ranks(layout.ranks, rank), _quick_and_quiet():
        mesh = init_device_mesh("cpu", (layout.ranks,)) if layout.strategy == "fsdp2" else None
        counter = _MessageCounter()
        with FakeTensorMode(), counter:
            net = build_model(model, layout.seq)
            if layout.checkpointing:
                net.gradient_checkpointing_enable()  # type: ignore[operator]
            counted = _Counted()
            wrapped = _wrap(net, layout, mesh)
            with counter.labelled("build"):
                optimizer = method.pair.build(net)
            if "ns_dtype" not in dict(method.pair.settings):
                for group in optimizer.param_groups:
                    group |= {"ns_dtype": layout.iteration_dtype} if "ns_dtype" in group else {}
            optimizer._identity = _Agreed(**vars(optimizer._identity))
            _take_steps(optimizer, method.step_kinds, wrapped, layout, counter, counted)
    return counted


class _Agreed(Identity):
    """Made-up ranks are not asked: they would not answer."""

    def agree(self, *args: Any, **settings: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def _fake_ranks(world: int, rank: int) -> Iterator[None]:
    """A default process group of ``world`` ranks, of which only this one exists.

    Raises:
        ValueError: a process group is running already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, when it is wanted

    if dist.is_initialized():
        raise ValueError("dry_run: a process group is running in this process; run hf-soo plan on its own.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _quick_and_quiet() -> Iterator[None]:
    """Without torch's warnings of fakes and of names that it calls itself; with at least four threads.

    LAMB's chunks grow with torch's threads: fewer chunks, and each costs as little as the next on fake tensors.
    """
    logger, threads = logging.getLogger("torch.distributed"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(max(4, threads))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


class _Silent(Diagnostics):
    """Records as ever, and reads nothing: there are no numbers."""

    def check(self, step: int, method: str) -> None:
        """Nothing."""


def _wrap(model: nn.Module, layout: Layout, mesh: Any) -> nn.Module:
    """The module that a rank calls: a fake model under FSDP2 over the ranks' ``mesh``, or under DDP."""
    if layout.strategy == "fsdp2":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if layout.bf16 else MixedPrecisionPolicy()
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model
    # init_sync compares the ranks' shapes, and the made-up ones have none.
    net = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
    net.register_comm_hook(None, lambda state, bucket: _reduce(bucket))  # torch refuses annotations that are strings
    return net


def _reduce(bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's own all-reduce: its C++ form waits for an answer that no fake rank gives."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _run_passes(net: nn.Module, layout: Layout) -> None:
    """Forward and backward of one micro-batch; the loss is the sum of the outputs."""
    ids = torch.zeros(layout.micro_batch, layout.seq, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=layout.bf16 and layout.strategy == "ddp"):
        outputs = net(input_ids=ids)
    floats = [t for t in tensors_in(dict(outputs)) if t.is_floating_point() and t.requires_grad]
    torch.stack([t.float().sum() for t in floats]).sum().backward()  # type: ignore[no-untyped-call]


def _take_steps(
    optimizer: PreconditionedOptimizer,
    kinds: StepKinds | None,
    net: nn.Module,
    layout: Layout,
    counter: _MessageCounter,
    counted: _Counted,
) -> None:
    """One pass, then a step of each kind on its gradients; what is held is counted before the first step frees any."""
    optimizer.stages.diagnostics = _Silent(optimizer.preconditioner.side_names)
    optimizer.stages.batched = True  # as on a GPU: few operations
    optimizer.stages.placement = _LabelledPlacement(optimizer.stages.placement, counter)
    optimizer.base.register_step_pre_hook(lambda *_: setattr(counter, "label", "base"))
    optimizer.base.register_step_post_hook(lambda *_: setattr(counter, "label", "loss"))  # what follows the base's step
    counter.take()
    for index, kind in enumerate(kinds.distinct if kinds else [Kind(False, False)]):
        if kinds is not None:
            optimizer.steps = kinds.step(kind)
            optimizer._schedule()
        if index == 0:
            _run_passes(net, layout)
            counted.passes = counter.take()
            counted.memory = _capture(optimizer)
        optimizer.report_loss(torch.ones(()))
        with counter.labelled("shards"):
            optimizer.step()
        counted.steps[kind] = counter.take()
    counted.memory |= {
        "parameters": sum(_local_bytes(p) for p in net.parameters()),
        "gradients": sum(_local_bytes(p.grad) for p in net.parameters() if p.grad is not None),
        "base_state": sum(_local_bytes(t) for t in tensors_in(optimizer.state)),
        "factors": sum(t.nbytes for t in tensors_in(optimizer.stages.states)),
    }


def _capture(optimizer: PreconditionedOptimizer) -> dict[str, int]:
    transient = optimizer.preconditioner.recorder.transient
    held = sum(tensor.nbytes for each in optimizer.stages.capture.buffers.values() for tensor in each)
    return {"capture": 0 if transient else held, "capture_transient": held if transient else 0}


def _local_bytes(tensor: Tensor) -> int:
    """Of the part of a tensor that this rank holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

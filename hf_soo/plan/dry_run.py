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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_soo.bench.bench import tensors_in
from hf_soo.bench.step_kinds import Cycle, Kind
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.plan.counter import Labelled, MessageCounter
from hf_soo.plan.method_on_model import Subject
from hf_soo.plan.model_shape import blocks_of, build_model
from hf_soo.plan.request import Layout


@dataclass
class Counted:
    """What one rank asked for.

    Args:
        rank: which.
        passes: bytes by kind of message in a micro-batch's forward and backward pass.
        steps: kind of step -> bytes by kind of message in ``optimizer.step()``.
        memory: bytes by kind, of what the rank holds after a step.
    """

    rank: int
    passes: dict[str, int] = field(default_factory=dict)
    steps: dict[Kind, dict[str, int]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def sent(self, kind: Kind) -> dict[str, int]:
        """Bytes by kind of message in a step of a kind with one micro-batch."""
        return dict(Counter(self.passes) + Counter(self.steps[kind]))


def count(subject: Subject, model: str, layout: Layout, rank: int = 0) -> Counted:
    """Build what a rank holds, and take a step of each kind that occurs.

    Args:
        subject: the method.
        model: the model's name; see ``build_model``.
        layout: the ranks; "ddp" or "fsdp2".
        rank: which of them to be.

    Raises:
        ValueError: a process group is running already.
    """
    with fake_ranks(layout.ranks, rank), _quiet(), _many_threads():
        mesh = init_device_mesh("cpu", (layout.ranks,)) if layout.strategy == "fsdp2" else None
        counter = MessageCounter()
        with FakeTensorMode(), counter:
            bare = build_model(model, layout.seq)
            if layout.checkpointing:
                bare.gradient_checkpointing_enable()  # type: ignore[operator]
            counted = Counted(rank)
            net = wrap(bare, layout, mesh)
            with counter.labelled("build"):
                optimizer = subject.pair.build(bare)
            optimizer.ranks_checked = True  # made-up ranks would not answer
            _take_steps(optimizer, subject.cycle, net, layout, counter, counted)
    return counted


@contextlib.contextmanager
def fake_ranks(world: int, rank: int) -> Iterator[None]:
    """A default process group of so many ranks, of which only this one exists.

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
def _quiet() -> Iterator[None]:
    """Without torch's warnings of fakes and of names that it calls itself."""
    logger = logging.getLogger("torch.distributed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _many_threads() -> Iterator[None]:
    """LAMB's pieces grow with torch's threads: fewer pieces, and each costs as little as the next on fake tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(4, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Silent(Diagnostics):
    """Records as ever, and reads nothing: there are no numbers."""

    def check(self, step: int, method: str) -> None:
        """Nothing."""


def wrap(model: nn.Module, layout: Layout, mesh: Any) -> nn.Module:
    """The model as a rank trains it.

    Args:
        model: fake.
        layout: the ranks.
        mesh: theirs, for FSDP2.

    Returns:
        The module to call.
    """
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


def run_passes(net: nn.Module, layout: Layout) -> None:
    """Forward and backward of one micro-batch; the loss is the sum of the outputs."""
    loss_of(net, layout).backward()  # type: ignore[no-untyped-call]


def loss_of(net: nn.Module, layout: Layout) -> Tensor:
    """The sum of the outputs on one micro-batch."""
    ids = torch.zeros(layout.micro_batch, layout.seq, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=layout.bf16 and layout.strategy == "ddp"):
        outputs = net(input_ids=ids)
    floats = [t for t in tensors_in(dict(outputs)) if t.is_floating_point() and t.requires_grad]
    return torch.stack([t.float().sum() for t in floats]).sum()


def _take_steps(
    optimizer: PreconditionedOptimizer,
    cycle: Cycle | None,
    net: nn.Module,
    layout: Layout,
    counter: MessageCounter,
    counted: Counted,
) -> None:
    """One pass, then a step of each kind on its gradients; what is held is counted before the first step frees any."""
    optimizer.stages.diagnostics = Silent(optimizer.preconditioner.side_names)
    optimizer.stages.batched = True  # as on a GPU: few operations
    optimizer.stages.placement = Labelled(optimizer.stages.placement, counter)
    optimizer.base.register_step_pre_hook(lambda *_: setattr(counter, "label", "base"))
    optimizer.base.register_step_post_hook(lambda *_: setattr(counter, "label", "loss"))  # what follows the base's step
    counter.take()
    for index, kind in enumerate(cycle.distinct if cycle else [Kind(False, False)]):
        if cycle is not None:
            optimizer.steps = cycle.step(kind)
            optimizer._schedule()
        if index == 0:
            run_passes(net, layout)
            counted.passes = counter.take()
            counted.memory = _capture(optimizer)
        optimizer.report_loss(torch.ones(()))
        with counter.labelled("shards"):
            optimizer.step()
        counted.steps[kind] = counter.take()
    counted.memory |= {
        "parameters": sum(local_bytes(p) for p in net.parameters()),
        "gradients": sum(local_bytes(p.grad) for p in net.parameters() if p.grad is not None),
        "base_state": sum(local_bytes(t) for t in tensors_in(optimizer.state)),
        "factors": sum(t.nbytes for t in tensors_in(optimizer.stages.states)),
    }


def _capture(optimizer: PreconditionedOptimizer) -> dict[str, int]:
    transient = optimizer.preconditioner.recorder.transient
    held = sum(tensor.nbytes for each in optimizer.stages.capture.buffers.values() for tensor in each)
    return {"capture": 0 if transient else held, "capture_transient": held if transient else 0}


def local_bytes(tensor: Tensor) -> int:
    """Of the part of a tensor that this rank holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

"""Runs of LAMB over pieces of parameters beside LAMB over whole ones; each function is called on every rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_soo.engine import chunks as pieces
from hf_soo.engine.pieces.fragments import Fragment
from hf_soo.engine.pieces.row_shards import _MeshPartition
from hf_soo.optimizers import Lamb

STEPS = 6
DTYPES = (torch.float64, torch.float32)
OPTIONS: list[dict[str, Any]] = [
    {"max_grad_norm": 0.02},  # below every gradient's norm in these runs
    {"max_grad_norm": 1e3},  # above
    {"max_grad_norm": None},
    {"max_grad_norm": 0.02, "always_adapt": True},
]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of a tensor."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.detach().double() - e.detach().double()).norm() / e.detach().double().norm()) for a, e in pairs)


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with decay, vectors without."""
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


# ---- DTensors --------------------------------------------------------------------------------------------------------


class Twins:
    """A model under fully_shard, and a whole one that gets the gradients of the first."""

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)]  # 1 row: less than ranks
        self.whole = nn.Sequential(*layers).to(dtype)
        self.model = copy.deepcopy(self.whole)
        fully_shard(self.model[0], mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.options, self.dtype = {"lr": 0.05, **options}, dtype
        self.theirs = Lamb(two_groups(list(self.whole.parameters())), **self.options)
        self.ours = self.optimizer()

    def optimizer(self) -> Lamb:
        return Lamb(two_groups(list(self.model.parameters())), **self.options)

    def gradients(self, step: int) -> None:
        """Each rank has rows of its own; fully_shard averages."""
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        rows = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(self.dtype)
        self.model.zero_grad()
        self.model(rows).square().mean().backward()
        for ours, theirs in zip(self.model.parameters(), self.whole.parameters(), strict=True):
            assert isinstance(ours.grad, DTensor)
            theirs.grad = ours.grad.full_tensor()

    def run(self, steps: range) -> float:
        """Take the steps; the largest difference after one of them."""
        errors = [0.0]
        for step in steps:
            self.gradients(step)
            limit = self.options["max_grad_norm"]
            if limit is not None:
                norm = torch.cat([p.grad.flatten() for p in self.whole.parameters() if p.grad is not None]).norm()
                assert (norm > limit) == (limit < 1)  # the case is what it says
            self.ours.step()
            self.theirs.step()
            errors.append(self.error())
        return max(errors)

    def error(self) -> float:
        return worst([p.full_tensor() for p in self.model.parameters()], list(self.whole.parameters()))


@contextlib.contextmanager
def local_norms() -> Iterator[None]:
    """The sum over ranks left out."""
    right = _MeshPartition.sum_norms_
    _MeshPartition.sum_norms_ = lambda self, values: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        _MeshPartition.sum_norms_ = right  # type: ignore[method-assign]


def steps_of_dtensors(mesh: DeviceMesh, cases: Sequence[int] = range(len(OPTIONS))) -> dict[str, Any]:
    """What every kind of mesh is asked for: equal steps, the number of all-reduces, and how far off local norms are."""
    errors = {(dtype, i): Twins(mesh, dtype, **OPTIONS[i]).run(range(STEPS)) for dtype in DTYPES for i in cases}
    counts = []
    for limit in (1.0, None):
        twins = Twins(mesh, torch.float32, max_grad_norm=limit)
        twins.gradients(0)
        with CommDebugMode() as messages:
            twins.ours.step()
        counts.append({str(name): count for name, count in messages.get_comm_counts().items() if count})
    with local_norms():
        naive = Twins(mesh, torch.float64, max_grad_norm=None).run(range(STEPS))
    return {"errors": errors, "counts": counts, "naive": naive}


def state_round_trips(mesh: DeviceMesh, folder: Path) -> dict[str, float]:
    """Load states as torch and accelerate do, in the middle of a run; the error at its end."""
    errors = {}
    twins = Twins(mesh, torch.float64, max_grad_norm=0.02)
    twins.ours.load_state_dict(twins.ours.state_dict())  # empty, as accelerate does
    errors["empty"] = twins.run(range(2))
    saved = twins.ours.state_dict()
    twins.ours = twins.optimizer()
    twins.ours.load_state_dict(saved)
    for param in twins.model.parameters():
        state = twins.ours.state[param]
        assert not isinstance(state["step"], DTensor) and state["step"].shape == () and float(state["step"]) == 2
        for name in ("exp_avg", "exp_avg_sq"):
            assert isinstance(param, DTensor) and isinstance(state[name], DTensor)
            assert (state[name].device_mesh, state[name].placements) == (param.device_mesh, param.placements)
            assert state[name].shape == param.shape
    errors["filled"] = twins.run(range(2, 4))

    dcp.save({"optimizer": get_optimizer_state_dict(twins.model, twins.ours)}, checkpoint_id=folder)
    twins.ours = twins.optimizer()
    twins.model.zero_grad()
    before = [p.full_tensor().clone() for p in twins.model.parameters()]
    loaded = {"optimizer": get_optimizer_state_dict(twins.model, twins.ours)}  # takes a step of size 0
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(twins.model.parameters(), before, strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_optimizer_state_dict(twins.model, twins.ours, loaded["optimizer"])
    errors["dcp"] = twins.run(range(4, STEPS))

    full = get_optimizer_state_dict(twins.model, twins.ours, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        for name, param in twins.whole.named_parameters():
            for key, value in twins.theirs.state[param].items():
                errors[f"{name}.{key}"] = worst([full["state"][name][key]], [value])
    return errors


def mixed_parameters(mesh: DeviceMesh) -> tuple[float, list[int]]:
    """Shards of two dtypes, one with transposed memory, a whole tensor, and one without gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (3, 4), (7, 2), (2, 2)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    start[1] = start[1].bfloat16()
    whole = [nn.Parameter(p.clone()) for p in start]
    ours = [nn.Parameter(distribute_tensor(p.clone(), mesh, [Shard(0)])) for p in start]
    transposed = ours[0].to_local().detach().t().contiguous().t()
    ours[0] = nn.Parameter(DTensor.from_local(transposed, mesh, [Shard(0)], shape=(5, 3), stride=(3, 1)))
    ours[2] = nn.Parameter(start[2].clone())
    optimizers = [Lamb(params, lr=0.05) for params in (ours, whole)]
    reductions: list[int] = []
    for _ in range(STEPS):
        for p, q in zip(ours[:3], whole[:3], strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(q.dtype)
            p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)]) if isinstance(p, DTensor) else q.grad.clone()
        with CommDebugMode() as messages:
            optimizers[0].step()
        optimizers[1].step()
        reductions.append(messages.get_total_counts())
    assert torch.equal(ours[3].full_tensor(), start[3]) and ours[3] not in optimizers[0].state
    assert optimizers[0].state[ours[1]]["exp_avg"].dtype == torch.float32
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in ours]
    assert torch.equal(full[1], whole[1])  # bf16: 1e-7 in the ratio does not change the rounding of 12 numbers
    return worst(full, whole), reductions


def refusals(mesh: DeviceMesh) -> list[str]:
    """Placements whose norms this is no code for."""
    cases = [((Shard(1),), (Shard(1),)), ((Replicate(),), (Replicate(),)), ((Shard(0),), (Partial(),))]
    messages = []
    for placements, grads in cases:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, placements))
        param.grad = DTensor.from_local(torch.ones(4, 4), mesh, grads) if Partial() in grads else param.detach().clone()
        with pytest.raises(NotImplementedError) as error:
            optimizer = Lamb([param])  # what the engine refuses is refused here
            assert placements == (Shard(0),), "only a gradient that lies elsewhere can wait until it is there"
            optimizer.step()
        messages.append(str(error.value))
    return messages


# ---- flat partitions -------------------------------------------------------------------------------------------------

SHAPES = [[(7, 5), (3, 4), (11,)], [(5,), (3,)]]  # with decay, without
ALIGNED = 4  # so of four ranks two hold nothing but padding of the second group


class FlatPartition:
    """ZeRO's layout: each group is one flat tensor, padded and cut into equal parts, one for each rank."""

    def __init__(self, groups: list[list[Tensor]], rank: int, world: int) -> None:
        self.tensors = sum(len(group) for group in groups)
        self.calls, self.norm = 0, torch.zeros(())
        self.rank, self.world = rank, world
        self.flats = [nn.Parameter(self.mine(group)) for group in groups]
        self._fragments: dict[Tensor, list[Fragment]] = {}
        number = 0
        for flat, group in zip(self.flats, groups, strict=True):
            fragments, begin, at = [], rank * flat.numel(), 0
            for tensor in group:
                first, last = max(at, begin), min(at + tensor.numel(), begin + flat.numel())
                if first < last:
                    split = (first + last) // 2  # a rank may hold several fragments of a tensor, or empty ones
                    fragments.append(Fragment(number, first - begin, split - first))
                    fragments.append(Fragment(number, split - begin, last - split))
                at, number = at + tensor.numel(), number + 1
            self._fragments[flat] = fragments

    def mine(self, group: list[Tensor]) -> Tensor:
        flat = torch.cat([tensor.detach().flatten() for tensor in group])
        part = -(-flat.numel() // (ALIGNED * self.world)) * ALIGNED
        return nn.functional.pad(flat, (0, part * self.world - flat.numel())).split(part)[self.rank].clone()

    def set_grads(self, groups: list[list[Tensor]]) -> None:
        squares = torch.zeros((), dtype=self.flats[0].dtype)
        for flat, group in zip(self.flats, groups, strict=True):
            flat.grad = self.mine(group) if self._fragments[flat] else None
            squares += self.mine(group).square().sum()
        dist.all_reduce(squares)
        self.norm = squares.sqrt()

    def parts_of(self, param: Tensor) -> list[Fragment]:
        return self._fragments[param]

    def sum_norms_(self, values: Tensor) -> None:
        self.calls += 1
        dist.all_reduce(values)

    def grad_norm(self) -> Tensor:
        return self.norm


class LocalNorms(FlatPartition):
    """What a rank knows alone."""

    def sum_norms_(self, values: Tensor) -> None:
        self.calls += 1


def step_by_group(optimizer: Lamb) -> int:
    """ZeRO-1 and ZeRO-2: the one group of a call replaces the groups."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups
    return len(groups)


def step_by_sub_group(optimizer: Lamb) -> int:
    """ZeRO-3: the one flat tensor of a call is put into its group, the other groups are empty."""
    params = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    for group, (flat,) in zip(optimizer.param_groups, params, strict=True):
        group["params"] = [flat]
        optimizer.step()
        group["params"] = []
    for group, held in zip(optimizer.param_groups, params, strict=True):
        group["params"] = held
    return len(params)


def step_at_once(optimizer: Lamb) -> int:
    """A wrapper that leaves the groups together."""
    optimizer.step()
    return 1


def flat_run(
    rank: int, world: int, dtype: torch.dtype, take_step: Any, make: type[FlatPartition], **options: Any
) -> float:
    """The largest difference to whole tensors after a step."""
    generator = torch.Generator().manual_seed(0)
    start = [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in group] for group in SHAPES]
    whole = [[nn.Parameter(p) for p in group] for group in start]
    decays = [{"weight_decay": 0.01}, {"weight_decay": 0.0}]
    theirs = Lamb([{"params": p, **d} for p, d in zip(whole, decays, strict=True)], lr=0.05, **options)
    partition = make(start, rank, world)
    ours = Lamb([{"params": [p], **d} for p, d in zip(partition.flats, decays, strict=True)], lr=0.05, **options)
    ours.partition = partition
    errors, calls = [], 0
    for _ in range(STEPS):
        grads = [[torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for p in g] for g in whole]
        partition.set_grads(grads)
        for params, values in zip(whole, grads, strict=True):
            for param, grad in zip(params, values, strict=True):
                param.grad = grad
        calls += take_step(ours)
        theirs.step()
        expected = [partition.mine(group) for group in whole]
        local = max(float((p - e).norm()) for p, e in zip(partition.flats, expected, strict=True))
        errors.append(local / min(float(p.norm()) for params in whole for p in params))
    assert partition.calls == calls  # one sum a call, also where a rank holds nothing, and without decay
    return max(errors)


def steps_of_flat_tensors(rank: int, world: int) -> dict[str, Any]:
    ways = (step_by_group, step_by_sub_group, step_at_once)
    errors = {
        (dtype, way.__name__, i): flat_run(rank, world, dtype, way, FlatPartition, **chosen)
        for dtype in DTYPES
        for way in ways
        for i, chosen in enumerate(OPTIONS)
    }
    pieces.CPU_PIECE, size = 3, pieces.CPU_PIECE  # so that fragments are cut
    errors[torch.float64, "small pieces", 0] = flat_run(
        rank, world, torch.float64, step_at_once, FlatPartition, **OPTIONS[0]
    )
    pieces.CPU_PIECE = size
    naive = flat_run(rank, world, torch.float64, step_by_group, LocalNorms, max_grad_norm=None)
    return {"errors": errors, "naive": naive}

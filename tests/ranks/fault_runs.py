"""What ranks do in the tests of faults: every function is a rank's."""

from __future__ import annotations

import functools
import logging
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_soo
from hf_soo.engine import diagnostics

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mkor": ("mkor", {"warmup_updates": 1, "update_period": 2}),
    "mkor_h": ("mkor_h", {"warmup_updates": 1, "update_period": 2}),
    "eva": ("eva", {"damping": 1e-3}),
    "kfac-1": ("kfac_expand", {"update_period": 1, "inverse_period": 2, "grad_workers": 1}),
    "kfac-2": ("kfac_expand", {"update_period": 1, "inverse_period": 2, "grad_workers": 2}),
    "rf_rmsprop": ("rf_rmsprop", {"batch_size": 8, "factor_lr": 0.5, "eps": 1e-2}),
}
"""K-FAC with one gradient worker for each layer, and with two: all ranks of a world of two, half of a world of four."""

STRATEGIES = ("ddp", "fsdp2", "zero2")
WIDTH, CLASSES, ROWS = 6, 3, 4


def die() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


# ---- a training run --------------------------------------------------------------------------------------------------


class Run:
    """A rank's part of a run: a model under a strategy, our optimizer, and its step."""

    def __init__(
        self, strategy: str, method: str, *, dtype: torch.dtype = torch.float32, scaler: bool = False, **changed: Any
    ) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
        self.model: nn.Module = nn.Sequential(*layers).to(dtype)
        self.dtype, self.engine = dtype, None
        name, settings = METHODS.get(method, (method, {}))
        self.build = lambda: hf_soo.build_optimizer(name, self.model, **{"lr": 1e-2, **settings, **changed})
        getattr(self, f"_start_{strategy}")()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000) if scaler else None
        if self.scaler is not None:
            self.optimizer.loss_scale = self.scaler.get_scale

    def _start_ddp(self) -> None:
        self.wrapped: nn.Module = DistributedDataParallel(self.model)
        self.optimizer = self.build()

    def _start_fsdp2(self) -> None:
        for i in (0, 2):
            fully_shard(self.model[i])  # type: ignore[index]
        self.wrapped = fully_shard(self.model)
        self.optimizer = self.build()

    def _start_zero2(self) -> None:
        import deepspeed

        from hf_soo.integrations.deepspeed import attach

        self.optimizer = self.build()
        config = {
            "train_micro_batch_size_per_gpu": ROWS, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2},
        }  # fmt: skip
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)
        attach(self.engine, self.optimizer)
        self.wrapped = self.engine

    def batch(self, step: int, spoil: float | None = None) -> tuple[Tensor, Tensor]:
        """This rank's rows of a step; ``spoil`` stands in one of them on the last rank alone."""
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype)
        if spoil is not None and dist.get_rank() == dist.get_world_size() - 1:
            x[1, 2] = spoil
        return x, torch.randint(CLASSES, (ROWS,), generator=generator)

    def backward(self, step: int, spoil: float | None = None) -> None:
        x, y = self.batch(step, spoil)
        loss = nn.functional.cross_entropy(self.wrapped(x), y)
        if self.engine is not None:
            self.engine.backward(loss)
        else:
            self.optimizer.report_loss(loss)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> None:
        """In accelerate's order."""
        if self.engine is not None:
            self.engine.step()
        elif self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def step(self, step: int, spoil: float | None = None) -> None:
        self.backward(step, spoil)
        self.update()

    def steps(self, steps: Iterable[int]) -> Run:
        for step in steps:
            self.step(step)
        return self

    def weights(self) -> Tensor:
        """All of them; every rank must ask."""
        whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return torch.cat([p.detach().flatten() for p in whole])

    def factors(self) -> Tensor:
        """All factors and what else the method remembers; every rank must ask."""
        saved = self.optimizer.second_order_state()
        tensors = [t for layer in saved["layers"].values() for t in layer.values()] + list(saved["own"].values())
        return torch.cat([tensor.double().flatten() for tensor in tensors])

    def collected(self) -> float:
        """The largest entry of what the window has collected so far on this rank."""
        buffers = [t for buffers in self.optimizer.stages.capture.buffers.values() for t in buffers if t.numel()]
        return max((float(t.abs().max()) for t in buffers), default=0.0)


def warnings_of(logger: str) -> list[str]:
    """What is logged there from now on."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    return messages


# ---- a peer that is gone ---------------------------------------------------------------------------------------------


def loses_a_rank(rank: int, world: int, strategy: str, method: str, where: str, how: str) -> None:
    """The last rank dies or sleeps after two steps, at a message of ours or before; or before the first one."""
    run = Run(strategy, method).steps(range(0 if where == "agree" else 2))
    fail = die if how == "dies" else lambda: time.sleep(600)
    if rank == world - 1:
        if where == "between steps":
            fail()
        setattr(run.optimizer.stages.comm, where, lambda *args: fail())
    run.steps(range(2, 5))


# ---- a batch that is not finite --------------------------------------------------------------------------------------


def spoiled(strategy: str, method: str, *, at: int, value: float, scaler: bool) -> dict[str, Any]:
    """Six steps and one more with ``value`` in an input row of the last rank; if skipped, beside six steps alone."""
    run = Run(strategy, method, scaler=scaler).steps(range(at))
    factors, weights, steps, updating = run.factors(), run.weights(), run.optimizer.steps, run.optimizer._updating
    messages = warnings_of("hf_soo")
    run.step(9, value)
    found: dict[str, Any] = {
        "factors kept": torch.equal(run.factors(), factors) and bool(factors.isfinite().all()),
        "weights kept": torch.equal(run.weights(), weights),
        "all weights NaN": bool(run.weights().isnan().all()),
        "steps": run.optimizer.steps - steps,
        "same turn": run.optimizer._updating == updating,
        "left over": run.collected(),
        "fallback": run.optimizer.health()["fallback_layers"],
        "layers": len(run.optimizer.layers),
        "scale": run.scaler.get_scale() if run.scaler is not None else 1.0,
    }
    run.steps(range(at, 6))
    if found["steps"] == 0:
        found["continued"] = all(
            map(torch.equal, (run.weights(), run.factors()), undisturbed(strategy, method, scaler))
        )
    found["final"], found["warnings"] = torch.cat([run.weights(), run.factors().float()]), list(messages)
    return found


@functools.cache
def undisturbed(strategy: str, method: str, scaler: bool) -> tuple[Tensor, Tensor]:
    """The weights and factors after six steps."""
    run = Run(strategy, method, scaler=scaler).steps(range(6))
    return run.weights(), run.factors()


def spoiled_runs(rank: int, world: int) -> dict[tuple[Any, ...], dict[str, Any]]:
    """NaN in fp32 under each strategy; inf under fp16's loss scale, on a factor update's turn and on another."""
    diagnostics.CHECK_PERIOD = 5  # so that a run of seven steps has a check behind it
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for method in METHODS:
        for strategy in STRATEGIES:
            found["nan", strategy, method] = spoiled(strategy, method, at=2, value=float("nan"), scaler=False)
        for strategy, at in (("ddp", 2), ("ddp", 3), ("fsdp2", 2)):
            found["inf", strategy, method, at] = spoiled(strategy, method, at=at, value=float("inf"), scaler=True)
        for strategy in ("ddp", "fsdp2"):
            found["shard", strategy, method] = {"weights": nan_in_one_row(strategy, method)}
    return found


def nan_in_one_row(strategy: str, method: str) -> Tensor:
    """The weights after a step whose averaged gradient has one NaN, in a row that one rank alone holds under FSDP2."""
    run = Run(strategy, method, base="sgd").steps(range(2))
    run.backward(2)
    gradient = run.model[2].weight.grad  # type: ignore[index]
    if isinstance(gradient, DTensor):
        if dist.get_rank() == 1:  # rows 4 to 7
            gradient.to_local()[1, 1] = float("nan")
    else:
        gradient[5, 1] = float("nan")
    run.update()
    return run.weights()


# ---- layers without rows ---------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Each example goes through one of four experts; the second is called with no rows, the others are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=i != 2) for i in range(4))

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        mixed = h
        for i, expert in enumerate(self.experts):
            rows = (route == i).nonzero().flatten()
            if len(rows) or i == 1:
                mixed = mixed.index_add(0, rows, torch.tanh(expert(h[rows])))
        return self.head(mixed)


ROUTES = [
    [0, 1, 2, 0, 0, 0, 0, 0],  # rank 1 of 2 has no rows for experts 1 and 2
    [0, 0, 1, 1, 2, 2, 2, 2],
    [1, 1, 1, 1, 0, 2, 0, 2],  # rank 0 has none for 0 and 2
    [0, 0, 0, 0, 0, 0, 0, 0],  # nobody has any for 1 and 2 in this step; for 3 never
    [2, 1, 0, 2, 1, 1, 1, 0],
    [0, 1, 2, 0, 0, 0, 0, 0],
]


def mixture(method: str, rank: int, world: int) -> tuple[Tensor, Tensor, set[str]]:
    """How far the weights have moved from their start, the start, and which layers had no rows at the end."""
    torch.manual_seed(0)
    model = Mixture().double()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    name, settings = METHODS[method]
    if world == 1:
        settings = {key: value for key, value in settings.items() if key != "grad_workers"}
    optimizer = hf_soo.build_optimizer(name, wrapped, lr=1e-2, **settings)
    for step, route in enumerate(ROUTES):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (8,), generator=generator)
        x, y, mine = (t.chunk(world)[rank] for t in (x, y, torch.tensor(route)))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(x, mine), y)
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    return end - start, start, optimizer.stages.diagnostics.without_rows()


def mixtures(rank: int, world: int) -> dict[str, tuple[Tensor, Tensor, set[str]]]:
    return {method: mixture(method, rank, world) for method in METHODS}


def shared_process_group(rank: int, world: int) -> dict[str, Any]:
    """What needs two ranks that stay alive."""
    return {"spoiled": spoiled_runs(rank, world), "mixtures": mixtures(rank, world)}


# ---- ranks that were set up differently ------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[str, tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "method": ("ddp", ("mkor", {}), ("eva", {})),
    "method without messages": ("ddp", ("mkor", {}), ("rf_rmsprop", {})),
    "method without layers": ("ddp", ("mkor", {}), ("adamw", {})),
    "period": ("ddp", ("mkor", {}), ("mkor", {"update_period": 3})),
    "decay": ("fsdp2", ("mkor", {}), ("mkor", {"factor_decay": 0.5})),
    "exclude": ("zero2", ("mkor", {}), ("mkor", {"exclude": ["2"]})),
    "base": ("ddp", ("mkor", {}), ("mkor", {"base": "sgd"})),
    "base settings": ("ddp", ("mkor", {}), ("mkor", {"base_args": {"betas": (0.5, 0.9)}})),
    "steps": ("ddp", ("mkor", {}), ("mkor", {})),
    # last: K-FAC makes process groups when it is built, and afterwards DeepSpeed could not make its own
    "method that shares work": ("ddp", ("mkor", {}), ("kfac-2", {})),
    "process groups": ("ddp", ("mkor", {}), ("kfac-1", {})),
}
"""What -> the strategy, and what each of two ranks builds."""


def set_up_differently(rank: int, world: int) -> dict[str, Any]:
    """The error of each rank's first step, and whether it has changed nothing; how often ranks that agree ask."""
    found: dict[str, Any] = {case: first_step(case, rank) for case in DIFFERENT}
    asked = []
    gather = dist.all_gather_into_tensor

    def counting(seen: Tensor, own: Tensor) -> Any:
        asked.append(own.nbytes)
        return gather(seen, own)

    dist.all_gather_into_tensor = counting
    Run("ddp", "mkor").steps(range(4))
    dist.all_gather_into_tensor = gather
    return found | {"asked": asked}


def first_step(case: str, rank: int) -> tuple[str, bool]:
    strategy, *choices = DIFFERENT[case]
    method, changed = choices[rank]
    run = Run(strategy, method, **changed)
    if case == "steps":
        saved = run.optimizer.second_order_state()
        run.steps(range(2))
        if rank == 1:
            run.optimizer.load_second_order_state(saved)
        else:
            run.optimizer.load_second_order_state(run.optimizer.second_order_state())
    before = run.weights()
    try:
        run.step(5)
    except ValueError as error:
        return str(error), torch.equal(run.weights(), before)
    return "nothing", False

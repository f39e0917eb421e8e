"""Runs the library and the numpy oracle side by side, on one network, one set of batches, one schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.oracles.core import Array, assert_close_report
from tests.oracles.training import Method, Mlp, simulate

Batches = list[tuple[Array, Array]]


def tensor(value: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))


def dense(C: torch.Tensor) -> Array:
    """I - CᵀC of a low-rank factor's rows in the library."""
    return (torch.eye(C.shape[-1], dtype=C.dtype) - C.mT @ C).numpy()


def twins(seed: int = 0, sizes: tuple[int, int, int] = (6, 5, 4), bias: bool = True) -> tuple[nn.Sequential, Mlp]:
    """A float64 torch network and its numpy copy."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(*sizes[:2], bias=bias), nn.Tanh(), nn.Linear(*sizes[1:], bias=bias)).double()
    linears = [net[0], net[2]]
    copies = [
        [None if p is None else p.detach().numpy().copy() for p in (layer.weight, layer.bias)] for layer in linears
    ]
    return net, Mlp([W for W, _ in copies], [c for _, c in copies])


def batches(steps: int, rows: int = 12, sizes: tuple[int, int, int] = (6, 5, 4), seed: int = 1) -> Batches:
    """Random inputs off zero, so that means are far from noise, and random targets."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(0.4, 1.0, (rows, sizes[0])), rng.normal(size=(rows, sizes[2]))) for _ in range(steps)]


def half_squares(net: nn.Module, x: Array, t: Array) -> torch.Tensor:
    """The loss of `Mlp`."""
    return (net(torch.from_numpy(x)) - torch.from_numpy(t)).square().sum(1).mean() / 2


def run_library(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, lrs: Sequence[float]
) -> list[list[torch.Tensor]]:
    """Parameters after each step; `lrs` are set on all groups, as a scheduler does."""
    after = []
    for (x, t), lr in zip(data, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        half_squares(net, x, t).backward()
        optimizer.step()
        after.append([p.detach().clone() for p in net.parameters()])
    return after


def assert_same_run(
    make: Callable[[nn.Module], PreconditionedOptimizer],
    method: Method | None,
    base: Any,
    *,
    steps: int = 10,
    lr: float = 0.05,
    rtol: float = 1e-10,
    batched: bool = False,
    sizes: tuple[int, int, int] = (6, 5, 4),
    bias: bool = True,
) -> None:
    """Train both, the learning rate changing from step to step, and compare every parameter after every step."""
    net, mlp = twins(sizes=sizes, bias=bias)
    data, lrs = batches(steps, sizes=sizes), [lr * (1 - 0.5 * step / steps) for step in range(steps)]
    optimizer = make(net)
    optimizer.stages.batched = batched
    library = run_library(net, optimizer, data, lrs)
    start = [p.copy() for p in mlp.parameters()]
    for step in range(steps):
        simulate(mlp, data[step : step + 1], method, base, lrs[step : step + 1])
        for (name, _), actual, expected in zip(net.named_parameters(), library[step], mlp.parameters(), strict=True):
            assert_close_report(actual, expected, rtol, f"{name} after step {step + 1}")
    moved = max(np.abs(p - q).max() for p, q in zip(mlp.parameters(), start, strict=True))
    assert moved > 1e-3, f"the runs agree, but nothing has moved (at most {moved:.1e})"

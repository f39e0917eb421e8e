"""Steps of the library's K-FAC on small networks: what went in, what came out, which factors it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hf_soo
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.oracles.core import Array, assert_close_report
from tests.oracles.kfac_cases import joint

SIDES = ("input", "output")


def build(name: str, net: nn.Module, *, lr: float = 0.0, **config: Any) -> PreconditionedOptimizer:
    """Over plain SGD, and without a rescale unless one is asked for: `.grad` is P after a step."""
    settings = {"rescale": "none", **config}
    return hf_soo.build_optimizer(
        name, net, lr=lr, base="sgd", base_args={"momentum": 0.0}, weight_decay=0.0, **settings
    )


def one_batch(name: str, net: nn.Module, **config: Any) -> PreconditionedOptimizer:
    """Factors of the last batch alone, and a new inverse each step."""
    return build(name, net, **{"factor_decay": 0.0, "update_period": 1, "inverse_period": 1, **config})


def one_step(optimizer: PreconditionedOptimizer, loss: Callable[[], Tensor]) -> dict[str, tuple[Array, Array]]:
    """(G, P) of each layer, [W | b] of shape [d_out, d_in (+ 1)]."""
    optimizer.zero_grad()
    loss().backward()
    return after_backward(optimizer)


def after_backward(optimizer: PreconditionedOptimizer) -> dict[str, tuple[Array, Array]]:
    """(G, P) of a step on the gradients that are there."""
    layers = {layer.name: layer.module for layer in optimizer.layers if layer.weight.grad is not None}
    before = {name: joint(module).numpy() for name, module in layers.items()}
    optimizer.step()
    return {name: (before[name], joint(module).numpy()) for name, module in layers.items()}


def factors_of(optimizer: PreconditionedOptimizer, name: str) -> tuple[Tensor, ...]:
    """The corrected estimates of the layer's sides, A then B (A alone for FOOF)."""
    rho, state = optimizer.config["factor_decay"], optimizer.stages.states[name]
    start = optimizer.config["factor_start"]
    return tuple(
        state[side]["factor"] / (1.0 if start == "identity" else 1 - rho ** int(state[side]["updates"]))
        for side in SIDES
        if side in state
    )


def assert_factors(optimizer: PreconditionedOptimizer, name: str, expected: Any, rtol: float) -> None:
    """A and B of a layer against the expected ones."""
    found = factors_of(optimizer, name)
    assert len(found) == len(expected)
    for side, ours, theirs in zip("AB", found, expected, strict=False):
        assert_close_report(ours, theirs, rtol, f"{side} of {name!r}")


def snapshot(optimizer: PreconditionedOptimizer, name: str, side: str) -> dict[str, Tensor]:
    """Copies of everything the state holds for one side."""
    return {key: tensor.clone() for key, tensor in optimizer.stages.states[name][side].items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def rows_seen(optimizer: PreconditionedOptimizer) -> dict[str, int]:
    """Rows of A in the current window, by layer: the first buffer holds the counts; an idle window has no buffers."""
    return {name: int(buffers[0][0]) if buffers else 0 for name, buffers in optimizer.stages.capture.buffers.items()}

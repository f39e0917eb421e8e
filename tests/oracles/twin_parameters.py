"""Runs the library and a numpy rule side by side on bare parameters whose gradients are set by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.methods import toy
from tests.oracles.core import Array, assert_close_report
from tests.oracles.training import Sgd

Gradient = Callable[[Array, int], Array]
Shapes = dict[str, tuple[int, ...]]
Values = dict[str, Array]
Make = Callable[[nn.Module], PreconditionedOptimizer]
Directions = Callable[[list[Array], float], list[Array]]
"""The oracle: gradients of all parameters and the learning rate -> their P."""


# ---- random problems -------------------------------------------------------------------------------------------------


def near_identity(rng: np.random.Generator, d: int, spread: float = 0.3) -> Array:
    return np.eye(d) + spread * rng.normal(size=(d, d)) / math.sqrt(d)


def drifting(rng: np.random.Generator, n: int, m: int, steps: int = 50) -> Gradient:
    """Gradients that depend on the point: M_t W N_t + R_t."""
    M, N = rng.normal(size=(steps, n, n)) / n, rng.normal(size=(steps, m, m)) / m
    R = rng.normal(scale=0.5, size=(steps, n, m))
    return lambda W, t: M[t] @ W @ N[t] + R[t]


def random_values(rng: np.random.Generator, shapes: Shapes, steps: int, scale: float = 0.5) -> list[Values]:
    """A set of tensors for each step, off zero, so that their means are no noise."""
    return [{name: rng.normal(0.3 * scale, scale, shape) for name, shape in shapes.items()} for _ in range(steps)]


# ---- the oracle's run ------------------------------------------------------------------------------------------------


def trajectory(
    W: Array, rule: Any, gradient: Gradient, steps: int, *, lr: float, alpha: float = 0.0, kappa: float = 0.0
) -> Array:
    """W after heavy-ball steps on the rule's directions, weight decay added after preconditioning."""
    W, base = W.copy(), Sgd(alpha, kappa)
    for t in range(steps):
        base.step([W], [rule.direction(gradient(W, t))], lr)
    return W


def separately(rules: Sequence[Any]) -> Directions:
    """Each parameter by its own rule; None leaves the gradient."""

    def directions(grads: list[Array], lr: float) -> list[Array]:
        return [g if rule is None else rule.direction(g) for rule, g in zip(rules, grads, strict=True)]

    return directions


# ---- the library's run -----------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Nothing but parameters."""

    def __init__(self, values: Values, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=dtype)))


def feed(optimizer: torch.optim.Optimizer, model: nn.Module, grads: Values) -> Values:
    """One step on these gradients; returns what `.grad` holds after it, P."""
    for name, parameter in model.named_parameters():
        parameter.grad = torch.tensor(grads[name], dtype=parameter.dtype)
    optimizer.step()
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def library_trajectory(
    optimizer: PreconditionedOptimizer, model: nn.Module, gradient: Gradient, steps: int, name: str = "weight"
) -> Array:
    """W after steps on gradients that depend on it."""
    parameter = dict(model.named_parameters())[name]
    for t in range(steps):
        feed(optimizer, model, {name: gradient(parameter.detach().double().numpy(), t)})
    return parameter.detach().double().numpy()


def assert_same_steps(
    make: Make,
    directions: Directions,
    shapes: Shapes,
    *,
    steps: int = 20,
    lr: float = 0.05,
    alpha: float = 0.0,
    kappa: float = 0.0,
    rtol: float = 1e-12,
    scale: float = 0.5,
    batched: bool | None = None,
    dtype: torch.dtype = torch.float64,
) -> PreconditionedOptimizer:
    """P and W after every step, the learning rate changing, `kappa` for every parameter not called a bias."""
    rng = np.random.default_rng(0)
    start, *grads = random_values(rng, shapes, steps + 1, scale)
    model = Bag(start, dtype)
    optimizer = make(model)
    optimizer.stages.batched = batched
    W = [start[name].copy() for name in shapes]
    base = Sgd(alpha, [0.0 if "bias" in name else kappa for name in shapes])
    for t, values in enumerate(grads):
        rate = lr * (1 - 0.5 * t / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        P = feed(optimizer, model, values)
        expected = directions([values[name] for name in shapes], rate)
        base.step(W, expected, rate)
        for name, p, w, actual in zip(shapes, expected, W, model.parameters(), strict=True):
            assert_close_report(P[name], p, rtol, f"P of {name} in step {t}")
            assert_close_report(actual, w, rtol, f"{name} after step {t}")
    return optimizer


def assert_moves_all_but_embeddings(make: Make, moves: Callable[[str, torch.Tensor], bool]) -> None:
    """One step of the toy model: P is another tensor than G exactly where `moves` says, and unused layers stay."""
    model = toy.toy()
    optimizer = make(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    toy.loss_of(model, toy.batches(1)[0]).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name not in grads:
            assert torch.equal(parameter, start[name]), name
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert torch.equal(parameter.grad, grads[name]) != moves(name, parameter), name
        assert not torch.equal(parameter, start[name]), name


def assert_resumes(make: Make, shapes: Shapes, *, before: int = 5, after: int = 5, scale: float = 0.5) -> None:
    """Saved after `before` steps, loaded with `weights_only=True` into new objects: the same bits from there on."""
    rng = np.random.default_rng(0)
    start, *grads = random_values(rng, shapes, before + after + 1, scale)
    model = Bag(start)
    optimizer = make(model)
    for values in grads[:before]:
        feed(optimizer, model, values)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    second = Bag(start)
    second.load_state_dict(saved["model"])
    resumed = make(second)
    resumed.load_state_dict(saved["optimizer"])
    for values in grads[before:]:
        P, Q = feed(optimizer, model, values), feed(resumed, second, values)
        for name, p, q in zip(shapes, model.parameters(), second.parameters(), strict=True):
            assert np.array_equal(P[name], Q[name]), f"P of {name}"
            assert torch.equal(p, q), name

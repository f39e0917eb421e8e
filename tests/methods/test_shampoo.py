"""Shampoo in the library against its definition in float64, the SVD, and the lengths of its grafts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.preconditioners.shampoo import _merge_dims
from tests.oracles import shampoo as sh
from tests.oracles.core import assert_close_report
from tests.oracles.twin_parameters import (
    Bag,
    Make,
    assert_moves_all_but_embeddings,
    assert_resumes,
    assert_same_steps,
    feed,
    random_values,
    separately,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"weight": (5, 4), "twin": (5, 4), "tall": (7, 3), "third": (3, 2, 4), "vector": (3,), "bias": (4,)}


def make(*, lr: float = 0.05, alpha: float = 0.0, kappa: float = 0.0, **config: object) -> Make:
    return lambda model: hf_soo.build_optimizer(
        "shampoo", model, lr=lr, base="sgd", base_args={"momentum": alpha}, weight_decay=kappa, **config
    )


def rules(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Any]:
    """Vectors are the base's."""
    return [sh.shampoo(shape, **config) if len(shape) > 1 else None for shape in shapes.values()]


# 1e-9: a factor of rank 4 of 5 has roots of ε^-e along its null directions, and ε = 1e-6 is felt at 1e-16/ε

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sum": {"factor_decay": 1.0},
    "slow average": {"factor_decay": 0.99, "inverse_period": 3},
    "periods": {"update_period": 2, "inverse_period": 3},
    "seldom updated": {"update_period": 4, "inverse_period": 2},
    "every step": {"inverse_period": 1},
    "exponent 1/2": {"exponent": 0.5, "inverse_period": 2},
    "exponent 1": {"exponent": 1.0, "epsilon": 1e-2},
    "adam": {"grafting": "adam"},
    "fast adam": {"grafting": "adam", "graft_decay": 0.9},
    "muon": {"grafting": "muon"},
    "no graft": {"grafting": "none", "inverse_period": 2},
    "epsilon": {"epsilon": 0.1, "grafting": "none"},
    "trace": {"trace_scaling": True, "grafting": "none", "epsilon": 1e-3},
    "blocks": {"max_dim": 3},
    "blocks to Muon": {"max_dim": 3, "grafting": "muon"},
    "blocks to Adam": {"max_dim": 4, "grafting": "adam"},
}
NAMES = {"factor_decay": "decay"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", [{}, {"alpha": 0.8, "kappa": 0.05}], ids=str)
def test_shampoo_is_the_definition(case: str, base: dict[str, float]) -> None:
    config = CASES[case]
    # a block of order 3 is no matrix, and Muon has no norm for it
    shapes = {name: shape for name, shape in SHAPES.items() if "Muon" not in case or len(shape) < 3}
    oracle = rules({NAMES.get(key, key): value for key, value in config.items()}, shapes)
    assert_same_steps(make(**base, **config), separately(oracle), shapes, rtol=1e-9, **base)


def test_shampoo_of_tensors_of_one_shape_together() -> None:
    assert_same_steps(make(), separately(rules({})), SHAPES, rtol=1e-9, batched=True)


def test_shampoo_holds_the_factor_and_its_root(rng: np.random.Generator) -> None:
    shapes = {"weight": (5, 4), "tall": (7, 3)}
    start, *grads = random_values(rng, shapes, 5)
    model = Bag(start)
    optimizer = make(max_dim=5, inverse_period=3, factor_decay=0.8)(model)
    rule = sh.shampoo((5, 4), decay=0.8, inverse_period=3).rules[0]
    for values in grads:
        feed(optimizer, model, values)
        rule.direction(values["weight"])
    for axis in range(2):
        state = optimizer.stages.states["weight"][f"axis{axis}"]
        assert int(state["updates"]) == 4
        assert_close_report(state["root"], rule.roots[axis], 1e-9, f"root {axis}")
        # the average is kept as a sum with weights 1-β₂, or already corrected: both are L up to one number
        factor = state["factor"].numpy()
        assert_close_report(factor / np.trace(factor), rule.L[axis] / np.trace(rule.L[axis]), 1e-12, f"factor {axis}")
    assert set(optimizer.stages.states["tall"]) == {f"block{i}.axis{axis}" for i in range(2) for axis in range(2)}
    assert [list(optimizer.stages.states["tall"][f"block{i}.axis0"]["root"].shape) for i in range(2)] == [
        [5, 5],
        [2, 2],
    ]


# ---- what it does to singular values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("exponent", "power"), [(None, 0.0), (0.25, 0.0), (0.5, -1.0)])
def test_shampoos_first_step_is_polar(
    rng: np.random.Generator, dtype: torch.dtype, exponent: float | None, power: float
) -> None:
    """The plain sum after G = USVᵀ: exponent 1/4 gives UVᵀ, 1/2 gives US⁻¹Vᵀ."""
    U, _, Vt = np.linalg.svd(rng.normal(size=(6, 6)))
    s = np.linspace(0.5, 2.0, 6)
    model = Bag({"weight": np.zeros((6, 6))}, dtype)
    optimizer = make(factor_decay=1.0, exponent=exponent, grafting="none", epsilon=1e-12)(model)
    P = feed(optimizer, model, {"weight": (U * s) @ Vt})["weight"]
    # in float32 eigenvalues are off by 1e-7 of the largest, 16 times the smallest; 6e-7 and 2e-6 in the spec
    assert_close_report(P, (U * s**power) @ Vt, 1e-11 if dtype is torch.float64 else 1e-5, "P")


def test_shampoo_with_trace_scaling_does_not_feel_the_loss_scale(rng: np.random.Generator) -> None:
    start, *grads = random_values(rng, {"weight": (5, 4)}, 6)
    moved = []
    for scale in (1.0, 1e-3):
        model = Bag(start)
        optimizer = make(trace_scaling=True, grafting="none", epsilon=1e-2, inverse_period=2)(model)
        moved.append([feed(optimizer, model, {"weight": scale * g["weight"]})["weight"] for g in grads])
    for one, small in zip(*moved, strict=True):
        assert_close_report(small, 1e-3 * one, 1e-11, "P")  # rounding of the eigenvalues


# ---- grafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_dim", [1024, 3])
@pytest.mark.parametrize("grafting", ["sgd", "adam", "muon"])
def test_shampoo_has_the_length_of_its_graft(rng: np.random.Generator, grafting: str, max_dim: int) -> None:
    """In each block, at the first step, where Adam's graft has entries of 1 up to 1e-8/|g|."""
    G = rng.normal(size=(7, 4))
    model = Bag({"weight": np.zeros((7, 4))})
    P = feed(make(grafting=grafting, max_dim=max_dim)(model), model, {"weight": G})["weight"]
    rows = [slice(0, 7)] if max_dim == 1024 else [slice(0, 3), slice(3, 6), slice(6, 7)]
    columns = [slice(0, 4)] if max_dim == 1024 else [slice(0, 3), slice(3, 4)]
    for where in [(r, c) for r in rows for c in columns]:
        n, m = G[where].shape
        muon = math.sqrt(min(n, m)) * math.sqrt(max(1.0, n / m))
        length = {"sgd": np.linalg.norm(G[where]), "adam": math.sqrt(n * m), "muon": muon}[grafting]
        assert np.linalg.norm(P[where]) == pytest.approx(float(length), rel=1e-6)


@pytest.mark.parametrize("grafting", ["sgd", "adam", "muon", "none"])
def test_shampoo_of_a_zero_gradient_is_zero(rng: np.random.Generator, grafting: str) -> None:
    model = Bag({"weight": np.ones((4, 3))})
    optimizer = make(grafting=grafting)(model)
    zero, G = np.zeros((4, 3)), rng.normal(size=(4, 3))
    assert np.array_equal(feed(optimizer, model, {"weight": zero})["weight"], zero)
    assert np.isfinite(feed(optimizer, model, {"weight": G})["weight"]).all()
    assert np.array_equal(feed(optimizer, model, {"weight": zero})["weight"], zero)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1, 2])
@pytest.mark.parametrize("threshold", [9, 1024, 8192])
@pytest.mark.parametrize(
    "shape",
    [(64, 3, 7, 7), (512, 512, 3, 3), (6, 6), (8, 4, 3, 3), (8, 1, 3, 1), (5,), (1, 1), (2, 2, 2, 2, 2), (30, 2, 2)],
)
def test_merge_dims_is_the_oracle(shape: tuple[int, ...], threshold: int, target: int) -> None:
    assert tuple(_merge_dims(shape, threshold, target=target)) == sh.merge_dims(shape, threshold, target)


def test_merge_dims_is_the_published_table() -> None:
    assert tuple(_merge_dims((64, 3, 7, 7), 1024, target=1)) == (64, 147)
    assert tuple(_merge_dims((512, 512, 3, 3), 1024, target=1)) == (512, 512, 9)
    assert tuple(_merge_dims((512, 512, 3, 3), 8192, target=1)) == (512, 4608)
    assert tuple(_merge_dims((6, 6), 1024)) == (6, 6)  # two axes stay a matrix unless asked


def test_shampoo_of_a_convolution_is_that_of_a_merged_matrix(rng: np.random.Generator) -> None:
    conv, linear = nn.Sequential(nn.Conv2d(3, 4, (2, 3))).double(), nn.Sequential(nn.Linear(18, 4)).double()
    one, two = make()(conv), make()(linear)
    for _ in range(4):
        G, bias = rng.normal(size=(4, 3, 2, 3)), rng.normal(size=4)
        P = feed(one, conv, {"0.weight": G, "0.bias": bias})
        Q = feed(two, linear, {"0.weight": G.reshape(4, 18), "0.bias": bias})
        assert np.array_equal(P["0.weight"].reshape(4, 18), Q["0.weight"])
        assert np.array_equal(P["0.bias"], bias)


def test_shampoo_leaves_vectors_and_embeddings_to_the_base() -> None:
    assert_moves_all_but_embeddings(make(), lambda name, parameter: parameter.ndim > 1 and "embedding" not in name)


def test_shampoo_refuses_what_it_cannot_do() -> None:
    for name, wrong in {
        "factor_decay": 1.5,
        "update_period": 0,
        "inverse_period": 0,
        "exponent": -0.5,
        "grafting": "lion",
        "graft_decay": 1.5,
        "epsilon": -1.0,
        "max_dim": 0,
    }.items():
        with pytest.raises(ValueError, match=name):
            make(**{name: wrong})(Bag({"weight": np.ones((3, 2))}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [{"inverse_period": 3}, {"grafting": "adam", "update_period": 2, "inverse_period": 4}, {"max_dim": 3}],
    ids=str,
)
def test_shampoo_resumes_to_the_bit(config: dict[str, Any]) -> None:
    """Five steps: in the middle of both periods."""
    assert_resumes(make(alpha=0.8, kappa=0.05, **config), SHAPES)

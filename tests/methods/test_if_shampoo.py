"""Inverse-free Shampoo in the library against its definition in float64: whole steps, factors, schedules, structure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.oracles import rootfree as rf
from tests.oracles.core import Array, assert_close_report
from tests.oracles.rootfree import InverseFree, inverse_free
from tests.oracles.twin_parameters import (
    Bag,
    Make,
    assert_moves_all_but_embeddings,
    assert_resumes,
    assert_same_steps,
    feed,
    near_identity,
    random_values,
    separately,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"weight": (4, 3), "twin": (4, 3), "third": (3, 4, 2), "fourth": (2, 3, 2, 3), "vector": (5,), "bias": (4,)}
DEFAULTS = {"batch_size": 8, "beta": 0.1, "momentum": 0.5, "damping": 1e-4}
NAMES = {"beta": "factor_lr", "momentum": "riemannian_momentum"}


def make(*, lr: float = 0.05, alpha: float = 0.0, kappa: float = 0.0, **config: object) -> Make:
    settings = {"batch_size": 8, "merge_kernels": False, **config}
    return lambda model: hf_soo.build_optimizer(
        "if_shampoo", model, lr=lr, base="sgd", base_args={"momentum": alpha}, weight_decay=kappa, **settings
    )


def one_matrix(start: Array, K: Sequence[Array] = (), **config: object) -> tuple[Bag, PreconditionedOptimizer]:
    """A model of one matrix, its factors at K."""
    model = Bag({"weight": start})
    optimizer = make(**config)(model)  # type: ignore[arg-type]
    for axis, factor in enumerate(K):
        optimizer.stages.states["weight"][f"axis{axis}"]["root"].copy_(torch.from_numpy(factor))
    return model, optimizer


def state(optimizer: PreconditionedOptimizer, name: str = "weight", key: str = "root", axes: int = 2) -> list[Array]:
    found = [optimizer.stages.states[name][f"axis{axis}"][key].double().numpy().copy() for axis in range(axes)]
    return [np.diag(k) if k.ndim == 1 else k for k in found]


def rules(shapes: dict[str, tuple[int, ...]], **config: object) -> list[rf.PerBlock]:
    return [inverse_free(shape, **{**DEFAULTS, **config}) for shape in shapes.values()]  # type: ignore[arg-type]


# ---- whole steps -----------------------------------------------------------------------------------------------------

# 1e-12: rounding of twenty steps, at most 6e-16 a step in the spec

CASES: dict[str, dict[str, float]] = {
    "defaults": {},
    "no momentum": {"momentum": 0.0, "damping": 0.1},
    "damped": {"damping": 0.5, "beta": 0.4},
    "batch": {"batch_size": 100, "beta": 0.45},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vector", ["diagonal", "dense"])
@pytest.mark.parametrize("base", [{}, {"alpha": 0.8, "kappa": 0.05}], ids=str)
def test_if_shampoo_is_the_definition(case: str, vector: str, base: dict[str, float]) -> None:
    config = CASES[case]
    build = make(vector_axes=vector, update_period=1, **base, **{NAMES.get(k, k): v for k, v in config.items()})
    optimizer = assert_same_steps(build, separately(rules(SHAPES, vector=vector, **config)), SHAPES, **base)
    for name, shape in SHAPES.items():
        assert set(optimizer.stages.states[name]) == {f"axis{axis}" for axis in range(len(shape))}


def test_if_shampoo_has_these_defaults() -> None:
    """update_period 2 among them."""
    assert_same_steps(make(), separately(rules(SHAPES, refreshes=rf.every(2))), SHAPES)


def test_if_shampoo_of_tensors_of_one_shape_together() -> None:
    assert_same_steps(make(), separately(rules(SHAPES, refreshes=rf.every(2))), SHAPES, batched=True)


@pytest.mark.parametrize(
    ("config", "refreshes"),
    [
        ({"update_period": 3}, rf.every(3)),
        ({"update_period": 2, "schedule": "prototype"}, rf.prototype(2)),
        ({"update_period": 1, "schedule": "prototype"}, rf.every(1)),
    ],
    ids=["every 3", "prototype 2", "prototype 1"],
)
def test_if_shampoo_refreshes_on_schedule(config: dict[str, object], refreshes: rf.Callable[[int], bool]) -> None:
    optimizer = assert_same_steps(make(**config), separately(rules(SHAPES, refreshes=refreshes)), SHAPES, steps=24)  # type: ignore[arg-type]
    chosen = [t for t in range(60) if optimizer.preconditioner.updates_at(t)]
    assert chosen == [t for t in range(60) if refreshes(t)]


def test_if_shampoo_ramps_the_prototypes_period() -> None:
    _, optimizer = one_matrix(np.ones((3, 2)), update_period=2, schedule="prototype")
    chosen = [t for t in range(24) if optimizer.preconditioner.updates_at(t)]
    assert chosen == [*range(16), 17, 19, 21, 23]


@pytest.mark.parametrize("large", ["diagonal", "identity", "block"])
def test_if_shampoo_of_long_axes(large: str) -> None:
    shapes = {"weight": (7, 3), "wide": (2, 8), "both": (4, 5), "third": (3, 4, 2)}
    build = make(max_dim=3, large_axes=large, update_period=1, damping=0.1)
    optimizer = assert_same_steps(build, separately(rules(shapes, max_dim=3, large=large, damping=0.1)), shapes)
    states = optimizer.stages.states["weight"]
    sizes = {key: list(value["root"].shape) for key, value in states.items()}
    if large == "diagonal":
        assert sizes == {"axis0": [7], "axis1": [3, 3]}
    elif large == "identity":
        assert sizes == {"axis1": [3, 3]}
    else:
        rows = {0: 3, 1: 3, 2: 1}
        expected = {f"block{i}.axis{axis}": [d, d] for i, n in rows.items() for axis, d in ((0, n), (1, 3))}
        assert sizes == expected


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_kernels", [False, True])
def test_if_shampoo_ignores_axes_of_one(rng: np.random.Generator, merge_kernels: bool) -> None:
    start, *grads = random_values(rng, {"weight": (4, 3)}, 6)
    short, long = Bag(start), Bag({"weight": start["weight"].reshape(4, 3, 1, 1)})
    one, two = make()(short), make(merge_kernels=merge_kernels)(long)
    for values in grads:
        P = feed(one, short, values)["weight"]
        Q = feed(two, long, {"weight": values["weight"].reshape(4, 3, 1, 1)})["weight"]
        assert np.array_equal(P, Q.reshape(4, 3))


@pytest.mark.parametrize("merge_kernels", [True, False])
def test_if_shampoo_of_a_convolution(rng: np.random.Generator, merge_kernels: bool) -> None:
    """Merged: the very bits of a Linear layer on unfolded inputs. Not merged: a factor for each axis."""
    conv = nn.Sequential(nn.Conv2d(3, 4, (2, 3), bias=False)).double()
    linear = nn.Sequential(nn.Linear(18, 4, bias=False)).double()
    one, two = make(merge_kernels=merge_kernels)(conv), make()(linear)
    rule = inverse_free((4, 3, 2, 3), **DEFAULTS, refreshes=rf.every(2))  # type: ignore[arg-type]
    for _ in range(5):
        G = rng.normal(size=(4, 3, 2, 3))
        P = feed(one, conv, {"0.weight": G})["0.weight"]
        Q = feed(two, linear, {"0.weight": G.reshape(4, 18)})["0.weight"]
        if merge_kernels:
            assert np.array_equal(P.reshape(4, 18), Q)
        else:
            assert_close_report(P, rule.direction(G), 1e-12, "P")  # rounding alone


def test_if_shampoo_of_one_number_is_rf_rmsprop_to_second_order(rng: np.random.Generator) -> None:
    beta = 1e-2
    for shape in ((1,), (1, 1)):
        G = {"weight": rng.uniform(0.16, 0.47, size=shape)}  # |Bg² - 1| <= .8
        model, other = Bag({"weight": np.ones(shape)}), Bag({"weight": np.ones(shape)})
        P = feed(make(factor_lr=beta, riemannian_momentum=0.0, damping=0.0)(model), model, G)["weight"]
        rf_rmsprop = hf_soo.build_optimizer("rf_rmsprop", other, lr=0.1, batch_size=8, factor_lr=beta, eps=0.0)
        Q = feed(rf_rmsprop, other, G)["weight"]
        assert_close_report(P, Q, 0.5 * beta**2, f"u of shape {shape}")  # ¾(Bg² - 1)²β²; .38 β² in the spec


def test_if_shampoo_leaves_embeddings_and_their_twins_to_the_base() -> None:
    assert_moves_all_but_embeddings(make(), lambda name, parameter: "embedding" not in name)


# ---- one step --------------------------------------------------------------------------------------------------------


def test_if_shampoo_applies_the_kronecker_product(rng: np.random.Generator) -> None:
    shapes = {name: SHAPES[name] for name in ("weight", "third", "fourth", "vector")}
    start, *grads = random_values(rng, shapes, 4)
    model = Bag(start)
    optimizer = make(vector_axes="dense")(model)
    for values in grads:
        P = feed(optimizer, model, values)
    for name, shape in shapes.items():
        Ks = state(optimizer, name, axes=len(shape))
        assert max(np.abs(K - np.eye(len(K))).max() for K in Ks) > 1e-2
        dense = rf.kron_all([K @ K.T for K in Ks]) @ grads[-1][name].ravel()
        assert_close_report(P[name].ravel(), dense, 1e-13, f"P of {name}")


@pytest.mark.parametrize("beta", [1e-1, 1e-2, 1e-3])
def test_if_shampoo_moves_the_inverse_as_an_average(rng: np.random.Generator, beta: float) -> None:
    """(KKᵀ)⁻¹ becomes (1-β)S + βU up to β²: the error is at most β², and is quadratic where that of a wrong U is β."""
    G, K = 0.2 * rng.normal(size=(4, 3)), [near_identity(rng, d) for d in (4, 3)]
    S = [rf.gram_inverse(k) for k in K]
    model, optimizer = one_matrix(
        np.zeros((4, 3)), K, factor_lr=beta, riemannian_momentum=0.0, damping=0.1, update_period=1
    )
    feed(optimizer, model, {"weight": G})
    assert max(np.linalg.norm(m) for m in state(optimizer, key="momentum")) < 1  # so that c = 1
    for n, (matrix, other) in enumerate(((G, S[1]), (G.T, S[0]))):
        inverse = np.linalg.inv(other)
        U = (8 * matrix @ inverse @ matrix.T + 0.1 * np.trace(inverse) * np.eye(len(S[n]))) / len(other)
        new = rf.gram_inverse(state(optimizer)[n])
        assert_close_report(new, (1 - beta) * S[n] + beta * U, beta**2, f"S of axis {n}")  # .47 β² in the spec


@pytest.mark.parametrize("beta", [0.3, 0.01])
def test_if_shampoo_truncates_the_exponential_map(rng: np.random.Generator, beta: float) -> None:
    before = [near_identity(rng, d) for d in (4, 3)]
    model, optimizer = one_matrix(
        np.zeros((4, 3)), before, factor_lr=beta, riemannian_momentum=0.0, damping=0.1, update_period=1
    )
    feed(optimizer, model, {"weight": 0.35 * rng.normal(size=(4, 3))})
    for K, old, m in zip(state(optimizer), before, state(optimizer, key="momentum"), strict=True):
        values, Q = np.linalg.eigh(-beta / max(1.0, np.linalg.norm(m)) * m)
        exact = old @ (Q * np.exp(values)) @ Q.T
        assert 0 < np.linalg.norm(K - exact) <= 0.1 * beta**2 * np.linalg.norm(exact)  # 7.5e-2 β² in the spec


@pytest.mark.parametrize("scale", [10.0**power for power in range(-3, 4)])
def test_if_shampoo_keeps_factors_invertible(rng: np.random.Generator, scale: float) -> None:
    beta = 0.9
    model, optimizer = one_matrix(np.zeros((4, 3)), factor_lr=beta, update_period=1)
    for t in range(20):
        before = state(optimizer)
        rank_one = rng.normal(size=(4, 1)) * rng.normal(size=(1, 3))
        feed(optimizer, model, {"weight": scale * (rank_one if t % 2 else rng.normal(size=(4, 3)))})
        for new, old in zip(state(optimizer), before, strict=True):
            # 1e-9: K is solved against itself, and its condition number grows
            assert np.linalg.eigvals(np.linalg.solve(old, new)).real.min() >= 1 - beta - 1e-9


def test_if_shampoo_refuses_what_it_cannot_do() -> None:
    for name, wrong in {
        "batch_size": 0,
        "factor_lr": -0.1,
        "riemannian_momentum": 1.5,
        "damping": -1.0,
        "update_period": 0,
        "schedule": "sometimes",
        "max_dim": 0,
        "large_axes": "dense",
        "vector_axes": "block",
        "state_dtype": "float8",
    }.items():
        with pytest.raises(ValueError, match=name):
            one_matrix(np.ones((3, 2)), **{name: wrong})


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        ({"update_period": 3, "alpha": 0.8, "kappa": 0.05}, SHAPES),
        ({"schedule": "prototype", "update_period": 2}, {"weight": (4, 3)}),
        ({"max_dim": 2, "large_axes": "block"}, {"weight": (5, 3)}),
        ({"max_dim": 3, "large_axes": "identity"}, {"weight": (5, 3)}),
        ({"state_dtype": "bfloat16"}, {"weight": (5, 3), "vector": (4,)}),
    ],
    ids=str,
)
def test_if_shampoo_resumes_to_the_bit(config: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> None:
    """Five steps with period 3: the phase is in the middle; the prototype's 17 comes after 15."""
    build = make(**config)  # type: ignore[arg-type]
    before = 16 if "schedule" in config else 5
    assert_resumes(build, shapes, before=before)
    optimizer = build(Bag(random_values(np.random.default_rng(0), shapes, 1)[0]))
    assert optimizer.state_dict()["second_order"]["config"]["batch_size"] == 8


def test_if_shampoo_of_a_zero_gradient_is_zero() -> None:
    model, optimizer = one_matrix(np.ones((4, 3)))
    for _ in range(3):
        assert np.array_equal(feed(optimizer, model, {"weight": np.zeros((4, 3))})["weight"], np.zeros((4, 3)))
    # no curvature but λ: K grows
    assert all(np.diag(K).min() > 1 for K in state(optimizer))


def test_if_shampoo_oracle_of_one_matrix_is_what_the_library_holds(rng: np.random.Generator) -> None:
    """K and m themselves, away from I."""
    K = [near_identity(rng, d) for d in (4, 3)]
    rule = InverseFree(8, 0.1, 0.5, 1e-4, ("dense",) * 2, [k.copy() for k in K])
    model, optimizer = one_matrix(np.zeros((4, 3)), K, update_period=1)
    for _ in range(5):
        G = rng.normal(size=(4, 3))
        feed(optimizer, model, {"weight": G})
        rule.direction(G)
        for key, expected in (("root", rule.K), ("momentum", rule.m)):
            for axis, value in enumerate(state(optimizer, key=key)):
                assert_close_report(value, expected[axis], 1e-12, f"{key} of axis {axis}")

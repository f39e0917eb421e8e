"""Eva-s in the library against dense solves and its definition in float64, the clip and norms over all tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hf_soo
from tests.oracles import shampoo as sh
from tests.oracles.core import Array, assert_close_report
from tests.oracles.shampoo import EvaS
from tests.oracles.twin_parameters import (
    Bag,
    Directions,
    Make,
    assert_moves_all_but_embeddings,
    assert_resumes,
    assert_same_steps,
    feed,
    random_values,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"weight": (5, 4), "twin": (5, 4), "third": (3, 4, 2), "fourth": (2, 3, 1, 2), "vector": (3,), "bias": (4,)}
DAMPING = 0.03


def make(*, lr: float = 0.05, alpha: float = 0.0, kappa: float = 0.0, **config: object) -> Make:
    """With mode means, as in the definition; the default is another scale."""
    settings = {"kv_scale": "mean", **config}
    return lambda model: hf_soo.build_optimizer(
        "eva_s", model, lr=lr, base="sgd", base_args={"momentum": alpha}, weight_decay=kappa, **settings
    )


def oracle(config: dict[str, Any]) -> Directions:
    """Vectors are the base's, and count in no clip or norm."""
    rule = EvaS(**config)

    def directions(grads: list[Array], lr: float) -> list[Array]:
        moved = iter(rule.directions([G for G in grads if G.ndim > 1], lr))
        return [next(moved) if G.ndim > 1 else G for G in grads]

    return directions


def one_step(G: Array, **config: object) -> Array:
    """The library's P of one tensor, without rescaling unless asked."""
    model = Bag({"weight": np.zeros(G.shape)})
    return feed(make(**{"rescale": "none", **config})(model), model, {"weight": G})["weight"]


# ---- one tensor ------------------------------------------------------------------------------------------------------

SCALES = pytest.mark.parametrize("kv_scale", ["mean", "unit", "sum"])
ORDERS = pytest.mark.parametrize("shape", [(6, 4), (3, 4, 2), (2, 3, 2, 3)])


@ORDERS
@SCALES
def test_joint_eva_s_is_a_dense_solve(rng: np.random.Generator, shape: tuple[int, ...], kv_scale: str) -> None:
    damping = 3.0 if kv_scale == "sum" else DAMPING  # sums are long, and a condition number of 1e9 needs no test
    G = rng.normal(0.2, 0.5, size=shape)
    vectors = sh.mode_vectors(G, kv_scale)
    expected = sh.eva_s_joint_dense(G, vectors, damping)
    condition = (sh.outer_all(vectors) ** 2).sum() / damping
    # 6e-16 in the spec for means; the dense solve loses the digits of its condition number
    P = one_step(G, kv_scale=kv_scale, damping=damping)
    assert_close_report(P, expected, max(1e-10, 1e-15 * condition), "P")


@ORDERS
@SCALES
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_separable_eva_s_is_the_dense_roots(
    rng: np.random.Generator, shape: tuple[int, ...], kv_scale: str, power: float
) -> None:
    G = rng.normal(0.2, 0.5, size=shape)
    outers = [np.outer(v, v) + DAMPING * np.eye(len(v)) for v in sh.mode_vectors(G, kv_scale)]
    dense = sh.kron_all([sh.matrix_power(C, -power) for C in outers]) @ G.ravel()
    P = one_step(G, form="separable", exponent=power, kv_scale=kv_scale)
    # 1e-15 in the spec for means and p = 1/4; here the condition number to the power p, for each axis
    condition = np.prod([np.linalg.cond(C) ** power for C in outers])
    assert_close_report(P.ravel(), dense, max(1e-10, 1e-15 * float(condition)), "P")


def test_separable_eva_s_has_exponent_one_quarter(rng: np.random.Generator) -> None:
    G = rng.normal(0.2, 0.5, size=(6, 4))
    expected = sh.eva_s_separable(G, sh.mode_vectors(G, "mean"), DAMPING, 0.25)
    assert_close_report(one_step(G, form="separable"), expected, 1e-12, "P")  # rounding alone


def test_eva_s_of_a_gradient_without_means_divides_by_the_damping(rng: np.random.Generator) -> None:
    """Rows and columns that sum to zero: v = 0 up to rounding, so P = G/γ in both forms of exponent 1/2."""
    G = rng.normal(size=(6, 4))
    G -= G.mean(0)
    G -= G.mean(1, keepdims=True)
    for config in ({"form": "joint"}, {"form": "separable", "exponent": 0.5}):
        assert_close_report(one_step(G, **config), G / DAMPING, 1e-12, str(config))  # |v|² is about 1e-33
    zero = np.zeros((6, 4))
    for kv_scale in ("mean", "unit"):
        for form in ("joint", "separable"):
            assert np.array_equal(one_step(zero, form=form, kv_scale=kv_scale), zero)


def test_eva_s_ignores_axes_of_one(rng: np.random.Generator) -> None:
    G = rng.normal(0.2, 0.5, size=(6, 4))
    for form in ("joint", "separable"):
        long = one_step(G.reshape(6, 1, 4, 1), form=form)
        assert_close_report(long.reshape(6, 4), one_step(G, form=form), 1e-14, form)  # sums in another order


# ---- rescaling -------------------------------------------------------------------------------------------------------


def steps_of(config: dict[str, Any], lr: float, scale: float = 1.0) -> tuple[list[Array], list[Array]]:
    """G and P of two tensors in one step."""
    shapes = {"weight": (5, 4), "third": (3, 4, 2)}
    (values,) = random_values(np.random.default_rng(0), shapes, 1, scale)
    model = Bag(values)
    P = feed(make(lr=lr, **config)(model), model, values)
    return [values[name] for name in shapes], [P[name] for name in shapes]


@pytest.mark.parametrize("form", ["joint", "separable"])
@pytest.mark.parametrize(("kl_clip", "active"), [(1e-6, True), (1e-3, True), (1e6, False)])
def test_eva_s_clips_the_predicted_change(form: str, kl_clip: float, active: bool) -> None:
    lr = 0.1
    grads, moved = steps_of({"form": form, "kl_clip": kl_clip}, lr)
    _, plain = steps_of({"form": form, "rescale": "none"}, lr)
    nu = np.linalg.norm(moved[0]) / np.linalg.norm(plain[0])
    change = lr**2 * nu * sum((P * G).sum() for G, P in zip(grads, moved, strict=True))
    assert change <= kl_clip * (1 + 1e-12)
    for P, Q in zip(moved, plain, strict=True):
        assert_close_report(P, nu * Q, 1e-13, "the same ν for both")
    if active:
        assert nu < 1 and change == pytest.approx(kl_clip, rel=1e-12)
    else:
        assert nu == 1.0


@pytest.mark.parametrize("form", ["joint", "separable"])
def test_eva_s_rescales_to_the_global_or_each_norm(form: str) -> None:
    _, plain = steps_of({"form": form, "rescale": "none"}, 0.1)
    grads, moved = steps_of({"form": form, "rescale": "global"}, 0.1)
    assert sum((P**2).sum() for P in moved) == pytest.approx(sum((G**2).sum() for G in grads), rel=1e-12)
    ratios = [np.linalg.norm(P) / np.linalg.norm(Q) for P, Q in zip(moved, plain, strict=True)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-13)
    grads, moved = steps_of({"form": form, "rescale": "norm"}, 0.1)
    for G, P, Q in zip(grads, moved, plain, strict=True):
        assert np.linalg.norm(P) == pytest.approx(np.linalg.norm(G), rel=1e-12)
        assert_close_report(P / np.linalg.norm(P), Q / np.linalg.norm(Q), 1e-13, "direction")


@pytest.mark.parametrize("rescale", ["kl_clip", "global", "norm", "none"])
def test_eva_s_of_zero_gradients_is_zero(rescale: str) -> None:
    grads, moved = steps_of({"rescale": rescale}, 0.1, scale=0.0)
    assert not any(G.any() for G in grads)
    assert all(np.array_equal(P, np.zeros_like(P)) for P in moved)


# ---- whole runs ------------------------------------------------------------------------------------------------------

# 1e-10: rounding of twenty steps; P is up to 1/γ = 33 times as long as G

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "separable": {"form": "separable"},
    "separable, exponent 1/2": {"form": "separable", "exponent": 0.5},
    "sums": {"kv_scale": "sum"},
    "unit": {"kv_scale": "unit"},
    "unit, separable": {"kv_scale": "unit", "form": "separable"},
    "new weight": {"kv_new_weight": 0.3},
    "period": {"update_period": 3, "kv_new_weight": 0.5},
    "warm-up": {"update_period": 4, "warmup_updates": 3, "kv_new_weight": 0.5},
    "global": {"rescale": "global"},
    "norm": {"rescale": "norm"},
    "clip never active": {"kl_clip": 1e3, "damping": 1.0},
    "damping": {"damping": 0.5, "rescale": "none"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", [{}, {"alpha": 0.8, "kappa": 0.05}], ids=str)
def test_eva_s_is_the_definition(case: str, base: dict[str, float]) -> None:
    config = CASES[case]
    assert_same_steps(make(**base, **config), oracle(config), SHAPES, rtol=1e-10, **base)


def test_eva_s_of_tensors_of_one_shape_together() -> None:
    assert_same_steps(make(), oracle({}), SHAPES, rtol=1e-10, batched=True)


def test_eva_s_holds_its_vectors(rng: np.random.Generator) -> None:
    start, *grads = random_values(rng, {"weight": (5, 4)}, 4)
    model, rule = Bag(start), EvaS(kv_new_weight=0.7)
    optimizer = make(kv_new_weight=0.7)(model)
    assert not any(bool(optimizer.stages.states["weight"][f"axis{axis}"]["seen"]) for axis in range(2))
    for values in grads:
        feed(optimizer, model, values)
        rule.directions([values["weight"]], 0.05)
        for axis, v in enumerate(rule.vectors[0]):
            state = optimizer.stages.states["weight"][f"axis{axis}"]
            assert bool(state["seen"])
            assert_close_report(state["vector"], v, 1e-14, f"v of axis {axis}")  # two products and a mean


def test_eva_s_with_large_damping_is_the_base() -> None:
    """lr·γ fixed: P/γ up to |v|²/γ; the momentum and decay are as they were."""
    damping, lr, rng = 1e6, 0.05, np.random.default_rng(0)
    start, *grads = random_values(rng, SHAPES, 6)
    for form in ("joint", "separable"):
        exponent = {"exponent": 0.5} if form == "separable" else {}
        shapes = {"weight": SHAPES["weight"]} if form == "separable" else SHAPES  # two axes: γ^-½ twice
        one, two = Bag({n: start[n] for n in shapes}), Bag({n: start[n] for n in shapes})
        settings = {"damping": damping, "rescale": "none", "form": form, **exponent}
        eva, sgd = make(**settings)(one), hf_soo.build_optimizer("sgd", two, lr=lr, momentum=0.0, weight_decay=0.0)  # type: ignore[arg-type]
        for group in eva.param_groups:
            group["lr"] = lr * damping
        for values in grads:
            matrices = {n: g if g.ndim > 1 else np.zeros_like(g) for n, g in values.items()}
            feed(eva, one, matrices)
            feed(sgd, two, matrices)
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert_close_report(p, q, 1e-6, f"{name}, {form}")


def test_eva_s_leaves_vectors_and_embeddings_to_the_base() -> None:
    assert_moves_all_but_embeddings(make(), lambda name, parameter: parameter.ndim > 1 and "embedding" not in name)


def test_eva_s_refuses_what_it_cannot_do() -> None:
    for name, wrong in {
        "form": "both",
        "damping": 0.0,
        "kv_new_weight": 1.5,
        "rescale": "lars",
        "kl_clip": 0.0,
        "update_period": 0,
        "warmup_updates": -1,
        "kv_scale": "median",
    }.items():
        with pytest.raises(ValueError, match=name):
            make(**{name: wrong})(Bag({"weight": np.ones((3, 2))}))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{"update_period": 3}, {"form": "separable", "kv_new_weight": 0.4}], ids=str)
def test_eva_s_resumes_to_the_bit(config: dict[str, Any]) -> None:
    assert_resumes(make(alpha=0.8, kappa=0.05, **config), SHAPES)

"""Root-free RMSProp in the library against its closed form in float64, its invariances, and its state's dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hf_soo
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.oracles.core import assert_close_report, relative_error
from tests.oracles.rootfree import RootFree
from tests.oracles.twin_parameters import (
    Bag,
    Make,
    assert_moves_all_but_embeddings,
    assert_resumes,
    assert_same_steps,
    drifting,
    feed,
    library_trajectory,
    random_values,
    separately,
    trajectory,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"weight": (4, 3), "twin": (4, 3), "tensor": (2, 3, 2), "vector": (5,), "bias": (4,), "scalar": ()}


def make(*, lr: float = 0.05, alpha: float = 0.0, kappa: float = 0.0, **config: object) -> Make:
    return lambda model: hf_soo.build_optimizer(
        "rf_rmsprop", model, lr=lr, base="sgd", base_args={"momentum": alpha}, weight_decay=kappa, **config
    )


def second_moment(optimizer: PreconditionedOptimizer, name: str = "weight") -> torch.Tensor:
    return optimizer.stages.states[name]["gradient"]["second_moment"]


# 1e-12: rounding of fifty steps, 5e-16 in the spec


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"factor_lr": 0.2, "eps": 1e-2}, {"alpha": 0.8, "kappa": 0.05}, {"batch_size": 1}], ids=str
)
def test_rf_rmsprop_is_the_closed_form(config: dict[str, float], batched: bool) -> None:
    settings = {"batch_size": 16, "factor_lr": 0.01, "eps": 1e-4, "alpha": 0.0, "kappa": 0.0, **config}
    rules = [RootFree(int(settings["batch_size"]), settings["factor_lr"], settings["eps"]) for _ in SHAPES]
    run = {key: settings[key] for key in ("alpha", "kappa")}
    build = make(**{"batch_size": 16, **config})  # what is not in `config` is the library's default
    optimizer = assert_same_steps(build, separately(rules), SHAPES, steps=50, batched=batched, **run)  # type: ignore[arg-type]
    for name, rule in zip(SHAPES, rules, strict=True):
        assert_close_report(second_moment(optimizer, name), rule.s, 1e-12, f"ŝ of {name}")


def test_rf_rmsprop_without_memory_is_sgd_to_the_bit(rng: np.random.Generator) -> None:
    start, *grads = random_values(rng, SHAPES, 11)
    one, two = Bag(start), Bag(start)
    rf = make(batch_size=64, factor_lr=0.0, eps=0.0, alpha=0.9, kappa=0.02)(one)
    sgd = hf_soo.build_optimizer("sgd", two, lr=0.05, momentum=0.9, weight_decay=0.02)
    for values in grads:
        feed(rf, one, values)
        feed(sgd, two, values)
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("B", [32, 48])
def test_rf_rmsprop_of_mean_and_summed_loss(rng: np.random.Generator, B: int) -> None:
    """(mean, B, ŝ₀ = 1, ε) and (sum, 1, ŝ₀ = B, Bε)."""
    gradient, start, after = drifting(rng, 5, 4), rng.normal(size=(5, 4)), []
    for factor, batch_size in ((1, B), (B, 1)):
        model = Bag({"weight": start})
        optimizer = make(batch_size=batch_size, factor_lr=0.05, eps=1e-3 * factor, alpha=0.6, kappa=0.01)(model)
        second_moment(optimizer).fill_(factor)
        after.append(library_trajectory(optimizer, model, lambda W, t, c=factor: c * gradient(W, t), 50))
    assert_close_report(after[1], after[0], 1e-13, "parameters")  # rounding alone; 0 in the spec for a power of 2


def test_rf_rmsprop_is_equivariant_to_diagonal_maps(rng: np.random.Generator) -> None:
    """w = Dw̃, ŝ₀ = D², ε = 0: the same trajectory in w, decay and momentum included."""
    gradient, start, D = drifting(rng, 5, 4), rng.normal(size=(5, 4)), np.exp(rng.normal(size=(5, 4)))
    settings = {"batch_size": 16, "factor_lr": 0.05, "eps": 0.0, "alpha": 0.6, "kappa": 0.01}
    rule = RootFree(16, 0.05, 0.0)
    expected = trajectory(start, rule, gradient, 50, lr=0.05, alpha=0.6, kappa=0.01)
    errors = []
    for moment in (D**2, np.ones_like(D)):
        model = Bag({"weight": start / D})
        optimizer = make(**settings)(model)  # type: ignore[arg-type]
        second_moment(optimizer).copy_(torch.from_numpy(moment))
        after = library_trajectory(optimizer, model, lambda W, t: D * gradient(D * W, t), 50)
        errors.append(relative_error(D * after, expected))
    assert errors[0] <= 1e-12  # 2e-16 in the spec
    assert errors[1] > 1e-3  # ŝ₀ = 1 belongs to one set of coordinates


def test_rf_rmsprop_at_rest_divides_by_the_loss_scale(rng: np.random.Generator) -> None:
    G, updates = rng.normal(size=(5, 4)), []
    for scale in (1.0, 7.0):
        model = Bag({"weight": np.zeros((5, 4))})
        optimizer = make(batch_size=8, factor_lr=0.1, eps=0.0)(model)
        updates.append([feed(optimizer, model, {"weight": scale * G}) for _ in range(400)][-1]["weight"])
    assert_close_report(updates[0], 1 / (8 * G), 1e-6, "u = 1/(Bg)")  # 0.9^400 of ŝ's start is left
    assert_close_report(updates[1], updates[0] / 7, 1e-6, "u of the sevenfold loss")


def test_rf_rmsprop_moves_everything_trainable() -> None:
    assert_moves_all_but_embeddings(make(batch_size=12), lambda name, parameter: True)


def test_rf_rmsprop_in_bfloat16_is_refused_where_it_would_freeze() -> None:
    model = Bag({"weight": np.ones((3, 2))}, torch.float32)
    with pytest.raises(ValueError, match="factor_lr"):
        make(batch_size=8, state_dtype="bfloat16", factor_lr=2**-9 * 0.99)(model)
    zero = {"weight": np.zeros((3, 2))}
    for state_dtype, factor_lr in (("bfloat16", 2**-8), ("float32", 1e-4)):
        optimizer = make(batch_size=8, state_dtype=state_dtype, factor_lr=factor_lr)(model)
        assert second_moment(optimizer).dtype == getattr(torch, state_dtype)
        feed(optimizer, model, zero)
        # 1 - β: a step of bfloat16 below 1 is 2⁻⁸; float32 rounds at 6e-8
        assert_close_report(second_moment(optimizer), np.full((3, 2), 1 - factor_lr), 1e-7, state_dtype)


def test_rf_rmsprop_needs_a_batch_size() -> None:
    model = Bag({"weight": np.ones((3, 2))})
    with pytest.raises((ValueError, TypeError), match="batch_size"):
        make()(model)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="batch_size"):
            make(batch_size=wrong)(model)


def test_rf_rmsprop_resumes_to_the_bit() -> None:
    build = make(batch_size=16, alpha=0.8, kappa=0.05)
    assert_resumes(build, SHAPES)
    rng = np.random.default_rng(0)
    optimizer = build(Bag(random_values(rng, SHAPES, 1)[0]))
    assert optimizer.state_dict()["second_order"]["config"]["batch_size"] == 16

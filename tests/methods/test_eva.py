"""Eva and Eva-f against dense solves in float64, the KL clip against its definition, and whole training runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.engine.gradients import Joint, TransformNorms, run_whole
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.rescale import KLClip
from hf_soo.preconditioners.eva import eva_f_product, eva_product
from tests.oracles import core as oracles
from tests.oracles.core import Array, assert_close_report
from tests.oracles.training import AdamW, Eva, Mlp, Sgd
from tests.oracles.twin_runs import assert_same_run, batches, run_library, tensor, twins

DAMPING = 0.03
BIAS = pytest.mark.parametrize("bias", [True, False])


def split(G: Array, bias: bool) -> Joint:
    """Weight and bias gradient of a joint one, with a batch dimension of layers in front."""
    return Joint(tensor(G[..., :-1]), tensor(G[..., -1])) if bias else Joint(tensor(G.copy()), None)


def apply(G: Array, bias: bool, *vectors: Array, damping: float = DAMPING) -> tuple[Array, TransformNorms]:
    """The library's P of the joint gradients G [L, n, m]: Eva for two vectors, Eva-f for one."""
    grad, product = split(G, bias), eva_product if len(vectors) == 2 else eva_f_product
    moved = run_whole(product(grad, *(tensor(v) for v in vectors), damping))
    return grad.matrix().numpy(), moved


# ---- the oracles themselves ------------------------------------------------------------------------------------------


# ---- one product -----------------------------------------------------------------------------------------------------


@BIAS
def test_eva_is_the_dense_solve(rng: np.random.Generator, bias: bool) -> None:
    G, a, b = rng.normal(size=(3, 7, 5)), rng.normal(size=(3, 5)), rng.normal(size=(3, 7))
    P, _ = apply(G, bias, a, b)
    for i in range(3):
        assert_close_report(
            P[i], oracles.eva_dense(G[i], a[i], b[i], DAMPING), 1e-10, f"layer {i}"
        )  # 5e-15 in the spec
        residual = np.outer(b[i], b[i]) @ P[i] @ np.outer(a[i], a[i]) + DAMPING * P[i] - G[i]
        assert np.abs(residual).max() < 1e-10


@BIAS
def test_eva_shrinks_its_own_direction_and_divides_the_rest(rng: np.random.Generator, bias: bool) -> None:
    G, a, b = rng.normal(size=(1, 6, 4)), rng.normal(size=(1, 4)), rng.normal(size=(1, 6))
    P, _ = apply(G, bias, a, b)
    expected = b[0] @ G[0] @ a[0] / (DAMPING + (a @ a.T).item() * (b @ b.T).item())
    assert b[0] @ P[0] @ a[0] == pytest.approx(expected, rel=1e-10)  # 2e-14 in the spec
    rank_one = np.outer(b[0], a[0])
    G -= (G[0] * rank_one).sum() / (rank_one**2).sum() * rank_one
    P, _ = apply(G, bias, a, b)
    assert_close_report(P, G / DAMPING, 1e-12, "P of a gradient orthogonal to baᵀ")


@BIAS
def test_eva_f_is_the_dense_solve(rng: np.random.Generator, bias: bool) -> None:
    G, a = rng.normal(size=(3, 7, 5)), rng.normal(size=(3, 5))
    P, _ = apply(G, bias, a)
    for i in range(3):
        dense = G[i] @ np.linalg.inv(np.outer(a[i], a[i]) + DAMPING * np.eye(5))
        assert_close_report(P[i], dense, 1e-10, f"layer {i}")  # 2e-15 in the spec


@BIAS
@pytest.mark.parametrize("method", ["eva", "eva_f"])
def test_norms_and_inner_product_are_those_of_the_tensors(rng: np.random.Generator, bias: bool, method: str) -> None:
    G = rng.normal(size=(3, 7, 5))
    vectors = [rng.normal(size=(3, 5)), rng.normal(size=(3, 7))][: 2 if method == "eva" else 1]
    P, moved = apply(G, bias, *vectors)
    for actual, expected in ((moved.before, G * G), (moved.after, P * P), (moved.inner, P * G)):
        assert_close_report(actual, expected.sum((1, 2)), 1e-11, "squared norm")  # differences of like numbers


def test_one_row_makes_the_gradient_rank_one(rng: np.random.Generator) -> None:
    x, t = rng.normal(size=(1, 5)), rng.normal(size=(1, 4))
    mlp = Mlp([rng.normal(size=(6, 5)), rng.normal(size=(4, 6))], [rng.normal(size=6), rng.normal(size=4)])
    for rows_a, rows_e in mlp.backward(x, t):
        G, a, b = rows_e.T @ rows_a, rows_a[0], rows_e[0]
        assert np.array_equal(G, np.outer(b, a))
        P, _ = apply(G[None], True, a[None], b[None])
        expected = G / (DAMPING + (G**2).sum())
        assert_close_report(
            P[0], expected, 1e-9, "Eva of one row"
        )  # G is nearly removed: cancellation, 7e-13 in the spec


@pytest.mark.parametrize("kv_scale", ["sum", "mean"])
def test_eva_of_one_row_through_the_optimizer(kv_scale: str) -> None:
    net, mlp = twins()
    data = batches(1, rows=1)
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = hf_soo.build_optimizer(
        "eva", net, lr=1.0, base_args={"momentum": 0.0}, kl_clip=None, damping=DAMPING, kv_scale=kv_scale
    )
    (after,) = run_library(net, optimizer, data, [1.0])
    for layer, (rows_a, rows_e) in enumerate(mlp.backward(*data[0])):
        G = rows_e.T @ rows_a
        P = G / (DAMPING + (G**2).sum())
        steps = [start[2 * layer + k] - after[2 * layer + k] for k in range(2)]
        assert_close_report(torch.cat([steps[0], steps[1][:, None]], 1), P, 1e-9, f"layer {layer}")


# ---- KL clip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_clip", [1e-6, 1e-3, 1e6])
def test_kl_clip_bounds_the_predicted_change(rng: np.random.Generator, kl_clip: float) -> None:
    lr = 0.1
    G = [rng.normal(size=(2, 7, 5)), rng.normal(size=(1, 4, 6))]
    P = [g / DAMPING for g in G]
    moved = [
        TransformNorms(*(tensor((x * y).sum((1, 2))) for x, y in ((g, g), (p, p), (p, g))))
        for g, p in zip(G, P, strict=True)
    ]
    rates = [torch.full((len(g),), lr, dtype=torch.float64) for g in G]
    scales = KLClip(kl_clip).scales(moved, rates)
    pairs = [(g[i], p[i]) for g, p in zip(G, P, strict=True) for i in range(len(g))]
    nu = oracles.kl_scale(pairs, lr, kl_clip)
    assert [float(s) for scale in scales for s in scale] == pytest.approx([nu] * 3, rel=1e-14)
    change = lr**2 * nu**2 * sum((p * g).sum() for g, p in pairs)
    assert change <= kl_clip * (1 + 1e-12)
    if kl_clip == 1e6:
        assert nu == 1.0
    else:
        assert change == pytest.approx(kl_clip, rel=1e-12)


def test_kl_clip_of_nothing_is_one() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    (scale,) = KLClip(1e-3).scales([TransformNorms(zero, zero, zero)], [torch.full_like(zero, 0.1)])
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_kl_clip_of_a_step_is_reached_exactly(name: str) -> None:
    """Without momentum the step is lr ν P, so lr ν ⟨step, G⟩ summed over layers must be κ; ν from an unclipped twin."""
    lr, kl_clip, steps = 0.1, 1e-4, {}
    data = batches(1)
    for clip in (None, kl_clip):
        net, mlp = twins()
        start = [p.detach().clone() for p in net.parameters()]
        optimizer = hf_soo.build_optimizer(name, net, lr=lr, base_args={"momentum": 0.0}, kl_clip=clip)
        (after,) = run_library(net, optimizer, data, [lr])
        steps[clip] = [p - q for p, q in zip(start, after, strict=True)]
    nu = float(steps[kl_clip][0].norm() / steps[None][0].norm())
    G = [e.T @ a for a, e in mlp.backward(*data[0])]
    grads = [part for g in G for part in (g[:, :-1], g[:, -1])]
    inner = sum(float((tensor(g) * step).sum()) for g, step in zip(grads, steps[kl_clip], strict=True))
    assert lr * nu * inner == pytest.approx(kl_clip, rel=1e-10)  # steps are differences of larger numbers
    assert nu < 0.5


# ---- whole runs ------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "mean": {"kv_scale": "mean"},
    "sum": {"kv_scale": "sum"},
    "no clip": {"kl_clip": None, "damping": 1.0},
    "new weight": {"kv_new_weight": 0.3, "kv_scale": "sum"},
    "period": {"update_period": 3, "kv_new_weight": 0.5},
    "warm-up": {"update_period": 4, "warmup_updates": 3, "kv_new_weight": 0.5},
    "clip rarely active": {"kl_clip": 0.3},
}


def as_oracle(name: str, config: dict[str, Any]) -> Eva:
    defaults = {"damping": DAMPING, "kv_new_weight": 0.95, "kl_clip": 1e-3, "update_period": 1, "warmup_updates": 0}
    return Eva({**defaults, **config}, input_only=name == "eva_f")


def make(name: str, **config: Any) -> Callable[[nn.Module], PreconditionedOptimizer]:
    return lambda net: hf_soo.build_optimizer(name, net, lr=0.1, **config)


# 1e-10: rounding of ten steps; P is up to 1/λ = 33 times as long as G


@BIAS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_eva_over_sgd_trains_as_the_oracle(name: str, case: str, bias: bool) -> None:
    config = CASES[case]
    assert_same_run(make(name, **config), as_oracle(name, config), Sgd(0.9), lr=0.1, bias=bias)


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_eva_over_adamw_trains_as_the_oracle(name: str) -> None:
    base = AdamW(weight_decay=[0.01, 0.0, 0.01, 0.0])
    build = make(name, base="adamw", base_args={"fused": False}, weight_decay=0.01)
    assert_same_run(build, as_oracle(name, {}), base, lr=0.01)


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_batched_layers_train_as_the_oracle(name: str) -> None:
    assert_same_run(make(name), as_oracle(name, {}), Sgd(0.9), lr=0.1, batched=True, sizes=(5, 5, 5))


@pytest.mark.parametrize("name", ["eva", "eva_f"])
def test_large_damping_with_lr_in_proportion_is_the_base(name: str) -> None:
    damping, lr = 1e6, 0.05
    (one, _), (two, _) = twins(), twins()
    data = batches(5)
    eva = hf_soo.build_optimizer(name, one, lr=lr * damping, damping=damping, kl_clip=None, kv_scale="mean")
    sgd = torch.optim.SGD(two.parameters(), lr=lr, momentum=0.9)
    after = run_library(one, eva, data, [lr * damping] * 5)[-1], run_library(two, sgd, data, [lr] * 5)[-1]
    start = [p.detach() for p in twins()[0].parameters()]
    for p, q, s in zip(*after, start, strict=True):
        # the part removed is |a|²|b|² / (λ + |a|²|b|²), and |a|² a few units: 1e-6 of the distance travelled, times 5
        assert_close_report(p - s, q - s, 5e-6, "distance travelled")
        assert_close_report(p, q, 1e-6, "parameters")
    assert math.isfinite(float(sum(p.sum() for p in after[0])))

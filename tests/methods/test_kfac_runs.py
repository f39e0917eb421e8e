"""FOOF, the length of a step, limits of the damping and whole training runs of the library's K-FAC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_soo
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.oracles import kfac
from tests.oracles import kfac_cases as cases
from tests.oracles.core import Array, assert_close_report, relative_error
from tests.oracles.kfac_cases import Net, rows_of
from tests.oracles.kfac_runs import assert_factors, build, factors_of, one_batch, one_step
from tests.oracles.training import AdamW, Muon, MuonAndRest, Sgd
from tests.oracles.twin_runs import assert_same_run, batches, half_squares, twins

MODE = pytest.mark.parametrize("mode", ["relative", "absolute"])
METHOD = pytest.mark.parametrize("method", ["kfac_expand", "kfac_reduce", "foof"])


def token_problem() -> tuple[Net, Tensor, Tensor]:
    net, x = Net("token"), cases.inputs()
    return net, x, cases.labels(net)


def cosine(P: Array, Q: Array) -> float:
    return float((P * Q).sum() / np.linalg.norm(P) / np.linalg.norm(Q))


# ---- FOOF (spec 9.19) ------------------------------------------------------------------------------------------------


@MODE
@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_foof_is_kfac_without_output_factor_and_a_regression(inverse: str, mode: str) -> None:
    net, x, y = token_problem()
    rows = rows_of(net, lambda: cases.cross_entropy(net(x), y))
    damping = 0.05
    optimizer = one_batch("foof", net, inverse=inverse, damping=damping, damping_mode=mode)
    for name, (G, P) in one_step(optimizer, lambda: cases.cross_entropy(net(x), y)).items():
        a, g = rows[name]
        A, B = kfac.factors(a, g)
        assert set(optimizer.stages.states[name]) == {"input"}
        assert_factors(optimizer, name, [A], 1e-12)  # sums in another order
        # condition numbers of about 1e2
        assert_close_report(P, kfac.foof(A, G, damping, mode), 1e-12, f"{name}, oracle")
        lam = damping * np.trace(A) / len(A) if mode == "relative" else damping
        assert_close_report(P, kfac.exact_dense(A, np.eye(len(B)), G, lam, "absolute"), 1e-12, f"{name}, B = I")
        assert_close_report(P, kfac.foof_least_squares(a, g, lam), 1e-12, f"{name}, regression")  # 3e-16 in the spec


# ---- lengths (spec 9.20) ---------------------------------------------------------------------------------------------


@METHOD
def test_kl_clip_bounds_the_predicted_change(method: str) -> None:
    net, x, y = token_problem()
    kl_clip, moved = 1e-6, {}
    for rule in ("kl_clip", "none"):
        optimizer = one_batch(method, net, lr=0.5, rescale=rule, kl_clip=kl_clip if rule == "kl_clip" else None)
        parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.param_groups[0]["lr"] = 0.2  # a scheduler has been here
        for group in optimizer.param_groups[1:]:
            group["lr"] = 0.2
        moved[rule] = one_step(optimizer, lambda: cases.cross_entropy(net(x), y))
        optimizer.remove_hooks()
        net.load_state_dict(parameters)
    total = sum(float((P * G).sum()) for G, P in moved["none"].values())
    nu = kfac.kl_scale(list(moved["none"].values()), 0.2, kl_clip)
    assert total > 0 and nu < 0.5
    for name, (_, P) in moved["kl_clip"].items():
        assert_close_report(P, nu * moved["none"][name][1], 1e-12, name)  # ν from sums in another order
    clipped = sum(float((P * G).sum()) for G, P in moved["kl_clip"].values())
    assert 0.2**2 * nu * clipped <= kl_clip * (1 + 1e-12)
    assert 0.2**2 * nu * clipped == pytest.approx(kl_clip, rel=1e-10)  # reached, as it acts


@METHOD
@pytest.mark.parametrize("rule", ["kl_clip", "none"])
def test_without_kl_clip_nothing_is_rescaled(method: str, rule: str) -> None:
    net, x, y = token_problem()
    optimizer = one_batch(method, net, lr=0.5, rescale=rule, kl_clip=None)
    moved = one_step(optimizer, lambda: cases.cross_entropy(net(x), y))
    for name, (G, P) in moved.items():
        F = [factor.numpy() for factor in factors_of(optimizer, name)]
        expected = kfac.foof(*F, G, 0.1) if method == "foof" else kfac.factored(*F, G, 0.1)
        assert_close_report(P, expected, 1e-10, name)  # condition numbers of about 1e3


@METHOD
def test_norms_are_matched_and_steps_descend(method: str) -> None:
    net, x, y = token_problem()
    for rule in ("norm", "global"):
        optimizer = one_batch(method, net, rescale=rule)
        moved = one_step(optimizer, lambda: cases.cross_entropy(net(x), y))
        optimizer.remove_hooks()
        norms = np.array([[np.linalg.norm(G), np.linalg.norm(P)] for G, P in moved.values()])
        if rule == "norm":
            assert_close_report(norms[:, 1], norms[:, 0], 1e-12, "|P| of each layer")
        else:
            before, after = (norms**2).sum(0)
            assert after == pytest.approx(before, rel=1e-12)
            assert relative_error(norms[:, 1], norms[:, 0]) > 0.01  # not layer by layer
        for name, (G, P) in moved.items():
            assert (P * G).sum() > 0 and relative_error(P, G) > 0.01, name


@METHOD
@pytest.mark.parametrize("rule", ["kl_clip", "norm", "global", "none"])
@pytest.mark.parametrize("first", [True, False])
def test_a_zero_gradient_stays_zero(first: bool, rule: str, method: str) -> None:
    net, x, _ = token_problem()
    optimizer = build(method, net, lr=0.1, rescale=rule, update_period=1, inverse_period=1)
    if not first:
        one_step(optimizer, lambda: net(x).square().sum())
    for name, (G, P) in one_step(optimizer, lambda: 0.0 * net(x).sum()).items():
        assert not G.any() and not P.any(), name
        assert all(tensor.isfinite().all() for tensor in optimizer.stages.states[name]["input"].values())


# ---- limits and whole runs (spec 9.21) -------------------------------------------------------------------------------


@METHOD
def test_large_damping_is_the_gradient(method: str) -> None:
    net, x, y = token_problem()
    cosines = {}
    for damping in (0.1, 1e8):
        optimizer = one_batch(method, net, damping=damping)
        moved = one_step(optimizer, lambda: cases.cross_entropy(net(x), y))
        optimizer.remove_hooks()
        cosines[damping] = [cosine(P, G) for G, P in moved.values()]
    # the factored inverse damps each side by 1e4 of its mean eigenvalue: the angle is below m · 1e-4, its square 1e-7
    assert min(cosines[1e8]) > 1 - 1e-6
    assert max(cosines[0.1]) < 0.999


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "periods": {"update_period": 2, "inverse_period": 4, "warmup_updates": 1},
    "no warm-up": {"update_period": 3, "inverse_period": 3, "warmup_updates": 0},
    "decay": {"factor_decay": 0.5},
    "no memory": {"factor_decay": 0.0},
    "eigen": {"inverse": "eigen"},
    "absolute": {"damping_mode": "absolute", "damping": 0.03},
    "absolute, eigen": {"damping_mode": "absolute", "damping": 0.03, "inverse": "eigen"},
    "damping": {"damping": 1.0},
    "no clip": {"kl_clip": None},
    "clip rarely active": {"kl_clip": 0.01},
    "norm": {"rescale": "norm"},
    "global": {"rescale": "global"},
    "none": {"rescale": "none", "damping": 3.0},
    "all rows": {"row_filter": "all"},
    "loss terms": {"loss_terms": 3, "damping_mode": "absolute"},
    "published": {**kfac.PUBLISHED, "kl_clip": 1e-3},
    "identity start": {"factor_start": "identity"},
}


NOT_OF_FOOF = ("loss terms", "published")  # they are about the output factor


def as_oracle(method: str, config: dict[str, Any]) -> kfac.Kfac:
    return kfac.Kfac(config, input_only=method == "foof", approx="reduce" if method == "kfac_reduce" else "expand")


def make(method: str, config: dict[str, Any], **options: Any) -> Callable[[nn.Module], PreconditionedOptimizer]:
    settings = {"rescale": "kl_clip", **config}
    return lambda net: hf_soo.build_optimizer(method, net, lr=0.1, **{"base": "sgd", **options}, **settings)


# 1e-10 in every run below: ten steps of a network amplify rounding, and so do condition numbers of about 1e3.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
@METHOD
def test_over_sgd_trains_as_the_oracle(method: str, case: str, bias: bool) -> None:
    if method == "foof" and case in NOT_OF_FOOF:
        with pytest.raises(ValueError, match="is no setting of 'foof'"):
            make(method, CASES[case])(nn.Linear(2, 2))
        return
    build = make(method, CASES[case], base_args={"momentum": 0.9}, weight_decay=0.0)
    assert_same_run(build, as_oracle(method, CASES[case]), Sgd(0.9), lr=0.05, bias=bias)


@METHOD
def test_over_adamw_trains_as_the_oracle(method: str) -> None:
    config = {"rescale": "norm", "update_period": 2, "inverse_period": 4, "warmup_updates": 2}
    build = make(method, config, base="adamw", base_args={"fused": False}, weight_decay=0.01)
    base = AdamW(weight_decay=[0.01, 0.0, 0.01, 0.0])  # biases take none
    assert_same_run(build, as_oracle(method, config), base, lr=0.01)


@METHOD
@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_batched_layers_train_as_the_oracle(inverse: str, method: str) -> None:
    config = {"inverse": inverse, "update_period": 2, "inverse_period": 4, "warmup_updates": 2}
    build = make(method, config, base_args={"momentum": 0.9}, weight_decay=0.0)
    assert_same_run(build, as_oracle(method, config), Sgd(0.9), lr=0.05, batched=True, sizes=(5, 5, 5))


def test_kaisa_trains_as_expand() -> None:
    config = {
        "rescale": "norm", "update_period": 2, "inverse_period": 4, "warmup_updates": 2,
        "damping": 0.1, "damping_mode": "relative", "inverse": "cholesky",
    }  # fmt: skip
    build = make("kaisa", config, base_args={"momentum": 0.9}, weight_decay=0.0)
    assert_same_run(build, as_oracle("kfac_expand", config), Sgd(0.9), lr=0.05)


# ---- Newton-Muon (Du and Su, 2026) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(8, 4, 3), (16, 8, 4), (6, 5, 4)], ids=str)  # with four blocks, both, and none
def test_newton_muon_trains_as_the_oracle(sizes: tuple[int, int, int], bias: bool, inverse: str) -> None:
    config = {"update_period": 4, "inverse_period": 4, "inverse": inverse, "rescale": "none"}
    build = make("newton_muon", config, base_args={"momentum": 0.9}, weight_decay=0.0)
    assert_same_run(build, kfac.NewtonMuon(bias, period=4), Sgd(0.9), lr=0.02, sizes=sizes, bias=bias)


@pytest.mark.parametrize("batched", [True, False])
def test_newton_muon_over_muon_trains_as_the_oracle(batched: bool) -> None:
    """By its name alone: 34 steps have two refreshes."""

    def build(net: nn.Module) -> PreconditionedOptimizer:
        return hf_soo.build_optimizer("newton_muon", net, lr=0.02, weight_decay=0.0, base_args={"ns_dtype": "float32"})

    base = MuonAndRest(None, Muon(weight_decay=0.0), AdamW(weight_decay=0.0))
    # Jordan's iteration does not converge: it makes 1e-12 of a rounding in each step
    assert_same_run(build, kfac.NewtonMuon(True), base, steps=34, rtol=1e-8, batched=batched, sizes=(8, 4, 4))


def test_newton_muon_keeps_a_factor_of_each_block() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    optimizer = hf_soo.build_optimizer("newton_muon", net, lr=0.1)
    shapes = [list(state["input"]["factor"].shape) for state in optimizer.stages.states.values()]
    assert shapes == [[4, 2, 2], [5, 5], [5, 5]]
    assert optimizer.preconditioner.minimal_products(optimizer.layers[0]).flops == (4 * 2 * 4 * 2 * 2, 0, 4 * 2**3)  # type: ignore[union-attr]


# ---- the released code (spec 9.23) -----------------------------------------------------------------------------------

RELEASED = {**kfac.PUBLISHED, **cases.RELEASED_CONFIG, "rescale": "kl_clip"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_published_scale_is_the_released_code(dtype: torch.dtype) -> None:
    """The numbers of kfac-pytorch 0.4.2 (commit 869cf11) after three steps, computed there in fp32."""
    net = cases.released_net().to(dtype)
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = build("kfac_expand", net, lr=0.1, **RELEASED)
    for step in range(3):
        x, t = (data.to(dtype) for data in cases.released_batch(step))
        moved = one_step(optimizer, lambda x=x, t=t: cases.released_loss(net, x, t))
        with torch.no_grad():
            for p, q in zip(net.parameters(), start, strict=True):
                p.copy_(q)  # there the parameters stood still
    for (_, P), expected in zip(moved.values(), cases.RELEASED_STEPS, strict=True):
        assert_close_report(P, expected, 2e-6, "P")  # fp32 of one side or both; 6e-7 measured on larger networks


def test_the_published_scale_is_foof_with_growing_damping() -> None:
    """With 1024 loss terms B stays ρᵘI, as close as fp32 can see: damping λ/ρᵘ on the input side alone (spec 4.5)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    config = {**kfac.PUBLISHED, "update_period": 1, "inverse_period": 1}
    optimizer = build("kfac_expand", net, **config)
    oracle = kfac.Kfac({**config, "warmup_updates": 20, "rescale": "none"})
    generator = torch.Generator().manual_seed(1)
    for u in range(1, 11):
        x, t = (torch.randn(256, 4, d, generator=generator) for d in (6, 4))

        def loss(x: Tensor = x, t: Tensor = t) -> Tensor:
            return (net(0.5 + x) - t).square().sum(-1).mean() / 2

        rows = rows_of(net, loss)
        moved = one_step(optimizer, loss)
        expected = oracle.transform([(a.double().numpy(), g.double().numpy()) for a, g in rows.values()], lr=0.0)
        for (G, P), Q, (A, _) in zip(moved.values(), expected, oracle.estimates, strict=True):
            assert_close_report(P, Q, 1e-5, f"P after {u} updates")  # fp32, condition numbers of about 1e2
            assert cosine(P, kfac.foof(A, G, 3e-3 / 0.95**u, "absolute")) > 0.9999, u


def test_without_the_published_scale_the_step_is_another() -> None:
    """The same settings at the scale of the loss: B has its say."""
    net, _ = twins()
    (x, t), *_ = batches(1, rows=256)
    steps = []
    for scale in ("published", "loss"):
        optimizer = build("kfac_expand", net, **{**kfac.PUBLISHED, "factor_scale": scale, "factor_start": "corrected"})
        steps.append(one_step(optimizer, lambda: half_squares(net, x, t)))
        optimizer.remove_hooks()
    for (G, P), (_, Q) in zip(*(moved.values() for moved in steps), strict=True):
        assert cosine(P, G) > 0.9999 > 0.99 > cosine(Q, G)  # spec 8.2: at the published scale it is inert

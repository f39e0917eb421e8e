"""MKOR's products against dense ones, whole training runs against the numpy oracle, and what holds for any step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_soo
from hf_soo.engine.gradients import Joint, TransformNorms, run_whole
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.preconditioners.mkor import _LowRank
from tests.oracles import core as oracles
from tests.oracles.core import Array, assert_close_report, relative_error
from tests.oracles.training import AdamW, Lamb, Mkor, Sgd
from tests.oracles.twin_runs import assert_same_run, batches, dense, half_squares, run_library, tensor, twins

# ---- applying the factors --------------------------------------------------------------------------------------------


def product_cases(rng: np.random.Generator, bias: bool, left: bool, right: bool) -> tuple[Any, ...]:
    L, n, m, K = 3, 8, 6, 4
    width = m + bias
    G = tensor(rng.normal(size=(L, n, m)))
    b = tensor(rng.normal(size=(L, n))) if bias else None
    C_left = tensor(0.3 * rng.normal(size=(L, K, n))) if left else None
    C_right = tensor(0.3 * rng.normal(size=(L, K + 1, width))) if right else None
    return G, b, C_left, C_right


def joint(G: Tensor, bias: Tensor | None) -> Array:
    return (G if bias is None else torch.cat([G, bias[..., None]], dim=-1)).numpy().copy()


def lowrank(G: Tensor, bias: Tensor | None, C_left: Tensor | None, C_right: Tensor | None) -> TransformNorms:
    """The library's P in place, for factors of which a side may be the identity."""
    left, right = (None if C is None else {"columns": C} for C in (C_left, C_right))
    return run_whole(_LowRank(history=4, factor_decay=0.9).transform(left, right, Joint(G, bias)))


SIDES = pytest.mark.parametrize(("left", "right"), [(True, True), (True, False), (False, True), (False, False)])
BIAS = pytest.mark.parametrize("bias", [True, False])


@SIDES
@BIAS
def test_lowrank_product_is_the_dense_product(rng: np.random.Generator, bias: bool, left: bool, right: bool) -> None:
    G, b, C_left, C_right = product_cases(rng, bias, left, right)
    before = joint(G, b)
    moved = lowrank(G, b, C_left, C_right)
    after = joint(G, b)
    for i in range(len(before)):
        F_left = np.eye(before.shape[1]) if C_left is None else dense(C_left[i])
        F_right = np.eye(before.shape[2]) if C_right is None else dense(C_right[i])
        P = F_left @ before[i] @ F_right
        assert_close_report(after[i], P, 1e-12, f"P of layer {i}")  # an identity: rounding alone
        sums = [(before[i] ** 2).sum(), (P**2).sum(), (P * before[i]).sum()]
        assert_close_report([moved.before[i], moved.after[i], moved.inner[i]], sums, 1e-12, "|G|², |P|², ⟨P, G⟩")


@SIDES
@BIAS
def test_batched_product_is_the_looped_product(rng: np.random.Generator, bias: bool, left: bool, right: bool) -> None:
    case = product_cases(rng, bias, left, right)
    single = [[None if x is None else x[i : i + 1].clone() for x in case] for i in range(3)]
    lowrank(*case)
    for i, one in enumerate(single):
        lowrank(*one)
        # the same sums, perhaps in another order
        assert_close_report(joint(case[0], case[1])[i : i + 1], joint(one[0], one[1]), 1e-14, f"layer {i}")


@SIDES
@BIAS
def test_dense_product_is_the_kronecker_product(rng: np.random.Generator, bias: bool, left: bool, right: bool) -> None:
    L, n, m = 2, 5, 4
    G, b = tensor(rng.normal(size=(L, n, m))), tensor(rng.normal(size=(L, n))) if bias else None
    W, X = rng.normal(size=(L, n, n)), rng.normal(size=(L, m + bias, m + bias))
    F_left, F_right = W @ W.swapaxes(1, 2), X @ X.swapaxes(1, 2)
    before = joint(G, b)
    run_whole(Joint(G, b).multiply_(tensor(F_left) if left else None, tensor(F_right) if right else None))
    for i in range(L):
        P = oracles.kronecker_product(
            F_left[i] if left else np.eye(n), before[i], F_right[i] if right else np.eye(m + bias)
        )
        assert_close_report(joint(G, b)[i], P, 1e-12, f"layer {i}")  # 3e-16 in the spec


# ---- whole steps -----------------------------------------------------------------------------------------------------

PLAIN = {"momentum": 0.0}


def mkor(base: str = "sgd", **config: Any) -> Callable[[nn.Module], PreconditionedOptimizer]:
    base_args = {"sgd": {"momentum": 0.9}, "lamb": {"max_grad_norm": 0.5}, "adamw": {"fused": False}}[base]
    decay = 0.0 if base == "sgd" else 0.01
    return lambda net: hf_soo.build_optimizer(
        "mkor", net, lr=0.05, base=base, base_args=base_args, weight_decay=decay, **config
    )


def as_oracle(config: dict[str, Any]) -> Mkor:
    """The oracle with the library's defaults; a dense factor unless a history shorter than the run is asked for."""
    return Mkor({"update_period": 10, "warmup_updates": 10, "factor_decay": 0.95, "history": None, **config})


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "period": {"update_period": 3, "warmup_updates": 2},
    "no warm-up": {"update_period": 4, "warmup_updates": 0},
    "decay": {"factor_decay": 0.7},
    "sum": {"kv_scale": "sum"},
    "mean": {"kv_scale": "mean"},
    "target": {"kv_target": 3.0},
    "clip": {"kv_scale": "sum", "clip_value": 0.3},
    "clip before unit": {"clip_value": 0.3},
    "input": {"sides": "input"},
    "output": {"sides": "output"},
    "history": {"history": 4},
    "rank": {"rank": 3},
    "rank, sum": {"rank": 2, "kv_scale": "sum"},
    "exponent": {"exponent": 0.5},
    "exponent, short history": {"exponent": 0.25, "history": 4, "sides": "output"},
    "gate": {"gate": True},
    "gate, sum, exponent": {"gate": True, "kv_scale": "sum", "exponent": 0.25, "update_period": 2, "warmup_updates": 0},
}
DENSE_CASES: dict[str, dict[str, Any]] = {
    "blend": {},
    "blend, rank": {"rank": 3},
    "gate": {"gate": True},
    "exact": {"update_rule": "exact", "stabilizer_threshold": 1.5, "stabilizer_blend": 0.9},
    "exact, sum": {
        "update_rule": "exact", "stabilizer_threshold": 1e3, "stabilizer_blend": 0.9, "kv_scale": "sum",
    },
    "paper": {"update_rule": "paper", "stabilizer_threshold": 2.0, "stabilizer_blend": 0.45},
}  # fmt: skip

# 1e-10 in every run below: ten steps of a network amplify rounding, and eigenvalues go down to about 1/100.


@BIAS
@pytest.mark.parametrize("name", CASES)
def test_lowrank_mkor_over_sgd_trains_as_the_oracle(name: str, bias: bool) -> None:
    config = CASES[name]
    assert_same_run(mkor(**config), as_oracle(config), Sgd(0.9), bias=bias)


@pytest.mark.parametrize("name", DENSE_CASES)
def test_dense_mkor_over_sgd_trains_as_the_oracle(name: str) -> None:
    config = DENSE_CASES[name]
    assert_same_run(mkor(representation="dense", **config), as_oracle(config), Sgd(0.9))


@pytest.mark.parametrize("config", [{}, {"update_period": 2, "warmup_updates": 1}])
def test_mkor_over_lamb_trains_as_the_oracle(config: dict[str, Any]) -> None:
    base = Lamb(weight_decay=[0.01, 0.0, 0.01, 0.0], max_grad_norm=0.5)  # biases take no decay, so no ratio
    assert_same_run(mkor("lamb", **config), as_oracle(config), base)


def test_mkor_over_adamw_trains_as_the_oracle() -> None:
    assert_same_run(mkor("adamw"), as_oracle({}), AdamW(weight_decay=[0.01, 0.0, 0.01, 0.0]), lr=0.01)


@pytest.mark.parametrize("representation", ["lowrank", "dense"])
def test_batched_layers_train_as_the_oracle(representation: str) -> None:
    make = mkor(representation=representation)
    assert_same_run(make, as_oracle({}), Sgd(0.9), batched=True, sizes=(5, 5, 5))


def test_lowrank_and_dense_give_the_same_run() -> None:
    config = {"update_period": 1, "warmup_updates": 0}
    runs = []
    for form in ({"representation": "dense"}, {"history": 30}):
        net, _ = twins()
        lrs = [0.05] * 30
        runs.append(run_library(net, mkor(**config, **form)(net), batches(30), lrs))
    for step, (dense_run, lowrank_run) in enumerate(zip(*runs, strict=True)):
        for p, q in zip(dense_run, lowrank_run, strict=True):
            assert_close_report(q, p, 1e-9, f"low rank against dense, step {step}")  # the same factors but for rounding


def gradients_and_steps(optimizer: PreconditionedOptimizer, net: nn.Module, x: Array, t: Array) -> Any:
    """Per layer the joint gradient before, and what a plain SGD base with lr 1 took off: P."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    optimizer.zero_grad()
    half_squares(net, x, t).backward()
    as_one = [
        (joint(layer.weight.grad, layer.bias.grad), joint(layer.weight.detach(), layer.bias.detach()))
        for layer in layers
    ]
    optimizer.step()
    return [
        (G, W - joint(layer.weight.detach(), layer.bias.detach())) for (G, W), layer in zip(as_one, layers, strict=True)
    ]


@pytest.mark.parametrize("representation", ["lowrank", "dense"])
def test_rescale_keeps_the_joint_norm_and_the_descent_direction(representation: str) -> None:
    net, _ = twins()
    make = {"base": "sgd", "base_args": PLAIN, "representation": representation}
    optimizer = hf_soo.build_optimizer("mkor", net, lr=1.0, **make)
    for x, t in batches(8):
        for G, P in gradients_and_steps(optimizer, net, x, t):
            # P is read off the parameters, which are larger than it: 1e-12 of the spec, and some cancellation
            assert abs(np.linalg.norm(P) - np.linalg.norm(G)) <= 1e-12 * max(1.0, np.linalg.norm(G))
            assert (P * G).sum() > 0
            assert relative_error(P, G) > 1e-2


@pytest.mark.parametrize("representation", ["lowrank", "dense"])
def test_a_zero_gradient_stays_zero(representation: str) -> None:
    net, _ = twins()
    optimizer = hf_soo.build_optimizer(
        "mkor", net, lr=1.0, base="sgd", base_args=PLAIN, representation=representation, kv_scale="sum"
    )
    (x, t), (x2, _) = batches(2)
    gradients_and_steps(optimizer, net, x, t)
    fits = net(torch.from_numpy(x2)).detach().numpy()
    for G, P in gradients_and_steps(optimizer, net, x2, fits):
        assert not G.any() and not P.any()


@pytest.mark.parametrize("kv_scale", ["unit", "sum", "mean"])
@pytest.mark.parametrize("representation", ["lowrank", "dense"])
def test_zero_vectors_leave_the_base_alone_to_the_bit(kv_scale: str, representation: str) -> None:
    """Inputs come in pairs ±x with output gradients ±e: both means are exactly 0, the gradient is not."""
    x = torch.randn(4, 5, dtype=torch.float64)
    e = torch.randn(4, 3, dtype=torch.float64)
    x, e = torch.cat([x, -x]), torch.cat([e, -e])
    nets = [nn.Linear(5, 3, bias=False).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    steps = [
        hf_soo.build_optimizer("mkor", nets[0], lr=0.1, base="sgd", kv_scale=kv_scale, representation=representation),
        torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, fused=True),  # the kernel that "sgd" uses
    ]
    for _ in range(4):
        for net, optimizer in zip(nets, steps, strict=True):
            optimizer.zero_grad()
            (net(x) * e).sum().backward()
            assert net.weight.grad.norm() > 1
            optimizer.step()
    # F is I exactly; the rescale multiplies by |G| / |P|, which is 1 to the bit for equal norms
    assert torch.equal(nets[0].weight, nets[1].weight)


@BIAS
@pytest.mark.parametrize("offset", [0.0, 1e-6])
def test_a_sum_of_rounding_noise_is_not_used(bias: bool, offset: float) -> None:
    """Output gradients that sum to rounding noise leave the left factor at I; at 1e-6 they are data and move it."""
    layer = nn.Linear(5, 3, bias=bias).double()
    x, e = 0.5 + torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    e[-1] = offset - e[:-1].sum(0)
    optimizer = hf_soo.build_optimizer("mkor", layer, lr=1.0, base="sgd", base_args=PLAIN)
    before = layer.weight.detach().clone()
    (layer(x) * e).sum().backward()
    optimizer.step()
    rows = np.hstack([x.numpy(), np.ones((8, int(bias)))])
    config = as_oracle({"sides": "both" if offset else "input"})
    (P,) = config.transform([(rows, e.numpy())], lr=1.0)
    # at 1e-6 the sum itself carries rounding of 1e-16 / 1e-6, and unit scaling hands that on
    assert_close_report(before - layer.weight.detach(), P[:, :5], 1e-8 if offset else 1e-12, "P")


@BIAS
@pytest.mark.parametrize("second", [0.7, -1.0], ids=["halves that agree", "halves that do not"])
def test_the_gate_is_the_cosine_of_two_halves_of_every_micro_batch(bias: bool, second: float) -> None:
    """And the distance is that of F^p: from F = I one vector with |v|² = dg² leaves (1 + dg²)^-p along it."""
    layer, d, p = nn.Linear(5, 4, bias=bias).double(), 4, 0.25
    optimizer = hf_soo.build_optimizer("mkor", layer, lr=1.0, base="sgd", gate=True, exponent=p)
    halves = np.zeros((2, d))
    for rows in (6, 7):  # of seven four come first
        first = -(-rows // 2)
        e = torch.randn(rows, d).double() + torch.tensor([1.0] * first + [second] * (rows - first))[:, None]
        halves += [e[:first].sum(0).numpy(), e[first:].sum(0).numpy()]
        (layer(0.5 + torch.randn(rows, 5).double()) * e).sum().backward()
    for parameter in layer.parameters():
        parameter.grad.mul_(0.01)  # as clipping does, which what was captured has not seen
    optimizer.step()
    row, (b1, b2) = optimizer.diagnostics()[""], halves
    g = max(0.0, b1 @ b2 / (np.linalg.norm(b1) * np.linalg.norm(b2)))
    assert (g > 0.2) == (second > 0)
    assert row["output_distance"] == pytest.approx(1 - (1 + d * g**2) ** -p, rel=1e-10, abs=0)
    assert row["output_side"] == ("updated" if g else "zero or rounding noise")
    assert row["input_side"] == "updated" and float(row["input_distance"]) > 0.1
    assert optimizer.health()["noise_layers"] == (not g)


def test_without_sides_the_base_steps_alone_to_the_bit() -> None:
    (one, _), (two, _) = twins(), twins()
    data, lrs = batches(5), [0.1, 0.08, 0.06, 0.04, 0.02]
    runs = [
        run_library(one, hf_soo.build_optimizer("mkor", one, lr=0.1, base="sgd", sides="none"), data, lrs),
        run_library(two, torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9, fused=True), data, lrs),
    ]
    for p, q in zip(runs[0][-1], runs[1][-1], strict=True):
        assert torch.equal(p, q)

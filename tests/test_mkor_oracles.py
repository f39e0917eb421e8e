"""MKOR against textbook float64: factor updates, low-rank form, preconditioning, and whole training runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from oracle_training import AdamW, Lamb, Mkor, Sgd
from oracles import Array, assert_close_report, relative_error
from torch import Tensor, nn
from twin_runs import assert_same_run, batches, half_squares, run_library, twins

import hf_soo
from hf_soo.engine import linalg
from hf_soo.engine.optimizer import PreconditionedOptimizer

GAMMA = 0.95


def drifting(rng: np.random.Generator, count: int, d: int, size: float = 1.0) -> list[Array]:
    """Vectors with |v|² about `size`, whose mean direction turns slowly, as a layer's means do."""
    mean, vectors = rng.normal(size=d), []
    for _ in range(count):
        mean = 0.97 * mean + 0.25 * rng.normal(size=d)
        v = mean + 0.3 * rng.normal(size=d)
        vectors.append(v * math.sqrt(size / (v @ v)))
    return vectors


def tensor(value: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))


def lowrank_after(vectors: list[Array], history: int, gamma: float = GAMMA) -> tuple[Tensor, Tensor]:
    C, head = torch.zeros(history, len(vectors[0]), dtype=torch.float64), torch.tensor(0)
    for v in vectors:
        C, head = linalg.lowrank_update(C, head, tensor(v)[None], gamma, torch.tensor(True))
    return C, head


def dense(C: Tensor) -> Array:
    """I - CᵀC of the library's rows."""
    return (torch.eye(C.shape[-1], dtype=C.dtype) - C.mT @ C).numpy()


# ---- the oracles themselves ------------------------------------------------------------------------------------------


def test_oracles_agree_with_matrix_inversion(rng: np.random.Generator) -> None:
    F, J = np.eye(6), np.eye(6)
    vectors = [v * 10 ** rng.uniform(-2, 1) for v in drifting(rng, 100, 6)]
    F_exact = np.eye(6)
    for v in vectors:
        # float64 with condition numbers below 1e5: five digits lost of sixteen
        assert_close_report(oracles.blend(F, v, GAMMA), oracles.blend_by_inversion(F, v, GAMMA), 1e-10, "blend")
        F, F_exact, J = oracles.blend(F, v, GAMMA), oracles.exact(F_exact, v, GAMMA), GAMMA * J + 0.05 * np.outer(v, v)
        assert_close_report(F_exact, np.linalg.inv(J), 1e-10, "exact")
    V = rng.normal(size=(6, 3))
    assert_close_report(oracles.blend(F, V, GAMMA), oracles.blend_by_inversion(F, V, GAMMA), 1e-10, "blend, 3 vectors")


def test_oracles_agree_on_the_lowrank_form(rng: np.random.Generator) -> None:
    F, vectors = np.eye(9), drifting(rng, 50, 9)
    for v in vectors:
        F = oracles.blend(F, v, GAMMA)
    columns = oracles.lowrank_columns(vectors, GAMMA, history=50)
    assert_close_report(oracles.from_columns(columns, 9), F, 1e-12, "I - CCᵀ")  # an identity: rounding of 50 updates


def test_oracles_agree_with_autograd() -> None:
    net, mlp = twins()
    ((x, t),) = batches(1)
    half_squares(net, x, t).backward()
    for layer, (a, e) in zip((net[0], net[2]), mlp.backward(x, t), strict=True):
        joint = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
        assert_close_report(joint, e.T @ a, 1e-13, "hand-written backward")  # sums of 12 products


def test_report_names_the_worst_entry() -> None:
    with pytest.raises(AssertionError, match=r"worst entry \(1, 0\): got 3.75, expected 3, ratio 1.25, 1 of 4"):
        assert_close_report(np.array([[1.0, 2.0], [3.75, 4.0]]), np.array([[1.0, 2.0], [3.0, 4.0]]), 1e-3)
    with pytest.raises(AssertionError, match=r"worst entry \(1,\): got nan"):
        assert_close_report(np.array([1.0, math.nan]), np.ones(2), 1.0)


# ---- dense factor updates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [5, 17, 64])
def test_exact_update_is_the_inverse(rng: np.random.Generator, d: int) -> None:
    F, J = torch.eye(d, dtype=torch.float64), np.eye(d)
    for v in drifting(rng, 200, d, size=d):
        F, J = linalg.exact_update(F, tensor(v), GAMMA), GAMMA * J + (1 - GAMMA) * np.outer(v, v)
    assert_close_report(F, np.linalg.inv(J), 1e-10, "exact factor after 200 updates")  # mkor_eva: 1e-15 measured


def test_exact_and_paper_updates_follow_the_oracle_in_batches(rng: np.random.Generator) -> None:
    v = rng.normal(size=(2, 3, 7))
    W = rng.normal(size=(2, 3, 7, 7))
    F = W @ W.swapaxes(-1, -2)
    for update, oracle in ((linalg.exact_update, oracles.exact), (linalg.paper_update, oracles.paper)):
        actual = update(tensor(F), tensor(v), 0.9)
        for index in np.ndindex(2, 3):  # one step each: only rounding
            assert_close_report(actual[index], oracle(F[index], v[index], 0.9), 1e-13, f"{update.__name__} {index}")


def test_blend_update_is_the_inverse_and_stays_between_0_and_1(rng: np.random.Generator) -> None:
    d = 12
    F = torch.eye(d, dtype=torch.float64)
    for v in drifting(rng, 500, d):
        v = v * 10 ** rng.uniform(-3, 3)  # |v| from 1e-3 to 1e3
        M = GAMMA * F.numpy() + (1 - GAMMA) * np.eye(d)
        F = linalg.blend_update(F, tensor(v)[None], GAMMA)
        # in F: the inverse's own entries grow to |v|² = 1e6, and rounding of the inversion with them
        assert_close_report(F, np.linalg.inv(np.linalg.inv(M) + np.outer(v, v)), 1e-10, "blend factor")
        eigenvalues = torch.linalg.eigvalsh(F)
        assert 0 < eigenvalues.min() and eigenvalues.max() <= 1 + 1e-12
        assert F.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("q", [0.01, 0.25, 1.0, 9.0, 1e3])
def test_blend_comes_to_rest_at_its_fixed_point(rng: np.random.Generator, q: float) -> None:
    d = 6
    v = rng.normal(size=d)
    v *= math.sqrt(q / (v @ v))
    F = torch.eye(d, dtype=torch.float64)
    for _ in range(1000):
        F = linalg.blend_update(F, tensor(v)[None], GAMMA)
    along = v @ F.numpy() @ v / q
    assert abs(along - oracles.blend_fixed_point(q, GAMMA)) < 1e-10  # 2e-15 in the spec
    others = np.sort(np.append(np.ones(d - 1), along))
    assert_close_report(torch.linalg.eigvalsh(F), others, 1e-10, "eigenvalues")


def test_paper_update_grows_as_derived(rng: np.random.Generator) -> None:
    F, v = torch.eye(8, dtype=torch.float64), tensor(rng.normal(size=8))
    for _ in range(5):
        before = float(v @ F @ v)
        F = linalg.paper_update(F, v, GAMMA)
        assert float(v @ F @ v) / before == pytest.approx(oracles.paper_growth(before, GAMMA), rel=1e-12)


def test_paper_update_diverges_unless_the_stabilizer_is_strong() -> None:
    v = torch.full((8,), 3.0, dtype=torch.float64)
    largest = {}
    for keep, updates in ((0.9, 100), (0.45, 300)):
        F = torch.eye(8, dtype=torch.float64)
        for _ in range(updates):
            F = linalg.paper_update(linalg.stabilize(F, 2.0, keep), v, GAMMA)
        largest[keep] = float(F.abs().max())
    assert largest[0.9] > 1e10  # ζ above 1/(γ + γ⁻³) = 0.47 cannot hold it
    assert largest[0.45] < 4


def test_stabilize_blends_only_what_is_too_large(rng: np.random.Generator) -> None:
    F = rng.normal(size=(3, 4, 4)) * np.array([1.0, 50.0, 0.1])[:, None, None]
    actual = linalg.stabilize(tensor(F), 10.0, 0.9)
    for i in range(3):
        assert_close_report(actual[i], oracles.stabilized(F[i], 10.0, 0.9), 1e-15, f"factor {i}")


def test_fp16_storage_keeps_the_blend_factor(rng: np.random.Generator) -> None:
    d = 256
    F, F_half = torch.eye(d, dtype=torch.float64), torch.eye(d, dtype=torch.float16)
    for v in drifting(rng, 300, d, size=10.0):
        F = linalg.blend_update(F, tensor(v)[None], GAMMA)
        F_half = linalg.blend_update(F_half.float(), tensor(v)[None].float(), GAMMA).half()
    assert_close_report(F_half, F, 2e-3, "fp16 factor")  # four units of fp16 rounding; 5e-4 in the spec
    assert torch.linalg.eigvalsh(F_half.double()).min() > 0


# ---- the low-rank form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.1, 1.0, 1e3])
def test_lowrank_update_is_the_dense_blend_while_history_lasts(rng: np.random.Generator, size: float) -> None:
    d, history = 24, 40
    vectors = drifting(rng, history, d, size)
    F = np.eye(d)
    for t, v in enumerate(vectors, start=1):
        F = oracles.blend(F, v, GAMMA)
        C, _ = lowrank_after(vectors[:t], history)
        assert_close_report(dense(C), F, 1e-12, f"I - CCᵀ after {t} updates")  # an identity: rounding alone


@pytest.mark.parametrize("size", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("history", [16, 64])
def test_lowrank_error_after_history_is_gamma_to_the_history(
    rng: np.random.Generator, history: int, size: float
) -> None:
    d, F = 96, np.eye(96)
    vectors = drifting(rng, history + 60, d, size)
    C, head = lowrank_after(vectors[:history], history)
    for v in vectors[:history]:
        F = oracles.blend(F, v, GAMMA)
    worst = 0.0
    for v in vectors[history:]:
        F = oracles.blend(F, v, GAMMA)
        C, head = linalg.lowrank_update(C, head, tensor(v)[None], GAMMA, torch.tensor(True))
        worst = max(worst, float(np.linalg.norm(dense(C) - F, 2)))
    assert worst <= 2 * GAMMA**history  # the weight of what was dropped
    assert worst > 1e-6  # something was dropped at all


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_lowrank_factor_stays_definite(rng: np.random.Generator, size: float) -> None:
    C, _ = lowrank_after(drifting(rng, 1000, 20, size), history=16)
    eigenvalues = np.linalg.eigvalsh(dense(C))
    assert 0 < eigenvalues.min()
    assert eigenvalues.max() <= 1 + 1e-12  # rounding of sixteen unit-sized columns


@pytest.mark.parametrize("r", [1, 2, 5])
def test_lowrank_block_update_is_woodbury(rng: np.random.Generator, r: int) -> None:
    d, history = 18, 10
    C, head = torch.zeros(2, history, d, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    F = [np.eye(d), np.eye(d)]
    for _ in range(history // r):
        V = rng.normal(size=(2, r, d))
        F = [oracles.blend_by_inversion(F[i], V[i].T, GAMMA) for i in range(2)]
        C, head = linalg.lowrank_update(C, head, tensor(V), GAMMA, torch.tensor([True, True]))
        for i in range(2):  # the oracle inverts twice: condition number 1/(1-γ) + |v|², about 1e2
            assert_close_report(dense(C[i]), F[i], 1e-12, f"factor {i}, {r} vectors")


@pytest.mark.parametrize("r", [1, 3])
def test_dense_block_update_is_woodbury(rng: np.random.Generator, r: int) -> None:
    F, V = np.eye(9), rng.normal(size=(4, r, 9))
    library = torch.eye(9, dtype=torch.float64)
    for block in V:
        F, library = oracles.blend_by_inversion(F, block.T, GAMMA), linalg.blend_update(library, tensor(block), GAMMA)
    assert_close_report(library, F, 1e-12, f"dense factor, {r} vectors")


def test_lowrank_update_leaves_an_invalid_factor_alone(rng: np.random.Generator) -> None:
    C, head = tensor(0.1 * rng.normal(size=(2, 4, 6))), torch.tensor([3, 3])
    V = tensor(rng.normal(size=(2, 1, 6)))
    V[1] = math.nan
    new_C, new_head = linalg.lowrank_update(C, head, V, GAMMA, torch.tensor([True, False]))
    assert torch.equal(new_C[1], C[1]) and new_head.tolist() == [0, 3]
    rows = C[0].numpy()
    F = oracles.blend_by_inversion(oracles.from_columns(list(rows), 6), V[0].T.numpy(), GAMMA)
    dropped = GAMMA * np.outer(rows[3], rows[3])  # the oldest row takes part in the update, then leaves
    assert_close_report(dense(new_C[0]), F + dropped, 1e-12, "the valid factor")


def test_order_in_the_ring_buffer_does_not_matter(rng: np.random.Generator) -> None:
    d, history = 10, 7
    vectors = drifting(rng, 17, d)
    wrapped, head = lowrank_after(vectors, history)
    assert 0 < int(head) < history
    in_order = torch.roll(wrapped, -int(head), dims=0)
    expected = np.array(oracles.lowrank_columns(vectors, GAMMA, history))
    assert_close_report(in_order, expected, 1e-12, "columns, oldest first")
    G = rng.normal(size=(d, d))
    products = []
    for C in (wrapped, in_order):
        P = tensor(G)[None].clone()
        linalg.lowrank_product(P, None, C[None], C[None])
        products.append(P)
    assert_close_report(products[0], products[1], 1e-13, "P")  # sums in another order


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


SIDES = pytest.mark.parametrize(("left", "right"), [(True, True), (True, False), (False, True), (False, False)])
BIAS = pytest.mark.parametrize("bias", [True, False])


@SIDES
@BIAS
def test_lowrank_product_is_the_dense_product(rng: np.random.Generator, bias: bool, left: bool, right: bool) -> None:
    G, b, C_left, C_right = product_cases(rng, bias, left, right)
    before = joint(G, b)
    moved = linalg.lowrank_product(G, b, C_left, C_right)
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
    linalg.lowrank_product(*case)
    for i, one in enumerate(single):
        linalg.lowrank_product(*one)
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
    linalg.dense_product(G, b, tensor(F_left) if left else None, tensor(F_right) if right else None)
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
    return Mkor({"update_period": 10, "warmup_updates": 10, "factor_decay": GAMMA, "history": None, **config})


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
}
DENSE_CASES: dict[str, dict[str, Any]] = {
    "blend": {},
    "blend, rank": {"rank": 3},
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
        (G, W - joint(layer.weight.detach(), layer.bias.detach()))
        for (G, W), layer in zip(as_one, layers, strict=True)
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
        torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9),
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


def test_without_sides_the_base_steps_alone_to_the_bit() -> None:
    (one, _), (two, _) = twins(), twins()
    data, lrs = batches(5), [0.1, 0.08, 0.06, 0.04, 0.02]
    runs = [
        run_library(one, hf_soo.build_optimizer("mkor", one, lr=0.1, base="sgd", sides="none"), data, lrs),
        run_library(two, torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9), data, lrs),
    ]
    for p, q in zip(runs[0][-1], runs[1][-1], strict=True):
        assert torch.equal(p, q)

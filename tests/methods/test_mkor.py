"""MKOR against textbook float64: the dense factor updates and the low-rank form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_soo.engine.gradients import Joint, run_whole
from hf_soo.preconditioners.mkor import lowrank_product, lowrank_update
from hf_soo.preconditioners.mkor_dense import blend_update, exact_update, paper_update, stabilize
from hf_soo.preconditioners.spd import power_columns
from tests.oracles import core as oracles
from tests.oracles.core import Array, assert_close_report, drifting
from tests.oracles.twin_runs import dense, tensor

GAMMA = 0.95


def lowrank_after(vectors: list[Array], history: int, gamma: float = GAMMA) -> tuple[Tensor, Tensor]:
    C, head = torch.zeros(history, len(vectors[0]), dtype=torch.float64), torch.tensor(0)
    for v in vectors:
        C, head = lowrank_update(C, head, tensor(v)[None], gamma, torch.tensor(True))
    return C, head


# ---- dense factor updates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [5, 17, 64])
def test_exact_update_is_the_inverse(rng: np.random.Generator, d: int) -> None:
    F, J = torch.eye(d, dtype=torch.float64), np.eye(d)
    for v in drifting(rng, 200, d, size=d):
        F, J = exact_update(F, tensor(v), GAMMA), GAMMA * J + (1 - GAMMA) * np.outer(v, v)
    assert_close_report(F, np.linalg.inv(J), 1e-10, "exact factor after 200 updates")  # mkor_eva: 1e-15 measured


def test_exact_and_paper_updates_follow_the_oracle_in_batches(rng: np.random.Generator) -> None:
    v = rng.normal(size=(2, 3, 7))
    W = rng.normal(size=(2, 3, 7, 7))
    F = W @ W.swapaxes(-1, -2)
    for update, oracle in ((exact_update, oracles.exact), (paper_update, oracles.paper)):
        actual = update(tensor(F), tensor(v), 0.9)
        for index in np.ndindex(2, 3):  # one step each: only rounding
            assert_close_report(actual[index], oracle(F[index], v[index], 0.9), 1e-13, f"{update.__name__} {index}")


def test_blend_update_is_the_inverse_and_stays_between_0_and_1(rng: np.random.Generator) -> None:
    d = 12
    F = torch.eye(d, dtype=torch.float64)
    for v in drifting(rng, 500, d):
        v = v * 10 ** rng.uniform(-3, 3)  # |v| from 1e-3 to 1e3
        M = GAMMA * F.numpy() + (1 - GAMMA) * np.eye(d)
        F = blend_update(F, tensor(v)[None], GAMMA)
        # in F: the inverse's own entries grow to |v|² = 1e6, and rounding of the inversion with them
        assert_close_report(F, np.linalg.inv(np.linalg.inv(M) + np.outer(v, v)), 1e-10, "blend factor")
        eigenvalues = torch.linalg.eigvalsh(F)
        assert eigenvalues.min() > 0 and eigenvalues.max() <= 1 + 1e-12
        assert F.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("q", [0.01, 0.25, 1.0, 9.0, 1e3])
def test_blend_comes_to_rest_at_its_fixed_point(rng: np.random.Generator, q: float) -> None:
    d = 6
    v = rng.normal(size=d)
    v *= math.sqrt(q / (v @ v))
    F = torch.eye(d, dtype=torch.float64)
    for _ in range(1000):
        F = blend_update(F, tensor(v)[None], GAMMA)
    along = v @ F.numpy() @ v / q
    assert abs(along - oracles.blend_fixed_point(q, GAMMA)) < 1e-10  # 2e-15 in the spec
    others = np.sort(np.append(np.ones(d - 1), along))
    assert_close_report(torch.linalg.eigvalsh(F), others, 1e-10, "eigenvalues")


def test_paper_update_grows_as_derived(rng: np.random.Generator) -> None:
    F, v = torch.eye(8, dtype=torch.float64), tensor(rng.normal(size=8))
    for _ in range(5):
        before = float(v @ F @ v)
        F = paper_update(F, v, GAMMA)
        assert float(v @ F @ v) / before == pytest.approx(oracles.paper_growth(before, GAMMA), rel=1e-12)


def test_paper_update_diverges_unless_the_stabilizer_is_strong() -> None:
    v = torch.full((8,), 3.0, dtype=torch.float64)
    largest = {}
    for keep, updates in ((0.9, 100), (0.45, 300)):
        F = torch.eye(8, dtype=torch.float64)
        for _ in range(updates):
            F = paper_update(stabilize(F, 2.0, keep), v, GAMMA)
        largest[keep] = float(F.abs().max())
    assert largest[0.9] > 1e10  # ζ above 1/(γ + γ⁻³) = 0.47 cannot hold it
    assert largest[0.45] < 4


def test_stabilize_blends_only_what_is_too_large(rng: np.random.Generator) -> None:
    F = rng.normal(size=(3, 4, 4)) * np.array([1.0, 50.0, 0.1])[:, None, None]
    actual = stabilize(tensor(F), 10.0, 0.9)
    for i in range(3):
        assert_close_report(actual[i], oracles.stabilized(F[i], 10.0, 0.9), 1e-15, f"factor {i}")


def test_fp16_storage_keeps_the_blend_factor(rng: np.random.Generator) -> None:
    d = 256
    F, F_half = torch.eye(d, dtype=torch.float64), torch.eye(d, dtype=torch.float16)
    for v in drifting(rng, 300, d, size=10.0):
        F = blend_update(F, tensor(v)[None], GAMMA)
        F_half = blend_update(F_half.float(), tensor(v)[None].float(), GAMMA).half()
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
        C, head = lowrank_update(C, head, tensor(v)[None], GAMMA, torch.tensor(True))
        worst = max(worst, float(np.linalg.norm(dense(C) - F, 2)))
    assert worst <= 2 * GAMMA**history  # the weight of what was dropped
    assert worst > 1e-6  # something was dropped at all


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_lowrank_factor_stays_definite(rng: np.random.Generator, size: float) -> None:
    C, _ = lowrank_after(drifting(rng, 1000, 20, size), history=16)
    eigenvalues = np.linalg.eigvalsh(dense(C))
    assert eigenvalues.min() > 0
    assert eigenvalues.max() <= 1 + 1e-12  # rounding of sixteen unit-sized columns


@pytest.mark.parametrize("r", [1, 2, 5])
def test_lowrank_block_update_is_woodbury(rng: np.random.Generator, r: int) -> None:
    d, history = 18, 10
    C, head = torch.zeros(2, history, d, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    F = [np.eye(d), np.eye(d)]
    for _ in range(history // r):
        V = rng.normal(size=(2, r, d))
        F = [oracles.blend_by_inversion(F[i], V[i].T, GAMMA) for i in range(2)]
        C, head = lowrank_update(C, head, tensor(V), GAMMA, torch.tensor([True, True]))
        for i in range(2):  # the oracle inverts twice: condition number 1/(1-γ) + |v|², about 1e2
            assert_close_report(dense(C[i]), F[i], 1e-12, f"factor {i}, {r} vectors")


@pytest.mark.parametrize("r", [1, 3])
def test_dense_block_update_is_woodbury(rng: np.random.Generator, r: int) -> None:
    F, V = np.eye(9), rng.normal(size=(4, r, 9))
    library = torch.eye(9, dtype=torch.float64)
    for block in V:
        F, library = oracles.blend_by_inversion(F, block.T, GAMMA), blend_update(library, tensor(block), GAMMA)
    assert_close_report(library, F, 1e-12, f"dense factor, {r} vectors")


def test_lowrank_update_leaves_an_invalid_factor_alone(rng: np.random.Generator) -> None:
    C, head = tensor(0.1 * rng.normal(size=(2, 4, 6))), torch.tensor([3, 3])
    V = tensor(rng.normal(size=(2, 1, 6)))
    V[1] = math.nan
    new_C, new_head = lowrank_update(C, head, V, GAMMA, torch.tensor([True, False]))
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
        run_whole(lowrank_product(Joint(P, None), C[None], C[None]))
        products.append(P)
    assert_close_report(products[0], products[1], 1e-13, "P")  # sums in another order


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("history", "d"), [(6, 17), (12, 5)])
def test_a_power_of_the_lowrank_factor_is_that_of_the_dense_one(
    rng: np.random.Generator, history: int, d: int, p: float
) -> None:
    factors = [lowrank_after(drifting(rng, history + 3, d, size=size), history)[0] for size in (0.1, d)]
    powers = power_columns(torch.stack(factors), p)
    for C, C_p in zip(factors, powers, strict=True):  # eigenvalues from 1 down to 1/37: rounding alone
        assert_close_report(dense(C_p), oracles.power(dense(C), p), 1e-12, "F^p")


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("λ", [1e-30, 1e-17, 1e-12, 1e-6])
def test_a_power_is_exact_where_hardly_anything_is_removed(λ: float, p: float) -> None:
    C = torch.zeros(1, 4, 9, dtype=torch.float64)
    C[0, 2, 5] = math.sqrt(λ)
    removed = p * λ + p * (1 - p) * λ**2 / 2 + p * (1 - p) * (2 - p) * λ**3 / 6  # of 1 - (1-λ)^p; λ⁴ is below rounding
    C_p = power_columns(C, p)[0]
    assert_close_report((C_p.mT @ C_p)[5, 5], removed, 1e-14, "1 - (1-λ)^p")
    assert C_p[:, [0, 8]].abs().max() == 0


def test_a_power_in_fp32_is_near_that_in_float64(rng: np.random.Generator) -> None:
    d, history = 300, 32
    C, _ = lowrank_after(drifting(rng, 40, d, size=d), history)  # eigenvalues of F down to 1/320
    C_p = power_columns(C.float()[None], 0.25)[0].double()
    # the smallest, 3e-3, has an error of 3e-7, and its root, 1/4, a quarter of that relative error
    assert np.linalg.norm(dense(C_p) - oracles.power(dense(C), 0.25), 2) < 2e-5
    whole = power_columns(torch.eye(3)[None], 0.25)[0]  # F = 0, which rounding can make of it
    assert_close_report(dense(whole), np.zeros((3, 3)), 1e-7, "0^p")


@pytest.mark.parametrize(("length", "waits"), [(0.5, True), (0.999, False)])
def test_a_product_that_waits_for_its_factor_is_the_product_times_it(length: float, waits: bool) -> None:
    """Where F = I - length² QQᵀ leaves nearly nothing, |P| is a difference of nearly equal squares: it is measured."""
    torch.manual_seed(0)
    n, m = 7, 5
    C_b = length * torch.linalg.qr(torch.randn(1, n, n, dtype=torch.float64)).Q
    C_a = length * torch.linalg.qr(torch.randn(1, m + 1, 2, dtype=torch.float64)).Q.mT
    weight, bias, f = torch.randn(1, n, m).double(), torch.randn(1, n).double(), torch.tensor([0.3]).double()
    ways = [Joint(weight.clone(), bias.clone(), waits=each) for each in (False, True)]
    moved = []
    for grad in ways:
        run_whole(grad.measure_())
        moved.append(run_whole(lowrank_product(grad, C_b, C_a)))
        assert (grad.later is not None) == (waits and grad is ways[1])
        grad.scale_(f)
    for now, later in zip(*(grad.tensors() for grad in ways), strict=True):
        assert_close_report(later, now, 1e-12, "P")
    assert_close_report(moved[1].after, moved[0].after, 1e-12, "|P|²")

"""The K-FAC oracles against curvlinops, exact curvature, dense algebra and the released kfac-pytorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from curvlinops import KFACInverseLinearOperator
from torch import nn

from tests.oracles import kfac
from tests.oracles import kfac_cases as cases
from tests.oracles.core import Array, assert_close_report, relative_error
from tests.oracles.kfac_cases import Net, rows_of
from tests.oracles.kfac_curvlinops import curvlinops_block, curvlinops_factors, curvlinops_kfac
from tests.oracles.training import Sgd, simulate
from tests.oracles.twin_runs import batches, twins

APPROX = pytest.mark.parametrize("approx", ["expand", "reduce"])
TASK = pytest.mark.parametrize("task", ["token", "mean", "sum"])
MODE = pytest.mark.parametrize("mode", ["relative", "absolute"])


def spd(rng: np.random.Generator, d: int, scale: float = 1.0) -> Array:
    X = rng.normal(size=(2 * d, d))
    return scale * X.T @ X / len(X)


def some_factors(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    return spd(rng, 5), spd(rng, 4, 0.01), rng.normal(size=(4, 5))


# ---- factors against curvlinops (spec 9.2) ---------------------------------------------------------------------------


@APPROX
@TASK
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_oracles_agree_with_curvlinops_on_cross_entropy(fisher: str, task: str, approx: str) -> None:
    net, x = Net(task), cases.inputs()
    y = cases.labels(net)
    K = curvlinops_kfac(net, nn.CrossEntropyLoss(), x, y, fisher_type=fisher, kfac_approx=approx)
    loss = (lambda: cases.cross_entropy(net(x), y)) if fisher == "empirical" else lambda: cases.every_label_loss(net, x)
    rows = rows_of(net, loss)
    for name, (A, B) in curvlinops_factors(K).items():
        mine = kfac.factors(*rows[name], net.terms(x), approx, row_filter="all")
        assert_close_report(mine[0], A, 1e-12, f"A of {name}")  # 3e-16 in the spec: sums in another order
        assert_close_report(mine[1], B, 1e-12, f"B of {name}")


@APPROX
@TASK
def test_oracles_agree_with_curvlinops_on_mean_squares(task: str, approx: str) -> None:
    """MSELoss also averages over the C outputs of a term: each is a term, R = N·C."""
    net, x = Net(task), cases.inputs()
    t = torch.randn_like(net(x))
    K = curvlinops_kfac(net, nn.MSELoss(), x, t, fisher_type="empirical", kfac_approx=approx)
    rows = rows_of(net, lambda: nn.functional.mse_loss(net(x), t))
    for name, (A, B) in curvlinops_factors(K).items():
        mine = kfac.factors(*rows[name], t.numel(), approx, row_filter="all")
        assert_close_report(mine[0], A, 1e-12, f"A of {name}")  # sums in another order
        assert_close_report(mine[1], B, 1e-12, f"B of {name}")


def test_the_roots_of_the_softmax_hessian_are_its_columns(rng: np.random.Generator) -> None:
    logits = rng.normal(size=4)
    p = np.exp(logits) / np.exp(logits).sum()
    root = kfac.one_hot_columns(p)
    assert_close_report(root @ root.T, np.diag(p) - np.outer(p, p), 1e-14, "root of the Hessian")  # rounding


# ---- exact blocks (spec 9.3, 9.4) ------------------------------------------------------------------------------------


@TASK
@APPROX
def test_oracles_agree_with_the_gauss_newton_block(task: str, approx: str) -> None:
    """Deep linear, squares: exact where the approximation fits the loss, and far off where it does not."""
    net = Net(task, linear=True)
    x, t = cases.orthogonal_residuals(net, cases.inputs())
    rows = rows_of(net, lambda: cases.half_squares(net, x, t))
    fits = (approx == "expand") == (task == "token")
    for name in rows:
        A, B = kfac.factors(*rows[name], net.terms(x), approx)
        block = cases.ggn_block(net, name, x, cases.unit_hessian)
        error = relative_error(np.kron(B, A), block)
        # 7e-16 in the spec where it fits
        assert error <= 1e-12 if fits else error > 0.1, f"{name}: {error:.2e}"


@TASK
def test_the_dense_block_agrees_with_curvlinops(task: str) -> None:
    """MSELoss(mean) is Σ|f - t|² / (R C), whose Hessian by one term's outputs is 2/C."""
    net, x = Net(task), cases.inputs()
    t = torch.randn_like(net(x))
    for name in cases.linears(net):
        block = cases.ggn_block(net, name, x, lambda z: 2 / len(z) * cases.unit_hessian(z))
        assert_close_report(block, curvlinops_block(net, nn.MSELoss(), x, t, name), 1e-12, name)  # sums reordered


@APPROX
def test_oracles_agree_with_the_exact_block_of_one_datum(approx: str) -> None:
    """One example, one position, any loss, any network."""
    net = Net("token")
    x = cases.inputs(1)[:, :1]
    y = torch.randint(cases.CLASSES, (1, 1))
    rows = rows_of(net, lambda: cases.every_label_loss(net, x))
    for name in rows:
        A, B = kfac.factors(*rows[name], 1, approx)
        exact = cases.ggn_block(net, name, x, cases.softmax_hessian)
        assert_close_report(np.kron(B, A), exact, 1e-12, f"{name}, dense")  # 2e-16 in the spec
        reference = curvlinops_block(net, nn.CrossEntropyLoss(), x, y, name)
        assert_close_report(np.kron(B, A), reference, 1e-12, f"{name}, curvlinops")


# ---- inverses (spec 9.6, 9.7, 9.8) -----------------------------------------------------------------------------------


@MODE
def test_oracles_agree_with_dense_solves(rng: np.random.Generator, mode: str) -> None:
    A, B, G = some_factors(rng)
    for damping in (1e-3, 0.1, 10.0):
        # condition numbers up to 1e5: five digits of sixteen; 4e-15 in the spec
        dense = kfac.exact_dense(A, B, G, damping, mode)
        assert_close_report(kfac.exact(A, B, G, damping, mode), dense, 1e-10, f"eigen, {damping}")
        dense = kfac.factored_dense(A, B, G, damping, mode)
        assert_close_report(kfac.factored(A, B, G, damping, mode), dense, 1e-10, f"Cholesky, {damping}")


@APPROX
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_oracles_agree_with_curvlinops_inverses(damping: float, approx: str) -> None:
    net, x = Net("token"), cases.inputs()
    y = cases.labels(net)
    K = curvlinops_kfac(net, nn.CrossEntropyLoss(), x, y, fisher_type="empirical", kfac_approx=approx)
    gradients = [torch.randn_like(p) for p in net.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    factors = curvlinops_factors(K)
    for option, mine in (("use_exact_damping", kfac.exact), ("use_heuristic_damping", kfac.factored)):
        # no floor of theirs: ours is relative
        inverse = KFACInverseLinearOperator(K, damping=damping, min_damping=0.0, **{option: True})
        theirs = iter((inverse @ flat).split([g.numel() for g in gradients]))
        for name, W, b in zip(factors, gradients[::2], gradients[1::2], strict=True):
            G = torch.cat([W, b[:, None]], 1).numpy()
            P = torch.cat([next(theirs).view_as(W), next(theirs)[:, None]], 1)
            # condition numbers below 1e3; 3e-15 in the spec
            assert_close_report(mine(*factors[name], G, damping, "absolute"), P, 1e-10, f"{option}, {name}")


@MODE
def test_split_damping_multiplies_to_the_whole(rng: np.random.Generator, mode: str) -> None:
    A, B, _ = some_factors(rng)
    alpha, beta = kfac.split_damping(A, B, 0.3, mode)
    assert alpha * beta == pytest.approx(kfac.tikhonov_damping(A, B, 0.3, mode), rel=1e-14)
    assert alpha / beta == pytest.approx(kfac.mean_eigenvalue(A) / kfac.mean_eigenvalue(B), rel=1e-14)
    same = kfac.split_damping(A, B, 0.3 * kfac.curvature(A, B), "absolute")
    if mode == "relative":
        assert (alpha, beta) == pytest.approx(same, rel=1e-14)
    # without eigenvalues the floor is what keeps the split positive
    assert kfac.split_damping(A, B, 1e-40, "absolute")[0] == kfac.FLOOR * kfac.mean_eigenvalue(A)


def test_one_row_is_removed_by_sherman_morrison(rng: np.random.Generator) -> None:
    a, g, terms = rng.normal(size=(1, 5)), 0.2 * rng.normal(size=(1, 4)), 3
    A, B = kfac.factors(a, g, terms)
    G = kfac.gradient(a, g)
    # G is the one direction with curvature: A |a|² R |g|² on it; 2e-14 in the spec
    expected = G / ((a**2).sum() * terms * (g**2).sum() + 0.01)
    assert_close_report(kfac.exact(A, B, G, 0.01, "absolute"), expected, 1e-10, "P")


@pytest.mark.parametrize("solve", [kfac.exact, kfac.factored])
def test_relative_damping_does_not_see_the_scale(rng: np.random.Generator, solve: Any) -> None:
    A, B, G = some_factors(rng)
    P = solve(A, B, G, 0.1)
    for s in (1e-7, 1e7):
        assert_close_report(s * solve(A, s * B, G, 0.1), P, 1e-12, f"s = {s}")  # 2e-16 in the spec
    assert relative_error(solve(A, 1e7 * B, G, 0.1, "absolute") * 1e7, P) > 0.1


# ---- FOOF (spec 9.19) ------------------------------------------------------------------------------------------------


@MODE
def test_foof_is_kfac_without_output_factor_and_a_regression(rng: np.random.Generator, mode: str) -> None:
    a, g = rng.normal(0.3, size=(6, 4, 5)), rng.normal(size=(6, 4, 3)) / 24
    A, _ = kfac.factors(a, g, 24)
    G = kfac.gradient(a, g)
    P = kfac.foof(A, G, 0.05, mode)
    # rounding times a condition number of about 100
    assert_close_report(P, kfac.exact_dense(A, np.eye(3), G, 0.05, mode), 1e-12, "B = I")
    lam = 0.05 * np.trace(A) / 5 if mode == "relative" else 0.05
    assert_close_report(P, kfac.foof_least_squares(a, g, lam), 1e-12, "least squares")  # 3e-16 in the spec


# ---- rows that count (spec 9.10), the running mean (9.15), lengths (9.20) --------------------------------------------


@APPROX
def test_masked_rows_do_not_count(rng: np.random.Generator, approx: str) -> None:
    a, g = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 4, 2))
    g[1, 2:] = g[3] = 0.0
    longer = [np.concatenate([rows, rng.normal(size=(5, 3, rows.shape[2]))], 1) for rows in (a, g)]
    longer[1][:, 4:] = 0.0
    for ours, theirs in zip(kfac.factors(*longer, None, approx), kfac.factors(a, g, 14, approx), strict=True):
        assert_close_report(ours, theirs, 1e-14, approx)  # the same rows in another order
    kept = [(a[i][g[i].any(1)], g[i][g[i].any(1)]) for i in (0, 1, 2, 4)]
    if approx == "expand":
        A = sum(p.T @ p for p, _ in kept) / 14
        B = 14 * sum(q.T @ q for _, q in kept)
    else:
        A = sum(np.outer(p.mean(0), p.mean(0)) for p, _ in kept) / 4
        B = 14 * sum(np.outer(q.sum(0), q.sum(0)) for _, q in kept)
    for ours, theirs in zip(kfac.factors(a, g, 14, approx), (A, B), strict=True):
        assert_close_report(ours, theirs, 1e-14, approx)  # the same sums by products of matrices
    all_rows = kfac.factors(*longer, 14, approx, row_filter="all")
    assert relative_error(all_rows[0], A) > 0.1
    assert_close_report(all_rows[1], B, 1e-14, "B has no use for rows of zeros")


def test_the_running_mean_is_corrected(rng: np.random.Generator) -> None:
    F = [spd(rng, 4) for _ in range(6)]
    assert_close_report(kfac.running(F[:1], 0.95)[1], F[0], 1e-15, "first update")  # one rounding
    for u in range(1, 7):
        assert_close_report(kfac.running([F[0]] * u, 0.95)[1], F[0], 1e-14, f"constant stream, {u}")  # a few roundings
    assert_close_report(kfac.running(F, 0.0)[1], F[-1], 0.0, "no memory")
    weights = 0.9 ** np.arange(5, -1, -1)
    weighted = sum(w * f for w, f in zip(weights, F, strict=True))
    assert_close_report(kfac.running(F, 0.9)[1], weighted / weights.sum(), 1e-14, "weighted mean")
    old, _ = kfac.running(F, 0.9, "identity")
    assert_close_report(old, 0.9**6 * np.eye(4) + 0.1 * weighted, 1e-14, "from the identity")


def test_lengths(rng: np.random.Generator) -> None:
    pairs = [(G, 30 * G + rng.normal(size=G.shape)) for G in (rng.normal(size=(4, 3)), rng.normal(size=(2, 5)))]
    for (G, _), P in zip(pairs, kfac.rescaled(pairs, 0.1, "norm", 1e-3), strict=True):
        assert np.linalg.norm(P) == pytest.approx(np.linalg.norm(G), rel=1e-12)
    total = sum((P**2).sum() for P in kfac.rescaled(pairs, 0.1, "global", 1e-3))
    assert total == pytest.approx(sum((G**2).sum() for G, _ in pairs), rel=1e-12)
    clipped = kfac.rescaled(pairs, 0.1, "kl_clip", 1e-3)
    nu = np.linalg.norm(clipped[0]) / np.linalg.norm(pairs[0][1])
    change = 0.1**2 * nu**2 * sum((P * G).sum() for G, P in pairs)
    assert nu < 1 and change == pytest.approx(1e-3, rel=1e-12)  # its definition, when it acts
    for kl_clip in (1e9, None):
        assert np.array_equal(kfac.rescaled(pairs, 0.1, "kl_clip", kl_clip)[1], pairs[1][1])


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_periods_of_a_run() -> None:
    """Factors at 0, 1, 3, 6, 9, ... and, after them, inverses at 0, 1, 6, 12."""
    _, mlp = twins()
    method = kfac.Kfac({"update_period": 3, "inverse_period": 6, "warmup_updates": 2})
    updates, inverses, last = [], [], None
    for t, batch in enumerate(batches(14)):
        before = len(method.streams[0][0]) if method.streams else 0
        simulate(mlp, [batch], method, Sgd(), [0.05])
        updates += [t] * (len(method.streams[0][0]) - before)
        inverses += [t] if method.estimates is not last else []
        last = method.estimates
    assert updates == [0, 1, 3, 6, 9, 12] and inverses == [0, 1, 6, 12]


def test_kfac_of_one_batch_is_newton_on_a_linear_network() -> None:
    """One linear layer, squares: B = I with residuals of second moment I, so P is (Gauss-Newton + λ)⁻¹ G."""
    net = Net("token", linear=True, depth=1)
    x, t = cases.orthogonal_residuals(net, cases.inputs())
    a, g = (rows.numpy() for rows in rows_of(net, lambda: cases.half_squares(net, x, t))["layers.0"])
    method = kfac.Kfac({"inverse": "eigen", "damping": 0.02, "damping_mode": "absolute", "rescale": "none"})
    (P,) = method.transform([(a, g)], lr=1.0)
    block = cases.ggn_block(net, "layers.0", x, cases.unit_hessian)
    newton = np.linalg.solve(block + 0.02 * np.eye(len(block)), kfac.gradient(a, g).flatten())
    assert_close_report(P.flatten(), newton, 1e-10, "P")  # condition number about 1e3


def test_the_published_scale_is_the_released_code() -> None:
    """Three steps of a 3-2-2 network against what kfac-pytorch 0.4.2 (commit 869cf11) computed in fp32."""
    method = kfac.Kfac({**kfac.PUBLISHED, **cases.RELEASED_CONFIG})
    net = cases.released_net()
    for step in range(3):
        x, t = cases.released_batch(step)
        rows = rows_of(net, lambda x=x, t=t: cases.released_loss(net, x, t))
        moved = method.transform([(a.numpy(), g.numpy()) for a, g in rows.values()], lr=0.1)
    for P, expected in zip(moved, cases.RELEASED_STEPS, strict=True):
        assert_close_report(P, expected, 2e-6, "P")  # their fp32; 6e-7 measured on larger networks


def test_the_published_scale_is_foof_with_growing_damping(rng: np.random.Generator) -> None:
    """B is ρᵘI and little else on a loss of many terms: damping λ/ρᵘ on the input side alone (spec 4.5)."""
    method = kfac.Kfac({**kfac.PUBLISHED, "warmup_updates": 100, "rescale": "none"})
    mixing, terms = rng.normal(size=(8, 8)) / 2, 1024
    for u in range(1, 21):
        a, g = rng.normal(0.5, size=(terms, 8)) @ mixing, rng.normal(size=(terms, 4)) / terms
        (P,) = method.transform([(a, g)], lr=0.1)
        G, A = kfac.gradient(a, g), method.estimates[0][0]
        P_foof = kfac.foof(A, G, 3e-3 / 0.95**u, "absolute")
        assert (P * P_foof).sum() / np.linalg.norm(P) / np.linalg.norm(P_foof) > 0.9999, u
    assert (P * G).sum() / np.linalg.norm(P) / np.linalg.norm(G) < 0.99  # not the gradient

"""The numpy versions of root-free RMSProp, inverse-free Shampoo and inverse-free K-FAC, held against identities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tests.oracles import rootfree as rf
from tests.oracles.core import assert_close_report, relative_error
from tests.oracles.rootfree import InverseFree, Rooted, RootFree, inverse_free
from tests.oracles.twin_parameters import drifting, near_identity, trajectory


def two_axes(rng: np.random.Generator, beta: float, momentum: float = 0.0, damping: float = 0.1) -> InverseFree:
    """A 4 x 3 rule away from its start."""
    return InverseFree(8, beta, momentum, damping, ("dense",) * 2, [near_identity(rng, d) for d in (4, 3)])


# ---- root-free RMSProp -----------------------------------------------------------------------------------------------


def test_oracles_agree_that_rmsprop_without_memory_is_sgd(rng: np.random.Generator) -> None:
    """β = 0 and ε = 0 leave ŝ = 1."""
    gradient, start = drifting(rng, 5, 4), rng.normal(size=(5, 4))
    W = torch.nn.Parameter(torch.from_numpy(start.copy()))
    sgd = torch.optim.SGD([W], lr=0.1, momentum=0.9, weight_decay=0.02, foreach=False)
    for t in range(20):
        W.grad = torch.from_numpy(gradient(W.detach().numpy(), t))
        sgd.step()
    after = trajectory(start, RootFree(16, 0.0, 0.0), gradient, 20, lr=0.1, alpha=0.9, kappa=0.02)
    assert_close_report(after, W, 1e-14, "parameters")  # torch may fuse a product and a sum, numpy does not


def test_oracles_agree_on_mean_and_summed_loss_of_rmsprop(rng: np.random.Generator) -> None:
    B, eps, gradient, start = 48, 1e-3, drifting(rng, 5, 4), rng.normal(size=(5, 4))
    run = {"lr": 0.1, "alpha": 0.6, "kappa": 0.01}
    mean = trajectory(start, RootFree(B, 0.05, eps), gradient, 50, **run)
    summed = trajectory(start, RootFree(1, 0.05, eps * B, s=float(B)), lambda W, t: B * gradient(W, t), 50, **run)
    assert_close_report(summed, mean, 1e-13, "parameters")  # rounding alone


def test_oracles_agree_that_only_the_rootless_rule_is_equivariant(rng: np.random.Generator) -> None:
    """w = Dw̃ elementwise, ŝ₀ = D², ε = 0: the same trajectory in w."""
    gradient, start = drifting(rng, 5, 4), rng.normal(size=(5, 4))
    D = np.exp(rng.normal(size=(5, 4)))
    run = {"lr": 0.1, "alpha": 0.6, "kappa": 0.01}
    errors = []
    for rule in (RootFree, Rooted):
        plain = trajectory(start, rule(16, 0.05, 0.0), gradient, 50, **run)
        other = trajectory(start / D, rule(16, 0.05, 0.0, s=D**2), lambda W, t: D * gradient(D * W, t), 50, **run)
        errors.append(relative_error(D * other, plain))
    assert errors[0] <= 1e-12  # 2e-16 in the spec
    assert errors[1] > 1e-2


def test_oracles_agree_on_the_loss_scale_at_rest(rng: np.random.Generator) -> None:
    G, c = rng.normal(size=(5, 4)), 7.0
    for rule, power in ((RootFree, 1), (Rooted, 0)):
        updates = []
        for scale in (1.0, c):
            one = rule(16, 0.1, 0.0)
            updates += [[one.direction(scale * G) for _ in range(400)][-1]]
        assert_close_report(updates[1], updates[0] / c**power, 1e-6, rule.__name__)  # 0.9^400 of ŝ's start remains


# ---- inverse-free Shampoo: one step ----------------------------------------------------------------------------------


def test_oracles_agree_with_the_matrix_form(rng: np.random.Generator) -> None:
    """Section 2.2's formulas for a matrix, written with letters C and K instead of axes."""
    rule, G, B, lam = two_axes(rng, 0.1), rng.normal(size=(4, 3)), 8, 0.1
    C, K = rule.K
    H_K = (B * K.T @ G.T @ C @ C.T @ G @ K + lam * np.trace(C @ C.T) * K.T @ K) / 4
    H_C = (B * C.T @ G @ K @ K.T @ G.T @ C + lam * np.trace(K @ K.T) * C.T @ C) / 3
    for actual, expected in zip(rule.curvature(G), (H_C, H_K), strict=True):
        assert_close_report(actual, expected, 1e-13, "H")
    assert_close_report(rule.precondition(G), C @ C.T @ G @ K @ K.T, 1e-13, "U")


def test_oracles_agree_with_the_dense_inverse_to_second_order(rng: np.random.Generator) -> None:
    """(KKᵀ)⁻¹ after one step is (1-β)S + βU + O(β²), U = (1/P)(B G(⊗S⁻¹)Gᵀ + λ Π tr(S⁻¹) I)."""
    errors, betas = [], [1e-1, 1e-2, 1e-3, 1e-4]
    G, start = 0.2 * rng.normal(size=(4, 3)), two_axes(rng, 0.0).K
    S = [rf.gram_inverse(K) for K in start]
    new = []
    for n, (matrix, other) in enumerate(((G, S[1]), (G.T, S[0]))):
        inner = 8 * matrix @ np.linalg.inv(other) @ matrix.T + 0.1 * np.trace(np.linalg.inv(other)) * np.eye(len(S[n]))
        new.append(inner / len(other))
    for beta in betas:
        rule = InverseFree(8, beta, 0.0, 0.1, ("dense",) * 2, list(start))
        rule.refresh(rule.curvature(G))
        assert max(np.linalg.norm(m) for m in rule.m) < 1  # c = 1, or β would not be the step
        pairs = [(rf.gram_inverse(K), (1 - beta) * s + beta * u) for K, s, u in zip(rule.K, S, new, strict=True)]
        errors.append(max(relative_error(got, want) for got, want in pairs))
    assert all(error <= beta**2 for error, beta in zip(errors, betas, strict=True))
    slopes = np.diff(np.log10(errors)) / np.diff(np.log10(betas))
    assert np.abs(slopes[1:] - 2).max() <= 0.05  # the first slope still feels the third order
    assert abs(slopes[0] - 2) <= 0.1


@pytest.mark.parametrize("beta", [0.3, 0.1, 0.01])
def test_oracles_agree_with_the_exponential_map(rng: np.random.Generator, beta: float) -> None:
    """K(I - xm) against K·Expm(-xm), x = β/c: what is cut off is x²m²/2 and more, and |xm| <= β."""
    before = two_axes(rng, beta).K
    for scale in (0.35, 1.0):  # H near I, where the spec measured; and far above it, c > 1
        rule = InverseFree(8, beta, 0.0, 0.1, ("dense",) * 2, list(before))
        rule.refresh(rule.curvature(scale * rng.normal(size=(4, 3))))
        for K, old, m in zip(rule.K, before, rule.m, strict=True):
            values, Q = np.linalg.eigh(-beta / max(1.0, np.linalg.norm(m)) * m)
            exact = old @ (Q * np.exp(values)) @ Q.T
            rest = np.linalg.norm(K - exact)
            assert rest <= 0.5 * beta**2 * math.exp(beta) * np.linalg.norm(old, 2)  # the series' remainder
            if scale < 1:
                assert rest <= 0.1 * beta**2 * np.linalg.norm(exact)  # 7.5e-2 β² in the spec


def test_oracles_agree_with_the_explicit_kronecker_product(rng: np.random.Generator) -> None:
    for shape in ((5,), (4, 3), (3, 4, 2), (2, 3, 2, 3)):
        Ks = [near_identity(rng, d) for d in shape]
        G = rng.normal(size=shape)
        rule = InverseFree(1, 0.1, 0.0, 0.1, ("dense",) * len(shape), Ks)
        dense = rf.kron_all([K @ K.T for K in Ks]) @ G.ravel()
        assert_close_report(rule.precondition(G).ravel(), dense, 1e-13, f"U of order {len(shape)}")


@pytest.mark.parametrize("scale", [10.0**power for power in range(-3, 4)])
def test_oracles_agree_that_a_factor_stays_invertible(rng: np.random.Generator, scale: float) -> None:
    """I - (β/c)m has eigenvalues of at least 1 - β, because |m|/c <= 1."""
    rule, beta = two_axes(rng, 0.9, momentum=0.5), 0.9
    for t in range(30):
        before = [K.copy() for K in rule.K]
        G = scale * rng.normal(size=(4, 1)) * rng.normal(size=(1, 3)) if t % 2 else scale * rng.normal(size=(4, 3))
        rule.refresh(rule.curvature(G))
        for new, old in zip(rule.K, before, strict=True):
            # 1e-9: K is solved against itself, and its condition number grows
            assert np.linalg.eigvals(np.linalg.solve(old, new)).real.min() >= 1 - beta - 1e-9


def test_oracles_agree_on_the_first_step_of_one_number(rng: np.random.Generator) -> None:
    """A 1 x 1 factor: u = g k², k = 1 - ½β(Bg² + λ - 1), against g / (1 - β + βBg²): equal to second order."""
    beta, B = 1e-2, 16
    g = rng.uniform(0.12, 0.33, size=20)  # |Bg² - 1| <= .8: the error is ¾(Bg² - 1)²β²
    for value in g:
        rule = inverse_free((1,), batch_size=B, beta=beta, momentum=0.0, damping=0.0)
        got = rule.direction(np.array([value]))
        other = RootFree(B, beta, 0.0).direction(np.array([value]))
        assert_close_report(got, other, 0.5 * beta**2, "u")  # .38 β² in the spec


# ---- inverse-free Shampoo: structure, scale and shape ----------------------------------------------------------------


def test_oracles_agree_on_a_diagonal_axis(rng: np.random.Generator) -> None:
    """The vector formula of section 2.5 against the dense rule whose off-diagonal entries are zeroed; three steps."""
    rule = InverseFree(8, 0.2, 0.5, 0.1, ("diagonal", "dense"), [np.eye(4), np.eye(3)])
    k, m = np.ones(4), np.zeros(4)
    for _ in range(3):
        G, K = rng.normal(size=(4, 3)), rule.K[1].copy()
        Y = math.sqrt(8) * np.diag(k) @ G @ K
        h = ((Y**2).sum(1) / 3 + 0.1 * np.trace(K.T @ K) / 3 * k**2 - 1) / 2
        m = 0.5 * m + 0.5 * h
        k = k * (1 - 0.2 * m / max(1.0, np.linalg.norm(m)))
        rule.refresh(rule.curvature(G))
        assert_close_report(np.diag(rule.K[0]), k, 1e-12, "k")
        assert np.array_equal(rule.K[0], np.diag(np.diag(rule.K[0])))


def test_oracles_agree_that_an_identity_axis_drops_out(rng: np.random.Generator) -> None:
    """One axis at I: its τ is 1, and the rest is the rule of a vector with the columns as samples."""
    rule = InverseFree(8, 0.2, 0.5, 0.1, ("dense", "identity"), [np.eye(4), np.eye(3)])
    K, m = np.eye(4), np.zeros((4, 4))
    for _ in range(3):
        G = rng.normal(size=(4, 3))
        U = rule.direction(G)
        m = 0.5 * m + 0.25 * (8 * K.T @ G @ G.T @ K / 3 + 0.1 * K.T @ K - np.eye(4))
        K = K @ (np.eye(4) - 0.2 / max(1.0, np.linalg.norm(m)) * m)
        assert_close_report(U, K @ K.T @ G, 1e-12, "U")
    assert np.array_equal(rule.K[1], np.eye(3))


def test_oracles_agree_on_mean_and_summed_loss(rng: np.random.Generator) -> None:
    B, lam, shape = 48, 0.01, (3, 4, 2)
    mean = InverseFree(B, 0.2, 0.5, lam, ("dense",) * 3, [np.eye(d) for d in shape])
    summed = InverseFree(1, 0.2, 0.5, B * lam, ("dense",) * 3, [B ** (-1 / 6) * np.eye(d) for d in shape])
    for _ in range(20):
        G = 0.2 * rng.normal(size=shape)
        assert_close_report(summed.direction(B * G), mean.direction(G), 1e-12, "U")  # rounding alone


@pytest.mark.parametrize(("damping", "follow"), [(0.0, True), (0.3, True), (0.0, False)])
def test_oracles_agree_on_affine_equivariance(rng: np.random.Generator, damping: float, follow: bool) -> None:
    """W = A W̃ D: the same trajectory in W if the factors of W̃ start at A⁻¹ and D⁻ᵀ and there is no damping."""
    A, D, gradient = near_identity(rng, 4, 0.6), near_identity(rng, 3, 0.6), drifting(rng, 4, 3)
    eyes = [np.eye(4), np.eye(3)]
    carried = [np.linalg.inv(A), np.linalg.inv(D).T] if follow else list(eyes)
    plain, moved = (InverseFree(8, 0.2, 0.5, damping, ("dense",) * 2, K) for K in (eyes, carried))
    W = rng.normal(size=(4, 3))
    run = {"lr": 0.05, "alpha": 0.7, "kappa": 0.05}
    expected = trajectory(W, plain, gradient, 40, **run)
    start = np.linalg.solve(A, W) @ np.linalg.inv(D)
    other = trajectory(start, moved, lambda V, t: A.T @ gradient(A @ V @ D, t) @ D.T, 40, **run)
    error = relative_error(A @ other @ D, expected)
    if damping == 0 and follow:
        assert error <= 1e-11  # 1e-15 in the spec, for condition numbers of 3 to 6
    else:
        assert error > 1e-3  # damping and the start at I belong to one set of coordinates


def test_oracles_agree_on_the_fixed_point(rng: np.random.Generator) -> None:
    """For E[vec g vec gᵀ] = L ⊗ R the factors come to rest where U = (E vec g vec gᵀ)⁻¹ vec X, and at no root of it."""
    n, m = 4, 3
    A, D, X = near_identity(rng, n, 1.0), near_identity(rng, m, 1.0), rng.normal(size=(n, m))
    grads = [math.sqrt(n * m) * np.outer(A[:, i], D[j]) for i, j in itertools.product(range(n), range(m))]
    rule = InverseFree(1, 0.3, 0.0, 0.0, ("dense",) * 2, [np.eye(n), np.eye(m)])
    for _ in range(500):
        each = [rule.curvature(G) for G in grads]
        rule.refresh([np.mean([H[axis] for H in each], axis=0) for axis in range(2)])
    U = rule.precondition(X)
    moments = np.mean([np.outer(G.ravel(), G.ravel()) for G in grads], axis=0)
    assert_close_report(U.ravel(), np.linalg.solve(moments, X.ravel()), 1e-8, "U at rest")  # 3e-13 in the spec
    L, R = A @ A.T, D.T @ D
    assert_close_report(moments, np.kron(L, R), 1e-13, "covariance")
    values, vectors = np.linalg.eigh(np.kron(L, R))
    root = (vectors * values**-0.5) @ vectors.T @ X.ravel()
    assert root @ U.ravel() / np.linalg.norm(root) / np.linalg.norm(U) < 0.99


def test_oracles_agree_that_axes_of_one_do_not_matter(rng: np.random.Generator) -> None:
    settings = {"batch_size": 8, "beta": 0.2, "momentum": 0.5, "damping": 0.1}
    long, short = inverse_free((4, 3, 1, 1), **settings), inverse_free((4, 3), **settings)
    for _ in range(3):
        G = rng.normal(size=(4, 3))
        assert np.array_equal(long.direction(G.reshape(4, 3, 1, 1)).reshape(4, 3), short.direction(G))


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_oracles_agree_with_the_rescaled_arithmetic(rng: np.random.Generator, dtype: type, rtol: float) -> None:
    """Section 2.3: Y and KᵀK from K/√d, U from K/s with s = max(1, √max|K|); the same numbers, kept near 1."""
    n, m, B, lam, beta = 24, 16, 8, 0.1, 0.2
    rule = InverseFree(B, beta, 0.0, lam, ("dense",) * 2, [4 * near_identity(rng, n), near_identity(rng, m)])
    G = 0.1 * rng.normal(size=(n, m))
    scaled = [(K / math.sqrt(len(K))).astype(dtype) for K in rule.K]
    Y = dtype(math.sqrt(B)) * (scaled[0].T @ G.astype(dtype) @ scaled[1])
    after = []
    for axis, (K, other) in enumerate(((scaled[0], scaled[1]), (scaled[1], scaled[0]))):
        d, rows = len(K), Y if axis == 0 else Y.T
        H = dtype(d) * (rows @ rows.T) + dtype(lam * d) * (other * other).sum() * (K.T @ K)
        h = (H - np.eye(d, dtype=dtype)) / 2
        shrink = dtype(beta) / max(1, np.linalg.norm(h))
        after.append(rule.K[axis].astype(dtype) @ (np.eye(d, dtype=dtype) - shrink * h))
    s = [max(1.0, math.sqrt(np.abs(K).max())) for K in after]
    C, K = (factor / dtype(x) for factor, x in zip(after, s, strict=True))
    U = C @ (C.T @ G.astype(dtype) @ K) @ K.T * dtype(s[0] ** 2 * s[1] ** 2)
    assert U.dtype == dtype
    assert_close_report(U, rule.direction(G), rtol, f"U in {dtype.__name__}")


# ---- refresh schedules -----------------------------------------------------------------------------------------------


def test_oracles_agree_on_the_refresh_schedules() -> None:
    chosen = [t for t in range(30) if rf.prototype(2)(t)]
    assert chosen == [*range(16), *range(17, 30, 2)]
    assert [t for t in range(30) if rf.prototype(1)(t)] == list(range(30))
    steps = list(itertools.takewhile(lambda t: t < 300_000, rf.prototype_steps(10)))
    gaps = np.diff(steps)
    assert next(t for t, gap in zip(steps, gaps, strict=False) if gap == 9) == 262_148  # an interval of 10 is far off
    assert gaps.max() == 9
    assert [t for t in range(13) if rf.every(3)(t)] == [0, 3, 6, 9, 12]


# ---- inverse-free K-FAC ----------------------------------------------------------------------------------------------


def test_oracles_agree_that_ikfac_is_kfac_to_second_order(rng: np.random.Generator) -> None:
    errors, betas = [], [1e-1, 1e-2, 1e-3]
    rows = rng.normal(size=(20, 5))
    A, K, lam = rows.T @ rows / 20, near_identity(rng, 5), 0.1
    for beta in betas:
        expected = rf.dense_ema(rf.gram_inverse(K), A, beta, lam)
        errors.append(relative_error(rf.gram_inverse(rf.ikfac_step(K, A, beta, lam)), expected))
    assert all(error <= 3 * beta**2 for error, beta in zip(errors, betas, strict=True))  # 1.1 β² in the spec
    slopes = np.diff(np.log10(errors)) / np.diff(np.log10(betas))
    assert abs(slopes[-1] - 2) <= 0.05

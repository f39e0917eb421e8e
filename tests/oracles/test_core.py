"""The textbook forms of MKOR, Eva and Muon against matrix inversion, dense solves, autograd and the SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.oracles import core as oracles
from tests.oracles.core import assert_close_report, drifting
from tests.oracles.twin_runs import batches, half_squares, twins

GAMMA, DAMPING = 0.95, 0.03


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


def test_oracles_agree_with_dense_solves(rng: np.random.Generator) -> None:
    G, a, b = rng.normal(size=(7, 5)), rng.normal(size=5), rng.normal(size=7)
    # condition number |a|²|b|²/λ, about 1e3: three digits of sixteen
    assert_close_report(oracles.eva(G, a, b, DAMPING), oracles.eva_dense(G, a, b, DAMPING), 1e-10, "Eva")
    dense = G @ np.linalg.inv(np.outer(a, a) + DAMPING * np.eye(5))
    assert_close_report(oracles.eva_f(G, a, DAMPING), dense, 1e-10, "Eva-f")


def test_oracles_agree_on_newton_schulz(rng: np.random.Generator) -> None:
    """The iteration keeps singular vectors and maps each singular value by one scalar polynomial."""
    for shape in ((12, 8), (8, 12)):
        G = rng.normal(size=shape)
        U, s, Vt = np.linalg.svd(G, full_matrices=False)
        s /= np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert_close_report(oracles.newton_schulz(G), (U * s) @ Vt, 1e-12, "NS₅ through the SVD")
        assert s.min() > 0.65 and s.max() < 1.25  # the band that the coefficients were chosen for

"""The numpy versions of Shampoo, Eva-s and MKOR-H's switch, held against the SVD, dense solves and definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracles import shampoo as sh
from tests.oracles.core import Array, assert_close_report, kl_scale
from tests.oracles.rootfree import along_all, block_slices, unfold
from tests.oracles.shampoo import EvaS, Shampoo, merge_dims, shampoo, switch_step

DAMPING = 0.03

# ---- Shampoo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (4, 6)])
def test_oracles_agree_that_the_first_step_is_polar(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    """The plain sum after one gradient, G = USVᵀ: exponent 1/4 gives UVᵀ, exponent 1/2 gives US⁻¹Vᵀ."""
    U, _, Vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.linspace(0.5, 2.0, min(shape))
    for exponent, values in ((None, np.ones_like(s)), (0.25, np.ones_like(s)), (0.5, 1 / s)):
        # ε/4s² of the values is left, and where a factor is singular its null directions have roots of ε^-e
        rule = Shampoo(decay=1.0, exponent=exponent, grafting="none", epsilon=1e-9)
        assert_close_report(rule.direction((U * s) @ Vt), (U * values) @ Vt, 1e-5, f"P, exponent {exponent}")


def test_oracles_agree_that_roots_are_roots(rng: np.random.Generator) -> None:
    """Order 3: the default exponent is 1/6, so the root's sixth power is the inverse of the corrected factor."""
    rule = Shampoo(decay=0.8, inverse_period=1, epsilon=1e-2, grafting="none")
    grads = [rng.normal(size=(3, 4, 2)) for _ in range(4)]
    for G in grads:
        P = rule.direction(G)
    weights = [0.2 * 0.8 ** (3 - i) for i in range(4)]  # they sum to 1 - 0.8⁴, the correction
    for n, root in enumerate(rule.roots):
        mean = sum(w * unfold(G, n) @ unfold(G, n).T for w, G in zip(weights, grads, strict=True)) / sum(weights)
        inverse = np.linalg.inv(mean + 1e-2 * np.eye(len(root)))
        assert_close_report(np.linalg.matrix_power(root, 6), inverse, 1e-11, f"root of axis {n}")
    assert_close_report(P, along_all(grads[-1], rule.roots), 1e-13, "P")


def test_oracles_agree_that_trace_scaling_removes_the_scale(rng: np.random.Generator) -> None:
    G = rng.normal(size=(5, 5))
    settings = {"decay": 0.9, "grafting": "none", "epsilon": 1e-3, "trace_scaling": True}
    one, ten = (Shampoo(**settings).direction(scale * G) for scale in (1.0, 10.0))  # type: ignore[arg-type]
    assert_close_report(ten, 10 * one, 1e-12, "P of the tenfold gradient")  # the factors are the same
    plain = Shampoo(**{**settings, "trace_scaling": False}).direction(10 * G)  # type: ignore[arg-type]
    assert np.linalg.norm(plain) < 0.5 * np.linalg.norm(ten)


def test_oracles_agree_on_the_lengths_of_grafts(rng: np.random.Generator) -> None:
    """SGD: |G|. Adam's first step: every entry 1. Muon: that of an orthonormal matrix times sqrt(max(1, n/m))."""
    for shape in ((8, 5), (5, 8)):
        G = rng.normal(size=shape)
        orthonormal = np.linalg.norm(np.linalg.qr(rng.normal(size=(max(shape), min(shape))))[0])
        lengths = {
            "sgd": math.sqrt((G**2).sum()),
            "adam": math.sqrt(40),  # up to 1e-8/|g|
            "muon": orthonormal * math.sqrt(max(1.0, shape[0] / shape[1])),
        }
        for grafting, length in lengths.items():
            P = Shampoo(grafting=grafting).direction(G)
            assert np.linalg.norm(P) == pytest.approx(length, rel=1e-6), grafting
            plain = Shampoo(grafting="none").direction(G)
            assert_close_report(P / np.linalg.norm(P), plain / np.linalg.norm(plain), 1e-12, "direction")


@pytest.mark.parametrize(
    ("shape", "threshold", "target", "merged"),
    [
        ((64, 3, 7, 7), 1024, 1, (64, 147)),
        ((512, 512, 3, 3), 1024, 1, (512, 512, 9)),
        ((512, 512, 3, 3), 8192, 1, (512, 4608)),
        ((6, 6), 1024, 1, (36,)),
        ((6, 6), 1024, 2, (6, 6)),
        ((8, 4, 3, 3), 1024, 2, (8, 36)),
        ((8, 1, 3, 1), 1024, 2, (8, 3)),
        ((1, 1), 1024, 2, (1,)),
    ],
)
def test_oracles_agree_on_merged_axes(
    shape: tuple[int, ...], threshold: int, target: int, merged: tuple[int, ...]
) -> None:
    assert merge_dims(shape, threshold, target) == merged


def test_oracles_agree_that_blocks_are_separate_tensors(rng: np.random.Generator) -> None:
    whole, G = shampoo((7, 4), max_dim=3), rng.normal(size=(7, 4))
    cuts = block_slices((7, 4), 3)
    sizes = [tuple(s.stop - s.start for s in block) for block in cuts]
    assert sizes == [(3, 3), (3, 1), (3, 3), (3, 1), (1, 3), (1, 1)]
    P = whole.direction(G)
    for block in cuts:
        assert np.array_equal(P[block], Shampoo().direction(G[block]))


# ---- Eva-s -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_oracles_agree_on_the_rank_one_root(rng: np.random.Generator, power: float) -> None:
    for length in (1.0, 1e-4, 0.0):
        v = length * rng.normal(size=6)
        dense = sh.matrix_power(np.outer(v, v) + DAMPING * np.eye(6), -power)
        assert_close_report(sh.rank_one_root(v, DAMPING, power), dense, 1e-10, f"|v| about {length}")  # 1e-14


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 2), (2, 3, 2, 3)])
@pytest.mark.parametrize("kv_scale", ["mean", "sum", "unit"])
def test_oracles_agree_that_eva_s_is_a_dense_solve(
    rng: np.random.Generator, shape: tuple[int, ...], kv_scale: str
) -> None:
    G = rng.normal(0.5, 1.0, size=shape)
    vectors = sh.mode_vectors(G, kv_scale)
    joint = sh.eva_s_joint(G, vectors, DAMPING)
    condition = math.prod(v @ v for v in vectors) / DAMPING  # up to 1e9 for the sums, which the dense solve feels
    rtol = max(1e-10, 1e-15 * condition)
    assert_close_report(joint, sh.eva_s_joint_dense(G, vectors, DAMPING), rtol, "joint")
    roots = [sh.matrix_power(np.outer(v, v) + DAMPING * np.eye(len(v)), -0.25) for v in vectors]
    dense = sh.kron_all(roots) @ G.ravel()
    assert_close_report(sh.eva_s_separable(G, vectors, DAMPING, 0.25).ravel(), dense, 1e-10, "separable")


def test_oracles_agree_on_the_vectors_of_a_matrix(rng: np.random.Generator) -> None:
    """r = G1/m and c = Gᵀ1/n; sums are those times m and n; unit ones have length √d."""
    G = rng.normal(0.5, 1.0, size=(6, 4))
    r, c = G.mean(1), G.mean(0)
    for kv_scale, expected in (("mean", (r, c)), ("sum", (4 * r, 6 * c))):
        for v, w in zip(sh.mode_vectors(G, kv_scale), expected, strict=True):
            assert_close_report(v, w, 1e-15, kv_scale)
    for v, w in zip(sh.mode_vectors(G, "unit"), (r, c), strict=True):
        assert v @ v == pytest.approx(len(v), rel=1e-14)
        assert v @ w == pytest.approx(np.linalg.norm(v) * np.linalg.norm(w), rel=1e-14)
    assert not any(v.any() for v in sh.mode_vectors(np.zeros((6, 4)), "unit"))


def pairs_of(rng: np.random.Generator, scale: float) -> list[tuple[Array, Array]]:
    grads = [scale * rng.normal(0.5, 1.0, size=shape) for shape in ((6, 4), (3, 4, 2))]
    return [(G, sh.eva_s_joint(G, sh.mode_vectors(G, "mean"), DAMPING)) for G in grads]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_oracles_agree_on_the_kl_clip(rng: np.random.Generator, scale: float) -> None:
    lr, kl_clip = 0.1, 1e-3
    pairs = pairs_of(rng, scale)
    nu = kl_scale(pairs, lr, kl_clip)
    change = lr**2 * nu**2 * sum((P * G).sum() for G, P in pairs)
    assert change <= kl_clip * (1 + 1e-12)
    if scale == 1.0:
        assert nu < 1 and change == pytest.approx(kl_clip, rel=1e-12)
    else:
        assert nu == 1.0


def test_oracles_agree_on_the_global_norm(rng: np.random.Generator) -> None:
    pairs = pairs_of(rng, 1.0)
    scales = sh.rescales(pairs, 0.1, "global", 1e-3)
    assert scales[0] == scales[1] != 1.0
    before = sum((G**2).sum() for G, _ in pairs)
    after = sum(((nu * P) ** 2).sum() for nu, (_, P) in zip(scales, pairs, strict=True))
    assert after == pytest.approx(before, rel=1e-13)
    each = sh.rescales(pairs, 0.1, "norm", 1e-3)
    for nu, (G, P) in zip(each, pairs, strict=True):
        assert np.linalg.norm(nu * P) == pytest.approx(np.linalg.norm(G), rel=1e-13)
    assert each[0] != each[1]


def test_oracles_agree_on_the_running_vectors(rng: np.random.Generator) -> None:
    """Period 2 after one warm-up step beside it: updates in steps 0, 1, 2, 4; ξ is the share of the new vector."""
    rule = EvaS(kv_new_weight=0.7, update_period=2, warmup_updates=2)
    grads = [rng.normal(0.5, 1.0, size=(6, 4)) for _ in range(6)]
    expected, share = grads[0].mean(1), 0.7
    for t, G in enumerate(grads):
        rule.directions([G], 0.1)
        if t in {1, 2, 4}:
            expected = (1 - share) * expected + share * G.mean(1)
        assert_close_report(rule.vectors[0][0], expected, 1e-15, f"r after step {t}")


# ---- MKOR-H ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate_decay", "horizon"), [(0.8, 5), (0.9, 10), (0.98, 50)])
@pytest.mark.parametrize("knee", [60, 100])
@pytest.mark.parametrize("period", [1, 5])
def test_oracles_agree_on_the_switch_after_a_knee(rate_decay: float, horizon: int, knee: int, period: int) -> None:
    """exp(-t/50), then flat. Two averages of one horizon lag behind each other: three horizons are enough."""
    losses = [math.exp(-min(t, knee) / 50) for t in range(500)]
    settings = {"rate_decay": rate_decay, "patience": 5, "min_steps": 10}
    step = switch_step(losses, period, **settings)
    assert step is not None and step % period == 0
    assert knee <= step <= knee + 5 * period + 3 * horizon
    steady = [1 - t / 1000 for t in range(500)]
    assert switch_step(steady, period, **settings) is None


def test_oracles_agree_on_rates_of_a_line() -> None:
    """A loss that falls by δ a step: R tends to δ as r does, so every fraction below 1 keeps the method on."""
    rule = sh.Switch(rate_decay=0.9)
    for t in range(400):
        rule.feed(t, 5 - 0.01 * t, True)
    assert rule.last == pytest.approx(5 - 0.01 * (399 - 9), rel=1e-10)  # the average lags by ρ/(1-ρ) = 9 steps
    assert rule.r.total == pytest.approx(0.01, rel=1e-10)


def test_oracles_agree_that_the_switch_waits(rng: np.random.Generator) -> None:
    """A rising loss falls behind from the start: patience, then the first step allowed; a good check resets it."""
    rising = [2 + t / 1000 for t in range(300)]
    assert switch_step(rising, 1, min_steps=0, patience=20) == 20  # the first step has no rate: checks 1 to 20
    assert switch_step(rising, 5, min_steps=0, patience=20) == 100
    assert switch_step(rising, 1, min_steps=150, patience=20) == 150
    rule = sh.Switch(rate_decay=0.5, patience=8, min_steps=0)
    for t in range(6):
        rule.feed(t, 2.0 + t / 10, True)
    assert rule.below == 5
    rule.feed(6, 0.5, True)
    assert rule.below == 0 and not rule.switched

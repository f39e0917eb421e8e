"""LAMB and its schedule against textbook float64, and the identities that tell the LAMB variants apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.optimizers.lamb import Lamb
from hf_soo.optimizers.schedules import poly_warmup
from tests.methods.twin_runs import assert_same_run, batches, run_library, twins
from tests.oracles import core as oracles
from tests.oracles import training as oracle_training
from tests.oracles.core import Array, assert_close_report

SHAPES = [(7, 5), (4,), (3, 2, 2), (6, 7)]
DECAYS = [0.01, 0.0, 0.01, 0.0]  # the last one is a matrix without decay: plain Adam
TINY = 1e-300  # decay that adds nothing to u, but is not 0: the tensor is adapted


def parameters(rng: np.random.Generator) -> list[Array]:
    return [rng.normal(size=shape) for shape in SHAPES]


def gradients(rng: np.random.Generator, steps: int, size: float = 1.0) -> list[list[Array]]:
    return [[size * rng.normal(size=shape) * 10 ** rng.uniform(-1, 1) for shape in SHAPES] for _ in range(steps)]


def run_lamb(
    start: list[Array], grads: list[list[Array]], decays: list[float], lr: float = 0.02, **options: Any
) -> list[nn.Parameter]:
    """The library's LAMB on given gradients, one group for each parameter."""
    params = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, decays, strict=True)]
    optimizer = Lamb(groups, lr=lr, **options)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.from_numpy(g.copy())
        optimizer.step()
    return params


def run_oracle(
    start: list[Array], grads: list[list[Array]], decays: list[float], lr: float = 0.02, **options: Any
) -> list[Array]:
    params, lamb = [p.copy() for p in start], oracle_training.Lamb(weight_decay=decays, **options)
    for step in grads:
        lamb.step(params, step, lr)
    return params


def assert_same(actual: list[Any], expected: list[Any], rtol: float) -> None:
    for i, (p, q) in enumerate(zip(actual, expected, strict=True)):
        assert_close_report(p, q, rtol, f"parameter {i} of shape {SHAPES[i]}")


def test_oracles_agree_with_torch(rng: np.random.Generator) -> None:
    """The simulated bases against torch's, and LAMB without its clip and ratio against Adam."""
    start, grads = parameters(rng), gradients(rng, 10)
    pairs = [
        (oracle_training.Sgd(0.9, 0.01), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01)),
        (oracle_training.AdamW(), lambda p: torch.optim.AdamW(p, lr=0.02)),
        (oracle_training.Lamb(0.0, max_grad_norm=1e9), lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-6)),
    ]
    for oracle, make in pairs:
        theirs = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
        ours, optimizer = [p.copy() for p in start], make(theirs)
        for step in grads:
            for p, g in zip(theirs, step, strict=True):
                p.grad = torch.from_numpy(g.copy())
            optimizer.step()
            oracle.step(ours, step, 0.02)
        assert_same(theirs, ours, 1e-13)  # ten steps of rounding


@pytest.mark.parametrize("max_grad_norm", [1.0, 30.0, 1e9])
def test_lamb_is_the_oracle(rng: np.random.Generator, max_grad_norm: float) -> None:
    """A clip that always acts, one that acts in some steps, one that never does."""
    start, grads = parameters(rng), gradients(rng, 30)
    norms = [math.sqrt(sum((g**2).sum() for g in step)) for step in grads]
    clipped = sum(norm > max_grad_norm for norm in norms)
    assert {1.0: clipped == 30, 30.0: 0 < clipped < 30, 1e9: clipped == 0}[max_grad_norm]
    expected = run_oracle(start, grads, DECAYS, max_grad_norm=max_grad_norm)
    assert_same(run_lamb(start, grads, DECAYS, max_grad_norm=max_grad_norm), expected, 1e-12)


def test_lamb_with_other_moments_is_the_oracle(rng: np.random.Generator) -> None:
    start, grads, options = parameters(rng), gradients(rng, 30), {"betas": (0.66, 0.996), "eps": 1e-3}
    expected = run_oracle(start, grads, DECAYS, **options)
    assert_same(run_lamb(start, grads, DECAYS, **options), expected, 1e-12)


def test_lamb_moves_adapted_tensors_by_lr_of_their_norm(rng: np.random.Generator) -> None:
    start = parameters(rng)
    params = run_lamb(start, gradients(rng, 1), DECAYS, lr=0.01)
    for old, new, decay in zip(start, params, DECAYS, strict=True):
        moved = np.linalg.norm(new.detach().numpy() - old) / np.linalg.norm(old)
        if decay:
            assert moved == pytest.approx(0.01, rel=1e-12)  # by construction; the difference costs two digits
        else:
            # a first Adam step is lr·sign(g), clipped gradients far above eps: lr·√d / |w|
            assert moved == pytest.approx(0.01 * math.sqrt(old.size) / np.linalg.norm(old), rel=1e-2)


def test_bias_correction_cancels_in_the_ratio(rng: np.random.Generator) -> None:
    """Without decay and eps, u is corrected by one factor, and the ratio divides it out."""
    start, grads = parameters(rng), gradients(rng, 20)
    options = {"eps": 0.0, "max_grad_norm": 1e9}
    uncorrected = run_oracle(start, grads, [TINY] * 4, corrected=False, **options)
    assert_same(run_lamb(start, grads, [TINY] * 4, **options), uncorrected, 1e-12)


@pytest.mark.parametrize("decay", [TINY, 0.01])
def test_gradient_scale_cancels_without_eps(rng: np.random.Generator, decay: float) -> None:
    start, grads = parameters(rng), gradients(rng, 20)
    large = [[1e3 * g for g in step] for step in grads]
    options = {"eps": 0.0, "max_grad_norm": 1e9}
    one, other = (run_lamb(start, g, [decay] * 4, **options) for g in (grads, large))
    assert_same(one, [p.detach() for p in other], 1e-12)  # 5e-16 in the spec


def test_weights_scale_without_decay_and_eps(rng: np.random.Generator) -> None:
    start, grads = parameters(rng), gradients(rng, 20)
    options = {"eps": 0.0, "max_grad_norm": 1e9}
    plain = run_lamb(start, grads, [TINY] * 4, **options)
    scaled = run_lamb([7.0 * p for p in start], grads, [TINY] * 4, **options)
    assert_same(scaled, [7.0 * p.detach() for p in plain], 1e-12)  # an identity: rounding alone


def test_no_ratio_without_weight_decay(rng: np.random.Generator) -> None:
    """Groups with decay 0 take Adam's step on the clipped gradient; with any decay they would not."""
    start, grads = parameters(rng), gradients(rng, 10)
    params = run_lamb(start, grads, [0.0] * 4)
    theirs = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
    adam = torch.optim.Adam(theirs, lr=0.02, eps=1e-6)
    for step in grads:
        for p, g in zip(theirs, step, strict=True):
            p.grad = torch.from_numpy(g.copy())
        nn.utils.clip_grad_norm_(theirs, 1.0)
        adam.step()
    assert_same(params, [p.detach() for p in theirs], 1e-5)  # torch's clip divides by the norm + 1e-6
    adapted = run_lamb(start, grads, [TINY] * 4)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(params, adapted, strict=True))


def test_clip_takes_one_norm_over_all_groups(rng: np.random.Generator) -> None:
    """A large gradient in one group makes the steps of all others those of a smaller gradient."""
    start = parameters(rng)
    (step,) = gradients(rng, 1)
    step[0] *= 1e4
    norm = math.sqrt(sum((g**2).sum() for g in step))
    options = {"eps": 1e-2}  # so that Adam's step depends on the gradient's size
    params = run_lamb(start, [step], DECAYS, max_grad_norm=2.0, **options)
    by_hand = run_oracle(start, [[g * (2.0 / norm) for g in step]], DECAYS, max_grad_norm=1e9, **options)
    assert_same(params, by_hand, 1e-13)
    alone = run_oracle(start, [step], DECAYS, max_grad_norm=1e9, **options)
    assert np.abs(alone[1] - by_hand[1]).max() > 1e-2


def test_ratio_is_one_where_a_norm_is_zero(rng: np.random.Generator) -> None:
    grads = gradients(rng, 1)
    zeros = [np.zeros(shape) for shape in SHAPES]
    options = {"max_grad_norm": 1e9}
    from_zero = run_lamb(zeros, grads, [0.01] * 4, **options)
    assert_same(from_zero, run_oracle(zeros, grads, [0.0] * 4, **options), 1e-15)  # Adam's step: 2e-16 in the spec
    start = parameters(rng)
    nothing = [[np.zeros(shape) for shape in SHAPES]]
    assert_same(run_lamb(start, nothing, [0.0] * 4), start, 0.0)  # u = 0
    assert_same(run_lamb(zeros, nothing, [0.01] * 4), zeros, 0.0)


def test_lamb_through_build_optimizer_trains_as_the_oracle() -> None:
    base = oracle_training.Lamb(weight_decay=[0.02, 0.0, 0.02, 0.0], max_grad_norm=0.3)
    assert_same_run(
        lambda net: hf_soo.build_optimizer("lamb", net, lr=0.05, weight_decay=0.02, max_grad_norm=0.3), None, base
    )


# ---- schedule --------------------------------------------------------------------------------------------------------


def rates(total: int, warmup: int, **options: Any) -> list[float]:
    """The learning rates that the steps of a run see."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    schedule, seen = poly_warmup(optimizer, warmup, total, **options), []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(("total", "warmup"), [(1563, 200), (100, 0), (50, 50), (7038, 2000)])
def test_poly_warmup_is_the_recipe(total: int, warmup: int) -> None:
    expected = [4e-3 * oracles.poly_warmup(step, total, warmup) for step in range(total)]
    assert_close_report(rates(total, warmup), expected, 1e-13, "learning rates")


def test_poly_warmup_degree() -> None:
    expected = [4e-3 * oracles.poly_warmup(step, 40, 10, degree=1.0) for step in range(40)]
    assert_close_report(rates(40, 10, degree=1.0), expected, 1e-13, "learning rates")


def test_poly_warmup_jumps_at_the_join() -> None:
    """BERT-Large phase 2: 200 of 1,563 steps; the rate falls from 199/200 of the peak to √(1 - 200/1563) = 0.934."""
    seen = rates(1563, 200)
    assert seen[0] == pytest.approx(4e-3 / 200, rel=1e-12)
    assert seen[198] == pytest.approx(4e-3 * 199 / 200, rel=1e-12)
    assert seen[199] == pytest.approx(4e-3 * math.sqrt(1 - 200 / 1563), rel=1e-12)
    assert seen[199] / 4e-3 == pytest.approx(0.934, abs=5e-4)
    assert seen[-1] == 0.0


def test_lamb_under_poly_warmup_trains_as_the_oracle() -> None:
    net, mlp = twins()
    data = batches(12)
    optimizer = hf_soo.build_optimizer("lamb", net, lr=0.05, weight_decay=0.01)
    schedule = poly_warmup(optimizer, 4, 12)
    base = oracle_training.Lamb(weight_decay=[0.01, 0.0, 0.01, 0.0])
    for step in range(12):
        lr = optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(0.05 * oracles.poly_warmup(step, 12, 4), rel=1e-13)
        run_library(net, optimizer, data[step : step + 1], [lr])
        oracle_training.simulate(mlp, data[step : step + 1], None, base, [lr])
        schedule.step()
    for p, q in zip(net.parameters(), mlp.parameters(), strict=True):
        assert_close_report(p, q, 1e-10, "parameter")  # as every ten-step run of these tests

"""LAMB against textbook float64, and the identities that tell the LAMB variants apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.engine import chunks
from hf_soo.optimizers.lamb import Lamb
from tests.optimizers.given import parameters, set_grads, two_groups
from tests.oracles import training as oracle_training
from tests.oracles.core import Array, assert_close_report
from tests.oracles.twin_runs import assert_same_run

SHAPES: list[tuple[int, ...]] = [(7, 5), (4,), (3, 2, 2), (6, 7), ()]
DECAYS = [0.01, 0.0, 0.01, 0.0, 0.0]  # a matrix without decay: plain Adam
TINY = 1e-300  # decay that adds nothing to u, but is not 0: the tensor is adapted


def arrays(rng: np.random.Generator) -> list[Array]:
    return [np.asarray(rng.normal(size=shape)) for shape in SHAPES]


def gradients(rng: np.random.Generator, steps: int) -> list[list[Array]]:
    return [[np.asarray(rng.normal(size=s) * 10 ** rng.uniform(-1, 1)) for s in SHAPES] for _ in range(steps)]


def run_lamb(
    start: list[Array], grads: list[list[Array]], decays: list[float], lr: float = 0.02, **options: Any
) -> list[nn.Parameter]:
    """The library's LAMB on given gradients, one group for each parameter; the first lies transposed in memory."""
    params = [nn.Parameter(torch.from_numpy(np.copy(p, order="F" if i == 0 else "C"))) for i, p in enumerate(start)]
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


@pytest.mark.parametrize("chunk", [1, 16, 100, 1 << 18])
@pytest.mark.parametrize("clip", [1.0, 30.0, None])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_lamb_is_the_oracle_however_tensors_are_cut(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, chunk: int, clip: float | None, always_adapt: bool
) -> None:
    """A clip that always acts, one that acts in some steps, none."""
    monkeypatch.setattr(chunks, "CPU_PIECE", chunk)
    start, grads = arrays(rng), gradients(rng, 30)
    norms = [math.sqrt(sum((g**2).sum() for g in step)) for step in grads]
    clipped = sum(norm > (clip or math.inf) for norm in norms)
    assert {1.0: clipped == 30, 30.0: 0 < clipped < 30, None: clipped == 0}[clip]
    decays = [decay or TINY for decay in DECAYS] if always_adapt else DECAYS
    expected = run_oracle(start, grads, decays, max_grad_norm=clip or 1e9)
    actual = run_lamb(start, grads, DECAYS, max_grad_norm=clip, always_adapt=always_adapt)
    assert_same(actual, expected, 1e-12)


def test_lamb_with_other_moments_is_the_oracle(rng: np.random.Generator) -> None:
    start, grads, options = arrays(rng), gradients(rng, 30), {"betas": (0.66, 0.996), "eps": 1e-3}
    expected = run_oracle(start, grads, DECAYS, **options)
    assert_same(run_lamb(start, grads, DECAYS, **options), expected, 1e-12)


def test_lamb_moves_adapted_tensors_by_lr_of_their_norm(rng: np.random.Generator) -> None:
    start = arrays(rng)
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
    start, grads = arrays(rng), gradients(rng, 20)
    options = {"eps": 0.0, "max_grad_norm": 1e9}
    uncorrected = run_oracle(start, grads, [TINY] * 5, corrected=False, **options)
    assert_same(run_lamb(start, grads, [TINY] * 5, **options), uncorrected, 1e-12)


@pytest.mark.parametrize("decay", [TINY, 0.01])
def test_gradient_scale_cancels_without_eps(rng: np.random.Generator, decay: float) -> None:
    start, grads = arrays(rng), gradients(rng, 20)
    large = [[np.asarray(1e3 * g) for g in step] for step in grads]
    options = {"eps": 0.0, "max_grad_norm": 1e9}
    one, other = (run_lamb(start, g, [decay] * 5, **options) for g in (grads, large))
    assert_same(one, [p.detach() for p in other], 1e-12)  # 5e-16 in the spec


def test_weights_scale_without_decay_and_eps(rng: np.random.Generator) -> None:
    start, grads = arrays(rng), gradients(rng, 20)
    options = {"eps": 0.0, "max_grad_norm": 1e9}
    plain = run_lamb(start, grads, [TINY] * 5, **options)
    scaled = run_lamb([7.0 * p for p in start], grads, [TINY] * 5, **options)
    assert_same(scaled, [7.0 * p.detach() for p in plain], 1e-12)  # an identity: rounding alone


def test_no_ratio_without_weight_decay(rng: np.random.Generator) -> None:
    """Groups with decay 0 take Adam's step on the clipped gradient; with any decay they would not."""
    start, grads = arrays(rng), gradients(rng, 10)
    params = run_lamb(start, grads, [0.0] * 5)
    theirs = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
    adam = torch.optim.Adam(theirs, lr=0.02, eps=1e-6)
    for step in grads:
        for p, g in zip(theirs, step, strict=True):
            p.grad = torch.from_numpy(g.copy())
        nn.utils.clip_grad_norm_(theirs, 1.0)
        adam.step()
    assert_same(params, [p.detach() for p in theirs], 1e-5)  # torch's clip divides by the norm + 1e-6
    adapted = run_lamb(start, grads, [TINY] * 5)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(params, adapted, strict=True))


def test_clip_takes_one_norm_over_all_groups(rng: np.random.Generator) -> None:
    """A large gradient in one group makes the steps of all others those of a smaller gradient."""
    start = arrays(rng)
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
    from_zero = run_lamb(zeros, grads, [0.01] * 5, **options)
    assert_same(from_zero, run_oracle(zeros, grads, [0.0] * 5, **options), 1e-15)  # Adam's step: 2e-16 in the spec
    start = arrays(rng)
    nothing = [[np.zeros(shape) for shape in SHAPES]]
    assert_same(run_lamb(start, nothing, [0.0] * 5), start, 0.0)  # u = 0
    assert_same(run_lamb(start, nothing, [0.0] * 5, always_adapt=True), start, 0.0)
    assert_same(run_lamb(zeros, nothing, [0.01] * 5), zeros, 0.0)


def test_lamb_through_build_optimizer_trains_as_the_oracle() -> None:
    base = oracle_training.Lamb(weight_decay=[0.02, 0.0, 0.02, 0.0], max_grad_norm=0.3)
    assert_same_run(
        lambda net: hf_soo.build_optimizer("lamb", net, lr=0.05, weight_decay=0.02, max_grad_norm=0.3), None, base
    )


@pytest.mark.parametrize("chunk", [16, 1 << 18])
def test_lamb_keeps_fp32_moments_for_bf16_parameters(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(chunks, "CPU_PIECE", chunk)
    low = parameters(torch.bfloat16)
    high = [nn.Parameter(p.detach().float()) for p in low]
    optimizers = [Lamb(two_groups(params), lr=0.05) for params in (low, high)]
    for params in (low, high):
        set_grads(low, 0)
        for target, source in zip(params, low, strict=True):
            assert source.grad is not None
            target.grad = source.grad.to(target.dtype)
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(low, high, strict=True):
        state = optimizers[0].state[a]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], optimizers[1].state[b]["exp_avg"])
        assert torch.equal(a, b.to(torch.bfloat16))  # one rounding, at the very end


def test_lamb_skips_parameters_without_gradient_and_refuses_sparse_ones() -> None:
    params = parameters()
    before = params[0].detach().clone()
    optimizer = Lamb(params, lr=0.1)
    set_grads(params, 0)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        Lamb(embedding.parameters()).step()
    assert Lamb(parameters()).step(lambda: 3.5) == 3.5  # no gradients at all


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0 is not allowed; give a number in \(0, inf\) or None"),
    ],
)
def test_lamb_names_the_bad_value(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Lamb(parameters(), **bad)
    if "max_grad_norm" not in bad:
        with pytest.raises(ValueError, match=match):
            Lamb([{"params": parameters(), **bad}])

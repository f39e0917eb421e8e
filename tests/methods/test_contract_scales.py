"""Finite in, finite out: gradients of any size, by the factor and in the loss, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_soo import PreconditionedOptimizer
from hf_soo.engine.chunks import root, squares, tensor_norms, total_norm
from hf_soo.engine.fisher import sampled_cross_entropy
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms, in_range, norms, run_whole, unit_of
from hf_soo.engine.rescale import KLClip, MatchNorm, make_rescale
from hf_soo.optimizers import Lamb
from hf_soo.optimizers.polar import polar_factor, schedule
from hf_soo.preconditioners.eva import eva_f_product, eva_product
from hf_soo.preconditioners.mkor import lowrank_product
from tests.methods.toy import CASES, batches, build, every_case, loss_of, second_order, toy, train, weights

SCALES = (1e-30, 1e-22, 1e-12, 1e12, 1e20, 1e30)

# Their P is of the directions in which a factor is nothing but rounding, once the damping is nothing beside the factor.
WITHOUT_DAMPING = {"kaisa", "kfac-absolute", "eva_s-separable", "rf_rmsprop", *(c for c in CASES if "shampoo" in c)}


def direction(
    case: str, dtype: torch.dtype, scale: float, of_loss: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], PreconditionedOptimizer]:
    """G and P of every parameter in float64, in the first step, and the optimizer."""
    model = toy(dtype)
    optimizer = build(case, model)
    (batch,) = batches(1)
    if optimizer.wants_sampled_loss:
        sampled = sampled_cross_entropy(model(batch[0]), batch[1])
        optimizer.backward_sampled(sampled * scale if of_loss else sampled)
    loss = loss_of(model, batch)
    optimizer.report_loss(loss)
    (loss * scale if of_loss else loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values() if not of_loss else ():
        grad.mul_(scale)
    before = {name: grad.double().clone() for name, grad in grads.items()}
    optimizer.step_around(lambda: None)
    return before, {name: grad.double().clone() for name, grad in grads.items()}, optimizer


@pytest.mark.parametrize("of_loss", [False, True], ids=["gradient", "loss"])
@second_order
def test_a_gradient_of_any_size_has_its_direction(case: str, of_loss: bool) -> None:
    usual = direction(case, torch.float32, 1.0, of_loss)[2].health()
    for scale in SCALES:
        G, P, optimizer = direction(case, torch.float32, scale, of_loss)
        assert all(each.isfinite().all() for each in P.values()), scale
        health = optimizer.health()
        assert (health["fallback_layers"], health["noise_layers"]) == (usual["fallback_layers"], usual["noise_layers"])
        alone = optimizer.halves is None and optimizer.wrappers is None  # and P is what the base is given
        if isinstance(optimizer.preconditioner.rescale, MatchNorm) and alone:
            for layer in optimizer.layers:
                names = [name for name in G if name.rpartition(".")[0] == layer.name]
                lengths = [torch.stack([each[name].norm() for name in names]).norm() for each in (P, G) if names]
                assert not names or lengths[0] / lengths[1] == pytest.approx(1, abs=1e-5), (scale, names)
        if case not in WITHOUT_DAMPING and optimizer.halves is None:
            exact = direction(case, torch.float64, scale, of_loss)[1]
            for name, expected in exact.items():
                error = (P[name] - expected).norm() / expected.norm()
                assert error < 1e-3, (scale, name, float(error))  # fp32; Eva takes away all but a thousandth of G


@every_case
def test_one_gradient_of_any_size_is_survived(case: str) -> None:
    for scale in (1e-30, 1e20, 1e30):
        model = toy(torch.float32)
        optimizer = build(
            case, model, lr=1e-3 if scale < 1 else 1e-37
        )  # where P is as long as G, the weights move by it
        first, outlier, *rest = batches(4)
        train(model, optimizer, [first])
        optimizer.zero_grad()
        loss = loss_of(model, outlier)
        if optimizer.wants_sampled_loss:
            optimizer.backward_sampled(sampled_cross_entropy(model(outlier[0]), outlier[1]))
        optimizer.report_loss(loss)
        (loss * scale).backward()
        optimizer.step()
        train(model, optimizer, rest)
        assert weights(model).isfinite().all(), scale
        for state in optimizer.stages.states.values():
            assert all(t.isfinite().all() for factor in state.values() for t in factor.values()), scale


def product(name: str, grad: Joint) -> RowSums[TransformNorms]:
    rng = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1, d, generator=rng) for d in (6, 4))
    if name == "lowrank":
        return lowrank_product(grad, 0.3 * b[:, None], 0.3 * a[:, None])
    if name == "dense":
        return grad.multiply_(b[:, :, None] * b[:, None], a[:, :, None] * a[:, None])
    return eva_product(grad, a, b, 0.1) if name == "eva" else eva_f_product(grad, a, 0.1)


@given(power=st.integers(-110, 100), name=st.sampled_from(["lowrank", "dense", "eva", "eva_f"]), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_a_power_of_two_changes_no_bit(power: int, name: str, seed: int) -> None:
    """The unit of the squares is exact: 2ᵏG has 2ᵏP, to the bit, whichever unit it has."""
    ends = []
    for k in (0, power):
        rng = torch.Generator().manual_seed(seed)
        W, c = (torch.randn(shape, generator=rng) * 2.0**k for shape in ((1, 4, 5), (1, 4)))
        grad = Joint(W, c)
        run_whole(grad.measure_())
        moved = run_whole(product(name, grad))
        moved.unit = grad.unit
        scales = [rule.scales([moved], [torch.ones(1)])[0] for rule in (MatchNorm(), make_rescale("global", None))]
        ends.append([t / 2.0**k for t in grad.tensors()] + scales + [moved.cosine()])
        nu = KLClip(1e-3).scales([moved], [torch.ones(1)])[0]
        length = torch.linalg.vector_norm(nu * moved.inner.sqrt() * (1.0 if grad.unit is None else grad.unit))
        assert length <= 1e-3**0.5 * (1 + 1e-6)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@given(power=st.integers(-140, 120), shape=st.sampled_from([(1, 3, 4), (2, 5), (3,), (2, 1, 1, 7), (2, 0), (1, 4096)]))
@settings(max_examples=100, deadline=None)
def test_norms_of_all_that_is_finite(power: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2.0**power
    expected = x.double().square().flatten(1).sum(1).sqrt() if x.ndim > 1 else x.double().abs()
    torch.testing.assert_close(norms(x).double(), expected, rtol=1e-5, atol=2.0**-148)
    unit = unit_of(norms(x))
    assert ((norms(x) / unit).square().isfinite()).all() and (torch.frexp(unit).mantissa == 0.5).all()
    if x.ndim == 2:
        scaled, by = in_range(x)
        by = by if isinstance(by, float) else by[:, None]
        torch.testing.assert_close(scaled * by, x, rtol=0, atol=2.0**-148)


def test_what_is_not_finite_stays_so() -> None:
    for bad in (float("inf"), float("nan")):
        x = torch.tensor([[1.0, bad], [2.0, 0.0]])
        assert not norms(x)[0].isfinite() and norms(x)[1] == 2
        assert unit_of(norms(x)).tolist() == [1, 1]


@pytest.mark.parametrize("scale", [1e-3, 1e20, 1e30])
def test_the_polar_factor_of_a_matrix_of_any_size(scale: float) -> None:
    M = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    coefficients = schedule("polar_express", 8, torch.float32)
    torch.testing.assert_close(
        polar_factor(M * scale, coefficients, torch.float32),
        polar_factor(M, coefficients, torch.float32),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_lamb_clips_a_gradient_of_any_size(scale: float) -> None:
    ends = []
    for size in (1e6, scale):
        params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, size * (i + 1))
        Lamb(params, lr=0.1).step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


@given(power=st.integers(-100, 110), parts=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_norm_of_what_lies_on_several_ranks(power: int, parts: int) -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2.0**power
    each = [squares(torch.stack(tensor_norms(list(part.split(2))))) for part in x.tensor_split(parts)]
    expected = x.double().norm()
    if power > -40:  # a clip never asks how small it is
        torch.testing.assert_close(root(torch.stack(each).sum(0)).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(total_norm(x.abs()).double(), expected, rtol=1e-6, atol=0)

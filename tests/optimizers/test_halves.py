"""A method on the base's momentum or update, against textbook float64; what is refused; a state that all share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from tests.oracles import directions as oracle
from tests.oracles.core import assert_close_report
from tests.oracles.training import Mkor
from tests.oracles.twin_runs import batches, half_squares, twins

MKOR = {"update_period": 3, "warmup_updates": 2, "factor_decay": 0.9}
STEPS = 8
EXACT = {"ns_dtype": "float32"}  # of float64 parameters: float64


def _small_betas(place: str) -> oracle.Adam:
    return oracle.Adam(place, betas=(0.5, 0.9), eps=1e-3)


def _muon(place: str, **more: Any) -> oracle.MuonAndRest:
    return oracle.MuonAndRest(place, 0.02, oracle.Adam(place), **more)


# base, its arguments, weight decay, the oracle of a place
BASES: dict[str, tuple[str, dict[str, Any], float, Any]] = {
    "sgd": ("sgd", {}, 0.1, lambda place: oracle.Sgd(weight_decay=0.1)),
    "sgd-nesterov": ("sgd", {"nesterov": True, "momentum": 0.8}, 0.0, lambda place: oracle.Sgd(0.8, nesterov=True)),
    "adamw": ("adamw", {}, 0.1, lambda place: oracle.Adam(place, weight_decay=0.1)),
    "adamw-betas": ("adamw", {"betas": (0.5, 0.9), "eps": 1e-3}, 0.0, _small_betas),
    "lamb": ("lamb", {}, 0.1, lambda place: oracle.Adam(place, lamb=True, eps=1e-6, weight_decay=0.1)),
    "muon": ("muon", {"rest_lr": 0.02, **EXACT}, 0.0, _muon),
    "muon-heavy-ball": (
        "muon", {"rest_lr": 0.02, "nesterov": False, "momentum": 0.7, **EXACT}, 0.0,
        lambda place: _muon(place, momentum=0.7, nesterov=False),
    ),
}  # fmt: skip
CELLS = [
    (name, place, rescale)
    for name in BASES
    for place in ("momentum", "update", "numerator")
    for rescale in ("norm", "none")
    if not (place == "update" and name.startswith("sgd"))
]


def build(net: nn.Module, name: str, place: str, **more: Any) -> hf_soo.PreconditionedOptimizer:
    base, args, decay, _ = BASES[name]
    groups = {"weight_decay": decay, "base": base, "base_args": args}
    return hf_soo.build_optimizer("mkor", net, lr=0.02, apply_to=place, **groups, **MKOR, **more)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    for x, t in data:
        optimizer.zero_grad()
        half_squares(net, x, t).backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "place", "rescale"), CELLS)
def test_a_method_on_a_direction_is_the_oracle(name: str, place: str, rescale: str) -> None:
    net, mlp = twins()
    for parameter in net.parameters():  # biases take decay too, in one group
        parameter.requires_grad_()
    data = batches(STEPS)
    optimizer = build(net, name, place, rescale=rescale)
    for group in optimizer.param_groups:
        group["weight_decay"] = BASES[name][2]
    train(net, optimizer, data)
    oracle.simulate(mlp, data, Mkor(MKOR | {"rescale": rescale}), BASES[name][3](place), [0.02] * STEPS)
    for i, (p, q) in enumerate(zip(net.parameters(), mlp.parameters(), strict=True)):
        # Jordan's iteration does not converge: it makes 1e-12 of a rounding in each step
        assert_close_report(p, q, 1e-9, f"{name} on {place}, parameter {i}")


def test_the_place_matters() -> None:
    """On the update Adam's direction is no longer the gradient's, so that three runs are three."""
    ends = []
    for place in ("gradient", "momentum", "update"):
        net, _ = twins()
        train(net, build(net, "adamw", place), batches(STEPS))
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (ends[one] - ends[other]).norm() > 1e-3 * ends[0].norm(), (one, other)


@pytest.mark.parametrize("name", BASES)
def test_a_method_that_changes_nothing_leaves_the_base_as_it_is(name: str) -> None:
    """Halves one after the other are the base's whole step: MKOR without a side is the identity."""
    base, args, decay, _ = BASES[name]
    for place in ("momentum", "update") if base != "sgd" else ("momentum",):
        (net, _), (other, _) = twins(), twins()
        whole = hf_soo.build_optimizer(base, other, lr=0.02, weight_decay=decay, **args)
        train(net, build(net, name, place, sides="none"), batches(STEPS))
        train(other, whole, batches(STEPS))
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert_close_report(p, q.detach().numpy(), 1e-11, f"{name} on {place}")


def test_a_run_may_go_on_at_another_place(caplog: pytest.LogCaptureFixture) -> None:
    (net, _), (other, _) = twins(), twins(seed=3)
    data = batches(STEPS)
    one, two = build(net, "adamw", "momentum"), build(other, "adamw", "gradient")
    train(net, one, data[:4])
    other.load_state_dict(net.state_dict())
    two.load_state_dict(one.state_dict())
    assert "apply_to" in caplog.text and "('momentum', 'gradient')" in caplog.text
    train(other, two, data[4:])
    assert two.steps == STEPS and all(math.isfinite(float(p.detach().sum())) for p in other.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"apply_to": "weights"}, ValueError, "apply_to='weights' is not allowed; give one of 'gradient'"),
        ({"base": "rmsprop", "apply_to": "momentum"}, NotImplementedError, "base RMSprop, whose momentum"),
        ({"base": "rmsprop", "apply_to": "numerator"}, NotImplementedError, "base RMSprop, whose numerator"),
        ({"base": "torch.optim:Adam", "apply_to": "update"}, NotImplementedError, "base Adam, whose update"),
        ({"base": "sgd", "apply_to": "update"}, ValueError, "whose update is its momentum"),
        ({"base": "sgd", "base_args": {"momentum": 0.0}, "apply_to": "momentum"}, ValueError, "change nothing"),
        ({"base": "adamw", "base_args": {"amsgrad": True}, "apply_to": "momentum"}, NotImplementedError, "amsgrad"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    net, _ = twins()
    with pytest.raises(error, match=match):
        hf_soo.build_optimizer("mkor", net, lr=0.1, **settings)


def test_a_base_alone_has_no_place() -> None:
    net, _ = twins()
    with pytest.raises(ValueError, match="apply_to"):
        hf_soo.build_optimizer("adamw", net, lr=0.1, apply_to="momentum")


def test_a_late_gradient_and_none_at_all() -> None:
    """A parameter without a gradient stays where it is, and begins when its first one comes."""
    net, _ = twins()
    optimizer = build(net, "lamb", "momentum")
    x, t = batches(1)[0]
    before = net[2].weight.detach().clone()
    optimizer.zero_grad()
    net[0](torch.from_numpy(x)).square().mean().backward()
    optimizer.step()
    assert torch.equal(net[2].weight, before)
    train(net, optimizer, [(x, t)])
    assert not torch.equal(net[2].weight, before)
    assert float(optimizer.state[net[2].weight]["step"]) == 1 and np.isfinite(net[2].weight.detach().numpy()).all()

"""``build_optimizer(params=...)``: groups of one's own, with their rates and decays, move what is in them alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hf_soo
from hf_soo.registry import METHODS

MODEL = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
X = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COUNT = len(list(MODEL.parameters()))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def fresh() -> tuple[nn.Module, list[nn.Parameter]]:
    model = copy.deepcopy(MODEL)
    return model, list(model.parameters())


rates = st.floats(1e-4, 0.1)
cuts = st.lists(
    st.tuples(rates, st.floats(0, 0.1), st.sets(st.integers(0, COUNT - 1), min_size=1)), min_size=1, max_size=4
)


def disjoint(cut: Any) -> list[tuple[float, float, list[int]]]:
    """The groups without what an earlier one has."""
    seen: set[int] = set()
    groups = []
    for rate, decay, places in cut:
        groups.append((rate, decay, sorted(places - seen)))
        seen |= places
    return [group for group in groups if group[2]]


@settings(max_examples=40, deadline=None)
@given(cut=cuts)
def test_a_base_alone_is_torchs_over_the_same_groups(cut: Any) -> None:
    def run(ours: bool) -> list[torch.Tensor]:
        model, parameters = fresh()
        groups = [
            {"params": [parameters[i] for i in places], "lr": rate, "weight_decay": decay}
            for rate, decay, places in disjoint(cut)
        ]
        if ours:
            return stepped(model, hf_soo.build_optimizer("adamw", model, lr=1.0, params=groups))
        return stepped(model, torch.optim.AdamW(groups, lr=1.0, fused=True))

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@settings(max_examples=40, deadline=None)
@given(cut=cuts, name=st.sampled_from(["mkor", "eva", "kfac_expand", "shampoo", "eva_s"]))
def test_each_group_has_its_rate_and_the_rest_is_left_alone(cut: Any, name: str) -> None:
    """A step over SGD without momentum is -rate (P + decay W), and P does not depend on the rates of its group."""
    options: dict[str, Any] = {"base": "torch.optim:SGD"} | (
        {} if name in {"shampoo"} else {"rescale": "norm"} if name != "mkor" else {}
    )
    model, parameters = fresh()
    whole, _ = fresh()
    groups = disjoint(cut)
    linear = {0, 4, 6}  # where the weights of Linear layers are
    if not linear & {i for _, _, places in groups for i in places}:
        groups.append((0.01, 0.0, [6]))
    given_ = [
        {"params": [parameters[i] for i in places], "lr": rate, "weight_decay": decay} for rate, decay, places in groups
    ]
    after = stepped(model, hf_soo.build_optimizer(name, model, lr=1.0, params=given_, **options), 1)
    unit = stepped(whole, hf_soo.build_optimizer(name, whole, lr=1.0, weight_decay=0.0, **options), 1)
    of = {i: (rate, decay) for rate, decay, places in groups for i in places}
    for i, (start, now, moved) in enumerate(zip(MODEL.parameters(), after, unit, strict=True)):
        if i not in of:
            assert torch.equal(now, start)
        elif partners(i) <= of.keys():  # a layer of which one part is left out is another layer
            rate, decay = of[i]
            assert torch.allclose(now, start - rate * (start - moved + decay * start), rtol=1e-9, atol=1e-12)


def partners(i: int) -> set[int]:
    return {i - i % 2, i - i % 2 + 1}


def test_the_default_groups_given_by_hand_change_nothing() -> None:
    for name in METHODS:
        options = {"batch_size": 16} if name in {"if_shampoo", "rf_rmsprop"} else {}
        results = []
        for own in (False, True):
            model, parameters = fresh()
            decayed = [p for p in parameters if p.dim() == 2]
            groups = [
                {"params": iter(decayed)},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ]
            optimizer = hf_soo.build_optimizer(
                name, model, lr=1e-3, weight_decay=0.1, params=groups if own else None, **options
            )
            if name == "mkor_h":
                optimizer.preconditioner.watches_loss = False
            results.append(stepped(model, optimizer))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def test_forms_that_torch_takes() -> None:
    model, parameters = fresh()
    for params in (
        model.parameters(),
        parameters[:4],
        [{"params": parameters[0]}],
        [{"params": parameters[:2]}, {"params": []}],
    ):
        optimizer = hf_soo.build_optimizer("mkor", model, lr=0.1, weight_decay=0.3, params=params)
        assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == 0.3
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.1, params=[{"params": parameters[:2], "name": "first"}])
    assert optimizer.param_groups[0]["name"] == "first" and [layer.name for layer in optimizer.layers] == ["0"]
    other = nn.Parameter(torch.zeros(2))
    optimizer = hf_soo.build_optimizer("eva", model, lr=0.1, params=[*parameters, other])
    assert optimizer.routing()["(unnamed)"] == "SGD"


REFUSED: list[tuple[Any, str]] = [
    ([{"parameters": []}], "is no parameter group; give dictionaries with 'params'"),
    ([{"params": [1.0]}], "1.0 is no parameter"),
    (list(MODEL.named_parameters()), "is no parameter; leave out names"),
    ([{"params": [MODEL[0].weight], "lr": -1.0}], "lr=-1.0 is not allowed"),
    ([{"params": [MODEL[0].weight], "lr": float("nan")}], "lr=nan is not allowed"),
    ([{"params": [MODEL[0].weight], "weight_decay": float("inf")}], "weight_decay=inf is not allowed"),
    ([{"params": [MODEL[0].weight]}, {"params": [MODEL[0].weight]}], "more than one parameter group"),
    ([], "no trainable parameter"),
    ([MODEL[2].weight], "no layer selected.*in no parameter group"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_groups_that_are_refused(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_soo.build_optimizer("mkor", MODEL, lr=0.1, params=params)

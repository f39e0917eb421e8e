"""Every field of every method's config changes the run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.registry import METHODS, takes_batch_size
from tests.methods.toy import OTHER_VALUES, batches, toy, train, weights

FACTORIZING = ("kfac_expand", "kfac_reduce", "kaisa", "foof", "newton_muon")
WITHOUT_EFFECT = {
    # name, field -> why it must not change the run
    **{(name, "grad_workers"): "it moves work between ranks: tests/engine/test_placement.py" for name in FACTORIZING},
    **{
        (name, "inverse"): "with one side the split and the exact damping are one: only rounding differs"
        for name in ("foof", "newton_muon")
    },
}


FIELDS = [(n, f.name) for n, m in METHODS.items() if m.config for f in dataclasses.fields(m.config)]


def final_weights(name: str, settings: dict[str, object]) -> torch.Tensor:
    model, data = toy(), batches(34 if name == "newton_muon" else 25)  # its periods are 32
    for _, labels in data:
        labels[:, -1] = -100  # rows without a gradient
    torch.manual_seed(0)  # for labels drawn from the model
    train(model, hf_soo.build_optimizer(name, model, lr=1e-2, **settings), data)  # type: ignore[arg-type]
    return weights(model)


def final_kernels(name: str, settings: dict[str, object]) -> torch.Tensor:
    """For settings that act on convolutions alone: the toy has none."""
    model = nn.Conv2d(3, 4, 3).double()
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-2, **settings)  # type: ignore[arg-type]
    for _ in range(5):
        optimizer.zero_grad()
        model(
            torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ).square().sum().backward()
        optimizer.step()
    return weights(model)


def final_scores(name: str, settings: dict[str, object]) -> torch.Tensor:
    """For settings that act on attention's queries alone: the toy has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    model.add_module("query", nn.Linear(5, 4).double())
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-2, **settings)  # type: ignore[arg-type]
    inputs = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()
    return weights(model)


ELSEWHERE = {"merge_kernels": final_kernels, "queries_and_keys": final_scores}


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_setting_changes_the_run(name: str, field: str) -> None:
    if (name, field) in WITHOUT_EFFECT:
        value = {"grad_workers": 1, "inverse": "eigen"}[field]
        base = {"base": "sgd"}
        same = relative_change(final_weights(name, base), final_weights(name, {**base, field: value}))
        assert same < 1e-9, f"{name}: {field}={value!r} changes the run by {same}"
        return
    value, others = OTHER_VALUES[name][field]
    others = {"batch_size": 12, **others} if takes_batch_size(name) else others
    baseline = {k: v for k, v in others.items() if not (field == "representation" and k == "history")}
    if field == "representation":  # equal while history covers the run, so the low-rank side is given a short one
        changed = relative_change(final_weights(name, {"history": 3}), final_weights(name, {field: value}))
    else:
        run = ELSEWHERE.get(field, final_weights)
        torch.manual_seed(0)
        before = run(name, baseline)
        torch.manual_seed(0)
        changed = relative_change(before, run(name, {**baseline, field: value}))
    assert changed > 1e-9, f"{name}: {field}={value!r} has no effect"


def relative_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()

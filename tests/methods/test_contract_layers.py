"""What every optimizer promises of odd layers: unused, frozen, tied, hooked, wrapped, with one output; convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.engine.selection import select_all_parameters
from hf_soo.registry import METHODS
from tests.methods.toy import (
    MATRICES_ONLY,
    batches,
    build,
    every_case,
    learns_from_gradients,
    second_order,
    tolerance,
    toy,
    train,
    weights,
)  # fmt: skip
from tests.oracles.core import assert_close_report


@second_order
def test_unused_frozen_tied_layers(case: str) -> None:
    model = toy()
    before = copy.deepcopy(model.state_dict())
    optimizer = build(case, model)
    losses = train(model, optimizer, batches(1) * 24)
    after = model.state_dict()
    assert losses[-1] < losses[0]
    for name in ("unused.weight", "frozen.weight"):
        assert torch.equal(before[name], after[name]), name
    routing = optimizer.routing()
    assert routing.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    select, vectors = METHODS[optimizer.name].select, optimizer.name not in MATRICES_ONLY
    for name in ("twice.weight", "no_bias.weight", "hidden.weight"):
        assert routing[name].startswith(optimizer.name), (name, routing[name])
    for name in ("twice.bias", "hidden.bias"):
        assert routing[name].startswith(optimizer.name) if vectors else "axes" in routing[name], (name, routing[name])
    assert routing["norm.weight"].startswith(optimizer.name) == (vectors and learns_from_gradients(case))
    assert routing["embedding.weight"].startswith(optimizer.name) == (select is select_all_parameters)
    assert select is select_all_parameters or "embedding" in routing["embedding.weight"]
    rows, side = optimizer.diagnostics(), f"{optimizer.preconditioner.side_names[0]}_side"
    suffix = ".weight" if learns_from_gradients(case) else ""  # a layer is known by its module, a parameter by itself
    # a layer that is never called has a hook that saw no rows; a parameter only lacks a gradient
    assert rows["unused" + suffix].get(side) == ("no rows" if optimizer.preconditioner.recorder.hooks else None)
    assert "cos" not in rows["unused" + suffix]
    for name in ("twice", "no_bias", "hidden"):
        row = rows[name + suffix]
        assert row.get(side) == ("updated" if optimizer.preconditioner.updates_at(0) else None)
        assert 0 < float(row["cos"]) < 0.99999, row
    unused = [layer.name for layer in optimizer.layers if layer.name.startswith("unused")]
    assert optimizer.health()["fallback_layers"] == len(unused) > 0


@every_case
def test_hooks_can_be_removed(case: str) -> None:
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, batches(3))
    optimizer.remove_hooks()
    assert not any(module._forward_hooks for module in model.modules())
    train(model, optimizer, batches(2))
    assert weights(model).isfinite().all() and not optimizer.stages.capture.buffers


def test_wrapped_models() -> None:
    with pytest.raises(NotImplementedError, match="DataParallel"):
        hf_soo.build_optimizer("mkor", nn.DataParallel(toy()), lr=1e-2)
    with pytest.raises(NotImplementedError, match="already compiled"):
        hf_soo.build_optimizer("mkor", torch.compile(toy(), backend="eager"), lr=1e-2)  # type: ignore[arg-type]


def test_fewer_rows_than_groups() -> None:
    """rank=4 with two rows: two groups are empty and add nothing."""
    few, many = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    many.load_state_dict(few.state_dict())
    for model, rank in ((few, 4), (many, 2)):
        optimizer = hf_soo.build_optimizer(
            "mkor", model, lr=1e-2, base="sgd", rank=rank, weight_decay=0.0, kv_target=float(rank)
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 4, dtype=torch.float64, generator=generator)).square().sum().backward()
            optimizer.step()
        assert optimizer.diagnostics()[""]["input_side"] == "updated"
    # the target undoes the weight 1/rank, so the two groups that have a row each act alike
    assert_close_report(few.weight, many.weight, 1e-12, "weights")


def test_training_in_eval_mode_is_warned_of_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model = toy().eval()
    train(model, build("mkor", model), batches(1))
    assert "no rows" in caplog.text and "hidden" in caplog.text
    assert "no statistics" in build_and_step(model)["hidden.weight"]


def build_and_step(model: nn.Module) -> dict[str, str]:
    optimizer = build("mkor", model)
    train(model, optimizer, batches(1))
    return optimizer.routing()


def test_a_penalty_with_create_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        out = model(x).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        (out + slope.square().sum()).backward()
        optimizer.step()
    assert not any(t.requires_grad for b in optimizer.stages.capture.buffers.values() for t in b)


@pytest.mark.parametrize("name", ["mkor", "mkor_h"])
def test_a_layer_with_one_output_or_input_is_the_bases(name: str) -> None:
    """A regression head learns the labels' mean along the mean input, which MKOR would damp."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    optimizer = hf_soo.build_optimizer(name, model, lr=0.1, base="sgd", weight_decay=0.0)
    before = model[4].weight.detach().clone()
    loss = (model(torch.randn(8, 1, dtype=torch.float64)) - 2.6).square().mean()
    loss.backward()
    gradient = model[4].weight.grad.clone()
    optimizer.report_loss(loss)
    optimizer.step()
    torch.testing.assert_close(model[4].weight.detach(), before - 0.1 * gradient, rtol=0, atol=1e-15)
    rules = optimizer.routing()
    assert rules["2.weight"] == f"{name} -> SGD"
    assert rules["0.weight"] == "SGD: one output or input [4, 1]" and rules["4.weight"].endswith("[1, 6]")
    with pytest.raises(ValueError, match=r"no layer selected: .*one output or input \[1, 6\]"):
        hf_soo.build_optimizer(name, nn.Linear(6, 1), lr=0.1)


CONVOLUTIONS = [
    "mkor",
    "rf_rmsprop",
    "eva_s",
    "eva_s-separable",
    "if_shampoo",
    "if_shampoo-blocks",
    "shampoo",
    "shampoo-adam",
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_in_either_memory_format(layout: torch.memory_format, case: str) -> None:
    def run(layout: torch.memory_format) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double().to(memory_format=layout)
        optimizer = build(case, model, lr=1e-4, base="sgd", weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=layout)).square().sum().backward()
            before = model.weight.grad.clone()
            optimizer.step()
            assert not torch.equal(before, model.weight.grad), "the weight's gradient was not replaced"
        return model.weight.detach()

    assert_close_report(run(layout), run(torch.contiguous_format), tolerance(case, 1e-12), "weights")


@pytest.mark.parametrize("rank", [1, 2])
def test_conv_of_one_image_without_batch(rank: int) -> None:
    def run(batched: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double()
        optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="sgd", weight_decay=0.0, rank=rank)
        for _ in range(2):
            optimizer.zero_grad()
            image = torch.randn(3, 6, 6, dtype=torch.float64)
            model(image[None] if batched else image).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    assert_close_report(run(False), run(True), 1e-12, "weights")

"""What a long run meets: a layer without gradient for a step, a side as long as a vocabulary, little memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_soo
from hf_soo.registry import METHODS, takes_batch_size

SECOND_ORDER = [name for name, method in METHODS.items() if method.config]
VOCABULARY = 30522


def build(name: str, model: nn.Module, **settings: Any) -> hf_soo.PreconditionedOptimizer:
    if takes_batch_size(name):
        settings["batch_size"] = 8
    return hf_soo.build_optimizer(name, model, lr=1e-3, weight_decay=0.0, **settings)


class Branches(nn.Module):
    """Two layers of one shape; a step may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)) if both else x)


def step(model: Branches, optimizer: hf_soo.PreconditionedOptimizer, both: bool) -> None:
    optimizer.zero_grad()
    x = torch.randn(8, 6, dtype=torch.float64)
    loss = (model(x, both) - x[:, :3]).square().mean()
    optimizer.report_loss(loss)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_layer_without_gradient_for_a_step_stays_as_it_is(name: str, batched: bool) -> None:
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = build(name, model)
    optimizer.stages.batched = batched
    for both in (True, True):
        step(model, optimizer, both)
    states = {key: copy.deepcopy(state) for key, state in optimizer.stages.states.items() if key.startswith("second")}
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    assert states
    step(model, optimizer, both=False)
    for key, state in states.items():
        for side, factor in state.items():
            for tensor_name, tensor in factor.items():
                assert torch.equal(optimizer.stages.states[key][side][tensor_name], tensor), (key, side, tensor_name)
    for key, p in model.named_parameters():
        assert torch.equal(p, weights[key]) == key.startswith("second"), key
    assert optimizer.health()["fallback_layers"] == len(states)
    step(model, optimizer, both=True)
    assert all(p.isfinite().all() and not torch.equal(p, weights[key]) for key, p in model.named_parameters())
    assert optimizer.health()["fallback_layers"] == 0


LARGE: dict[str, dict[str, Any]] = {"if_shampoo": {"max_dim": 256}, "shampoo": {"max_dim": 256}}
LEFT = {"kfac_expand", "kfac_reduce", "kaisa"}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_side_as_long_as_a_vocabulary(name: str) -> None:
    """A factor of 30,522² would take 3.7 GB: K-FAC leaves the layer to its base and says so, Shampoo cuts it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))
    optimizer = build(name, model, **LARGE.get(name, {}))
    rule = optimizer.routing()["2.weight"]
    assert rule.endswith(f"max_dim=8192 exceeded ({VOCABULARY})") if name in LEFT else rule.startswith(f"{name} -> ")
    factors = [t for state in optimizer.stages.states.values() for f in state.values() for t in f.values()]
    assert all(t.numel() <= VOCABULARY * 32 for t in factors), "MKOR keeps 32 columns; nobody more"
    before = model[2].weight.detach().clone()
    for _ in range(2 if name == "soap" else 1):  # its first step moves no layer
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.arange(4))
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()
    assert model[2].weight.isfinite().all() and not torch.equal(before, model[2].weight)


class Allocations(TorchDispatchMode):
    """The sizes of new tensors that are no views of what an operation got."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("name", "allowed"), [("eva", 0), ("eva_f", 0), ("eva_s", 0), ("mkor", 0), ("kfac_expand", 1)])
def test_the_rank_one_family_makes_no_copy_of_a_gradient(name: str, allowed: int) -> None:
    """mkor_eva 9.24: beyond G nothing of its size is made. K-FAC's products need one, which shows that this counts."""
    torch.manual_seed(0)
    model = nn.Linear(300, 200)
    optimizer = build(name, model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(16, 300)).square().mean().backward()
        with Allocations() as made:
            if optimizer._updating:
                optimizer.stages.update(1.0)
            if optimizer.preconditioner.refreshes_at(optimizer.steps):
                optimizer.stages.refresh()
            optimizer.stages.transform({})
        assert (made.largest >= 200 * 300) == bool(allowed), made.largest


@pytest.mark.parametrize("name", ["mkor", "kfac_expand"])
def test_a_half_precision_gradient_is_widened_once_a_step(name: str) -> None:
    """Asking whether there is a gradient makes no copy of it: in bf16 each look at it in fp32 is one."""
    model = nn.Linear(300, 200, dtype=torch.bfloat16)
    optimizer = build(name, model)
    model(torch.randn(16, 300, dtype=torch.bfloat16)).square().mean().backward()
    with Allocations() as made:
        assert optimizer.stages.strategy.has(optimizer.layers[0])
        (bias,) = optimizer.stages.strategy.biases(optimizer.layers)
    assert bias.dtype == torch.float32 and made.largest < 200 * 300

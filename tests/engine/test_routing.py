"""Every parameter has a rule and a reason, also when it is thawed or added later, and checkpoints know the reason."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_soo
from hf_soo import PreconditionedOptimizer

KINDS = ["mkor", "mkor_h", "eva", "kfac_expand", "shampoo", "muon", "adamw", "lamb"]


def net(frozen: bool) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    made[0].requires_grad_(not frozen)
    return made


def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, dtype=torch.float64, generator=generator), torch.arange(8) % 3
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def thawed(name: str) -> tuple[nn.Sequential, PreconditionedOptimizer]:
    """Three steps with the first layer frozen, then it is added, and three more."""
    model = net(frozen=True)
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-2)
    train(model, optimizer, range(3))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 3e-3})
    train(model, optimizer, range(3, 6))
    return model, optimizer


@pytest.mark.parametrize("name", KINDS)
def test_a_thawed_layer_is_told_of_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = net(frozen=True)
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-2)
    train(model, optimizer, range(1))
    assert "frozen" not in caplog.text and "0.weight" not in optimizer.routing()
    model[0].weight.requires_grad_(True)
    train(model, optimizer, range(3))
    assert caplog.text.count("were frozen when the optimizer was built") == 1 and "['0.weight'] (1 param" in caplog.text
    assert optimizer.routing()["0.weight"].startswith("nothing: frozen when the optimizer was built")
    model[0].bias.requires_grad_(True)
    train(model, optimizer, range(2))
    assert caplog.text.count("were frozen when the optimizer was built") == 2 and "['0.bias'] (1 param" in caplog.text


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["built frozen", "built thawed"])
def test_an_added_layer_moves_and_resumes(name: str, frozen: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint goes on bit for bit in an optimizer that never saw the layer, and in one built over all."""
    model, optimizer = thawed(name)
    assert not torch.equal(model[0].weight, net(True)[0].weight) and "never move" not in caplog.text
    rules = {key: rule for key, rule in optimizer.routing().items() if key.startswith("0.")}
    assert len(rules) == 2 and all(rule.endswith(": added to the groups after construction") for rule in rules.values())
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(6, 9))

    other = net(frozen)
    resumed = hf_soo.build_optimizer(name, other, lr=1e-2)
    other.load_state_dict(before)
    resumed.load_state_dict(saved)
    other.requires_grad_(True)
    train(other, resumed, range(6, 9))
    for mine, theirs in zip(weights(other), weights(model), strict=True):
        assert torch.equal(mine, theirs), name
    assert resumed.routing() == optimizer.routing() and "never move" not in caplog.text
    assert resumed.state_dict()["parameters"] == optimizer.state_dict()["parameters"]


def test_a_checkpoint_of_other_parameters_is_refused_before_anything_changes() -> None:
    saved = hf_soo.build_optimizer("adamw", net(True), lr=1e-2).state_dict()
    optimizer = hf_soo.build_optimizer("adamw", net(False), lr=1e-2)
    with pytest.raises(
        ValueError, match=r"moves other parameters: missing \['0.bias', '0.weight'\] \(2\), unknown \[\]"
    ):
        optimizer.load_state_dict(saved)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]


class Gate(nn.Module):
    """A module of its own kind: a matrix that only it reads, beside a layer and a norm."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.scores, self.shift = nn.Parameter(torch.randn(wide, 4)), nn.Parameter(torch.zeros(4))
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x + self.shift)).exp() @ self.scores.softmax(0).mT


def test_every_parameter_has_a_reason() -> None:
    table = hf_soo.build_optimizer("mkor", nn.Sequential(Gate(3), nn.Linear(3, 2)), lr=1e-2).routing()
    assert table == {
        "0.scores": "Lamb: Gate reads these [3, 4] itself, which is followed for experts and routers alone",
        "0.shift": "Lamb: no matrix [4]",
        "0.inner.weight": "mkor -> Lamb",
        "0.inner.bias": "mkor -> Lamb",
        "0.norm.weight": "Lamb: no matrix [4]",
        "0.norm.bias": "Lamb: no matrix [4]",
        "1.weight": "mkor -> Lamb",
        "1.bias": "mkor -> Lamb",
    }


@pytest.mark.parametrize("wide, exclude, warned", [(3, None, False), (30, None, True), (3, [r"inner"], False)])
def test_a_start_that_leaves_most_to_the_base_is_warned_of(
    wide: int, exclude: list[str] | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What the user excludes, and embeddings, are a choice and count on neither side."""
    caplog.set_level(logging.WARNING)
    model = nn.Sequential(nn.Embedding(900, 4), Gate(wide), nn.Linear(wide, 2 if wide > 3 else 5))
    hf_soo.build_optimizer("eva", model, lr=1e-2, exclude=exclude)
    text = (
        "eva leaves 61 % of the matrices' entries (embeddings and decoders apart) to SGD alone: 1.scores, 1 such: Gate"
    )
    assert (text in caplog.text) == warned and ("entries" in caplog.text) == warned, caplog.text


def test_muon_says_what_its_adamw_is_left() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), Gate(3), nn.Linear(3, 2))
    assert hf_soo.build_optimizer("muon", model, lr=1e-2).routing() == {
        "1.inner.weight": "Muon (muon)",
        "2.weight": "Muon (muon)",
        "0.weight": "Muon (adamw): embedding",
        "1.scores": "Muon (adamw): Gate reads these [3, 4] itself, which is followed for experts and routers alone",
        "1.shift": "Muon (adamw): no matrix [4]",
        "1.inner.bias": "Muon (adamw): no single matrix [4]",
        "1.norm.weight": "Muon (adamw): no matrix [4]",
        "1.norm.bias": "Muon (adamw): no matrix [4]",
        "2.bias": "Muon (adamw): no single matrix [2]",
    }

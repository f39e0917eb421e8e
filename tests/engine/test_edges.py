"""Inputs and changes of mind that a training run meets late: no rows, late gradients, layers frozen on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_soo
from hf_soo.engine.comm import Communicator
from hf_soo.engine.fisher import sampled_cross_entropy
from tests.oracles.core import assert_close_report
from tests.ranks.distributed import run_ranks

HOOKED = ["mkor", "eva", "eva_f", "kfac_expand", "kfac_reduce", "kaisa", "foof"]


class Net(nn.Module):
    """Three layers, the first two checkpointed or not."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant
        self.double()

    def _body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.last(self._body(x))
        return self.last(checkpoint(self._body, x, use_reentrant=self.reentrant))


def inputs(rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(3, (rows,), generator=generator)


def step(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5, "weight_decay": 0.1}, {"dampening": 0.5, "maximize": True}])
def test_a_first_gradient_that_comes_late(options: dict[str, Any]) -> None:
    """Under fused SGD with momentum, as under the plain one: a layer that the first batches do not use."""
    grads = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    after = []
    for fused in (True, False):
        net = nn.ParameterList([nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)])
        args = {"momentum": 0.9, **options}
        weight_decay = args.pop("weight_decay", 0.0)
        optimizer = hf_soo.build_optimizer("sgd", net, lr=0.1, weight_decay=weight_decay, fused=fused, **args)
        for t, (early, late) in enumerate(grads):
            optimizer.zero_grad()
            net[0].grad = early.clone()
            net[1].grad = late.clone() if t >= 2 else None
            optimizer.step()
        after.append(parameters(net))
    torch.testing.assert_close(after[0], after[1], rtol=1e-6, atol=1e-7)  # fp32, another order of operations


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_micro_batch_without_rows_adds_nothing(name: str, kind: str) -> None:
    """A mixture's expert without tokens, a head that gathers masked positions of which there are none."""

    def run(empty: bool) -> Tensor:
        torch.manual_seed(0)
        net = (nn.Linear(6, 3) if kind == "linear" else nn.Conv2d(2, 3, 2)).double()
        shape = (4, 6) if kind == "linear" else (4, 2, 3, 3)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        optimizer = hf_soo.build_optimizer(name, net, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if empty:
                net(x[:0]).sum().backward()
            optimizer.step()
        return parameters(net)

    assert_close_report(run(True), run(False), 1e-12, f"{name} {kind}")


@pytest.mark.parametrize("name", [*HOOKED, "mkor_h"])
@pytest.mark.parametrize("what", ["bias", "layer", "thaw"])
def test_freezing_on_the_way(name: str, what: str) -> None:
    net = Net()
    if what == "thaw":
        net.second.bias.requires_grad_(False)
    optimizer = hf_soo.build_optimizer(name, net, lr=0.01)
    x, y = inputs()

    def go() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()

    go()
    part = net.second if what == "layer" else net.second.bias
    part.requires_grad_(what == "thaw")
    before = copy.deepcopy(net.second)
    for _ in range(2):
        go()
    moved = {
        n: not torch.equal(p, q) for (n, p), q in zip(net.second.named_parameters(), before.parameters(), strict=True)
    }
    # what is thawed after construction is in no parameter group, as with any optimizer
    assert moved == {"weight": what != "layer", "bias": False}
    assert parameters(net).isfinite().all()
    # a bias that was trained and is not any more leaves the layer without the gradient that its factors are of
    assert optimizer.health()["fallback_layers"] == (0 if what == "thaw" else 1)


def test_another_precision_after_construction_is_named() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    optimizer = hf_soo.build_optimizer("kfac_expand", net, lr=0.1)
    net.double()
    with pytest.raises(RuntimeError, match=r"'0' is torch.float64 now.*convert the model before"):
        step(net, optimizer, *inputs())


@pytest.mark.parametrize("settings", [{}, {"kv_scale": "mean"}, {"form": "separable"}], ids=str)
def test_eva_s_leaves_parameters_without_entries(settings: dict[str, Any]) -> None:
    net = nn.Linear(6, 3)
    net.empty = nn.Parameter(torch.ones(0, 5))
    optimizer = hf_soo.build_optimizer("eva_s", net, lr=0.1, **settings)
    (net(torch.ones(2, 6)).square().sum() + net.empty.sum()).backward()
    optimizer.step()
    assert optimizer.routing()["empty"].startswith("SGD: ") and parameters(net).isfinite().all()


def test_a_weight_that_is_computed_is_not_called_quantised() -> None:
    net = nn.Sequential(nn.Linear(4, 4), torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    optimizer = hf_soo.build_optimizer("mkor", net, lr=0.1)
    assert optimizer.routing()["1.bias"].endswith(": weight computed from other parameters")


# ---- K-FAC -----------------------------------------------------------------------------------------------------------


def test_the_smallest_output_gradients_do_not_stop_a_layer() -> None:
    """A factor of zeros, which squares that underflow would make: π infinite, and A's inverse 0 until the refresh."""
    net = Net().float()
    optimizer = hf_soo.build_optimizer("kfac_expand", net, lr=0.1, damping_mode="absolute", warmup_updates=1)
    x, y = inputs()
    x = x.detach().float()
    (F.cross_entropy(net(x), y) * 1e-24).backward()
    optimizer.step()
    assert optimizer.stages.states["first"]["output"]["factor"].diagonal().gt(0).all()
    before = net.first.weight.detach().clone()
    step(net, optimizer, x, y)
    assert not torch.equal(net.first.weight, before)


@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce", "foof"])
def test_a_convolution_keeps_its_image_and_not_its_patches(name: str) -> None:
    def kept(hooked: bool) -> int:
        net, x, bytes_kept = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 8, 8), []
        if hooked:
            hf_soo.build_optimizer(name, net, lr=0.1)

        def pack(tensor: Tensor) -> Tensor:
            bytes_kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x)
        return sum(bytes_kept)

    image = 2 * 4 * 8 * 8 * 4
    assert kept(hooked=True) == kept(hooked=False) + image  # the image itself, named a second time


@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce", "foof"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_factors_compile_to_one_graph(name: str, kind: str) -> None:
    torch.manual_seed(0)
    net = (nn.Sequential(nn.Linear(6, 3)) if kind == "linear" else nn.Sequential(nn.Conv2d(2, 3, 2))).double()
    x = torch.randn((4, 5, 6) if kind == "linear" else (4, 2, 3, 3), dtype=torch.float64)
    optimizer = hf_soo.build_optimizer(name, net, lr=0.1)
    torch._dynamo.reset()
    sums = []
    for model in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        sums.append([buffer.clone() for buffer in optimizer.stages.capture.buffers["0"]])
    assert sums[0][0].ne(0).all()
    for eager, compiled in zip(*sums, strict=True):
        assert_close_report(compiled, eager, 1e-12, f"{name} {kind}")


def sampled_step(net: nn.Module, optimizer: Any, cleared_late: bool) -> None:
    x, y = inputs()
    if not cleared_late:
        optimizer.zero_grad()
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    if cleared_late:
        optimizer.zero_grad()
    optimizer.backward_sampled(sampled_cross_entropy(logits, y, torch.Generator().manual_seed(2)))
    loss.backward()


def test_gradients_may_be_cleared_between_forward_and_sampled_backward() -> None:
    after = []
    for cleared_late in (False, True):
        net = Net()
        optimizer = hf_soo.build_optimizer("kfac_expand", net, lr=0.1, fisher="mc")
        for _ in range(2):
            sampled_step(net, optimizer, cleared_late)
            optimizer.step()
        after.append(parameters(net))
    assert torch.equal(*after)


@pytest.mark.parametrize("cleared_late", [False, True])
def test_sampled_labels_under_checkpointing(cleared_late: bool) -> None:
    """Without reentry the factors are the same, and no output of the second run is held on to."""
    nets = [Net(), Net(reentrant=False)]
    optimizers = [hf_soo.build_optimizer("kfac_expand", net, lr=0.1, fisher="mc") for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        sampled_step(net, optimizer, cleared_late)
        assert optimizer.stages.capture.sampled == []
    for name, buffers in optimizers[0].stages.capture.buffers.items():
        for ours, plain in zip(optimizers[1].stages.capture.buffers[name], buffers, strict=True):
            assert torch.equal(ours, plain), name


def test_sampled_labels_do_not_reach_through_reentrant_checkpointing() -> None:
    """The first run is without a graph: B would stay 0 there."""
    net = Net(reentrant=True)
    optimizer = hf_soo.build_optimizer("kfac_expand", net, lr=0.1, fisher="mc")
    with pytest.raises(NotImplementedError, match=r"reentrant.*\('(first|second)'\).*use_reentrant=False"):
        sampled_step(net, optimizer, False)


# ---- MKOR-H, ranks ---------------------------------------------------------------------------------------------------


def test_mkor_h_has_no_health_after_the_switch() -> None:
    net = Net()
    optimizer = hf_soo.build_optimizer(
        "mkor_h", net, lr=0.01, rate_decay=0.5, patience=2, min_steps=3, update_period=1, warmup_updates=0
    )
    x, y = inputs()
    for t in range(8):
        assert bool(optimizer.health()) == (t > 0 and not optimizer.switched)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.report_loss(2 + t / 10)
        optimizer.step()
    assert optimizer.switched and optimizer.health() == {} and optimizer.diagnostics() == {}


def late_group(rank: int, world: int) -> tuple[int, int]:
    """Elements of state kept by an optimizer that was built before there was a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Communicator, "world_size", 1)
        net = Net()
        optimizer = hf_soo.build_optimizer("kfac_expand", net, lr=0.1, grad_workers=1)
    step(net, optimizer, *inputs())
    held = sum(t.numel() for s in optimizer.stages.states.values() for f in s.values() for t in f.values())
    return held, sum(optimizer.stages.placement.is_inverse_worker(layer.name) for layer in optimizer.layers)


def test_a_process_group_that_starts_before_the_first_step_is_followed() -> None:
    ranks = run_ranks(2, late_group)
    alone = hf_soo.build_optimizer("kfac_expand", Net(), lr=0.1)
    whole = sum(t.numel() for s in alone.stages.states.values() for f in s.values() for t in f.values())
    assert sorted(owned for _, owned in ranks) == [1, 2]
    assert sum(held for held, _ in ranks) == whole, "each layer's state is kept once"

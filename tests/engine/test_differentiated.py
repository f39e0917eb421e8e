"""What is differentiated: a backward pass counts where it accumulates the weight's gradient, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_soo

HOOKED = ("mkor", "eva", "eva_f", "kfac_expand", "kfac_reduce", "foof")
ROWS = 8


class Net(nn.Module):
    """Embeddings, two layers that may be checkpointed, and a head."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant
        self.double()

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.last(self.body(x))
        hidden = checkpoint(self.body, x, use_reentrant=self.reentrant)
        assert isinstance(hidden, Tensor)
        return self.last(hidden)


Model = Callable[[Tensor], Tensor]
Extra = Callable[[Net, Model, Tensor, Tensor], Any]


def loss_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def asked(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def by_inputs(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    """The input gradient of adversarial training."""
    x = asked(x)
    torch.autograd.grad(loss_of(model, x, y), x)


def by_inputs_several_times(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    """Adversarial perturbations in some steps, each from the one before."""
    delta = torch.zeros_like(x)
    for _ in range(3):
        delta = asked(delta)
        delta = delta + 0.1 * torch.autograd.grad(loss_of(model, x + delta, y), delta)[0].sign()


def backward_to_inputs(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    loss_of(model, x := asked(x), y).backward(inputs=[x])


def by_weights(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    """A monitor of gradient noise: gradients are returned, not accumulated."""
    torch.autograd.grad(loss_of(model, x, y), list(net.parameters()))


def by_weights_twice(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    """A product of the Hessian and a vector."""
    weights = list(net.parameters())
    grads = torch.autograd.grad(loss_of(model, x, y), weights, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in grads), weights)


def backward_to_another_parameter(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    loss_of(model, x, y).backward(inputs=[net.last.bias])


def of_a_frozen_model(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    """What a generator learns from a critic."""
    net.requires_grad_(False)
    loss_of(model, asked(x), y).backward()
    net.requires_grad_(True)


def of_other_weights(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    """A teacher, or a copy that is adapted to a task."""
    others = {name: asked(p) for name, p in net.named_parameters()}
    F.cross_entropy(functional_call(net, others, (x,)), y).backward()


def of_a_copy(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    loss_of(copy.deepcopy(net), x, y).backward()


def in_forward_mode(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, torch.ones_like(x)))


def scores(x: Tensor, net: Net) -> Tensor:
    return net(x).logsumexp(-1).sum()


def per_example(net: Net, model: Model, x: Tensor, y: Tensor) -> None:
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    vmap(grad(loss), (None, 0, 0))(weights, x, y)


DIFFERENTIABLE: dict[str, Extra] = {
    f.__name__: f
    for f in (by_inputs, by_inputs_several_times, backward_to_inputs, by_weights, by_weights_twice,
              backward_to_another_parameter, of_a_frozen_model)
}  # fmt: skip
OTHERS: dict[str, Extra] = {
    **{f.__name__: f for f in (of_other_weights, of_a_copy, in_forward_mode, per_example)},
    "jacobian": lambda net, model, x, y: torch.autograd.functional.jacobian(net, x),
    "hessian": lambda net, model, x, y: torch.autograd.functional.hessian(lambda a: scores(a, net), x[:1]),
    "func.grad": lambda net, model, x, y: grad(scores)(x, net),
    "func.vmap": lambda net, model, x, y: vmap(net)(x),
    "func.vjp": lambda net, model, x, y: vjp(net, x)[1](torch.ones(ROWS, 3).double()),
    "func.jvp": lambda net, model, x, y: jvp(net, (x,), (x,)),
    "func.jacrev": lambda net, model, x, y: jacrev(net)(x),
    "func.jacfwd": lambda net, model, x, y: jacfwd(net)(x[0]),
    "func.hessian": lambda net, model, x, y: hessian(scores)(x[0], net),
    "func.linearize": lambda net, model, x, y: linearize(net, x),
    "jit.trace": lambda net, model, x, y: torch.jit.trace(net.last, torch.ones(ROWS, 6).double()),
    "jit.script": lambda net, model, x, y: torch.jit.script(net.last)(torch.ones(ROWS, 6).double()).sum().backward(),
    "export": lambda net, model, x, y: torch.export.export(net, (x,)),
    "fx": lambda net, model, x, y: torch.fx.symbolic_trace(net.last)(torch.ones(ROWS, 6).double()),
}


def trained(
    name: str, extras: list[Extra], *, compiled: bool = False, reentrant: bool | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after three steps, with extra passes before the window, in it, and before its backward pass.

    Also the statistics of the last window.
    """
    net = Net(reentrant)
    optimizer = hf_soo.build_optimizer(name, net, lr=0.1)
    torch._dynamo.reset()
    model: Model = torch.compile(net, backend="aot_eager") if compiled else net
    chance = torch.Generator().manual_seed(1)
    statistics: list[Tensor] = []
    for _ in range(3):
        x, y = torch.randn(ROWS, 5, generator=chance, dtype=torch.float64), torch.randint(3, (ROWS,), generator=chance)
        for extra in extras:
            extra(net, model, x, y)
        optimizer.zero_grad()
        for extra in extras:
            extra(net, model, x, y)
        loss = loss_of(model, asked(x), y)
        for extra in extras:
            extra(net, model, x, y)
        net.zero_grad()  # the gradients that an extra pass has accumulated, and not what was collected
        loss.backward()
        statistics = [t.clone() for buffers in optimizer.stages.capture.buffers.values() for t in buffers]
        optimizer.step()
    return [p.detach() for p in net.parameters()], statistics


def assert_same_bits(one: tuple[list[Tensor], list[Tensor]], other: tuple[list[Tensor], list[Tensor]]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("extra", DIFFERENTIABLE)
def test_a_pass_that_trains_no_weight_counts_nothing(name: str, extra: str) -> None:
    assert_same_bits(trained(name, [DIFFERENTIABLE[extra]]), trained(name, []))


@pytest.mark.parametrize("name", ["mkor", "kfac_expand"])
@pytest.mark.parametrize("extra", OTHERS)
def test_a_transform_or_a_copy_of_the_model_counts_nothing(name: str, extra: str) -> None:
    assert_same_bits(trained(name, [OTHERS[extra]]), trained(name, []))


@pytest.mark.parametrize("name", HOOKED)
def test_checkpointed_layers_know_it_too(name: str) -> None:
    """Without reentry; with it torch refuses a backward pass to chosen inputs."""
    extras = [*DIFFERENTIABLE.values()]
    assert_same_bits(trained(name, extras, reentrant=False), trained(name, [], reentrant=False))


@pytest.mark.xfail(
    Version(torch.__version__) < Version("2.11"), raises=RuntimeError, strict=True,
    reason="where a compiled backward pass has added to a tensor, no second one goes through the graph",
)  # fmt: skip
@pytest.mark.parametrize("name", ["mkor", "kfac_reduce"])
def test_compiled_layers_know_it_too(name: str) -> None:
    """A compiled backward pass computes all gradients, asked for or not."""
    extras: list[Extra] = [by_inputs, backward_to_inputs, by_weights]
    assert_same_bits(trained(name, extras, compiled=True), trained(name, [], compiled=True))


def plainly(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    loss.backward()


def to_the_weights(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    loss.backward(inputs=weights)


def to_some_weights(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    for one in (weights[:2], weights[2:]):
        loss.backward(inputs=one, retain_graph=True)


def after_the_inputs(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()


def with_the_inputs(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    torch.autograd.backward([loss], inputs=[x, *weights])


def after_the_weights(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    torch.autograd.grad(loss, weights, retain_graph=True)
    loss.backward()


def with_a_graph(loss: Tensor, x: Tensor, weights: list[nn.Parameter]) -> None:
    grads = torch.autograd.grad(loss, [x, *weights], create_graph=True)
    (loss + 0.0 * sum(g.square().sum() for g in grads)).backward()


WAYS = (plainly, to_the_weights, to_some_weights, after_the_inputs, with_the_inputs, after_the_weights, with_a_graph)


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("way", WAYS)
def test_a_pass_that_trains_the_weights_counts_once(
    name: str, reentrant: bool | None, way: Callable[..., None]
) -> None:
    def collected(way: Callable[..., None]) -> list[Tensor]:
        net = Net(reentrant)
        optimizer = hf_soo.build_optimizer(name, net, lr=0.1)
        x = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        way(loss_of(net, x, torch.arange(ROWS) % 3), x, list(net.parameters()))
        return [t for buffers in optimizer.stages.capture.buffers.values() for t in buffers]

    once = collected(plainly)
    assert once[0].eq(ROWS).all()
    for ours, theirs in zip(collected(way), once, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)  # fp64; a penalty of zero moves last bits


def test_a_gradient_penalty_counts_the_rows_once() -> None:
    """Its rows are those of the one forward pass; Σ dL/dy is of the whole loss, as the bias's gradient is."""
    net = Net()
    optimizer = hf_soo.build_optimizer("eva", net, lr=0.1)
    x = asked(torch.randn(ROWS, 5, dtype=torch.float64))
    critic = net(x)[:, 0].sum()
    (slope,) = torch.autograd.grad(critic, x, create_graph=True)
    (critic + (slope.norm(dim=1) - 1).square().mean()).backward()
    for layer, inputs in (("first", x), ("second", torch.tanh(net.first(x)))):
        samples, sums = optimizer.stages.capture.buffers[layer][:2]
        assert samples.item() == ROWS
        torch.testing.assert_close(sums[0], inputs.detach().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "lamb", "mkor", "kfac_expand", "eva_s"])
def test_a_compiled_step_runs_as_it_stands(name: str) -> None:
    def run(compiled: bool) -> list[Tensor]:
        net = Net()
        optimizer = hf_soo.build_optimizer(name, net, lr=0.01)
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net, torch.ones(ROWS, 5).double(), torch.arange(ROWS) % 3).backward()
            step()
        return [p.detach() for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))

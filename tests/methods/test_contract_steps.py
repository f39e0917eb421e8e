"""What every optimizer promises of a step: micro-batches, evaluation, skipped steps, loss scales, schedulers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_soo.engine.layers import LinearLayer, groups_of
from tests.methods.toy import (
    batches,
    build,
    every_case,
    loss_of,
    parts,
    reported_loss,
    second_order,
    splits_rows,
    tolerance,
    toy,
    train,
    weights,
)
from tests.oracles.core import assert_close_report


@every_case
@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [2, 2, 8]], ids=["even", "ragged"])
def test_one_batch_equals_its_micro_batches(case: str, sizes: list[int]) -> None:
    if splits_rows(case):
        pytest.skip("groups and halves of rows are made in the order they come: micro-batches have others")
    one, many = toy(), toy()
    train(one, build(case, one), batches(5))
    train(many, build(case, many), batches(5), parts(sizes))
    # fp64 sums in another order: 1e-10
    assert_close_report(weights(many), weights(one), tolerance(case, 1e-10), f"{case} weights")


@every_case
def test_evaluation_leaves_state_alone(case: str) -> None:
    data = batches(6)
    plain, disturbed = toy(), toy()
    train(plain, build(case, plain), data)
    optimizer = build(case, disturbed)
    for batch in data:
        train(disturbed, optimizer, [batch])
        disturbed.eval()
        loss_of(disturbed, batches(1, seed=9)[0]).backward()  # with gradients even
        with torch.no_grad():
            loss_of(disturbed, batches(1, seed=8)[0])
        disturbed.train()
    assert torch.equal(weights(plain), weights(disturbed))


@every_case
def test_skipped_step_changes_nothing(case: str) -> None:
    """A GradScaler that meets an inf skips the step: weights, factors and the count stay, the next step is as ever."""
    data = batches(6)
    clean, bumpy = toy(torch.float32), toy(torch.float32)
    for model, bad in ((clean, False), (bumpy, True)):
        optimizer = build(case, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # powers of two scale fp32 without rounding
        optimizer.loss_scale = scaler.get_scale
        for step, batch in enumerate(data):
            for poison in [True, False] if bad and step in (1, 4) else [False]:
                optimizer.zero_grad()
                loss = reported_loss(optimizer, loss_of(model, batch).float())
                scaler.scale(loss * float("inf") if poison else loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert optimizer.steps == len(data)
    assert torch.equal(weights(clean), weights(bumpy))


@second_order
def test_loss_scale_is_taken_out(case: str) -> None:
    """With the scale removed from captured and ordinary gradients alike, a scaled run is the unscaled one."""
    plain, scaled = toy(), toy()
    train(plain, build(case, plain), batches(5))
    optimizer = build(case, scaled)
    optimizer.loss_scale = lambda: 2.0**16
    for batch in batches(5):
        optimizer.zero_grad()
        (reported_loss(optimizer, loss_of(scaled, batch)) * 2.0**16).backward()
        for parameter in scaled.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2.0**16
        optimizer.step()
    assert_close_report(weights(scaled), weights(plain), tolerance(case, 1e-10), f"{case} weights")


@second_order
def test_batched_layers_equal_single_ones(case: str) -> None:
    """On a GPU layers of one shape are stacked; the step must be the same. Two layers here share a shape."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        pair = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
        return pair.double()

    results = []
    for batched in (False, True):
        net = model()
        optimizer = build(case, net)
        optimizer.stages.batched = batched
        generator = torch.Generator().manual_seed(3)
        for _ in range(12):
            x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            reported_loss(optimizer, (net(x) - x.flip(1)).square().mean()).backward()
            optimizer.step()
        results.append(weights(net))
    # the same sums, other kernels: 1e-14 a step
    assert_close_report(results[1], results[0], tolerance(case, 1e-11), f"{case} batched")


def test_a_cpu_works_on_small_layers_of_one_shape_together() -> None:
    shapes = [(1024, 1025), (512, 512), (3, 2), (1024, 1025), (3, 2), *[(512, 512)] * 4]
    layers = [LinearLayer(str(i), nn.Linear(*shape)) for i, shape in enumerate(shapes)]

    def groups(batched: bool | None) -> list[str]:
        return ["".join(layer.name for layer in group) for group in groups_of(layers, batched, 1 << 20)]

    assert groups(None) == ["0", "3", "1567", "8", "24"]  # four of 512 x 512 are the 2²⁰ elements that fit
    assert groups(True) == ["03", "15678", "24"] and groups(False) == list("012345678")


@every_case
def test_schedulers_and_groups_are_the_bases(case: str) -> None:
    model = toy()
    optimizer = build(case, model)
    assert optimizer.param_groups is optimizer.base.param_groups and optimizer.state is optimizer.base.state
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for batch in batches(2):
        train(model, optimizer, [batch])
        scheduler.step()
    still = weights(model)
    train(model, optimizer, batches(1))
    assert torch.equal(still, weights(model)), "learning rate 0 moved the weights"
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups and optimizer.state is optimizer.base.state


@every_case
def test_closure_is_called_once(case: str) -> None:
    model, calls = toy(), []
    optimizer = build(case, model)

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        return loss

    before = weights(model)
    loss = optimizer.step(closure)
    assert len(calls) == 1 and loss.item() > 0 and not torch.equal(before, weights(model))


class ReadsToHost(TorchDispatchMode):
    """Counts values read from tensors: on a GPU each is a synchronisation."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@every_case
def test_a_step_reads_nothing_from_the_device(case: str) -> None:
    if case in ("rmsprop", "mkor+class"):
        pytest.skip("torch's own RMSprop and unfused Adam read their step counts on a CPU")
    model = toy(torch.float32)
    optimizer = build(case, model)
    method = optimizer.preconditioner
    train(model, optimizer, batches(1))
    settled = next((t for t in range(11, 400) if method.updates_at(t) and not method.refreshes_at(t)), 11)
    for steps in (1, settled, settled + 1):
        optimizer.steps = steps
        optimizer._schedule()
        reported_loss(optimizer, loss_of(model, batches(1)[0])).backward()
        # new inverses: one flag for each side of each group of layers tells whether all of them decomposed;
        # MKOR-H reads its count of checks with each factor update
        allowed = 2 * len(optimizer.layers) if method.refreshes_at(steps) else 0
        allowed += method.watches_loss and method.updates_at(steps)
        with ReadsToHost() as reads:
            optimizer.step()
        assert reads.count <= allowed, steps

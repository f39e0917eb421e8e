"""MKOR-H in the library: MKOR until the loss stops falling, by the oracle's rule, and then the base to the bit."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.oracles.shampoo import switch_step
from tests.oracles.twin_runs import Batches, batches, half_squares, twins

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 160
KNEE = [math.exp(-min(t, 60) / 50) for t in range(STEPS)]
STEADY = [1 - t / 1000 for t in range(STEPS)]
RISING = [2 + t / 1000 for t in range(STEPS)]
FAST = {"rate_decay": 0.8, "patience": 5, "min_steps": 10, "update_period": 1, "warmup_updates": 0}


def make(net: nn.Module, base: str = "sgd", name: str = "mkor_h", **config: Any) -> PreconditionedOptimizer:
    return hf_soo.build_optimizer(name, net, lr=0.01, base=base, weight_decay=0.01, **config)


def report_once(optimizer: Any, loss: float) -> None:
    optimizer.report_loss(loss)


def run(
    net: nn.Module,
    optimizer: Any,
    data: Batches,
    losses: Sequence[float] = (),
    report: Callable[[Any, float], None] = report_once,
) -> list[list[torch.Tensor]]:
    """Steps on `data` with the losses that are reported; parameters after each."""
    after = []
    for i, (x, t) in enumerate(data):
        optimizer.zero_grad()
        half_squares(net, x, t).backward()
        if losses:
            report(optimizer, losses[i])
        optimizer.step()
        after.append([p.detach().clone() for p in net.parameters()])
    return after


def switched_at(
    losses: Sequence[float], report: Callable[[Any, float], None] = report_once, **config: Any
) -> tuple[int | None, PreconditionedOptimizer, nn.Module]:
    """The step after which the library has switched."""
    net, _ = twins()
    optimizer = make(net, **config)
    for t, (batch, loss) in enumerate(zip(batches(len(losses)), losses, strict=True)):
        assert optimizer.switched is False
        run(net, optimizer, [batch], [loss], report)
        if optimizer.switched:
            return t, optimizer, net
    return None, optimizer, net


def hooks(net: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)


def assert_equal(one: list[list[torch.Tensor]], two: list[list[torch.Tensor]]) -> None:
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q), f"step {step}"


# ---- when ------------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "every step": {},
    "every fifth": {"update_period": 5},
    "warm-up": {"update_period": 4, "warmup_updates": 70},
    "patience": {"patience": 12},
    "slow": {"rate_decay": 0.9},
    "eager": {"rate_fraction": 0.8, "patience": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_mkor_h_switches_where_the_oracle_does(case: str) -> None:
    config = {**FAST, **CASES[case]}
    expected = switch_step(KNEE, **config)
    assert expected is not None and expected < STEPS - 5
    step, _, _ = switched_at(KNEE, **config)
    assert step == expected
    if "rate_fraction" not in config:  # at 0.8 of the mean rate it stops within the exponential
        horizon = 1 / (1 - config["rate_decay"])
        assert 60 <= step <= 60 + config["patience"] * config["update_period"] + 3 * horizon


def test_mkor_h_has_these_defaults() -> None:
    """0.98, 0.3, patience 20, 100 steps, and MKOR's own period 10 with 10 updates of warm-up."""
    losses = [math.exp(-min(t, 100) / 50) for t in range(440)]
    step, _, _ = switched_at(losses)
    assert step == switch_step(losses, 10, 10)
    assert step is not None and step > 300


def test_mkor_h_stays_while_the_loss_falls_steadily() -> None:
    step, optimizer, net = switched_at(STEADY, **FAST)
    assert step is None
    assert hooks(net) > 0 and set(optimizer.stages.states) == {"0", "2"}


@pytest.mark.parametrize("min_steps", [30, 90])
def test_mkor_h_does_not_switch_before_min_steps(min_steps: int) -> None:
    """A rising loss is behind from the start, so the switch comes as soon as it may: patience may count from there."""
    step, _, _ = switched_at(RISING, **{**FAST, "min_steps": min_steps})
    assert step is not None and min_steps - 1 <= step <= min_steps + FAST["patience"]


def in_two(optimizer: Any, loss: float) -> None:
    """As of two micro-batches whose mean is the loss, one of them a tensor."""
    optimizer.report_loss(loss + 0.125)
    optimizer.report_loss(torch.tensor(loss - 0.125, dtype=torch.float64))


def test_mkor_h_averages_micro_batches() -> None:
    step, _, _ = switched_at(KNEE, in_two, **FAST)
    assert step == switch_step(KNEE, **FAST)


# ---- before and after ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "lamb", "adamw"])
def test_mkor_h_is_mkor_and_then_its_base(base: str) -> None:
    (one, _), (two, _) = twins(), twins()
    hybrid, mkor = make(one, base, **FAST), make(two, base, "mkor", update_period=1, warmup_updates=0)
    data, knee = batches(STEPS), switch_step(KNEE, **FAST)
    assert knee is not None
    before = run(one, hybrid, data[:knee], KNEE[:knee])
    assert_equal(before, run(two, mkor, data[:knee]))
    assert hybrid.switched is False and hooks(one) == hooks(two) > 0

    run(one, hybrid, data[knee : knee + 1], KNEE[knee : knee + 1])
    assert hybrid.switched is True
    assert hooks(one) == 0 and hybrid.stages.states == {}
    alone = copy.deepcopy(one)
    plain = make(alone, None, base)  # type: ignore[arg-type]
    plain.base.load_state_dict(copy.deepcopy(hybrid.base.state_dict()))  # torch would share the buffers
    rest = slice(knee + 1, knee + 11)
    assert_equal(run(one, hybrid, data[rest], KNEE[rest]), run(alone, plain, data[rest]))
    further = run(two, mkor, data[knee : knee + 11])[-1]
    assert not any(torch.equal(p, q) for p, q in zip(one.parameters(), further, strict=True))  # MKOR went elsewhere


def saved_and_loaded(net: nn.Module, optimizer: PreconditionedOptimizer, **config: Any) -> tuple[nn.Module, Any]:
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, _ = twins(seed=5)
    second.load_state_dict(saved["model"])
    resumed = make(second, **config)
    resumed.load_state_dict(saved["optimizer"])
    return second, resumed


@pytest.mark.parametrize("stop", [1, 40, 70])
def test_mkor_h_resumes_with_its_averages_and_patience(stop: int) -> None:
    """Stopped at the start, half-way, and where the checks are counting: it switches in the same step."""
    config = {**FAST, "patience": 10}
    knee = switch_step(KNEE, **config)
    assert knee is not None and 70 < knee < 90
    net, _ = twins()
    optimizer, data = make(net, **config), batches(STEPS)
    run(net, optimizer, data[:stop], KNEE[:stop])
    second, resumed = saved_and_loaded(net, optimizer, **config)
    for t in range(stop, knee + 3):
        part = slice(t, t + 1)
        assert_equal(run(net, optimizer, data[part], KNEE[part]), run(second, resumed, data[part], KNEE[part]))
        assert optimizer.switched is resumed.switched is (t >= knee), t


def test_mkor_h_resumes_switched() -> None:
    step, optimizer, net = switched_at(KNEE, **FAST)
    assert step is not None
    second, resumed = saved_and_loaded(net, optimizer, **FAST)
    assert resumed.switched is True and resumed.stages.states == {} and hooks(second) == 0
    rest = slice(step + 1, step + 6)
    data = batches(STEPS)
    assert_equal(run(net, optimizer, data[rest], KNEE[rest]), run(second, resumed, data[rest], KNEE[rest]))


def test_mkor_h_refuses_what_it_cannot_do() -> None:
    for name, wrong in {"rate_decay": 1.0, "rate_fraction": -1.0, "patience": 0, "min_steps": -1}.items():
        with pytest.raises(ValueError, match=name):
            make(twins()[0], **{name: wrong})


def test_a_step_without_a_loss_is_refused_before_anything_changes() -> None:
    net, _ = twins()
    optimizer = make(net)
    x, t = batches(1)[0]
    half_squares(net, x, t).backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"mkor_h decides by the training loss: call optimizer.report_loss"):
        optimizer.step()
    assert_equal([before], [list(net.parameters())])
    assert optimizer.steps == 0 and not optimizer.state
    optimizer.step(lambda: half_squares(net, x, t))  # a closure's loss counts as reported
    assert optimizer.steps == 1


def test_after_the_switch_nothing_of_the_method_is_left() -> None:
    step, optimizer, net = switched_at(KNEE, **FAST)
    assert step is not None and hooks(net) == 0
    assert not optimizer.stages.states and not optimizer.stages.capture.buffers and not optimizer.layers
    assert optimizer.health() == {} and optimizer.diagnostics() == {}
    assert set(optimizer.routing().values()) == {"SGD: mkor_h has switched to its base"}

"""What torch.optim promises of every optimizer, over all names: the properties, in a table of our own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hf_soo
from hf_soo import PreconditionedOptimizer
from hf_soo.optimizers import Lamb, Muon
from hf_soo.registry import METHODS

SETTINGS: dict[str, dict[str, Any]] = {"rf_rmsprop": {"batch_size": 8}, "if_shampoo": {"batch_size": 8}}
every_name = pytest.mark.parametrize("name", hf_soo.available())


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def build(name: str, model: nn.Module, **more: Any) -> PreconditionedOptimizer:
    return hf_soo.build_optimizer(name, model, **{"lr": 1e-2, **SETTINGS.get(name, {}), **more})


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    like = next(p for p in model.parameters() if p.ndim == 2)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x.to(like.dtype)).double(), y)


def run(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range, set_to_none: bool = True) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad(set_to_none)
        loss = loss_of(model, step % 2)
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def trained(
    name: str, steps: int = 4, after: Callable[[PreconditionedOptimizer], None] = lambda o: None, **more: Any
) -> Tensor:
    model = net()
    optimizer = build(name, model, **more)
    after(optimizer)
    run(model, optimizer, range(steps))
    return weights(model)


# ---- it moves as it should -------------------------------------------------------------------------------------------


@every_name
def test_it_goes_down_whatever_the_memory_is_like(name: str) -> None:
    ends = []
    for transposed in (False, True):
        model = net()
        for p in model.parameters() if transposed else ():
            if p.ndim == 2:
                p.data = p.data.t().contiguous().t()
        losses = run(model, build(name, model), range(12))
        assert losses[-1] < losses[0]
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=2e-3 if name == "muon" else 1e-6, atol=1e-9)  # Muon may iterate in bf16


@every_name
@pytest.mark.parametrize("given", [lambda lr: torch.tensor(lr), lambda lr: torch.tensor(lr, dtype=torch.float64)])
def test_a_tensor_is_a_learning_rate(name: str, given: Callable[[float], Tensor]) -> None:
    def rates(optimizer: PreconditionedOptimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = given(2.0**-6)

    expected = trained(name, lr=2.0**-6)
    ours = name.endswith("muon") or METHODS[name].apply_to != "gradient"
    rtol = 1e-5 if ours else 1e-12  # its decay 1 - ηκ is in the tensor's dtype
    torch.testing.assert_close(trained(name, lr=given(2.0**-6)), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(trained(name, lr=2.0**-6, after=rates), expected, rtol=rtol, atol=0)


@every_name
def test_a_group_has_its_own_rate_and_decay(name: str) -> None:
    model = net()
    still, pulled, usual = model[0].parameters(), model[2].parameters(), model[4].parameters()
    groups = [
        {"params": list(still), "lr": 0.0},
        {"params": list(pulled), "weight_decay": 0.5},
        {"params": list(usual)},
    ]
    optimizer = build(name, model, params=groups, weight_decay=0.0)
    before, plain = weights(model), trained(name, params=None, weight_decay=0.0)
    run(model, optimizer, range(4))
    after, cut = weights(model), sum(p.numel() for p in model[0].parameters())
    assert torch.equal(after[:cut], before[:cut]) and not torch.equal(after[cut:], before[cut:])
    assert not torch.equal(after[cut : cut + 36], plain[cut : cut + 36])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.StepLR(o, 1)], [2]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
}


@every_name
def test_schedulers_drive_it(name: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    for label, make in SCHEDULERS.items():
        model, rates = net(), []
        optimizer = build(name, model)
        scheduler = make(optimizer)
        for step in range(4):
            run(model, optimizer, range(step, step + 1))
            rates.append(optimizer.base.param_groups[0]["lr"])
            scheduler.step()
        assert len(set(rates)) > 1, label
    assert not [w for w in recwarn if "before" in str(w.message) and "optimizer.step" in str(w.message)]


@every_name
def test_maximize_is_the_opposite(name: str) -> None:
    model = net()
    base = build(name, model).base
    if "maximize" not in base.param_groups[0]:
        pytest.skip(f"{type(base).__name__} has no maximize")
    where = {"maximize": True} if METHODS[name].config is None else {"base_args": {"maximize": True}}
    if METHODS[name].apply_to != "gradient":
        with pytest.raises(NotImplementedError, match="with maximize=True of AdamW; leave it out"):
            build(name, model, **where)
        return
    down, up = (trained(name, 1, weight_decay=0.0, **more) - weights(net()) for more in ({}, where))
    torch.testing.assert_close(up, -down, rtol=1e-9, atol=1e-12)


@every_name
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_kernels_agree(name: str, flag: str) -> None:
    if flag not in build(name, net()).base.defaults:
        pytest.skip(f"its base has no {flag}")
    own = METHODS[name].config is None
    first, second = (trained(name, **({flag: on} if own else {"base_args": {flag: on}})) for on in (True, False))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


# ---- and stays where it should ---------------------------------------------------------------------------------------


@every_name
def test_no_gradient_no_step(name: str) -> None:
    model = net()
    optimizer, before = build(name, model), weights(model)
    optimizer.report_loss(1.0)
    optimizer.step()
    assert torch.equal(weights(model), before)
    model[2].requires_grad_(False)
    run(model, optimizer, range(2))
    middle = slice(30, 30 + 42)
    assert torch.equal(weights(model)[middle], before[middle]) and not torch.equal(weights(model), before)


@every_name
def test_zeros_for_gradients_move_nothing_without_decay(name: str) -> None:
    model = net()
    optimizer, before = build(name, model, weight_decay=0.0), weights(model)
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none)
        (loss_of(model) * 0.0).backward()
        optimizer.report_loss(0.0)
        optimizer.step()
    assert torch.equal(weights(model), before)


@every_name
def test_cleared_gradients_are_none_or_zeros(name: str) -> None:
    model, other = net(), net()
    run(model, build(name, model), range(4))
    optimizer = build(name, other)
    run(other, optimizer, range(4), set_to_none=False)
    assert torch.equal(weights(model), weights(other))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in other.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in other.parameters())


class Odd(nn.Module):
    """A number, no numbers, and a layer of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain, self.nothing = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.empty(0, 3))
        self.first, self.second = nn.Linear(4, 6, dtype=torch.float64), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.double())).float() * self.gain) + self.nothing.sum()


@every_name
def test_parameters_of_any_shape_and_several_dtypes(name: str) -> None:
    model = Odd()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    run(model, build(name, model), range(3))
    for key, p in model.named_parameters():
        assert p.dtype == before[key].dtype and p.isfinite().all()
        assert torch.equal(p, before[key]) == (key == "nothing"), key


# ---- its interface ---------------------------------------------------------------------------------------------------


@every_name
def test_closures(name: str) -> None:
    model, other = net(), net()
    optimizer = build(name, model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        returned = [optimizer.step(closure) for _ in range(2)]
    assert all(loss.requires_grad for loss in returned) and returned[1] < returned[0]
    again = build(name, other)
    for _ in range(2):
        run(other, again, range(1))
    assert torch.equal(weights(model), weights(other))


@every_name
def test_its_text_and_its_defaults(name: str) -> None:
    optimizer = build(name, net())
    assert "PreconditionedOptimizer" in repr(optimizer) and "lr: 0.01" in repr(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    for group in optimizer.param_groups:
        assert {"params", "lr", "weight_decay"} <= group.keys()
    assert optimizer.param_groups is optimizer.base.param_groups and len(optimizer.param_groups[-1]["params"]) == 1


@every_name
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda m: [], "no trainable parameter"),
        (lambda m: [{"params": [*m.parameters()]}, {"params": [m[0].weight]}], "more than one parameter group"),
        (lambda m: [{"params": [*m.parameters()], "lr": -1.0}], "-1.0"),
        (lambda m: [{"params": "weights"}], "no parameter"),
        (lambda m: [{"params": [m[0].weight * 2]}], "can't optimize a non-leaf Tensor|no layer selected"),
        (lambda m: ["weight"], "no parameter"),
    ],
    ids=["none", "twice", "rate", "text", "no leaf", "names"],
)
def test_wrong_parameters_are_named(name: str, params: Callable[[nn.Module], Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        build(name, model, params=params(model))


@every_name
def test_a_group_that_is_added_must_be_new(name: str) -> None:
    model = net()
    optimizer = build(name, model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight]})
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": ["weight"]})
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})
    for step in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, step) + extra.square().sum()
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()
    assert (extra < 1).all()


@every_name
def test_it_is_not_copied(name: str) -> None:
    optimizer = build(name, net())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save state_dict"):
            copied(optimizer)


# ---- its state -------------------------------------------------------------------------------------------------------


@every_name
def test_a_state_goes_on_bit_for_bit(name: str) -> None:
    model, resumed = net(), net()
    optimizer, again = build(name, model), build(name, resumed)
    run(model, optimizer, range(3))
    assert repr(optimizer.state_dict()) == repr(optimizer.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert repr(again.state_dict()) == repr(optimizer.state_dict())
    run(model, optimizer, range(3, 6))
    run(resumed, again, range(3, 6))
    assert torch.equal(weights(model), weights(resumed))
    with pytest.raises(ValueError, match=r"parameter group|other parameters|layers differ"):
        build(name, nn.Sequential(nn.Linear(4, 3))).load_state_dict(optimizer.state_dict())


@every_name
def test_a_state_of_an_older_torch(name: str) -> None:
    """Step counts were numbers, and a group had fewer settings."""
    model, resumed = net(), net()
    optimizer, again = build(name, model), build(name, resumed)
    run(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = float(entry["step"])
    for group in saved["param_groups"]:
        for late in ("foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay",
                     "always_adapt", "ns_coefficients", "ns_dtype"):  # fmt: skip
            group.pop(late, None)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    if optimizer.halves is None and name != "muon":  # which says its names of groups in another way
        third = net()
        third.load_state_dict(model.state_dict())
        by_name = build(name, third)
        entries = {**optimizer.base_state()}
        for entry in entries["state"].values():
            if "step" in entry:
                entry["step"] = float(entry["step"])
        by_name.load_base_state(entries)
        by_name.load_second_order_state(copy.deepcopy(optimizer.second_order_state()))
        run(third, by_name, range(3, 6))
        run(resumed, again, range(3, 6))
        assert torch.equal(weights(third), weights(resumed))
    else:
        run(resumed, again, range(3, 6))
    run(model, optimizer, range(3, 6))
    assert torch.equal(weights(model), weights(resumed))


# ---- hooks -----------------------------------------------------------------------------------------------------------


@every_name
def test_hooks_on_a_step(name: str) -> None:
    model, calls = net(), []
    optimizer = build(name, model)
    every = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("every before", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("every after", o))),
    ]
    own = [
        optimizer.register_step_pre_hook(lambda o, *_: calls.append(("before", o))),
        optimizer.register_step_post_hook(lambda o, *_: calls.append(("after", o))),
        optimizer.base.register_step_pre_hook(lambda o, *_: calls.append(("base before", o))),
        optimizer.base.register_step_post_hook(lambda o, *_: calls.append(("base after", o))),
    ]
    try:
        run(model, optimizer, range(1))
    finally:
        for handle in every:
            handle.remove()
    names = [label for label, _ in calls]
    assert names == ["every before", "before", "base before", "base after", "after", "every after"]
    assert all(who is (optimizer.base if "base" in label else optimizer) for label, who in calls)
    for handle in own:
        handle.remove()
    run(model, optimizer, range(1))
    assert len(calls) == 6


@every_name
def test_hooks_on_a_state(name: str) -> None:
    model, calls = net(), []
    optimizer = build(name, model)
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("save")),
        optimizer.register_state_dict_post_hook(lambda o, state: calls.append("saved")),
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1}, prepend=True),
        optimizer.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "note"}),
        optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("load" + "note" * ("note" in state))),
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded")),
    ]
    saved = optimizer.state_dict()
    assert saved["note"] == 1 and calls == ["save", "saved"]
    kept = dict(saved)
    optimizer.load_state_dict(saved)
    assert calls[2:] == ["load", "loaded"] and saved.keys() == kept.keys()
    for handle in handles:
        handle.remove()
    assert "note" not in optimizer.state_dict() and len(calls) == 4


# ---- parameters and bases that not everybody can take ----------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.rest = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.words(x[:, 0].abs().mul(3).long().clamp(max=9)))


@every_name
def test_a_sparse_gradient_is_taken_or_named(name: str) -> None:
    model = Words()
    optimizer = build(name, model, weight_decay=0.0)
    before = model.words.weight.detach().clone()
    if isinstance(optimizer.base, torch.optim.SGD) and name != "rf_rmsprop":
        run(model, optimizer, range(3))
        assert not torch.equal(model.words.weight, before)
    else:
        with pytest.raises(ValueError, match=r"'words.weight' is sparse, and .* takes dense ones alone; build the"):
            run(model, optimizer, range(1))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.phase, self.rest = nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.phase(x.to(torch.complex64)).abs().float())


@every_name
def test_complex_parameters_are_taken_by_the_base_or_refused(name: str) -> None:
    model = Waves()
    if METHODS[name].base == "lamb":
        with pytest.raises(ValueError, match="complex numbers is not supported; use base="):
            build(name, model)
        return
    optimizer, before = build(name, model), model.phase.weight.detach().clone()
    run(model, optimizer, range(3))
    assert not torch.equal(model.phase.weight, before) and model.phase.weight.isfinite().all()
    if METHODS[name].config is not None:
        assert "complex numbers" in optimizer.routing()["phase.weight"]


@every_name
def test_a_layer_without_a_shape_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet .* run one batch through the model before"):
        build(name, nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(3)))


def test_a_base_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates the model itself, through a closure"):
        build("mkor", net(), base="torch.optim:LBFGS")


class Averaging(torch.optim.Adam):
    """Two sets of weights, as a schedule-free optimizer has them: it steps in training mode alone."""

    training = False

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def step(self, closure: Any = None) -> Any:
        assert self.training
        return super().step(closure)


def test_a_base_with_two_sets_of_weights_is_told_of_training() -> None:
    model = net()
    optimizer = build("mkor", model, base=Averaging)
    optimizer.train()
    run(model, optimizer, range(1))
    optimizer.eval()
    with pytest.raises(AssertionError):
        run(model, optimizer, range(1))
    plain = build("mkor", net())
    plain.train(), plain.eval()  # nothing to do


def test_schedule_free() -> None:
    pytest.importorskip("schedulefree")
    model = net()
    optimizer = build("mkor", model, base="schedulefree:AdamWScheduleFree")
    optimizer.train()
    losses = run(model, optimizer, range(20))
    moving = weights(model)
    optimizer.eval()
    assert losses[-1] < losses[0] and not torch.equal(weights(model), moving)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_a_base_with_a_state_of_eight_bits(package: str) -> None:
    pytest.importorskip(package)
    with torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        first, second = (build("mkor", model, base=f"{package}.optim:AdamW8bit") for model in models)
        losses = run(models[0], first, range(6))
        kept = first.state[models[0][2].weight].values()
        assert losses[-1] < losses[0]
        assert any(type(t) is not Tensor or t.dtype == torch.uint8 for t in kept if isinstance(t, Tensor))
        models[1].load_state_dict(models[0].state_dict())
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        for model, optimizer in zip(models, (first, second), strict=True):
            run(model, optimizer, range(6, 8))
        assert torch.equal(weights(models[0]), weights(models[1]))


class HalfState(torch.optim.Optimizer):
    """A momentum in bfloat16, as low-precision optimizers keep it."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.bfloat16))
                    m.mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * m)


def test_a_base_with_a_state_of_lower_precision() -> None:
    model = net(torch.float32)
    optimizer = build("mkor", model, base=HalfState)
    losses = run(model, optimizer, range(10))
    assert losses[-1] < losses[0] and optimizer.state[model[0].weight]["m"].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda p: Lamb([p]), lambda p: Muon([p], matrices=[p])])
def test_our_bases_alone_call_hooks_once(make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> None:
    calls: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: calls.append(type(o).__name__))
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    try:
        make(parameter).step()
    finally:
        handle.remove()
    assert len(calls) == 1

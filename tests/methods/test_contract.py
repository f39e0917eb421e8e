"""What every optimizer promises: one row a name, the same properties for all."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_soo
from hf_soo.engine.selection import select_all_parameters, select_layers
from hf_soo.registry import METHODS, takes_batch_size
from tests.methods.toy import CASES, batches, build, loss_of, parts, tolerance, toy, train, weights
from tests.oracles.core import assert_close_report

every_case = pytest.mark.parametrize("case", CASES)
# But for one that has handed over to its base, and then has nothing to show of itself.
second_order = pytest.mark.parametrize(
    "case", [c for c, (name, _) in CASES.items() if METHODS[name].config and c != "mkor_h-switching"]
)


def reported_loss(optimizer: hf_soo.PreconditionedOptimizer, loss: torch.Tensor) -> torch.Tensor:
    optimizer.report_loss(loss)
    return loss


MATRICES_ONLY = {"shampoo", "eva_s"}
"""Methods that leave biases and norms to the base: they have fewer than two axes."""


def learns_from_gradients(case: str) -> bool:
    return METHODS[CASES[case][0]].select is not select_layers


@every_case
def test_resume_is_bit_exact(case: str) -> None:
    data = batches(23)
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, data[:13])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, data[13:])

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = toy(seed=5)
    resumed.load_state_dict(saved["model"])
    again = build(case, resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, data[13:])
    assert torch.equal(weights(model), weights(resumed))


@every_case
def test_loading_does_not_change_its_argument(case: str) -> None:
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, batches(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert identical(saved, before)


def identical(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@every_case
@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [2, 2, 8]], ids=["even", "ragged"])
def test_one_batch_equals_its_micro_batches(case: str, sizes: list[int]) -> None:
    if CASES[case][1].get("rank", 1) != 1:
        pytest.skip("rank > 1 means groups of rows in the order they come: micro-batches are other groups")
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
    assert routing["norm.weight"].startswith(optimizer.name) == (vectors and select is not select_layers)
    assert routing["embedding.weight"].startswith(optimizer.name) == (select is select_all_parameters)
    assert select is select_all_parameters or "embedding" in routing["embedding.weight"]
    rows, side = optimizer.diagnostics(), f"{optimizer.preconditioner.side_names[0]}_side"
    suffix = "" if select is select_layers else ".weight"  # a layer is known by its module, a parameter by itself
    # a layer that is never called has a hook that saw no rows; a parameter only lacks a gradient
    assert rows["unused" + suffix].get(side) == ("no rows" if select is select_layers else None)
    assert "cos" not in rows["unused" + suffix]
    for name in ("twice", "no_bias", "hidden"):
        row = rows[name + suffix]
        assert row[side] == "updated" and 0 < float(row["cos"]) < 0.99999, row
    unused = [layer.name for layer in optimizer.layers if layer.name.startswith("unused")]
    assert optimizer.health()["fallback_layers"] == len(unused) > 0


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_of_lower_precision(case: str, dtype: torch.dtype) -> None:
    model = toy(dtype)
    optimizer = build(case, model)
    losses = train(model, optimizer, batches(1) * 12)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
    state = optimizer.state_dict()
    for tensors in state["second_order"]["layers"].values():
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} <= {torch.float32}
    # accelerate loads the state once in every fresh run; the base's cast of its own state must not reach the factors
    optimizer.load_state_dict(state)
    for factors in optimizer.states.values():
        assert {t.dtype for f in factors.values() for t in f.values() if t.is_floating_point()} <= {torch.float32}


@every_case
def test_zero_gradient_stays_finite(case: str) -> None:
    model = toy()
    optimizer = build(case, model)
    for scale in (0.0, 0.0, 1.0):
        optimizer.zero_grad()
        reported_loss(optimizer, loss_of(model, batches(1)[0]) * scale).backward()
        optimizer.step()
    assert weights(model).isfinite().all()


@every_case
def test_hooks_can_be_removed(case: str) -> None:
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, batches(3))
    optimizer.remove_hooks()
    assert not any(module._forward_hooks for module in model.modules())
    train(model, optimizer, batches(2))
    assert weights(model).isfinite().all() and not optimizer.capture.buffers


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
        optimizer.batched = batched
        generator = torch.Generator().manual_seed(3)
        for _ in range(12):
            x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            reported_loss(optimizer, (net(x) - x.flip(1)).square().mean()).backward()
            optimizer.step()
        results.append(weights(net))
    # the same sums, other kernels: 1e-14 a step
    assert_close_report(results[1], results[0], tolerance(case, 1e-11), f"{case} batched")


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


# A value unlike the default for every field of every config; what else must be set for it to act.
OTHER_VALUES: dict[str, dict[str, tuple[object, dict[str, object]]]] = {
    "mkor": {
        "update_period": (3, {}),
        "warmup_updates": (2, {}),
        "factor_decay": (0.8, {}),
        "representation": ("dense", {"history": 3}),
        "history": (4, {}),
        "update_rule": ("exact", {"representation": "dense"}),
        "clip_value": (0.01, {"kv_scale": "sum"}),
        "kv_scale": ("sum", {}),
        "kv_target": (0.1, {}),
        "rank": (2, {}),
        "sides": ("input", {}),
        "stabilizer_threshold": (1.5, {"representation": "dense", "update_rule": "exact"}),
        "stabilizer_blend": (0.2, {"representation": "dense", "update_rule": "exact", "stabilizer_threshold": 1.5}),
    },
    "eva": {
        "damping": (3.0, {}),
        "kv_new_weight": (0.3, {}),
        "kl_clip": (1e-6, {}),
        "update_period": (4, {}),
        "warmup_updates": (6, {"update_period": 4}),
        "kv_scale": ("sum", {}),
    },
}
FACTORIZING = ("kfac_expand", "kfac_reduce", "kaisa", "foof")
FACTORS: dict[str, tuple[object, dict[str, object]]] = {
    "damping": (3.0, {}),
    "damping_mode": ("absolute", {}),
    "inverse": ("eigen", {}),
    "factor_decay": (0.5, {}),
    "update_period": (5, {"inverse_period": 10}),
    "inverse_period": (20, {}),
    "warmup_updates": (2, {}),
    "rescale": ("global", {"kl_clip": 1e-3}),
    "kl_clip": (1e-6, {"rescale": "kl_clip"}),
    "row_filter": ("all", {}),
    "max_dim": (9, {}),
    "factor_start": ("identity", {}),
}
OTHER_VALUES["foof"] = FACTORS
OTHER_VALUES["kfac_expand"] = OTHER_VALUES["kfac_reduce"] = FACTORS | {
    "fisher": ("mc", {}),
    "loss_terms": (7, {"damping_mode": "absolute"}),
    "factor_scale": ("published", {"damping_mode": "absolute"}),
}
OTHER_VALUES["kaisa"] = OTHER_VALUES["kfac_expand"] | {
    "damping_mode": ("relative", {}),
    "inverse": ("cholesky", {}),
    "update_period": (2, {"inverse_period": 10}),
    "warmup_updates": (7, {}),
}
EARLY = {"patience": 2, "min_steps": 4, "rate_fraction": 100.0, "rate_decay": 0.9}
OTHER_VALUES["mkor_h"] = OTHER_VALUES["mkor"] | {
    "rate_decay": (0.1, EARLY | {"rate_fraction": 1.0}),
    "rate_fraction": (1e-9, EARLY),
    "patience": (6, EARLY),
    "min_steps": (12, EARLY),
}
OTHER_VALUES["eva"]["kv_scale"] = ("mean", {})
OTHER_VALUES["eva_f"] = OTHER_VALUES["eva"] | {"kv_scale": ("unit", {"damping": 3.0})}
OTHER_VALUES["eva"]["rescale"] = OTHER_VALUES["eva_f"]["rescale"] = ("norm", {})
OTHER_VALUES["eva_s"] = OTHER_VALUES["eva"] | {
    "form": ("separable", {}),
    "rescale": ("global", {}),
    "kv_scale": ("sum", {}),
    "exponent": (0.5, {"form": "separable"}),
}
OTHER_VALUES["rf_rmsprop"] = {
    "batch_size": (60, {}),
    "factor_lr": (0.1, {}),
    "eps": (0.1, {}),
    "state_dtype": ("bfloat16", {}),
}
OTHER_VALUES["if_shampoo"] = {
    "batch_size": (60, {}),
    "factor_lr": (0.3, {}),
    "riemannian_momentum": (0.1, {}),
    "damping": (0.1, {}),
    "update_period": (5, {}),
    "schedule": ("prototype", {}),
    "max_dim": (5, {}),
    "large_axes": ("identity", {"max_dim": 8}),
    "vector_axes": ("dense", {}),
    "merge_kernels": (False, {}),
    "state_dtype": ("bfloat16", {}),
}
OTHER_VALUES["shampoo"] = {
    "factor_decay": (1.0, {}),
    "update_period": (5, {}),
    "inverse_period": (4, {}),
    "exponent": (0.5, {}),
    "grafting": ("muon", {}),
    "graft_decay": (0.9, {"grafting": "adam"}),
    "epsilon": (1e-2, {}),
    "trace_scaling": (True, {}),
    "max_dim": (5, {}),
}
WITHOUT_EFFECT = {
    # name, field -> why it must not change the run
    **{(name, "grad_workers"): "it moves work between ranks: tests/engine/test_placement.py" for name in FACTORIZING},
    ("foof", "inverse"): "with one side the split and the exact damping are one: only rounding differs",
}
FIELDS = [(n, f.name) for n, m in METHODS.items() if m.config for f in dataclasses.fields(m.config)]


def final_weights(name: str, settings: dict[str, object]) -> torch.Tensor:
    model, data = toy(), batches(25)
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


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_setting_changes_the_run(name: str, field: str) -> None:
    if (name, field) in WITHOUT_EFFECT:
        value = {"grad_workers": 1, "inverse": "eigen"}[field]
        same = relative_change(final_weights(name, {}), final_weights(name, {field: value}))
        assert same < 1e-9, f"{name}: {field}={value!r} changes the run by {same}"
        return
    value, others = OTHER_VALUES[name][field]
    others = {"batch_size": 12, **others} if takes_batch_size(name) else others
    baseline = {k: v for k, v in others.items() if not (field == "representation" and k == "history")}
    if field == "representation":  # equal while history covers the run, so the low-rank side is given a short one
        changed = relative_change(final_weights(name, {"history": 3}), final_weights(name, {field: value}))
    else:
        run = final_kernels if field == "merge_kernels" else final_weights
        torch.manual_seed(0)
        before = run(name, baseline)
        torch.manual_seed(0)
        changed = relative_change(before, run(name, {**baseline, field: value}))
    assert changed > 1e-9, f"{name}: {field}={value!r} has no effect"


def relative_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


BAD_SETTINGS = [
    ("mkro", {}, "Did you mean 'mkor'"),
    ("mkor", {"update_perid": 3}, "Did you mean 'update_period'"),
    ("mkor", {"factor_decay": 1.0}, r"factor_decay=1.0 is out of range"),
    ("mkor", {"update_period": 0}, "update_period=0"),
    ("mkor", {"update_period": 2.5}, "update_period=2.5"),
    ("mkor", {"warmup_updates": -1}, "warmup_updates=-1"),
    ("mkor", {"history": 0}, "history=0"),
    ("mkor", {"rank": 64}, "history=32"),
    ("mkor", {"representation": "sparse"}, "representation='sparse'"),
    ("mkor", {"update_rule": "exact"}, "representation='dense'"),
    ("mkor", {"update_rule": "exact", "representation": "dense", "rank": 2}, "rank=2"),
    ("mkor", {"representation": "dense", "history": 8}, "history=8"),
    ("mkor", {"stabilizer_blend": 0.5}, "stabilizer_blend=0.5"),
    ("mkor", {"stabilizer_threshold": 0.5, "representation": "dense", "update_rule": "exact"}, "out of range"),
    ("mkor", {"kv_scale": "sum", "kv_target": 2.0}, "kv_target=2.0"),
    ("mkor", {"kv_scale": "huge"}, "kv_scale='huge'"),
    ("mkor", {"sides": "left"}, "sides='left'"),
    ("mkor", {"clip_value": "100"}, "clip_value='100' is not a number"),
    ("mkor", {"base": "adafactor"}, "base='adafactor'"),
    ("mkor", {"base": "nowhere:Nothing"}, "cannot be imported"),
    ("mkor", {"base_args": {"beta": 1}}, "Did you mean 'betas'"),
    ("mkor", {"include": ["nothing"]}, "no layer selected"),
    ("mkor", {"exclude": ["("]}, "no regular expression"),
    ("mkor", {"exclude": "decoder"}, "list of regular expressions"),
    ("mkor", {"lr": -1.0}, "lr=-1.0"),
    ("lamb", {"exclude": ["decoder"]}, "preconditions nothing"),
    ("lamb", {"base": "sgd"}, "preconditions nothing"),
    ("adamw", {"momentum": 0.9}, "'momentum' is no argument"),
    ("rf_rmsprop", {}, "batch_size=None: .* the global batch"),
    ("rf_rmsprop", {"batch_size": 0}, "batch_size=0"),
    ("rf_rmsprop", {"batch_size": 12, "factor_lr": 1.0}, "factor_lr=1.0 is out of range"),
    ("rf_rmsprop", {"batch_size": 12, "eps": -1.0}, "eps=-1.0"),
    ("rf_rmsprop", {"batch_size": 12, "state_dtype": "float16"}, "state_dtype='float16'"),
    ("rf_rmsprop", {"batch_size": 12, "state_dtype": "bfloat16", "factor_lr": 1e-3}, "would never change"),
    ("eva", {"damping": 0.0}, "damping=0.0"),
    ("mkor_h", {"rate_decay": 1.0}, "rate_decay=1.0"),
    ("mkor_h", {"patience": 0}, "patience=0"),
    ("mkor_h", {"rate_fraction": 0.0}, "rate_fraction=0.0"),
    ("mkor_h", {"min_steps": -1}, "min_steps=-1"),
    ("kfac_expand", {"damping": 0}, "damping=0 is out of range"),
    ("kfac_expand", {"damping_mode": "pi"}, "damping_mode='pi'"),
    ("kfac_expand", {"inverse": "qr"}, "inverse='qr'"),
    ("kfac_expand", {"factor_decay": 1.0}, "factor_decay=1.0"),
    ("kfac_expand", {"inverse_period": 15}, "no multiple of update_period=10"),
    ("kfac_expand", {"inverse_period": 0}, "inverse_period=0"),
    ("kfac_expand", {"rescale": "clip"}, "rescale='clip'"),
    ("kfac_expand", {"rescale": "norm", "kl_clip": 0.1}, "kl_clip=0.1 has no effect"),
    ("kfac_expand", {"kl_clip": 0.0}, "kl_clip=0.0"),
    ("kfac_expand", {"fisher": "true"}, "fisher='true'"),
    ("kfac_expand", {"row_filter": "none"}, "row_filter='none'"),
    ("kfac_expand", {"max_dim": 0}, "max_dim=0"),
    ("kfac_expand", {"max_dim": 4}, "max_dim=4 exceeded"),
    ("kfac_expand", {"grad_workers": 0}, "grad_workers=0"),
    ("kfac_expand", {"grad_workers": 2}, "does not divide the world size 1"),
    ("kfac_expand", {"factor_start": "zero"}, "factor_start='zero'"),
    ("kfac_expand", {"factor_scale": "kfp"}, "factor_scale='kfp'"),
    ("kfac_expand", {"loss_terms": 0}, "loss_terms=0"),
    ("kfac_expand", {"loss_terms": 5, "factor_scale": "published"}, "loss_terms=5 has no effect"),
    ("foof", {"fisher": "mc"}, "'fisher' is no setting of 'foof'"),
    ("eva", {"kl_clip": -1}, "kl_clip=-1"),
    ("eva", {"kv_new_weight": 1.5}, "kv_new_weight=1.5"),
    ("eva", {"rescale": "trust"}, "rescale='trust'"),
    ("eva", {"rescale": "norm", "kl_clip": 0.1}, "kl_clip=0.1 has no effect with rescale='norm'"),
    ("if_shampoo", {}, "batch_size=None: .* the global batch"),
    ("if_shampoo", {"batch_size": 2.5}, "batch_size=2.5"),
    ("if_shampoo", {"batch_size": 12, "factor_lr": 1.0}, "factor_lr=1.0 is out of range"),
    ("if_shampoo", {"batch_size": 12, "riemannian_momentum": 1.0}, "riemannian_momentum=1.0"),
    ("if_shampoo", {"batch_size": 12, "damping": -1.0}, "damping=-1.0"),
    ("if_shampoo", {"batch_size": 12, "update_period": 0}, "update_period=0"),
    ("if_shampoo", {"batch_size": 12, "schedule": "log"}, "schedule='log'"),
    ("if_shampoo", {"batch_size": 12, "max_dim": 0}, "max_dim=0"),
    ("if_shampoo", {"batch_size": 12, "large_axes": "dense"}, "large_axes='dense'"),
    ("if_shampoo", {"batch_size": 12, "vector_axes": "block"}, "vector_axes='block'"),
    ("if_shampoo", {"batch_size": 12, "merge_kernels": "yes"}, "merge_kernels='yes'"),
    ("if_shampoo", {"batch_size": 12, "state_dtype": "half"}, "state_dtype='half'"),
    (
        "if_shampoo",
        {"batch_size": 12, "state_dtype": "bfloat16", "factor_lr": 0.01},
        r"axis of length 8 \('twice.weight'\): it needs factor_lr > √d/256 = 0.0110",
    ),
    (
        "if_shampoo",
        {"batch_size": 12, "large_axes": "identity", "max_dim": 2, "vector_axes": "dense"},
        "no layer selected: .*every axis is longer than max_dim=2",
    ),
    ("shampoo", {"factor_decay": 0.0}, "factor_decay=0.0"),
    ("shampoo", {"factor_decay": 1.5}, "factor_decay=1.5"),
    ("shampoo", {"update_period": 0}, "update_period=0"),
    ("shampoo", {"inverse_period": 0}, "inverse_period=0"),
    ("shampoo", {"exponent": 0.0}, "exponent=0.0"),
    ("shampoo", {"grafting": "adagrad"}, "grafting='adagrad'"),
    ("shampoo", {"graft_decay": 0.9}, "graft_decay=0.9 has no effect with grafting='sgd'"),
    ("shampoo", {"graft_decay": 1.0, "grafting": "adam"}, "graft_decay=1.0"),
    ("shampoo", {"epsilon": 0.0}, "epsilon=0.0"),
    ("shampoo", {"trace_scaling": "yes"}, "trace_scaling='yes'"),
    ("shampoo", {"max_dim": 0}, "max_dim=0"),
    ("eva_s", {"form": "both"}, "form='both'"),
    ("eva_s", {"damping": 0.0}, "damping=0.0"),
    ("eva_s", {"kv_new_weight": 0.0}, "kv_new_weight=0.0"),
    ("eva_s", {"kv_scale": "top"}, "kv_scale='top'"),
    ("eva_s", {"rescale": "none", "kl_clip": 0.1}, "kl_clip=0.1 has no effect with rescale='none'"),
    ("eva_s", {"exponent": 0.5}, "form='separable'"),
    ("eva_s", {"form": "separable", "exponent": 0.0}, "exponent=0.0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused_at_construction(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        hf_soo.build_optimizer(name, toy(), **{"lr": 1e-2, **settings})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_wrapped_models() -> None:
    with pytest.raises(NotImplementedError, match="DataParallel"):
        hf_soo.build_optimizer("mkor", nn.DataParallel(toy()), lr=1e-2)
    with pytest.raises(NotImplementedError, match="already compiled"):
        hf_soo.build_optimizer("mkor", torch.compile(toy(), backend="eager"), lr=1e-2)  # type: ignore[arg-type]


def test_another_optimizers_checkpoint_is_refused() -> None:
    model = toy()
    mkor, lamb, eva = (build(case, model) for case in ("mkor", "lamb", "eva"))
    over_adamw, dense = build("mkor+adamw", model), build("mkor-dense", model)
    plain = torch.optim.AdamW(model.parameters()).state_dict()
    for optimizer, saved, message in (
        (mkor, lamb.state_dict(), "written with optimizer 'lamb'"),
        (lamb, mkor.state_dict(), "written with optimizer 'mkor'"),
        (mkor, eva.state_dict(), "written with optimizer 'eva'"),
        (mkor, over_adamw.state_dict(), "base optimizer 'AdamW'"),
        (mkor, plain, "no state of 'mkor'"),
        (mkor, dense.state_dict(), "this run needs"),
        (mkor, build("mkor", model, exclude=["hidden"]).state_dict(), "missing \\['hidden'\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("spoiled", ["ours", "base"])
def test_a_refused_state_changes_nothing(spoiled: str) -> None:
    model = toy()
    source, target = build("mkor", model), build("mkor", model)
    train(model, source, batches(3))
    saved = source.state_dict()
    if spoiled == "ours":
        saved["second_order"] = saved["second_order"] | {"optimizer": "eva"}
    else:
        saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(ValueError):
        target.load_state_dict(saved)
    assert target.steps == 0 and not target.state
    assert all(not f["columns"].any() for state in target.states.values() for f in state.values())


def test_changed_settings_on_resume_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with caplog.at_level(logging.WARNING):
        build("mkor", model, update_period=5).load_state_dict(build("mkor", model).state_dict())
    assert caplog.text.count("changed settings") == 1 and "update_period" in caplog.text


NON_FINITE = ["mkor", "mkor-dense", "mkor-sum", "eva", "eva_f", *filter(learns_from_gradients, CASES)]


def spoil(model: nn.Module, optimizer: hf_soo.PreconditionedOptimizer) -> tuple[str, str]:
    """Make what ``no_bias`` learns from not finite. Returns its name, and that of a sound layer."""
    if optimizer.capture.buffers:
        optimizer.capture.buffers["no_bias"][1][0, 0] = float("nan")
        return "no_bias", "hidden"
    model.no_bias.weight.grad[0, 0] = float("nan")
    return "no_bias.weight", "hidden.weight"


@pytest.mark.parametrize("case", NON_FINITE)
def test_non_finite_statistics_keep_the_old_factors(case: str, caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, batches(4))  # the next step updates every method
    before = copy.deepcopy(optimizer.states)
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    spoiled, sound = spoil(model, optimizer)
    optimizer.steps = 99  # so that the check runs after this step
    optimizer.step()
    for name, factor in before[spoiled].items():
        if learns_from_gradients(case) or name in ("right", "input"):  # the output side's statistics were sound
            assert all(torch.equal(t, optimizer.states[spoiled][name][key]) for key, t in factor.items())
    changed = [
        not torch.equal(t, optimizer.states[sound][side][key])
        for side, factor in before[sound].items()
        for key, t in factor.items()
    ]
    assert any(changed)
    # A gradient that is not finite reaches the base as it came, and so the weight: to skip such steps is the caller's.
    assert weights(model).isfinite().all() != learns_from_gradients(case)
    side = optimizer.preconditioner.side_names[0]
    assert optimizer.diagnostics()[spoiled][f"{side}_side"] == "non-finite statistics"
    unused = [layer.name for layer in optimizer.layers if layer.name.startswith("unused")]
    assert optimizer.health()["fallback_layers"] == 1 + len(unused)
    assert f"non-finite statistics): ['{spoiled}']" in caplog.text


def test_inert_run_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    optimizer = build("eva", model, kv_scale="mean", damping=1e6)  # P = G/γ
    for _ in range(2):
        train(model, optimizer, batches(1) * 100)
    assert caplog.text.count("this run is first-order") == 1
    caplog.clear()
    active = toy()
    train(active, build("mkor", active), batches(1) * 100)
    assert "first-order" not in caplog.text


def test_import_needs_no_transformers() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('transformers', 'accelerate', 'datasets', 'deepspeed', 'matplotlib'): sys.modules[name] = None\n"
        "import torch, hf_soo\n"
        "model = torch.nn.Linear(3, 2)\n"
        "optimizer = hf_soo.build_optimizer('mkor', model, lr=1e-2)\n"
        "model(torch.ones(4, 3)).sum().backward(); optimizer.step(); print('stepped', optimizer.steps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "stepped 1", done.stderr


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_kernels_where_they_can_run(name: str) -> None:
    def fused(device: str, **args: object) -> object:
        return hf_soo.build_optimizer(name, nn.Linear(3, 2, device=device), lr=1e-2, **args).param_groups[0]["fused"]  # type: ignore[arg-type]

    assert fused("cpu") is True
    assert not fused("cpu", foreach=True) and not fused("cpu", fused=False) and not fused("meta")


def test_half_precision_sgd_is_right() -> None:
    """torch's fused SGD is not, for bf16 with momentum on a CPU: it must neither be chosen nor be accepted."""
    model, reference = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).bfloat16()
    reference.load_state_dict(model.state_dict())
    optimizers = (
        hf_soo.build_optimizer("sgd", model, lr=0.1, weight_decay=0.0),
        torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, fused=False, foreach=False),
    )
    for step in range(4):
        for net, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.full((4, 8), step + 1.0).bfloat16()).float().square().mean().backward()
            optimizer.step()
    # foreach and the loop may round once differently: 2^-8
    assert_close_report(model.weight.float(), reference.weight.float(), 1e-2, "weights")
    with pytest.raises(ValueError, match="fused=True is not right"):
        hf_soo.build_optimizer("sgd", model, lr=0.1, fused=True)


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


def test_optimizers_are_not_copied_and_models_are() -> None:
    model = toy()
    optimizer = build("mkor", model)
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save state_dict"):
            copier(optimizer)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(copied, batches(1)[0]).backward()  # its hooks are there and do nothing
        assert all(not t.any() for b in optimizer.capture.buffers.values() for t in b)
        train(copied, build("mkor", copied), batches(2))


def test_a_vector_too_small_to_scale_is_not_used() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="sgd", weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.full((5, 4), 1e-24)).sum().backward()
        optimizer.step()
    assert model.weight.isfinite().all()
    assert all(t.isfinite().all() for f in optimizer.states[""].values() for t in f.values())


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
    assert not any(t.requires_grad for b in optimizer.capture.buffers.values() for t in b)


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

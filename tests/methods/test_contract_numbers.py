"""What every optimizer promises: low precision; gradients that are zero, tiny or not finite; inert runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import hf_soo
from tests.methods.toy import (
    CASES,
    batches,
    build,
    every_case,
    learns_from_gradients,
    loss_of,
    reported_loss,
    toy,
    train,
    weights,
)


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
    for factors in optimizer.stages.states.values():
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


NON_FINITE = [
    "mkor", "mkor-dense", "mkor-sum", "mkor-power", "mkor-gate", "eva", "eva_f", *filter(learns_from_gradients, CASES)
]  # fmt: skip


def spoil(model: nn.Module, optimizer: hf_soo.PreconditionedOptimizer) -> tuple[str, str]:
    """Make what ``no_bias`` learns from not finite. Returns its name, and that of a sound layer."""
    if optimizer.stages.capture.buffers:
        optimizer.stages.capture.buffers["no_bias"][1][0, 0] = float("nan")
        return "no_bias", "hidden"
    model.no_bias.weight.grad[0, 0] = float("nan")
    return "no_bias.weight", "hidden.weight"


@pytest.mark.parametrize("case", NON_FINITE)
def test_non_finite_statistics_keep_the_old_factors(case: str, caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, batches(4))  # the next step updates every method
    before = copy.deepcopy(optimizer.stages.states)
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    spoiled, sound = spoil(model, optimizer)
    optimizer.steps = 99  # so that the check runs after this step
    optimizer.step()
    for name, factor in before[spoiled].items():
        if learns_from_gradients(case) or name in ("right", "input"):  # the output side's statistics were sound
            assert all(torch.equal(t, optimizer.stages.states[spoiled][name][key]) for key, t in factor.items())
    changed = [
        not torch.equal(t, optimizer.stages.states[sound][side][key])
        for side, factor in before[sound].items()
        for key, t in factor.items()
    ]
    assert any(changed)
    # A gradient that is not finite reaches the base as it came, and so the weight: to skip such steps is the caller's.
    # Muon leaves such a matrix where it is.
    assert weights(model).isfinite().all() != (learns_from_gradients(case) and "muon" not in case)
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


def test_a_vector_too_small_to_scale_is_not_used() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="sgd", weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.full((5, 4), 1e-24)).sum().backward()
        optimizer.step()
    assert model.weight.isfinite().all()
    assert all(t.isfinite().all() for f in optimizer.stages.states[""].values() for t in f.values())

"""Every field of every method's config changes the run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.registry import METHODS, takes_batch_size
from tests.methods.toy import batches, toy, train, weights

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

"""A small model with every kind of layer that has broken an optimizer, and a plain loop over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_soo
from hf_soo import PreconditionedOptimizer
from hf_soo.engine.fisher import sampled_cross_entropy
from hf_soo.engine.selection import select_layers
from hf_soo.registry import METHODS
from tests.methods.forms import FORMS, VOCABULARY, Toy

Batch = tuple[Tensor, Tensor]


def toy(dtype: torch.dtype = torch.float64, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().to(dtype)


def batches(steps: int, rows: int = 12, length: int = 5, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(VOCABULARY, (rows, length), generator=generator) for _ in range(2))  # type: ignore[misc]
        for _ in range(steps)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1).double(), batch[1].flatten())


def train(
    model: nn.Module,
    optimizer: PreconditionedOptimizer,
    data: Iterable[Batch],
    split: Callable[[Batch], list[tuple[Batch, float]]] = lambda batch: [(batch, 1.0)],
) -> list[float]:
    """One step a batch; ``split`` makes weighted micro-batches of it."""
    losses = []
    for batch in data:
        optimizer.zero_grad()
        total = 0.0
        for part, weight in split(batch):
            logits, labels = model(part[0]), part[1]
            loss = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()) * weight
            if optimizer.wants_sampled_loss:
                optimizer.backward_sampled(sampled_cross_entropy(logits, labels) * weight)
            optimizer.report_loss(loss)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


def parts(sizes: list[int]) -> Callable[[Batch], list[tuple[Batch, float]]]:
    """Micro-batches of these sizes, weighted so that their losses sum to the batch's."""

    def split(batch: Batch) -> list[tuple[Batch, float]]:
        total = sum(sizes)
        pieces = zip(*(tensor.split(sizes) for tensor in batch), strict=True)
        return [((x, y), size / total) for (x, y), size in zip(pieces, sizes, strict=True)]

    return split


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


# Every name of the registry, and the forms of a method that run other code.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in hf_soo.available()},
    "rf_rmsprop": ("rf_rmsprop", {"batch_size": 12}),
    "if_shampoo": ("if_shampoo", {"batch_size": 12}),
    **FORMS,
}
LEARNING_RATE = {
    "adamw": 1e-2, "rmsprop": 1e-3, "mkor+adamw": 1e-2,
    "kfac_expand": 1e-1, "kfac_reduce": 1e-1, "kfac-eigen": 1e-1, "foof": 1e-1,
    "rf_rmsprop": 1e-1, "shampoo": 1e-2, "shampoo-sum": 1e-2, "shampoo-adam": 1e-2, "shampoo-orthogonal": 1e-2,
    "soap": 1e-2,
    "if_shampoo": 1e-2, "if_shampoo-blocks": 1e-2, "if_shampoo-identity": 1e-2,
    "if_shampoo-prototype": 1e-2, "eva_s": 1e-2, "eva_s-separable": 1e-2,
    "eva": 1e-2, "eva_f": 1e-2, "eva-unit": 1e-2, "eva-unclipped": 1e-3,
}  # fmt: skip

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
        "exponent": (0.25, {}),
        "gate": (True, {}),
        "queries_and_keys": (False, {}),
        "rescale": ("none", {}),
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
    "epsilon": (0.1, {}),
}
OTHER_VALUES["foof"] = FACTORS | {"input_blocks": (3, {})}
OTHER_VALUES["newton_muon"] = OTHER_VALUES["foof"] | {
    "update_period": (16, {}),
    "inverse_period": (64, {}),
    "max_dim": (8, {}),
    "rescale": ("global", {}),
}
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
OTHER_VALUES["muon_mkor"] = OTHER_VALUES["mkor"] | {"queries_and_keys": (True, {})}
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

OTHER_VALUES["soap"] = {
    "factor_decay": (0.8, {}),
    "moment_decay": (0.8, {}),
    "eps": (1e-2, {}),
    "inverse_period": (4, {}),
    "max_dim": (8, {}),
    "ties": (0.1, {}),
}

# Methods that leave biases and norms to the base: they have fewer than two axes.
MATRICES_ONLY = {"shampoo", "eva_s", "soap"}

ROUNDING = {
    "mkor+muon": 2e-3,  # Muon iterates in bf16 where that is fast, and there 1e-16 can turn a rounding (2^-9)
    "mkor+muon-momentum": 2e-3,
    "muon": 2e-3,
    "kaisa": 1e-9,  # its absolute damping is 1e-5 of the curvature here, so its inverses make more of a rounding
    # roots of factors without full rank turn 1e-16 into 1e-13 where a dead unit's gradient is 0; AdamW's ε is 1e-8
    "shampoo": 1e-4,
    "soap": 1e-4,  # likewise: a dead unit's rows are zeros of a factor, and only its ties tell one from another
    "soap+muon": 2e-3,
    "shampoo-adam": 1e-4,
    "shampoo-momentum": 1e-4,
    "shampoo-sum": 1e-7,
    "shampoo-orthogonal": 1e-7,
}


def tolerance(case: str, rtol: float) -> float:
    """``rtol``, or more for a method that makes more of a rounding."""
    return max(rtol, ROUNDING.get(case, 0.0))


def build(case: str, model: nn.Module, **overrides: object) -> PreconditionedOptimizer:
    name, settings = CASES[case]
    lr = LEARNING_RATE.get(case, 2e-2)
    return hf_soo.build_optimizer(name, model, **{"lr": lr, "weight_decay": 0.01, **settings, **overrides})  # type: ignore[arg-type]


every_case = pytest.mark.parametrize("case", CASES)
# But for one that has handed over to its base, and then has nothing to show of itself.
second_order = pytest.mark.parametrize(
    "case", [c for c, (name, _) in CASES.items() if METHODS[name].config and c != "mkor_h-switching"]
)


def reported_loss(optimizer: hf_soo.PreconditionedOptimizer, loss: torch.Tensor) -> torch.Tensor:
    optimizer.report_loss(loss)
    return loss


def splits_rows(case: str) -> bool:
    """Whether groups or halves of a micro-batch's rows are told apart: other micro-batches have others."""
    settings = CASES[case][1]
    return settings.get("rank", 1) != 1 or "gate" in settings


def learns_from_gradients(case: str) -> bool:
    return METHODS[CASES[case][0]].select is not select_layers

"""The small model and the forms of the methods that the contract's tests and the comparison of versions share.

Nothing here imports hf_soo: the comparison runs it beside any version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH = 16, 8


class Toy(nn.Module):
    """Embedding; a layer used twice; one without bias; an in-place activation; unused, frozen and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.no_bias = nn.Linear(WIDTH, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(WIDTH, 3)
        self.decoder = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.decoder.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.norm(torch.relu_(self.no_bias(x)))
        x = torch.relu_(self.hidden(x))  # biased, 3-D: nn.Linear returns a view, which is changed in place
        return self.decoder(x + self.frozen(x))


# All that may be put around a base.
AROUND: dict[str, Any] = {
    "slow_momentum": 0.9, "slow_weight": 2.0, "cautious": True, "ema_decay": 0.8, "lookahead": 0.5,
    "lookahead_decay": 0.9,
}  # fmt: skip

# The forms of a method that run other code than its defaults.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mkor-dense": ("mkor", {"representation": "dense"}),
    "mkor-exact": ("mkor", {"representation": "dense", "update_rule": "exact"}),
    "mkor-rank2": ("mkor", {"rank": 2}),
    "mkor-power": ("mkor", {"exponent": 0.25}),
    "mkor-gate": ("mkor", {"gate": True}),
    "mkor-sum": ("mkor", {"kv_scale": "sum"}),
    "mkor+adamw": ("mkor", {"base": "adamw"}),
    "mkor+muon": ("mkor", {"base": "muon"}),
    "mkor-momentum": ("mkor", {"apply_to": "momentum"}),
    "mkor-update": ("mkor", {"apply_to": "update", "rescale": "none"}),
    "mkor+adamw-momentum": ("mkor", {"base": "adamw", "apply_to": "momentum"}),
    "mkor+muon-momentum": ("mkor", {"base": "muon", "apply_to": "momentum", "rescale": "none"}),
    "eva-momentum": ("eva", {"apply_to": "momentum"}),
    "kfac-momentum": ("kfac_expand", {"apply_to": "momentum"}),
    "shampoo-momentum": ("shampoo", {"base": "sgd", "apply_to": "momentum"}),
    "soap+muon": ("soap", {"base": "muon", "inverse_period": 4}),
    "eva-unit": ("eva", {"kv_scale": "unit"}),
    "eva-unclipped": ("eva", {"kl_clip": None}),
    "mkor_h-switching": ("mkor_h", {"rate_fraction": 100.0, "patience": 1, "min_steps": 3}),
    "kfac-eigen": ("kfac_expand", {"inverse": "eigen"}),
    "kfac-absolute": ("kfac_expand", {"damping_mode": "absolute", "damping": 3e-3, "rescale": "norm"}),
    "kfac-published": ("kfac_expand", {"factor_scale": "published", "factor_start": "identity"}),
    "foof-eigen": ("foof", {"inverse": "eigen", "rescale": "global"}),
    "eva_s-separable": ("eva_s", {"form": "separable", "kv_scale": "sum"}),
    "if_shampoo-blocks": ("if_shampoo", {"batch_size": 12, "max_dim": 5, "vector_axes": "dense"}),
    "if_shampoo-identity": ("if_shampoo", {"batch_size": 12, "max_dim": 8, "large_axes": "identity"}),
    "if_shampoo-prototype": (
        "if_shampoo",
        {"batch_size": 12, "schedule": "prototype", "large_axes": "diagonal", "max_dim": 8},
    ),
    "shampoo-sum": ("shampoo", {"factor_decay": 1.0, "grafting": "none", "base": "sgd"}),
    "shampoo-adam": ("shampoo", {"grafting": "adam", "max_dim": 5, "inverse_period": 3}),
    "shampoo-orthogonal": ("shampoo", {"grafting": "muon", "base": "sgd", "trace_scaling": True}),
    "mkor-momentum-around": ("mkor", {"apply_to": "momentum", "base_args": AROUND}),
    "muon-around": ("muon", AROUND),
    "mkor+class": ("mkor", {"base": "torch.optim:Adam", "base_args": {"betas": (0.8, 0.9)}}),
}

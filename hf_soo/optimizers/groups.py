"""Parameter groups: the two that transformers' Trainer makes, or somebody's own, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Groups = list[dict[str, Any]]

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names of parameters that take no weight decay, as in transformers' Trainer."""


def decay_groups(model: nn.Module, weight_decay: float | None) -> Groups:
    """Trainable parameters in a decay and a no-decay group, as transformers' Trainer makes them.

    Args:
        model: the model.
        weight_decay: of the decay group; None leaves it to the optimizer's default.

    Returns:
        The groups that are not empty.
    """
    norms = {
        f"{name}.{p}" for name, m in model.named_modules() if _is_norm(m) for p, _ in m.named_parameters(recurse=False)
    }
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if name in norms or NO_DECAY.search(name) else decay).append(parameter)
    first: dict[str, Any] = {"params": decay} if weight_decay is None else {
        "params": decay, "weight_decay": weight_decay,
    }  # fmt: skip
    return [group for group in (first, {"params": rest, "weight_decay": 0.0}) if group["params"]]


def given_groups(params: Iterable[Any], weight_decay: float | None = None) -> Groups:
    """Parameter groups that somebody else has made, as torch.optim takes them.

    Args:
        params: parameters, or dictionaries with parameters under "params" and what differs for them ("lr",
            "weight_decay").
        weight_decay: of the groups that do not say; None leaves it to the optimizer's default.

    Returns:
        Copies of the groups that are not empty.

    Raises:
        ValueError: a group is neither.
    """
    given = list(params)
    groups: Groups = []
    for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(
                f"params: {group!r} is no parameter group; give dictionaries with 'params', or parameters."
            )
        inside = group["params"]
        inside = [inside] if isinstance(inside, torch.Tensor) else list(inside)
        for parameter in inside:
            if not isinstance(parameter, torch.Tensor):
                raise ValueError(f"params: {parameter!r} is no parameter; leave out names: model.parameters().")
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        groups += [{**decay, **group, "params": inside}] if inside else []
    return groups


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
        or "Norm" in type(module).__name__
    )

"""Parameters of a loss that the Trainer keeps beside its model: sentence-transformers' classifiers and margins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def _losses(trainer: object) -> Iterator[tuple[str, nn.Module]]:
    """The modules among a trainer's attributes with "loss" in their name, or in dictionaries there."""
    for attribute, value in vars(trainer).items():
        held: Mapping[str, Any] = value if isinstance(value, Mapping) else {"": value}
        for key, loss in held.items() if "loss" in attribute else ():
            if isinstance(loss, nn.Module):
                yield f"{attribute}.{key}" if key else attribute, loss


def loss_parameters(trainer: object, model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> where each parameter of a loss is that is not the model's: "loss.classifier.weight", module and name.

    Args:
        trainer: who keeps it.
        model: what it trains.
    """
    models = {id(parameter) for parameter in model.parameters()}
    return {
        f"{path}.{name}": (module, name)
        for prefix, loss in _losses(trainer)
        for path, module in loss.named_modules(prefix=prefix)
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in models
    }

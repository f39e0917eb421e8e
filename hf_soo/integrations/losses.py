"""Parameters of a loss that the Trainer keeps beside its model: sentence-transformers' classifiers and margins."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

LOSS_FILE = "loss.pt"

logger = logging.getLogger(__name__)


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


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """What DistributedDataParallel does for its model: gradients become the ranks' mean, where any rank has one.

    Args:
        parameters: the same ones on every rank.
        accelerator: of the ranks.
    """
    if not parameters:
        return
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    had = pieces[0].new_tensor([p.grad is not None for p in parameters])
    total: Tensor = accelerator.reduce(torch.cat([*(piece.flatten() for piece in pieces), had]), "sum")
    *summed, counts = torch.split(total, [*(piece.numel() for piece in pieces), len(pieces)])
    for parameter, piece, count in zip(parameters, summed, counts.tolist(), strict=True):
        mean = (piece / accelerator.num_processes).view_as(parameter).to(parameter.dtype)
        parameter.grad = mean if count else None


def loss_state(trainer: object, model: nn.Module) -> dict[str, Tensor]:
    """Name -> each tensor of a loss that a checkpoint must hold beside the model's: what is trained, and buffers.

    Args:
        trainer: who keeps it.
        model: what it trains.
    """
    models = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return {
        name: tensor.detach()
        for prefix, loss in _losses(trainer)
        for name, tensor in loss.state_dict(prefix=f"{prefix}.", keep_vars=True).items()
        if id(tensor) not in models and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def load_loss_state(trainer: object, model: nn.Module, saved: Mapping[str, Tensor] | None, checkpoint: str) -> None:
    """Go on with a loss as a checkpoint left it.

    Args:
        trainer: as ``loss_state``'s.
        model: as ``loss_state``'s.
        saved: what ``loss_state`` gave; None: the checkpoint has none.
        checkpoint: its folder, for the messages.

    Raises:
        ValueError: it is the state of another loss.
    """
    state = loss_state(trainer, model)
    if saved is None and state:
        logger.warning(
            "%s has no %s: the loss's own tensors (%s, ...) start anew", checkpoint, LOSS_FILE, next(iter(state))
        )
        return
    shapes, wanted = ({name: tensor.shape for name, tensor in each.items()} for each in (saved or {}, state))
    if shapes != wanted:
        other = sorted({*shapes.items()} ^ {*wanted.items()})
        raise ValueError(f"{checkpoint}: {LOSS_FILE} is of another loss: {other[:3]}; resume with the loss it was of.")
    for name, tensor in state.items():
        tensor.copy_((saved or {})[name])

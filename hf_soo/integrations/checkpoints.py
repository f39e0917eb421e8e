"""Trainer checkpoints: the factors' own file, and which folders are whole."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PRECONDITIONER_FILE = "preconditioner.pt"
TRAINER_STATE_FILE = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def save_preconditioner(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the factors' file whole or not at all.

    Args:
        folder: a checkpoint folder.
        state: ``PreconditionedOptimizer.second_order_state()``.
    """
    target = Path(folder) / PRECONDITIONER_FILE
    partial = target.with_suffix(".pt.partial")
    torch.save(state, partial)
    os.replace(partial, target)


def load_preconditioner(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The factors of a checkpoint, on the CPU, or None if it has none.

    Args:
        folder: a checkpoint folder.

    Returns:
        What ``second_order_state()`` gave.

    Raises:
        ValueError: the file is damaged.
    """
    source = Path(folder) / PRECONDITIONER_FILE
    if not source.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:  # what torch.load raises for a truncated archive
        raise ValueError(f"{source} is damaged ({error}); resume from an earlier checkpoint.") from error
    return state


def load_renamed_weights(folder: str | os.PathLike[str], model: nn.Module) -> bool:
    """Load the weights of a checkpoint that has them under other names than the model; else do nothing.

    ``save_pretrained`` writes some models (ViT among them) under the names that their checkpoints on the hub have.
    Trainer reads a checkpoint as if the names were the model's, warns, and goes on with weights that it did not load
    (https://github.com/huggingface/transformers/issues/43701); ``from_pretrained`` knows the names.

    Args:
        folder: a checkpoint folder.
        model: the bare model.

    Returns:
        Whether the weights had other names, and are loaded now.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files:
        return False
    written: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            written.update(weights.keys())
    if written.issubset(model.state_dict()):  # tied weights are written once
        return False
    model.load_state_dict(type(model).from_pretrained(folder).state_dict())
    return True


def has_optimizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint holds any optimizer's state (``save_only_model`` writes none).

    Args:
        folder: a checkpoint folder.
    """
    return any(Path(folder).glob("optimizer*"))


def is_write_error(error: Exception) -> bool:
    """Whether torch or safetensors failed to write a file; neither raises OSError for a full disk.

    Args:
        error: what saving a checkpoint raised.
    """
    return isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error)


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that was written to its end; unfinished ones are named in a warning.

    Trainer writes ``trainer_state.json`` last, so a folder without it, or with half of it, was cut off.

    Args:
        folder: the run's output folder.

    Returns:
        The checkpoint's path, or None.
    """
    numbered = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning("%s was not written to its end and is passed over", path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether Trainer finished writing a checkpoint."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return "global_step" in state

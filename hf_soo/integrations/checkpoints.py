"""Trainer checkpoints: the factors' own file, and which folders are whole."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from hf_soo.files import write_atomically

logger = logging.getLogger(__name__)

PRECONDITIONER_FILE = "preconditioner.pt"
BASE_FILE = "base_optimizer.pt"
"""The base's state in whole tensors, written where it was sharded: to go on under another strategy or world size."""
MANIFEST_FILE = "manifest.json"
TRAINER_STATE_FILE = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def load_renamed_weights(folder: str | os.PathLike[str], model: nn.Module) -> bool:
    """Load the weights of a checkpoint that has them under other names than the model; whether it has.

    ``save_pretrained`` writes some models (ViT among them) under the names that their checkpoints on the hub have.
    Trainer reads a checkpoint as if the names were the model's, warns, and goes on with weights that it did not load
    (https://github.com/huggingface/transformers/issues/43701); ``from_pretrained`` knows the names.
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
    model.load_state_dict(type(model).from_pretrained(folder, trust_remote_code=False).state_dict())
    return True


def write_manifest(folder: str | os.PathLike[str], strategy: str) -> None:
    """Say which files a checkpoint has, and of which size; called by one rank when all have written theirs.

    Args:
        folder: a checkpoint folder, complete but for ``trainer_state.json``.
        strategy: over what the run was sharded (``strategy_of``).
    """
    root = Path(folder)
    files = {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    write_atomically(root / MANIFEST_FILE, json.dumps({"strategy": strategy, "files": files}, indent=1) + "\n")


def strategy_in(folder: str | os.PathLike[str]) -> str | None:
    """Over what a checkpoint's run was sharded; None if it has no manifest (another Trainer wrote it)."""
    manifest = Path(folder) / MANIFEST_FILE
    return str(json.loads(manifest.read_text(encoding="utf-8"))["strategy"]) if manifest.is_file() else None


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that is whole, or None; others are named in a warning, with the reason."""
    numbered = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        reason = why_not_whole(path)
        if reason is None:
            return str(path)
        logger.warning("%s is passed over: %s", path, reason)
    return None


def why_not_whole(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is missing from a checkpoint, or None.

    Trainer writes ``trainer_state.json`` last, after every rank has written its files and the manifest lists them. A
    checkpoint without a manifest (of another Trainer) is taken for whole if it has that file.
    """
    root = Path(checkpoint)
    try:
        state = json.loads((root / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return f"it was not written to its end ({TRAINER_STATE_FILE} is missing or cut off)"
    if "global_step" not in state:
        return f"its {TRAINER_STATE_FILE} has no global_step"
    manifest = root / MANIFEST_FILE
    try:
        files: dict[str, int] = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else {}
    except json.JSONDecodeError as error:
        return f"{MANIFEST_FILE} is damaged ({error})"
    for name, size in files.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, but {size} were written"
    return None


def save_whole(folder: str | os.PathLike[str], name: str, state: dict[str, Any]) -> None:
    """Write a file of a checkpoint, for ``torch.load(weights_only=True)``, whole or not at all."""
    partial = Path(folder) / f"{name}.partial"
    torch.save(state, partial)
    os.replace(partial, Path(folder) / name)


def load_whole(folder: str | os.PathLike[str], name: str, *, mmap: bool = False) -> dict[str, Any] | None:
    """A file of a checkpoint, on the CPU, or None if there is none.

    Args:
        folder: a checkpoint folder.
        name: the file's.
        mmap: read a tensor only when it is used, for callers that want something else of the file.

    Raises:
        ValueError: the file is damaged.
    """
    source = Path(folder) / name
    if not source.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError) as error:  # what torch.load raises for a truncated archive
        raise ValueError(f"{source} is damaged ({error}); resume from an earlier checkpoint.") from error
    return state

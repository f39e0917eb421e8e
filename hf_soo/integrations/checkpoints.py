"""Trainer checkpoints: which folders are whole, and the factors' own file; how they are written is in ``saving``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_soo.files import read_object, sha256_of, write_atomically

logger = logging.getLogger(__name__)

PRECONDITIONER_FILE = "preconditioner.pt"
BASE_FILE = "base_optimizer.pt"
"""The base's state in whole tensors, written where it was sharded: to go on under another strategy or world size."""
MANIFEST_FILE = "manifest.json"
TRAINER_STATE_FILE = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
SAVING = "_saving"
"""Where a checkpoint is until it is whole; Trainer's pushes leave out what begins with an underscore."""
_WEIGHTS = "model.safetensors"
_MARK = "hf_soo"
_T = TypeVar("_T")


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


def load_whole(folder: str | os.PathLike[str], name: str, *, mmap: bool = False) -> dict[str, Any] | None:
    """A file of a checkpoint, on the CPU, or None if there is none.

    Args:
        folder: a checkpoint folder.
        name: the file's.
        mmap: read a tensor only when it is used, for callers that want something else of the file.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    source = Path(folder) / name
    if not source.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # of a damaged archive torch.load raises anything, and never says of which file
        raise ValueError(f"{source} is damaged ({error}); resume from an earlier checkpoint.") from error
    return state


# ---- is it whole? ----------------------------------------------------------------------------------------------------


def why_not_whole(checkpoint: str | os.PathLike[str], *, hashed: bool = True) -> str | None:
    """What is wrong with a checkpoint, beginning with the file's name, or None.

    What an older version wrote is known by its files' sizes; what another Trainer wrote, without a manifest, is taken
    for whole if its files open. A warning says then that damage cannot be seen.

    Args:
        checkpoint: the folder.
        hashed: read every file and compare its SHA-256.
    """
    root = Path(checkpoint)
    if not root.is_dir():
        return "there is no such folder"
    try:
        step = _step_of(root)
        manifest = _manifest_of(root)
        if manifest is None:
            _open_files(root)
        elif manifest.get("step", step) != step:
            return f"{MANIFEST_FILE} is of step {manifest['step']}, {TRAINER_STATE_FILE} of step {step}"
        else:
            _compare(root, manifest, hashed=hashed)
    except (ValueError, OSError) as error:
        return str(error)
    if hashed and "sha256" not in (manifest or {}):
        logger.warning("%s has no hashes of its files: they cannot be checked against damage", root)
    return None


def write_manifest(folder: Path, strategy: str, step: int, *, hashed: bool) -> None:
    """List the files of a checkpoint, when all have written theirs.

    Args:
        folder: the checkpoint.
        strategy: over what the run was sharded (``strategy_of``).
        step: of the run.
        hashed: read every file for its SHA-256.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest: dict[str, Any] = {"step": step, "strategy": strategy, "files": sizes}
    if hashed:
        manifest["sha256"] = _hashes(folder, sizes)
    manifest["digest"] = _digest(manifest)
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def manifest_mark(step: int) -> dict[str, Any]:
    """What a Trainer state's ``stateful_callbacks`` say where the checkpoint of that step has a manifest."""
    return {_MARK: {"args": {}, "attributes": {"manifest_of_step": step}}}


def strategy_in(folder: str | os.PathLike[str]) -> str | None:
    """Over what a checkpoint's run was sharded; None if it has no manifest (another Trainer wrote it).

    Raises:
        ValueError: the manifest is damaged.
    """
    manifest = _manifest_of(Path(folder))
    return None if manifest is None else str(manifest["strategy"])


def _step_of(root: Path) -> int:
    try:
        state = read_object(root / TRAINER_STATE_FILE)
    except ValueError as error:
        raise ValueError(
            f"it was not written to its end ({TRAINER_STATE_FILE} is missing, cut off or damaged: {error})"
        ) from error
    step, said = state.get("global_step"), state.get("stateful_callbacks")
    if not isinstance(step, int):
        raise ValueError(f"{TRAINER_STATE_FILE} has no global_step")
    marked = isinstance(said, dict) and said.get(_MARK) == manifest_mark(step)[_MARK]
    if marked and not (root / MANIFEST_FILE).is_file():
        raise ValueError(f"{MANIFEST_FILE} is missing")
    return step


def _manifest_of(root: Path) -> dict[str, Any] | None:
    if not os.path.lexists(root / MANIFEST_FILE):
        return None
    try:
        manifest = read_object(root / MANIFEST_FILE)
    except ValueError as error:
        raise ValueError(f"{MANIFEST_FILE} is damaged ({error})") from error
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("strategy"), str):
        raise ValueError(f"{MANIFEST_FILE} is damaged (it has no strategy or no files)")
    older = manifest.keys() == {"strategy", "files"}
    if not older and manifest.get("digest") != _digest(manifest):
        raise ValueError(f"{MANIFEST_FILE} is damaged (its digest is of another content)")
    return manifest


def _compare(root: Path, manifest: dict[str, Any], *, hashed: bool) -> None:
    files: dict[str, int] = manifest["files"]
    if _WEIGHTS in files and not (root / _WEIGHTS).is_file() and _has_shards(root, files):
        logger.warning("%s has other files of weights than were written: damage in them cannot be seen", root)
        files = {name: size for name, size in files.items() if name != _WEIGHTS}
    for name, size in files.items():
        if not (root / name).is_file():
            raise ValueError(f"{name} is missing")
        if (root / name).stat().st_size != size:
            raise ValueError(f"{name} has {(root / name).stat().st_size} bytes, but {size} were written")
    wanted = {name: value for name, value in manifest.get("sha256", {}).items() if hashed and name in files}
    for name, found in _hashes(root, wanted).items():
        if found != wanted[name]:
            raise ValueError(f"{name} is damaged: it has SHA-256 {found}, but {wanted[name]} was written")


def _hashes(root: Path, names: Iterable[str]) -> dict[str, str]:
    def read(name: str) -> str:
        try:
            return sha256_of(root / name)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error})") from error

    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        return dict(zip(names, pool.map(read, names), strict=True))


def _has_shards(root: Path, files: Collection[str]) -> bool:
    """Whether the weights were put into shards since; the index names them.

    Raises:
        ValueError: one is missing.
    """
    index = root / "model.safetensors.index.json"
    if index.name in files or not index.is_file():
        return False
    weights = read_object(index).get("weight_map")
    if not isinstance(weights, dict):
        raise ValueError(f"{index.name} has no weight_map")
    for shard in sorted(map(str, set(weights.values()))):
        if not (root / shard).is_file():
            raise ValueError(f"{shard} is missing, which {index.name} names")
    return True


def _open_files(root: Path) -> None:
    """Open the files of a checkpoint that has no list of them.

    Raises:
        ValueError: one is cut off.
    """
    for path in sorted(root.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.is_file() and path.open("rb").read(4) == b"PK\3\4":  # what torch.save writes
                zipfile.ZipFile(path).close()
        except (SafetensorError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.relative_to(root)} is damaged ({error})") from error


def _digest(manifest: dict[str, Any]) -> str:
    """Of a manifest without its own: damage in it shall not be looked for in the files."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- which one a run goes on from ------------------------------------------------------------------------------------


def last_whole_checkpoint(
    folder: str | os.PathLike[str],
    why_not: Callable[[Path], str | None] | None = None,
    among: Collection[str] | None = None,
) -> str | None:
    """The newest checkpoint of a run that is whole, or None; others are named in a warning, with the reason.

    Args:
        folder: the run's.
        why_not: says what is wrong with one; None: ``why_not_whole``.
        among: names to look at; None: all.
    """
    for path in sorted(Path(folder).glob(f"{SAVING}/checkpoint-*")):
        logger.warning("%s is passed over: its save did not end", path)
    for path in _newest_first(folder):
        if among is not None and path.name not in among:
            continue
        reason = (why_not or why_not_whole)(path)
        if reason is None:
            return str(path)
        logger.warning("%s is passed over: %s", path, reason)
    return None


def _newest_first(folder: str | os.PathLike[str]) -> list[Path]:
    numbered = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    return [path for _, path in sorted(numbered.items(), reverse=True)]


# ---- what the ranks of a run find together ---------------------------------------------------------------------------


def on_all_ranks(call: Callable[[], _T]) -> _T:
    """What it returns, on each rank; what one refuses, all refuse, so that none waits for another.

    Raises:
        ValueError: the first rank's.
    """
    found: list[_T] = []
    refusal = None
    try:
        found.append(call())
    except ValueError as error:
        refusal = str(error)
    for said in gather_object([refusal]):
        if said is not None:
            raise ValueError(said)
    return found[0]


def newest_whole(args: TrainingArguments) -> str | None:
    """The newest checkpoint in ``args.output_dir`` that all ranks see and find whole; every rank must call it."""
    seen = gather_object([{path.name for path in _newest_first(str(args.output_dir))}])
    return last_whole_checkpoint(str(args.output_dir), lambda path: _why_not(args, path), set.intersection(*seen))


def require_whole(args: TrainingArguments, checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is not whole on every rank; every rank must call it.

    Raises:
        ValueError: it is not.
    """
    reason = _why_not(args, checkpoint)
    if reason is not None:
        raise ValueError(
            f"{checkpoint} cannot be resumed from: {reason}; give an earlier checkpoint, or True for the newest whole "
            "one."
        )


def require_weights(args: TrainingArguments, checkpoint: str | os.PathLike[str]) -> None:
    """Refuse weights that are not what was written, whatever has become of the other files; all ranks must call it."""

    def compare() -> None:
        manifest = _manifest_of(Path(checkpoint))
        if manifest is not None:
            weights = {name: size for name, size in manifest["files"].items() if "model" in name}
            hashed = args.local_process_index == 0 and hashes(args)
            try:
                _compare(Path(checkpoint), manifest | {"files": weights}, hashed=hashed)
            except ValueError as error:
                raise ValueError(f"the weights of {checkpoint} cannot be loaded: {error}.") from error

    on_all_ranks(compare)


def hashes(args: TrainingArguments) -> bool:
    """Whether a run writes and compares hashes: ``hash_checkpoints``, which only our arguments have."""
    return bool(getattr(args, "hash_checkpoints", True))


def _why_not(args: TrainingArguments, checkpoint: str | os.PathLike[str]) -> str | None:
    reason = why_not_whole(checkpoint, hashed=args.local_process_index == 0 and hashes(args))
    return next((each for each in gather_object([reason]) if each is not None), None)

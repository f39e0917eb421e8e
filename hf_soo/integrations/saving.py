"""How a Trainer's checkpoint is saved, and who may write in the folder of a run.

A run's folder has ``checkpoint-N`` whole or not at all:

1. ``_saving`` is emptied, and every rank writes what it has into ``_saving/checkpoint-N``.
2. When all have, process 0 (with ``save_on_each_node`` one of each node) writes ``manifest.json``, the last: the step,
   the strategy, every other file with its size and SHA-256, and a digest of all that.
3. It forces files and folders onto the disk, moves an older ``checkpoint-N`` into ``_saving``, and gives the new one
   its name.
4. Only then is the new one pushed, and are older checkpoints deleted (``save_total_limit``).

A run that is killed at any moment, or finds no space, leaves its earlier checkpoints, and in ``_saving`` what nobody
reads and the next save takes away. ``trainer_state.json`` says that there is a manifest: what is left of a checkpoint
by a deletion that was killed is not taken for one of another Trainer, which has none.

Before a run goes on, every rank looks for the files and their sizes, the first process of each node reads them all for
their hashes, and what one finds wrong, all refuse. While a run goes on, process 0 holds the lock of its folder.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import sys
from pathlib import Path

from hf_soo.files import force_to_disk, force_tree_to_disk
from hf_soo.integrations.checkpoints import SAVING, write_manifest

logger = logging.getLogger(__name__)

_LOCK = "_lock"
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|inline_container|iostream error|os error \d+")
"""What torch's, safetensors' and tokenizers' writers say of a full disk; none of them raises OSError."""


def begin_save(run: Path) -> None:
    """Make an empty ``_saving`` in a run's folder; what a save that did not end has left there goes."""
    saving = run / SAVING
    if saving.is_symlink():
        saving.unlink()
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True, exist_ok=True)


def finish_save(saved: Path, strategy: str, step: int, *, hashed: bool) -> None:
    """Write a checkpoint's manifest, and give it its name; called by one process when all have written their files.

    Args:
        saved: its folder in ``_saving``.
        strategy: over what the run was sharded (``strategy_of``).
        step: of the run.
        hashed: read every file for its SHA-256.
    """
    write_manifest(saved, strategy, step, hashed=hashed)
    force_tree_to_disk(saved)
    saving, place = saved.parent, saved.parent.parent / saved.name
    if os.path.lexists(place):
        place.rename(saving / "replaced")
    saved.rename(place)
    force_to_disk(place.parent)
    shutil.rmtree(saving)


def write_error(error: Exception, saved: Path) -> OSError | None:
    """The error of a save that could not write, which names the file; None: ``error`` is of another kind.

    Args:
        error: what a writer raised.
        saved: the checkpoint's folder in ``_saving``.
    """
    if not isinstance(error, OSError) and not _WRITE_FAILED.search(str(error)):
        return None
    files = [path for path in saved.rglob("*") if path.is_file()]
    last, step = max(files, key=lambda path: path.stat().st_mtime_ns, default=saved), saved.name.rpartition("-")[2]
    return OSError(
        f"the checkpoint of step {step} in {saved.parent} could not be written ({error}), at or after the file "
        f"{last.name}; free space (that folder may go) or choose another output_dir, then resume from the last "
        "whole checkpoint."
    )


def hold(run: Path) -> int | None:
    """Take the lock of a run's folder, which ends with its descriptor, or with the process, however that ends.

    Args:
        run: the folder; made when absent.

    Returns:
        The descriptor; None where there are no locks, which a warning says.

    Raises:
        ValueError: another process has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        return None
    import fcntl  # not on Windows

    descriptor = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child of a dead process keeps it
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): see to it that no other run writes there.", run, error)
            return None
        raise ValueError(f"{run} is in use: {holder} trains there; let it end, or give another output_dir.") from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor

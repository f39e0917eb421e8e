"""File locks that end with the process that holds them, and a storage file of Optuna that survives any kill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def try_lock(file: Path) -> int | None:
    """A descriptor that holds the lock of a file until it is closed, in this process and its children; None: taken.

    Args:
        file: made when absent.
    """
    descriptor = _open(file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, waiting for it.

    Args:
        file: made when absent.
    """
    descriptor = _open(file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


class StorageLock:
    """The lock of Optuna's journal file: who gets it takes away the half of a line that a killed process wrote."""

    def __init__(self, file: Path) -> None:
        """Not held yet.

        Args:
            file: the journal.
        """
        self._file = file
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock, then mend the file."""
        self._descriptor = _open(self._file.with_name(f"{self._file.name}.lock"))
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        _drop_half_a_line(self._file)
        return True

    def release(self) -> None:
        """Let others have it."""
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None


def _drop_half_a_line(file: Path) -> None:
    with file.open("rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0:
            return
        stream.seek(size - 1)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)

"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: str | Path, text: str) -> None:
    """Write a text file whole or not at all, and on the disk before it has its name.

    Args:
        file: the file; an old one is replaced.
        text: its content.
    """
    path = Path(file)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""Files and folders that a user names, to be written: what cannot be is refused before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path


def folder_to_write(flag: str, given: str | Path) -> Path:
    """A folder that can be made, or is there and can be written to.

    Raises:
        ValueError: it is none of these.
    """
    _refuse(flag, str(given), Path(given))
    return Path(given)


def file_to_write(flag: str, given: str) -> Path:
    """A file that can be written; its folder is made.

    Raises:
        ValueError: it is a folder, or its folder cannot be written to.
    """
    file = Path(given)
    if file.is_dir():
        raise ValueError(f"{flag}={given!r} is a folder; give the name of a file, such as {str(file / 'report')!r}.")
    _refuse(flag, given, file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _refuse(flag: str, given: str, folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if why := "a file" if not there.is_dir() else "" if os.access(there, os.W_OK) else "read-only":
        raise ValueError(f"{flag}={given!r} cannot be written to: {str(there)!r} is {why}; give another folder.")

"""Files and folders that a user names, to be written: what cannot be is refused before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path


def folder_to_write(flag: str, given: str | Path) -> Path:
    """A folder that can be made, or is there and can be written to.

    Raises:
        ValueError: it is none of these.
    """
    folder = Path(given)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if why := "a file" if not there.is_dir() else "" if os.access(there, os.W_OK) else "read-only":
        raise ValueError(f"{flag}={str(given)!r} cannot be written to: {str(there)!r} is {why}; give another folder.")
    return folder


def file_to_write(flag: str, given: str) -> Path:
    """A file that can be written; its folder is made.

    Raises:
        ValueError: it is a folder, or its folder cannot be written to.
    """
    file = Path(given)
    if file.is_dir():
        raise ValueError(f"{flag}={given!r} is a folder; give the name of a file, such as {str(file / 'report')!r}.")
    folder_to_write(flag, file.parent).mkdir(parents=True, exist_ok=True)
    return file

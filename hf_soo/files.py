"""Files and folders that are whole or absent, what killed runs left beside them, and lines of text that are UTF-8."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")


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


def is_broken(text: str) -> bool:
    """Whether it holds half of a surrogate pair, as JSON's escapes can; UTF-8, and so a tokenizer, cannot."""
    return _SURROGATE.search(text) is not None


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; a wrong byte is named by file, line and offset."""
    offset = 0
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"file {str(file)!r}, line {number} is not UTF-8: byte 0x{raw[error.start]:02x} at offset "
                    f"{offset + error.start}; convert it first, for example with iconv."
                ) from error
            yield line.rstrip("\r\n").removeprefix("\ufeff" if offset == 0 else "")
            offset += len(raw)


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The number of every line that is not blank, from 1 on, and its value; a line that is no JSON is named.

    Args:
        file: one value a line.

    Yields:
        Number and value.

    Raises:
        ValueError: a line is no JSON, or no UTF-8.
    """
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error.msg}); give one object a line.") from error
        yield number, value


@contextmanager
def built_beside(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` that takes its place if the block succeeds, and goes if it does not.

    Args:
        output: the final place; what is there is replaced.

    Yields:
        The folder to fill, ``<output>.partial-<host>-<pid>``.
    """
    partial, retired = (output.with_name(f"{output.name}.{state}-{_owner()}") for state in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        if output.exists():
            output.rename(retired)
        partial.rename(output)
    except BaseException:
        if retired.exists():
            retired.rename(output)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def clear_leftovers(output: Path) -> None:
    """Tidy up what killed runs of this host left beside ``output``, and say so; folders of other hosts stay.

    Unfinished folders are removed. One that ``output`` was moved to while its successor took its place comes back.

    Args:
        output: the final place of those runs.
    """
    for state in ("old", "partial"):
        for folder in sorted(output.parent.glob(f"{glob.escape(output.name)}.{state}-*")):
            host, _, pid = folder.name.removeprefix(f"{output.name}.{state}-").rpartition("-")
            if host != socket.gethostname() or not pid.isdigit() or _is_running(int(pid)):
                continue
            if state == "old" and not output.exists():
                logger.warning("moved %s back to %s: a run was killed while it replaced it", folder, output)
                folder.rename(output)
            else:
                logger.warning("removed %s, which a killed run left behind", folder)
                shutil.rmtree(folder)


def _owner() -> str:
    """This process, in the name of a folder; hosts that share a file system do not share process numbers."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_running(pid: int) -> bool:
    """Whether another process of this host exists, whoever owns it."""
    if pid == os.getpid():  # this one has made nothing yet: the number is used again, as containers do
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Make sure that the files are on the disk before the folder gets its name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

"""Files and folders that are whole or absent, what killed runs left beside them, and text and JSON that are sound."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LONGEST_LINE = 32 << 20  # bytes

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
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8") as stream:  # never through a link that lies there
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """Digest of a file, read a megabyte at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_object(file: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ValueError: the file cannot be read, or is none.
    """
    with readable(file):
        content = file.read_bytes()
    try:
        found = parse_json(content.decode())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object, but a {type(found).__name__}")
    return found


def is_broken(text: str) -> bool:
    """Whether it holds half of a surrogate pair, as JSON's escapes can; UTF-8, and so a tokenizer, cannot."""
    return _SURROGATE.search(text) is not None


def files_below(folder: Path) -> list[Path]:
    """The files under a folder, by name, those of linked folders too; hidden ones are left out.

    Args:
        folder: where to look.

    Raises:
        ValueError: a folder cannot be read or is there twice, by a link, or a link leads nowhere.
    """
    found, seen, waiting = [], dict[str, Path](), [folder]
    for path in waiting:
        if (other := seen.setdefault(os.path.realpath(path), path)) != path:
            raise ValueError(f"{str(path)!r} and {str(other)!r} are one folder, by a link; take one of them away.")
        with readable(path), os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(path / entry.name)
                elif not entry.name.startswith("."):
                    found.append(path / entry.name)
                    if not entry.is_file():
                        raise ValueError(f"{str(found[-1])!r} is no file (a link that leads nowhere?); take it away.")
    return sorted(found)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Name what the system does not let us read.

    Args:
        path: file or folder that the block reads.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{str(error.filename or path)!r} cannot be read ({error.strerror or error}).") from error


def read_lines(file: Path, longest: int | None = LONGEST_LINE) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; what is no text is named by file, line and offset.

    Args:
        file: of text.
        longest: most bytes of a line, so that memory holds any of them; None: any number.

    Yields:
        Lines.

    Raises:
        ValueError: a byte that is no UTF-8 or NUL, a line that is too long, or a file that cannot be read.
    """
    offset = 0
    with readable(file), file.open("rb") as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(-1 if longest is None else longest + 1), b""), 1):
            if longest is not None and len(raw) > longest:
                raise ValueError(
                    f"file {str(file)!r}, line {number} has more than {longest >> 20} MiB; break it into lines."
                )
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"file {str(file)!r}, line {number} is not UTF-8: byte 0x{raw[error.start]:02x} at offset "
                    f"{offset + error.start}; convert it first, for example with iconv."
                ) from error
            if (place := raw.find(0)) >= 0:
                raise ValueError(
                    f"file {str(file)!r}, line {number} is no text: byte 0x00 at offset {offset + place}; write it "
                    "again, or convert it first, for example with iconv."
                )
            yield line.rstrip("\r\n").removeprefix("\ufeff" if offset == 0 else "")
            offset += len(raw)


def parse_json(text: str) -> Any:
    """A JSON value; a number that is too long, too deep a nest and a key given twice are errors of its kind, too.

    Args:
        text: one value.

    Raises:
        JSONDecodeError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("too deep a nest", text, _depth_exceeded(text)) from error
    except ValueError as error:  # a number of more digits than Python converts, or a key twice
        digits = re.search(r"\d{4301}", text)
        raise json.JSONDecodeError(str(error).partition(";")[0], text, digits.start() if digits else 0) from error


def jsonable(value: Any) -> Any:
    """Plain JSON values: numbers that are not finite become None, absolute paths their last part, the rest text.

    Args:
        value: a nest of mappings, sequences, numbers, strings, paths and anything else.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, str | Path):
        return os.path.basename(str(value).rstrip(os.sep)) if os.path.isabs(value) else str(value)
    if isinstance(value, Sequence):
        return [jsonable(item) for item in value]
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which `json` would keep the last of equal keys."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return made


def _depth_exceeded(text: str) -> int:
    """Where a JSON text is nested 200 deep."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 200:
            return match.start()
    return 0


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
            value = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error.msg}); give one object a line.") from error
        yield number, value


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """One process after the other, on all nodes that share the file system; one that dies holds nobody up.

    Args:
        file: the lock; made when absent, and left there.

    Raises:
        OSError: the file system has no locks.
    """
    import fcntl  # not on Windows

    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.lockf(
                descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # unlike flock's, no child of a dead process keeps it
        except (BlockingIOError, PermissionError):
            logger.info("waiting for another process that has %s", file)
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                f"{file} cannot be locked ({error}), so several processes would prepare the same; prepare with one "
                "process first, or use a file system with locks."
            ) from error
        yield
    finally:
        os.close(descriptor)


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
        force_tree_to_disk(partial)
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


def force_tree_to_disk(folder: Path) -> None:
    """Wait until a folder is on the disk with all that is in it: before it gets its name."""
    for path in (*folder.rglob("*"), folder):
        force_to_disk(path)


def force_to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    # not every system can open a folder, or force its list of files
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

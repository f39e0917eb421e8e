"""Folders that killed runs leave behind, folders that are read, and text and JSON that are damaged."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_soo.bert.data.folder import load_prepared
from hf_soo.files import LONGEST_LINE, built_beside, clear_leftovers, files_below, parse_json, read_lines

HERE = socket.gethostname()


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").write_text("data")


def test_leftovers_of_ended_processes_go(tmp_path: Path, gone: int, caplog: pytest.LogCaptureFixture) -> None:
    stays = [f"out.partial-{HERE}-{os.getppid()}", f"out.partial-elsewhere-{gone}", f"other.partial-{HERE}-{gone}"]
    stays += [f"out.partial-{HERE}-1", "out.partial-notes", "out"]  # process 1 runs, whoever owns it
    goes = [f"out.partial-{HERE}-{gone}", f"out.partial-{HERE}-{os.getpid()}", f"out.old-{HERE}-{gone}"]
    leave(tmp_path, *goes, *stays)
    with caplog.at_level(logging.WARNING):
        clear_leftovers(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == set(stays)
    assert caplog.text.count("which a killed run left behind") == 3


def test_replaced_folder_comes_back(tmp_path: Path, gone: int, caplog: pytest.LogCaptureFixture) -> None:
    leave(tmp_path, f"out.old-{HERE}-{gone}", f"out.partial-{HERE}-{gone}")
    with caplog.at_level(logging.WARNING):
        clear_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "data"
    assert "back to" in caplog.text


def test_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        with built_beside(tmp_path / "out") as folder:
            (folder / "data").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.partial-")
    with pytest.raises(ValueError, match="is no finished data set"):
        load_prepared(left)
    clear_leftovers(tmp_path / "out")
    with built_beside(tmp_path / "out") as folder:
        (folder / "data").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def grow(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("One.")
    return root


def names(root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in files_below(root)]


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    root = grow(tmp_path, "src/a.txt", "src/b/c.txt", "src/.hidden", "else/d.txt", "else/e/f.txt", "one.txt") / "src"
    (root / "linked").symlink_to("../else")
    (root / "b" / "g.txt").symlink_to(tmp_path / "one.txt")
    (root / ".odd").symlink_to("nowhere")  # hidden
    assert names(root) == ["a.txt", "b/c.txt", "b/g.txt", "linked/d.txt", "linked/e/f.txt"]
    (tmp_path / "way").symlink_to(root)
    assert names(tmp_path / "way") == names(root)


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("src/up", "..", "are one folder, by a link"),
        ("src/self", ".", "are one folder, by a link"),
        ("src/b/up", "../../src", "are one folder, by a link"),
        ("src/twin", "b", "are one folder, by a link"),
        ("src/twin", "../else/../src/b", "are one folder, by a link"),
        ("src/gone.txt", "nowhere", "gone.txt' is no file"),
        ("src/gone", "nowhere", "gone' is no file"),
        ("src/ring", "ring", r"ring' cannot be read \(Too many levels"),
    ],
)
def test_links_that_cannot_be_right_are_refused(tmp_path: Path, link: str, target: str, message: str) -> None:
    grow(tmp_path, "src/a.txt", "src/b/c.txt", "else/d.txt")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(ValueError, match=message):
        files_below(tmp_path / "src")


def test_what_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tmp_path, "a.txt", "locked/b.txt")
    scan = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"locked' cannot be read \(Permission denied\)"):
        files_below(tmp_path)
    with pytest.raises(ValueError, match=r"absent' cannot be read \(No such file"):
        list(read_lines(tmp_path / "absent"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe' is no file"):
        files_below(tmp_path)


def test_a_line_that_is_too_long_is_named_and_not_held(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"short\n")
        file.truncate(100 * LONGEST_LINE)  # of zeros, which take no place on the disk
    lines = read_lines(tmp_path / "a.txt")
    assert next(lines) == "short"
    with pytest.raises(ValueError, match=r"a.txt', line 2 has more than 32 MiB"):
        next(lines)
    (tmp_path / "b.txt").write_bytes(b"One.\nT\x00wo.\n")
    with pytest.raises(ValueError, match=r"b.txt', line 2 is no text: byte 0x00 at offset 6"):
        list(read_lines(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "key 'c' stands twice in an object"),
        ("[\n\n" + "[" * 200_000, "too deep a nest: line 3 column 199"),
        ('{"a": "[[[[{{{{\\"[[[",\n"b": ' + '{"a":' * 200_000, "too deep a nest: line 2"),
        ("[" * 100_000 + "]" * 100_000, "too deep a nest: line 1"),
        ("[1,\n" + "1" * 5000 + "]", "Exceeds the limit .* line 2 column 1"),
        ("-" + "1" * 5000, "Exceeds the limit"),
        ("[1, 2", "delimiter"),
        ("{}\n{}", "Extra data: line 2"),
    ],
)
def test_json_that_is_none(text: str, said: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=said) as error:
        parse_json(text)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5e3, null, true, "\\u00e9"], "b": {}}', "[" * 100 + "]" * 100, "1e999", "12"]
)
def test_json_that_is_sound(text: str) -> None:
    assert parse_json(text) == json.loads(text)

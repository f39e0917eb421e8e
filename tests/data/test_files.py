"""Folders that killed runs leave behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_soo.bert.data.folder import load_prepared
from hf_soo.files import built_beside, clear_leftovers

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

"""What the tests of the training scripts share."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only_run(folder: Path) -> dict[str, Any]:
    """The one run JSON of a folder."""
    (file,) = folder.glob("*.json")
    run: dict[str, Any] = json.loads(file.read_text())
    return run


def check_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    """One line on stderr says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]

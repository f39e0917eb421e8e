"""What the tests of the training scripts share."""

from __future__ import annotations

import gc
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_soo.bert.data.prepare import PrepareConfig, prepare

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gc.collect()
    gc.freeze()  # as in conftest.py: it has imported more
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


def write_corpus(folder: Path) -> Path:
    """40 documents of 6 sentences over 120 words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abdeilmnorst", k=5)) for _ in range(120)]
    documents = ["\n".join(f"The {' '.join(chance.choices(words, k=6))}." for _ in range(6)) for _ in range(40)]
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n")
    return folder / "text.txt"


def prepare_corpus(folder: Path, eval_documents: float = 0.2) -> Path:
    """That corpus as pairs of at most 32 tokens, in FOLDER/data."""
    data = folder / "data"
    text = str(write_corpus(folder))
    prepare(PrepareConfig(text, str(data), vocab_size=120, max_seq_length=32, eval_documents=eval_documents))
    return data

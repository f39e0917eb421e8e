"""Tiny SQuAD files, a vocabulary that spells their words, and a random BERT in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from tests.scripts.script_runs import ROOT

DATA = Path(os.environ.get("HF_SOO_DATA", ROOT.parent / "shared" / "data")) / "squad"
COLOURS = ("red", "blue", "green", "pink", "teal", "gold")
WORDS = [f"w{i}" for i in range(30)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *COLOURS, "which", "colour", "?", ".", "##s", "the"]


def real_file(name: str) -> Path:
    """A file of the real data; skips the test where it is absent."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not there; set HF_SOO_DATA to a folder with squad/{name}")
    return path


def nested(*paragraphs: dict[str, Any], version: str = "1.1") -> dict[str, Any]:
    return {"version": version, "data": [{"title": "t", "paragraphs": list(paragraphs)}]}


def paragraph(context: str, *qas: dict[str, Any]) -> dict[str, Any]:
    return {"context": context, "qas": list(qas)}


def qa(name: str, context: str, *answers: str, question: str = "which colour ?", **more: Any) -> dict[str, Any]:
    """A question whose answers stand in the context."""
    found = [{"text": text, "answer_start": context.index(text)} for text in answers]
    return {"id": name, "question": question, "answers": found, **more}


def colour_questions(count: int, seed: int, *, words: int = 12, impossible: int = 0) -> dict[str, Any]:
    """The answer is the one colour among the words of the context; every `impossible`-th context has none."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for number in range(count):
        text = list(rng.choice(WORDS, size=words))
        colour = str(rng.choice(COLOURS))
        none = bool(impossible) and number % impossible == 0
        if not none:
            text[rng.integers(words)] = colour
        context, name = " ".join(text), f"q{seed}-{number}"
        marks = {"is_impossible": none} if impossible else {}
        paragraphs.append(paragraph(context, qa(name, context, *([] if none else [colour]), **marks)))
    return nested(*paragraphs, version="v2.0" if impossible else "1.1")


def write(file: Path, content: Any) -> str:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def tokenizer(folder: Path) -> BertTokenizer:
    write(folder / "vocab.txt", "".join(f"{piece}\n" for piece in PIECES))
    return BertTokenizer(vocab=str(folder / "vocab.txt"))


def save_model(folder: Path, **changes: Any) -> str:
    """A random BERT of 64 positions and its tokenizer."""
    folder.mkdir()
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(PIECES), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, **changes,
    }  # fmt: skip
    BertModel(BertConfig(**settings)).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return str(folder)

"""A tiny BERT with its vocabulary, and small files in the layouts of GLUE's archive, for the tests of run_glue.py."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("fine", "good", "nice", "warm"), ("bad", "cold", "poor", "sad")
WORDS = [*GOOD, *BAD, "the", "a", "movie", "dog", "is", "was", '"', ".", "not"]


def make_model(folder: Path, positions: int = 32, words: int = len(WORDS)) -> Path:
    """A BERT of one layer and its tokenizer, as save_pretrained writes them."""
    torch.manual_seed(1)
    vocabulary = [*SPECIAL, *WORDS[:words]]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def sentence(label: int, draw: random.Random) -> str:
    """Its first word says the label."""
    first = draw.choice((BAD, GOOD)[label])
    return " ".join([first, *draw.choices(WORDS[8:], k=draw.randint(2, 6))])


def write_archive(root: Path, train: int = 48, dev: int = 20) -> Path:
    """All nine tasks, in the layouts of the official archive; MNLI, QNLI, QQP as JSON, one folder deeper."""
    for part, count in (("train", train), ("dev", dev)):
        draw = random.Random(part)
        pairs = [(index % 2, sentence(index % 2, draw), sentence(index % 2, draw)) for index in range(count)]
        words = ("entailment", "not_entailment")
        _write(root / f"CoLA/{part}.tsv", [f"gj04\t{y}\t\t{a}" for y, a, _ in pairs])
        _write(root / f"SST-2/{part}.tsv", ["sentence\tlabel", *(f"{a}\t{y}" for y, a, _ in pairs)])
        header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        _write(root / f"MRPC/{part}.tsv", [header, *(f'{y}\t1\t2\t" {a}\t{b}' for y, a, b in pairs)])
        header = "index\tgenre\tsentence1\tsentence2\tscore"
        _write(root / f"STS-B/{part}.tsv", [header, *(f"{i}\tx\t{a}\t{b}\t{4.5 * y + i % 3 / 8:.3f}"
                                                      for i, (y, a, b) in enumerate(pairs))])  # fmt: skip
        rows = [f"{i}\t{a}\t{b}\t{words[y]}" for i, (y, a, b) in enumerate(pairs)]
        _write(root / f"RTE/{part}.tsv", ["index\tsentence1\tsentence2\tlabel", *rows])
        rows = [f"{i}\t{a}\t{b}\t{y}" for i, (y, a, b) in enumerate(pairs)]
        _write(root / f"WNLI/{part}.tsv", ["index\tsentence1\tsentence2\tlabel", *rows])
        for name, labels in (("MNLI", ("entailment", "neutral")), ("QNLI", words), ("QQP", ("0", "1"))):
            content = {str(i): {"text_a": a, "text_b": b, "label": labels[y]} for i, (y, a, b) in enumerate(pairs)}
            _write(root / f"subset/{name}/{part}.json", [json.dumps(content, indent=1)])
    return root


def write_tests(root: Path, count: int = 5) -> None:
    """Test parts without labels of MRPC, RTE and STS-B, MNLI's three missing parts, and the diagnostic set."""
    draw = random.Random("test")
    pairs = [(sentence(index % 2, draw), sentence(index % 2, draw)) for index in range(count)]
    header = "index\t#1 ID\t#2 ID\t#1 String\t#2 String"
    _write(root / "MRPC/test.tsv", [header, *(f"{i}\t1\t2\t{a}\t{b}" for i, (a, b) in enumerate(pairs))])
    for name in ("RTE", "STS-B"):
        rows = (f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(pairs))
        _write(root / f"{name}/test.tsv", ["index\tsentence1\tsentence2", *rows])
    for part in ("test_matched", "test_mismatched", "dev_mismatched"):
        entries = [{"premise": a, "hypothesis": b, "label": i % 3} for i, (a, b) in enumerate(pairs)]
        _write(root / f"subset/MNLI/{part}.jsonl", [json.dumps(entry) for entry in entries])
    rows = (f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(pairs))
    _write(root / "subset/diagnostic/diagnostic.tsv", ["index\tsentence1\tsentence2", *rows])


def _write(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

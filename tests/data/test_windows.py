"""`hf_soo.lm.data`: bytes, held-out parts, windows and masks."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_soo.lm.data import IGNORE, TextArguments, TextData, Windows, unigram_entropy
from hf_soo.text.corpus import Corpus
from tests.scripts.script_runs import write_corpus

DOCUMENTS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, each of one letter and its own number."""
    file = tmp_path_factory.mktemp("windows") / "text.txt"
    file.write_text("\n\n".join(f"document {number:02d} says {'xyz'[number % 3] * 40}" for number in range(DOCUMENTS)))
    return file


def load(source: Path | str, **settings: Any) -> TextData:
    return TextData.load(TextArguments(source=str(source), **{"window": 16, **settings}))


def documents(part: np.ndarray) -> list[int]:
    return [int(line.split()[1]) for line in part.tobytes().decode().splitlines()]


def test_the_parts_share_no_document_and_are_all_of_the_text(text: Path) -> None:
    """Of every 20 documents the 10th and the 20th are held out, each for its purpose."""
    choose, claim = load(text), load(text, held_out="claim")
    assert documents(choose.eval) == [9, 29, 49] and documents(claim.eval) == [19, 39, 59]
    assert documents(choose.train) == documents(claim.train) == [n for n in range(DOCUMENTS) if n % 20 not in (9, 19)]
    assert choose.train.tobytes() == "".join(
        f"{line}\n" for number, line in enumerate(Corpus(str(text)).texts()) if number % 20 not in (9, 19)
    ).encode("ascii")
    parts = {key: value for key, value in choose.description.items() if key != "held_out"}
    assert parts == {key: value for key, value in claim.description.items() if key != "held_out"}
    assert (choose.description["held_out"], claim.description["held_out"]) == ("choose", "claim")


def test_only_ascii_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["Café Ångström 北京 – é"] * 20))
    data = load(tmp_path / "a.txt", window=4)
    assert data.eval.tobytes() == b"Cafe Angstrom   e\n" and data.symbols == 256 and data.eval.dtype == np.uint8


def test_reading_stops_at_max_bytes_and_the_digest_is_of_what_was_read(text: Path, tmp_path: Path) -> None:
    whole, half = load(text), load(text, max_bytes=1700)
    assert documents(half.train)[-1] < DOCUMENTS - 10 and whole.description["digest"] != half.description["digest"]
    (tmp_path / "text.txt").write_text(text.read_text())
    assert load(tmp_path / "text.txt").description == whole.description  # the folder's name is no part of it
    (tmp_path / "text.txt").write_text(text.read_text().replace("document 19", "document 91"))
    assert load(tmp_path / "text.txt").description["digest"] != whole.description["digest"]


def test_unigram_entropy_is_that_of_the_counts(text: Path) -> None:
    data = load(text)
    counts = Counter(data.train.tobytes())
    expected = -sum(n / len(data.train) * math.log(n / len(data.train)) for n in counts.values())
    assert data.description["unigram_entropy"] == pytest.approx(expected, rel=1e-12)
    assert unigram_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(math.log(256))
    assert unigram_entropy(np.zeros(5, dtype=np.uint8)) == 0.0


SYMBOLS = np.arange(1000, dtype=np.int32)  # a window says where it is


def starts(windows: Windows) -> list[int]:
    return [int(windows[number]["input_ids"][0]) for number in range(len(windows))]


def test_training_windows_depend_on_seed_epoch_and_number_alone() -> None:
    windows, again, other = (Windows(SYMBOLS, 10, seed=seed) for seed in (3, 3, 4))
    assert len(windows) == 100 and starts(windows) == starts(again) != starts(other)
    assert [starts(windows)[number] for number in (7, 2)] == [int(windows[number]["input_ids"][0]) for number in (7, 2)]
    first = starts(windows)
    windows.set_epoch(1)
    assert starts(windows) != first
    windows.set_epoch(0)
    assert starts(windows) == first
    # uniform over the 991 places: mean 495 with a deviation of 286 / sqrt(100), five of them
    assert abs(np.mean(first) - 495) < 143 and min(first) >= 0 and max(first) <= 990
    example = windows[5]
    assert torch.equal(example["labels"], example["input_ids"]) and example["labels"].dtype == torch.int64


@pytest.mark.parametrize(("count", "expected"), [(4, [0, 330, 660, 990]), (500, [*range(0, 1000, 10)]), (1, [0])])
def test_evaluation_windows_are_spread_and_do_not_overlap(count: int, expected: list[int]) -> None:
    assert starts(Windows(SYMBOLS, 10, count=count)) == expected


def test_masks_are_exact_and_drawn_anew_each_epoch() -> None:
    """A share of 15 % of 24 is 4: they have labels, and the model sees the mask in their places, and nothing else."""
    windows = Windows(SYMBOLS, 24, mask=2000, seed=1)
    for number in range(len(windows)):
        example = windows[number]
        chosen = example["labels"] != IGNORE
        assert int(chosen.sum()) == 4 and torch.equal(example["input_ids"] == 2000, chosen)
        whole = torch.where(chosen, example["labels"], example["input_ids"])
        assert torch.equal(whole, whole[0] + torch.arange(24))
    before = [(windows[n]["labels"] != IGNORE).tolist() for n in range(len(windows))]
    windows.set_epoch(1)
    after = [(windows[n]["labels"] != IGNORE).tolist() for n in range(len(windows))]
    assert sum(a == b for a, b in zip(before, after, strict=True)) <= 2  # of 41; a pair is equal once in 10,626
    assert int((Windows(SYMBOLS, 2, mask=2000)[0]["labels"] != IGNORE).sum()) == 1  # at least one


def test_every_place_is_masked_equally_often() -> None:
    windows = Windows(np.arange(24_000, dtype=np.int32), 24, mask=2000, seed=0)
    count = sum((windows[number]["labels"] != IGNORE).long() for number in range(len(windows)))
    # 1,000 windows, each place with p = 1/6: 167 with a deviation of 11.8
    assert isinstance(count, torch.Tensor) and int(count.min()) > 117 and int(count.max()) < 217


def test_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    """Instead of bytes: documents end with [SEP], and [MASK] is the vocabulary's own."""
    from tests.data.squad_data import tokenizer

    tokens = tokenizer(tmp_path)
    tokens.save_pretrained(tmp_path / "tokenizer")
    corpus = write_corpus(tmp_path)
    data = load(corpus, tokenizer_name=str(tmp_path / "tokenizer"), objective="masked", window=8)
    assert (data.symbols, data.mask) == (len(tokens), tokens.mask_token_id)
    assert int((data.eval == tokens.sep_token_id).sum()) == 2  # documents of 40
    assert load(corpus, tokenizer_name=str(tmp_path / "tokenizer"), window=8).mask is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 1}, "window=1 is not allowed; give a whole number >= 2"),
        ({"mask_prob": 1.0}, r"mask_prob=1.0 is not allowed; give a number in \(0, 1\)"),
        ({"max_eval_samples": 0}, "max_eval_samples=0 is not allowed; give a whole number >= 1"),
        ({"max_bytes": 0}, "max_bytes=0 is not allowed; give a whole number >= 1"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextArguments(**given)


def test_what_cannot_be_read(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 174 symbols for 'choose', .* and window=400; give more text or a"):
        load(text, window=400)
    with pytest.raises(ValueError, match="is no file or folder here"):
        load(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"tokenizer_name='.*' does not load"):
        load(text, tokenizer_name=str(tmp_path))

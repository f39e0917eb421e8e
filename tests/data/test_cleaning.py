"""What is left out of a corpus, by which rule, and that it is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_soo.text.cleaning import Cleaning, RawDocument, _digest, _DigestSet, _remove_headings
from hf_soo.text.corpus import Corpus

RECORD = (
    "Anarchism\n\nAnarchism is a philosophy.\n\nEtymology and terms \n\nThe word is old.\nIt is Greek.\n\nSee also\n"
)


def kept(text: str, *, title: str = "", record: bool = False, keep: bool = False) -> tuple[list[str], int]:
    lines, headings = _remove_headings(RawDocument(text.splitlines(), title, record), keep)
    return [line for line in lines if line.strip()], headings


def test_unmarked_headings_of_records() -> None:
    text = ["Anarchism is a philosophy.", "The word is old.", "It is Greek."]
    assert kept(RECORD, record=True) == (text, 3)
    assert kept(RECORD, title="Anarchism", record=True) == (text, 2)  # the title is no heading
    assert kept(RECORD, title="Anarchism", record=True, keep=True)[0] == [
        text[0],
        "Etymology and terms ",
        *text[1:],
        "See also",
    ]
    assert kept(RECORD)[1] == 0  # plain text, one sentence a line, may lack full stops


@pytest.mark.parametrize(
    "text",
    [
        "Four",  # a text of one line
        "One\nTwo\nThree",  # no blank line: lines are all there is
        "A line.\n\nTwo words\nin a block\n\nAn end.",  # not alone
        "A line.\n\nlower case\n\nAn end.",
        "A line.\n\nIt ends as a sentence.\n\nReally?\n\n" + "Long " * 14 + "\n\nAn end.",
    ],
)
def test_what_may_be_text_is_kept(text: str) -> None:
    assert kept(text, record=True) == ([line for line in text.splitlines() if line], 0)


def test_marked_headings() -> None:
    text = "= Title =\nFirst. \n == Part == \n = = Sub = = \nSection::::History.\n a = b = c\nLast"
    assert kept(text) == (["First. ", " a = b = c", "Last"], 4)
    assert kept(text, keep=True)[1] == 0


def test_wikitext_titles_begin_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        " \n = One = \n \n First . \n \n = = Part = = \n \n Second . \n \n = Two = \n \n Third . \n"
    )
    assert list(Corpus(str(tmp_path / "a.txt"))) == [["First .", "Second ."], ["Third ."]]


def test_every_document_is_counted(tmp_path: Path) -> None:
    texts = ["Long enough to keep.", "Short.", "", "LONG  enough\nto keep.", "Long enough, too.\n\nHead\n\nEnd.", None]
    rows = [{"title": "Head", "text": text} for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = Corpus(str(tmp_path / "a.jsonl"), cleaning=Cleaning(min_characters=10, keep_duplicates=False))
    for _ in range(2):  # a second pass begins anew
        assert list(corpus.texts()) == ["Long enough to keep.", "Long enough, too.\nEnd."]
        assert corpus.counts.as_dict() == {
            "documents": 6,
            "text_bytes": 20 + 6 + 21 + 29,
            "left_out": {"empty": 2, "too_short": 1, "duplicate": 1, "without_tokens": 0},
            "headings_left_out": 1,
        }
    assert len(list(Corpus(str(tmp_path / "a.jsonl"), cleaning=Cleaning(10)))) == 3
    with pytest.raises(ValueError, match=r"holds no text to keep: read 6 documents .* left out 2 empty, 4 too short"):
        list(Corpus(str(tmp_path / "a.jsonl"), cleaning=Cleaning(1000)))


def test_limit_counts_the_documents_that_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nOne.\n\nTwo.\n\nThree.")
    corpus = Corpus(str(tmp_path / "a.txt"), limit=2, cleaning=Cleaning(keep_duplicates=False))
    assert list(corpus.texts()) == ["One.", "Two."] and corpus.counts.left_out["duplicate"] == 1


def test_digest_sees_letters_alone() -> None:
    assert _digest("A b\nc") == _digest(" a  B C ") != _digest("ab c")


def test_digest_set_is_a_set_of_8_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_DigestSet, "MOST_RECENT", 100)
    numbers = [*np.random.default_rng(0).integers(0, 2000, size=5000).tolist(), 2**64 - 1, 0, 2**64 - 1]
    digests, reference = _DigestSet(), set()
    for number in numbers:
        assert digests.add(number) == (number not in reference)
        reference.add(number)
    assert len(digests) == len(reference)
    assert digests._sorted.nbytes == 8 * (len(reference) - len(digests._recent)) and len(digests._recent) < 100


def test_least_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match="min_document_characters is 0; it must be at least 1"):
        Cleaning(min_characters=0)

"""What is left out of a corpus, by which rule, and that it is counted."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_soo.lm.data import TextArguments, TextData
from hf_soo.text.cleaning import Cleaner, Cleaning, CorpusCounts, Kind, RawDocument, _digest, _DigestSet, unescaped
from hf_soo.text.corpus import Corpus

RECORD = (
    "Anarchism\n\nAnarchism is a philosophy.\n\nEtymology and terms \n\nThe word is old.\nIt is Greek.\n\nSee also\n"
)


def kept(text: str, *, title: str = "", kind: Kind = "text", **rules: bool) -> tuple[list[str], int]:
    counts = CorpusCounts()
    left = Cleaner(Cleaning(**rules), counts)(RawDocument(text.splitlines(), title, kind))
    return (left or "").splitlines(), counts.headings


def test_unmarked_headings_of_records() -> None:
    text = ["Anarchism is a philosophy.", "The word is old.", "It is Greek."]
    assert kept(RECORD, kind="record") == (text, 3)
    assert kept(RECORD, title="Anarchism", kind="record") == (text, 2)  # the title is no heading
    assert kept(RECORD, title="Anarchism", kind="record", keep_headings=True)[0] == [
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
    assert kept(text, kind="record") == ([line for line in text.splitlines() if line], 0)


def test_marked_headings() -> None:
    text = "= Title =\nFirst. \n == Part == \n = = Sub = = \nSection::::History.\n a = b = c\nLast"
    assert kept(text) == (["First. ", " a = b = c", "Last"], 4)
    assert kept(text, keep_headings=True)[1] == 0


SECTION_TITLES = (
    "History.", "Early life.", "See also.", "External links.", "1980s.", "2003 season.",
    "Life and career (1900–1950).", '"Captain EO" (1986).', "Move to the U.S..", "Dr. Martin Luther King Jr..",
    "St. Thomas University (STU).", "Étienne.", "Modules vs. namespace.", "2008–2010: Recession.",
    "Newton's binomial series.", "Air shows.", "Free will.", "Ancient remains.", "Hidden Markov model.",
    "Treaty of Kiel to World War II.", "Q&A.", "Her career.", "Q & A.",
)  # fmt: skip
SENTENCES = (
    "It closed in 1950.", "He died.", "She sang.", "They left.", "There are others.", "This was it.",
    "Homer was blind.", "The lager is pale.", "Knuth joined Caltech.", "Rome became a republic.",
    "Some men can fly.", "The film has no end.", "Twenty of his stories became motion pictures.",
    "It ended. So did he.", "He left town. Nobody knew.", "Why?", "Go!", "An opening line without its full stop",
    "and the rest of it.", "What followed...", "The heading's text follows here:",
    "On receiving his degree, he taught at a college of the north.", "Berthollet married early, had died by then.",
)  # fmt: skip


@pytest.mark.parametrize("line", SECTION_TITLES)
def test_section_titles_of_wikiextractor_are_left_out(line: str) -> None:
    assert kept(f"{line}\nIt is text.\n{line}", kind="wiki") == (["It is text."], 2)
    assert kept(f"{line}\nIt is text.", kind="wiki", keep_headings=True) == ([line, "It is text."], 0)
    assert kept(f"{line}\nIt is text.", kind="wiki", wiki_as_written=True) == ([line, "It is text."], 0)
    assert kept(f"{line}\nIt is text.") == ([line, "It is text."], 0)  # other text has no such lines
    assert kept(line, kind="wiki") == ([line], 0)  # all there is


@pytest.mark.parametrize("line", SENTENCES)
def test_short_sentences_of_wikiextractor_are_kept(line: str) -> None:
    assert kept(f"{line}\nHistory.\n{line}", kind="wiki") == ([line, line], 1)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("R&amp;D &lt; &gt; &quot;a&quot; &apos;b&apos;", "R&D < > \"a\" 'b'"),
        ("5&nbsp;tonnes &ndash; caf&eacute; &hellip;", "5\xa0tonnes – café …"),
        ("&#39;a&#x27; &#8211; &#X200B;", "'a' – \u200b"),
        ("&amp;amp; &amp;lt;b&amp;gt; 5&amp;nbsp;t &amp;amp;quot; &amp;#39;", "& <b> 5\xa0t \" '"),
        ("&amp;amp;amp;lt;", "<"),
        ("AT&T, R&D; a & b; ?a=1&copy=2&lt=3 &unknown; &; &#; &#x; &#xG;", None),
        ("&#0; &#xD800; &#1114112; &#9999999;", "\ufffd \ufffd \ufffd \ufffd"),
        (f"&#{'9' * 5000}; &#x{'f' * 5000}; &{'a' * 5000};", None),
    ],
)
def test_entities_are_put_back(written: str, meant: str | None) -> None:
    meant = written if meant is None else meant
    assert unescaped(written) == meant
    assert kept(f"{written} is it.\nHe left.", kind="wiki")[0][0] == f"{meant} is it."
    assert kept(f"{written} is it.", kind="wiki", wiki_as_written=True) == ([f"{written} is it."], 0)
    assert kept(f"{written} is it.") == ([f"{written} is it."], 0)


@given(st.text(max_size=40).filter(lambda text: not re.search(r"&[#\w]+;", text)), st.integers(1, 3))
def test_what_was_escaped_comes_back(text: str, times: int) -> None:
    written = text
    for _ in range(times):
        written = html.escape(written)
    assert unescaped(written) == text


@pytest.mark.parametrize(
    ("head", "title", "rest"),
    [
        ('<doc id="5" url="?curid=5" title="Mill &amp; Sons">', "Mill &amp; Sons", "It is a firm."),
        ('<doc id="5" url="?curid=5" title="Mill & Sons">', "Mill &amp; Sons", "It is a firm."),
        ('<doc id="5" url="?curid=5" title=""Weird Al" Yankovic">', '"Weird Al" Yankovic', "He sings."),
        ("<doc id=5>", "Mill", "It is a firm."),
        ('<doc id="5" title="Mill">', "It is the first line, no title.", "It is a firm."),
    ],
)
def test_title_of_wikiextractor_is_no_text(tmp_path: Path, head: str, title: str, rest: str) -> None:
    (tmp_path / "wiki_00").write_text(f"{head}\n{title}\n\n{rest}\n</doc>\n", encoding="utf-8")
    text = f"{title}\n{rest}" if "no title" in title else rest
    assert list(Corpus(str(tmp_path)).texts()) == [text]
    row = {"url": "?curid=5", "title": "Mill & Sons", "text": "Mill &amp; Sons\n\nHistory.\nIt is R&amp;D."}
    (tmp_path / "wiki_00").write_text(json.dumps(row), encoding="utf-8")
    assert list(Corpus(str(tmp_path)).texts()) == ["It is R&D."]


def test_language_models_read_clean_text_or_that_which_is_written(tmp_path: Path) -> None:
    documents = (f"<doc id={i}>\nT\n\nHistory.\nText {i} of R&amp;D is here.\n</doc>\n" for i in range(40))
    (tmp_path / "wiki_00").write_text("".join(documents))
    clean, written = (
        TextData.load(TextArguments(source=str(tmp_path), window=8, wiki_as_written=flag)) for flag in (False, True)
    )
    assert bytes(clean.train).startswith(b"Text 0 of R&D is here.\nText 1 of")
    assert bytes(written.train).startswith(b"History.\nText 0 of R&amp;D is here.\nHistory.\n")
    assert clean.description["digest"] != written.description["digest"]


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

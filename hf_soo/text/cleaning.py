"""What of a corpus is text to train on: headings go, and so do empty, very short and repeated documents.

Headings, by rules that only take what cannot be a sentence of the text:

    title       the first line of a WikiExtractor document; the first line of a record that repeats its ``title``
    marked      `` = Heading = `` (WikiText), ``Section::::Heading`` (WikiExtractor --sections)
    unmarked    in records (JSON lines, Parquet, hub) whose text has blank lines: a line alone between blank lines, of
                at most 60 characters, that begins with a capital or a digit and ends with a letter, a digit or ")"
    full stop   in WikiExtractor's output, which puts one behind a section's title ("Early life."): a line of at most
                seven words that reads as a heading without it, and has no pronoun and no common verb.
                Of 304,424 lines of the English Wikipedia 71,064 are; of 200 drawn at random none was a sentence

WikiExtractor's output is escaped as HTML, once or twice (``&amp;nbsp;``): its entities are put back first. Repeated
documents are those with the same letters but for case and white space.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

LONGEST_HEADING = 60
MOST_WORDS = 7  # of a heading that ends with a full stop
LONGEST_ABBREVIATION = 5  # with its full stop: a longer word ends a sentence

_MARKED = re.compile(r"\s*(?:(=+) .* \1|Section::::.*)\s*")
# With its semicolon: "&copy=1" of an address is none.
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_QUOTES = "\"'“”‘’"
_SUBJECTS = frozenset(("It", "He", "She", "They", "We", "I", "You", "There", "This", "These", "Here"))
_VERBS = frozenset({  # and pronouns
    "it", "he", "she", "they", "we", "is", "are", "was", "were", "be", "been", "has", "have", "had", "do", "does",
    "did", "can", "could", "may", "might", "must", "will", "would", "shall", "should", "became", "become",
    "becomes", "began", "begins", "came", "comes", "contains", "died", "gave", "gives", "includes", "joined",
    "knew", "lived", "married", "received", "returned", "said", "says", "took", "takes", "went", "wrote",
})  # fmt: skip


Kind = Literal["text", "record", "wiki"]  # plain; of JSON lines, Parquet or the hub; WikiExtractor's


@dataclass(frozen=True, slots=True)
class RawDocument:
    """The lines of a document as they were read, blank ones too, and what the file says of them."""

    lines: list[str]
    title: str = ""  # a first line equal to it is no text
    kind: Kind = "text"


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What is left out; by default only documents without text."""

    min_characters: int = 1
    keep_duplicates: bool = True
    keep_headings: bool = False
    wiki_as_written: bool = False  # WikiExtractor's entities and section titles stay

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: the least length is below 1.
        """
        if self.min_characters < 1:
            raise ValueError(
                f"min_document_characters is {self.min_characters}; it must be at least 1 (keep all text)."
            )


@dataclass(slots=True)
class CorpusCounts:
    """What one pass over a corpus read and left out."""

    documents: int = 0
    text_bytes: int = 0
    headings: int = 0
    left_out: Counter[str] = field(
        default_factory=lambda: Counter({"empty": 0, "too_short": 0, "duplicate": 0, "without_tokens": 0})
    )

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """The counts as plain values."""
        return {
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "left_out": dict(self.left_out),
            "headings_left_out": self.headings,
        }

    def __str__(self) -> str:
        """The counts as a phrase."""
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.left_out.items())
        return (
            f"read {self.documents:,} documents ({self.text_bytes / 1e6:,.1f} MB of text); left out {reasons}; "
            f"{self.headings:,} headings left out of the others"
        )


class Cleaner:
    """Takes the documents of one pass, and says what is left of each."""

    def __init__(self, rules: Cleaning, counts: CorpusCounts) -> None:
        """Set up a pass that leaves out what ``rules`` say, and keeps ``counts`` up to date."""
        self.rules, self.counts = rules, counts
        self._seen = _DigestSet()

    def __call__(self, document: RawDocument) -> str | None:
        """The text of a document, a paragraph a line; None when the document is left out."""
        lines, title, kind = document.lines, document.title, document.kind
        if kind == "wiki" and self.rules.wiki_as_written:
            kind = "text"
        if kind == "wiki":
            lines, title = [unescaped(line) for line in lines], unescaped(title)
        lines = _without_title(lines, title)
        lines, headings = (lines, 0) if self.rules.keep_headings else _remove_headings(lines, kind)
        text = "\n".join(line for line in lines if line and not line.isspace())
        self.counts.documents += 1
        self.counts.text_bytes += max(0, sum(len(line.encode()) + 1 for line in document.lines) - 1)
        if reason := self._reason_against(text):
            self.counts.left_out[reason] += 1
            return None
        self.counts.headings += headings
        return text

    def _reason_against(self, text: str) -> str | None:
        """Why a document is left out, if it is."""
        if not text:
            return "empty"
        if len(text) < self.rules.min_characters:
            return "too_short"
        return "duplicate" if not self.rules.keep_duplicates and not self._seen.add(_digest(text)) else None


def unescaped(line: str) -> str:
    """A line with HTML's entities put back, those that were escaped a second time too."""
    while "&" in line and (plain := _ENTITY.sub(lambda entity: html.unescape(entity[0]), line)) != line:
        line = plain
    return line


def _without_title(lines: list[str], title: str) -> list[str]:
    """The lines behind a first one that is the title."""
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    return lines[first + 1 :] if first is not None and title and lines[first].strip() == title else lines


def _remove_headings(lines: list[str], kind: Kind) -> tuple[list[str], int]:
    """The lines without headings; and how many went."""
    kept = [line for line in lines if not _MARKED.fullmatch(line)]
    blank = [not line.strip() for line in kept]
    if blank.count(False) > 1 and kind == "wiki":
        kept = [line for line in kept if not _ends_as_section_title(line.strip())]
    elif blank.count(False) > 1 and kind == "record" and any(blank):
        alone = [before and after for before, after in zip([True, *blank], [*blank[1:], True], strict=False)]
        kept = [line for line, lonely in zip(kept, alone, strict=True) if not (lonely and _is_heading(line.strip()))]
    return kept, len(lines) - len(kept)


def _is_heading(line: str) -> bool:
    """Whether a line that stands alone reads as a heading, not as a sentence."""
    return (
        0 < len(line) <= LONGEST_HEADING
        and (line[0].isupper() or line[0].isdigit())
        and (line[-1].isalnum() or line[-1] == ")")
    )


def _ends_as_section_title(line: str) -> bool:
    """Whether a line is a heading with WikiExtractor's full stop: "History.", "Move to the U.S.."."""
    if not line.endswith(".") or line.endswith("...") or len(line) > LONGEST_HEADING:
        return False
    words = line.strip(_QUOTES + ".").split()
    return (
        0 < len(words) <= MOST_WORDS
        and _is_heading(" ".join(words).rstrip(_QUOTES))
        and not any(word.endswith(".") and len(word) > LONGEST_ABBREVIATION for word in words)
        and (words[0] not in _SUBJECTS or len(words) == 1)
        and _VERBS.isdisjoint(words[1:-1])
    )


def _digest(text: str) -> int:
    """64 bits of a text's letters, whatever the case and the white space: 20 million texts collide once in 90,000."""
    digest = hashlib.blake2b(digest_size=8)
    for line in text.split("\n"):  # the words of a long text take ten times its memory
        if words := line.lower().split():
            digest.update(f"{' '.join(words)} ".encode())
    return int.from_bytes(digest.digest(), "little")


class _DigestSet:
    """A set of 64-bit digests at 8 bytes each (16 while it merges), where a Python set takes 70."""

    MOST_RECENT = 1 << 16

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        """Number of digests."""
        return len(self._sorted) + len(self._recent)

    def add(self, digest: int) -> bool:
        """Put a digest in; False if it was there."""
        if digest in self._recent:
            return False
        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        if place < len(self._sorted) and int(self._sorted[place]) == digest:
            return False
        self._recent.add(digest)
        if len(self._recent) >= self.MOST_RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            # Stable: timsort merges two sorted runs in linear time.
            self._sorted = np.sort(np.concatenate([self._sorted, np.sort(recent)]), kind="stable")
            self._recent = set()
        return True

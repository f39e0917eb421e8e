"""Text of any common layout -> documents, a document being the list of its sentences; and the WordPiece vocabulary.

    embedded             `pydoc_data.topics` of the running CPython: 0.5 MB of real English, no download
    folder or file       WikiExtractor output (`<doc id= url= title=>` ... `</doc>`, or its --json), *.txt with a blank
                         line between documents, *.jsonl, *.parquet; a folder is read recursively, by name
    hub data set         `name` or `name:configuration`, for example "wikimedia/wikipedia:20231101.en"

Sentences come from a regular expression (45 MB/s on one core), not from a model: next-sentence pairs need plausible
boundaries, and a tokeniser that trains on pieces does not care.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hf_soo.tasks.wordpiece import Document, read_lines, train_wordpiece

__all__ = ["Corpus", "Document", "read_documents", "split_sentences", "train_wordpiece"]

logger = logging.getLogger(__name__)

# A sentence ends at . ! or ? (with closing quotes) before white space and a capital or a digit, unless the word is an
# initial or a title. The lookbehinds stand after the full stop, so that they run only there: 3 times faster.
_SENTENCE_END = re.compile(
    r"""[.!?](?<![\s.(][A-Z]\.)(?<!\b(?:Mr|Dr|St|vs|No|Jr|Sr|Lt)\.)(?<!\b(?:Mrs|Rev|Gen|Col|Sen|Gov)\.)"""
    r"""["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9À-ÞΑ-ΩА-Я])|[。！？]"""
)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_FILE_SUFFIXES = {".txt", ".jsonl", ".json", ".parquet"}


def split_sentences(paragraph: str) -> Document:
    """The sentences of one paragraph, without surrounding white space; none of them is empty."""
    ends = [match.end() for match in _SENTENCE_END.finditer(paragraph)]
    pieces = (paragraph[start:end].strip() for start, end in zip([0, *ends], [*ends, None], strict=True))
    return [piece for piece in pieces if piece]


def read_documents(source: str, *, text_column: str = "text", split: str = "train") -> Iterator[Document]:
    """Read the documents of a corpus, in a fixed order, one at a time; documents without text are left out.

    Args:
        source: "embedded", a file, a folder or the name of a hub data set; the module lists the layouts.
        text_column: Column or key that holds the text of JSONL, Parquet and hub data.
        split: Split of a hub data set.

    Yields:
        The sentences of one document.

    Raises:
        ValueError: The source is unknown or missing, holds no text, or is not UTF-8.
    """
    path = Path(source).expanduser()
    if source == "embedded":
        documents = _read_embedded()
    elif path.exists():
        documents = (document for file in _text_files(path) for document in _read_file(file, text_column))
    elif path.suffix in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise ValueError(
            f"source {source!r} is no file or folder here; give an existing path, 'embedded' or a hub data set's name"
        )
    else:
        documents = _read_hub(source, text_column, split)
    empty = True
    for document in documents:
        if document:
            empty = False
            yield document
    if empty:
        raise ValueError(f"source {source!r} holds no text; it needs at least one document with a sentence")


def _read_embedded() -> Iterator[Document]:
    """One document a topic; paragraphs are wrapped lines between blank lines."""
    from pydoc_data.topics import topics

    for text in dict.fromkeys(topics[name] for name in sorted(topics)):  # two names may share a text
        yield _sentences(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))


def _sentences(paragraphs: Iterable[str]) -> Document:
    """The sentences of a document's paragraphs."""
    return [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the files under a folder by name; hidden ones are left out, unknown kinds with a warning."""
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    known = [file for file in files if _kind(file)]
    if not known:
        raise ValueError(
            f"folder {str(path)!r} holds {len(files)} files and none is text; "
            "allowed are WikiExtractor files, *.txt, *.jsonl and *.parquet"
        )
    if skipped := [file.name for file in files if not _kind(file)]:
        logger.warning("%s: left out %d files of unknown kind: %s", path, len(skipped), ", ".join(skipped[:5]))
    return known


def _kind(file: Path) -> str:
    """Layout of a file, by its suffix or its first bytes: wiki, txt, jsonl, parquet, or "" for unknown."""
    if file.suffix == ".parquet":
        return "parquet"
    with file.open("rb") as stream:
        head = stream.read(64).lstrip()
    if head.startswith(b"<doc "):
        return "wiki"
    if file.suffix in (".jsonl", ".json") or (file.name.startswith("wiki_") and head.startswith(b"{")):
        return "jsonl"
    return "txt" if file.suffix == ".txt" else ""


def _read_file(file: Path, text_column: str) -> Iterator[Document]:
    """The documents of one file."""
    kind = _kind(file)
    if kind == "parquet":
        return _read_parquet(file, text_column)
    if kind == "wiki":
        return _read_wiki(file)
    if kind == "jsonl":
        return _read_jsonl(file, text_column)
    if kind == "txt":
        return _read_text(file)
    raise ValueError(
        f"file {str(file)!r} is of unknown kind; allowed are WikiExtractor files, *.txt, *.jsonl and *.parquet"
    )


def _read_wiki(file: Path) -> Iterator[Document]:
    """WikiExtractor: `<doc ...>`, the title on a line, then a paragraph a line, `</doc>`."""
    paragraphs: list[str] | None = None
    for line in read_lines(file):
        if line.startswith("<doc "):
            paragraphs = []
        elif line.startswith("</doc>") and paragraphs is not None:
            yield _sentences(paragraphs[1:])  # the first is the title
            paragraphs = None
        elif line and paragraphs is not None:
            paragraphs.append(line)
    if paragraphs is not None:
        raise ValueError(f"file {str(file)!r} ends inside a <doc> block; it was cut off: extract it again")


def _read_text(file: Path) -> Iterator[Document]:
    """Plain text: lines are paragraphs or sentences, blank lines separate documents."""
    document: Document = []
    for line in read_lines(file):
        if line.strip():
            document += split_sentences(line)
        elif document:
            yield document
            document = []
    yield document


def _read_jsonl(file: Path, text_column: str) -> Iterator[Document]:
    """One JSON object a line."""
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"file {str(file)!r}, line {number} is not JSON ({error.msg}); "
                f"each line must be an object with {text_column!r}"
            ) from error
        yield _document_of(row, text_column, f"file {str(file)!r}, line {number}")


def _read_parquet(file: Path, text_column: str) -> Iterator[Document]:
    """One column of a Parquet file, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"file {str(file)!r} is not Parquet ({error}); write it again") from error
    _require_column(text_column, parquet.schema_arrow.names, f"file {str(file)!r}")
    for batch in parquet.iter_batches(batch_size=256, columns=[text_column]):
        for row in batch.to_pylist():
            yield _document_of(row, text_column, f"file {str(file)!r}")


def _read_hub(name: str, text_column: str, split: str) -> Iterator[Document]:
    """A data set of the hub (or of a local folder) through `datasets.load_dataset`."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split)
    except (OSError, ValueError) as error:  # not found, no network, no such configuration or split
        reason = " ".join(str(error).split())
        raise ValueError(
            f"source {name!r} is no local path, and does not load as a hub data set with split {split!r}: {reason}"
        ) from error
    _require_column(text_column, rows.column_names, f"data set {name!r}")
    for row in rows:
        yield _document_of(row, text_column, f"data set {name!r}")


def _document_of(row: Any, text_column: str, where: str) -> Document:
    """The sentences of a record's text."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; it must be an object with {text_column!r}")
    _require_column(text_column, list(row), where)
    text = row[text_column]
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: {text_column!r} is a {type(text).__name__}; it must be text")
    return _sentences((text or "").splitlines())


def _require_column(column: str, names: list[str], where: str) -> None:
    """Refuse data without the text column."""
    if column not in names:
        raise ValueError(
            f"{where} has no column {column!r}; it has {', '.join(map(str, names))}: choose one with text_column"
        )


class Corpus:
    """A corpus that can be read more than once: iterating starts `read_documents` anew."""

    def __init__(
        self, source: str, *, text_column: str = "text", split: str = "train", limit: int | None = None
    ) -> None:
        """Remember where the documents are.

        Args:
            source: As for `read_documents`.
            text_column: As for `read_documents`.
            split: As for `read_documents`.
            limit: Number of documents to stop after; None reads all.
        """
        self.source, self.text_column, self.split, self.limit = source, text_column, split, limit

    def __iter__(self) -> Iterator[Document]:
        """The documents, from the first on."""
        return islice(read_documents(self.source, text_column=self.text_column, split=self.split), self.limit)

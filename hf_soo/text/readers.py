"""Files and hub data sets -> documents as they are written there, one at a time; what cannot be read is an error.

Every error names the file and the line or row. Memory holds one document, or a batch of rows.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_soo.files import LONGEST_LINE, files_below, is_broken, read_json_lines, read_lines, readable
from hf_soo.text.cleaning import RawDocument, unescaped

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 256

_WIKI_NAME = re.compile(r"wiki_\d+")
_WIKI_TITLE = re.compile(r' title="(.*)">\s*')
_WIKI_URL = "curid="  # in the address of each of WikiExtractor's documents
_WIKITEXT_TITLE = re.compile(r"\s*= [^=].* =\s*")


def read_embedded() -> Iterator[RawDocument]:
    """``pydoc_data.topics``: one document a topic; paragraphs are wrapped lines between blank lines."""
    from pydoc_data.topics import topics

    for text in dict.fromkeys(topics[name] for name in sorted(topics)):  # two names may share a text
        yield RawDocument([" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)])


def read_path(path: Path, text_column: str) -> Iterator[RawDocument]:
    """The documents of a file, or of the files under a folder by name.

    Args:
        path: file or folder.
        text_column: column or key of the text.

    Yields:
        Documents as they are written.

    Raises:
        ValueError: no file is text, or one cannot be read.
    """
    files = _text_files(path)
    for file in files:
        if _kind_of(file) == "parquet":
            _open_parquet(file, text_column).close()  # the last of a hundred shows now, not after hours
    for file in files:
        kind = _kind_of(file)
        if kind == "parquet":
            yield from _read_parquet(file, text_column)
        elif kind == "wiki":
            yield from _read_wiki(file)
        elif kind == "jsonl":
            yield from _read_jsonl(file, text_column)
        elif kind == "txt":
            yield from _read_text(file)
        else:
            raise ValueError(
                f"file {str(file)!r} is of unknown kind; allowed are WikiExtractor files, *.txt, *.jsonl and *.parquet."
            )


def _kind_of(file: Path) -> str:
    """Layout of a file, by its suffix or its first bytes: wiki, txt, jsonl, parquet, or "" for unknown."""
    if file.suffix == ".parquet":
        return "parquet"
    with readable(file), file.open("rb") as stream:
        head = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"<doc "):
        return "wiki"
    named = _WIKI_NAME.fullmatch(file.name) is not None
    if file.suffix in (".jsonl", ".json") or (named and head.startswith(b"{")):
        return "jsonl"
    if named:  # whatever damage its first bytes have
        return "wiki"
    return "txt" if file.suffix == ".txt" else ""


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the text files under a folder; files of unknown kind are named in a warning."""
    if path.is_file():
        return [path]
    files = files_below(path)
    known = [file for file in files if _kind_of(file)]
    if not known:
        raise ValueError(
            f"folder {str(path)!r} holds {len(files)} files and none is text; "
            "allowed are WikiExtractor files, *.txt, *.jsonl and *.parquet."
        )
    if skipped := [file.name for file in files if not _kind_of(file)]:
        logger.warning("%s: left out %d files of unknown kind: %s", path, len(skipped), ", ".join(skipped[:5]))
    return known


def _read_wiki(file: Path) -> Iterator[RawDocument]:
    """WikiExtractor: ``<doc ...>``, the title on a line, then a paragraph a line, ``</doc>``."""
    lines: list[str] | None = None
    title, began = None, 0
    for number, line in enumerate(read_lines(file), start=1):
        if line.startswith("<doc "):
            if lines is not None:
                raise ValueError(
                    f"file {str(file)!r}, line {number} begins a <doc> inside that of line {began}, "
                    "which has no </doc>: extract it again."
                )
            lines, title, began = [], _WIKI_TITLE.search(line), number
        elif lines is None:
            if line.strip():
                raise ValueError(f"file {str(file)!r}, line {number} is outside any <doc>; extract it again.")
        elif line.startswith("</doc>"):
            if lines and (title is None or unescaped(lines[0].strip()) == unescaped(title[1].strip())):
                del lines[0]
            yield RawDocument(lines, kind="wiki")
            lines = None
        elif line:
            lines.append(line)
    if lines is not None:
        raise ValueError(
            f"file {str(file)!r} ends inside the <doc> block of line {began}; it was cut off: extract it again."
        )


def _read_text(file: Path) -> Iterator[RawDocument]:
    """Plain text: lines are paragraphs or sentences, blank lines separate documents.

    A file whose first line of text is `` = Title = `` is WikiText: there such lines after a blank one begin documents,
    and blank lines alone do not.
    """
    lines: list[str] = []
    wikitext: bool | None = None
    after_blank = True
    for line in read_lines(file):
        blank = not line.strip()
        if wikitext is None and not blank:
            wikitext = bool(_WIKITEXT_TITLE.fullmatch(line))
        if lines and (after_blank and _WIKITEXT_TITLE.fullmatch(line) if wikitext else blank):
            yield RawDocument(lines)
            lines = []
        if not blank:
            lines.append(line)
        after_blank = blank
    if lines:
        yield RawDocument(lines)


def _read_jsonl(file: Path, text_column: str) -> Iterator[RawDocument]:
    """One JSON object a line."""
    for number, row in read_json_lines(file):
        yield _document_of(row, text_column, f"file {str(file)!r}, line {number}")


def _open_parquet(file: Path, text_column: str) -> Any:
    """A Parquet file that has the text column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        names = parquet.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"file {str(file)!r} is not Parquet ({reason}); write it again.") from error
    _require_column(text_column, names, f"file {str(file)!r}")
    return parquet


def _read_parquet(file: Path, text_column: str) -> Iterator[RawDocument]:
    """The rows of a Parquet file, a batch of them at a time."""
    parquet, number = _open_parquet(file, text_column), 0
    columns = [name for name in dict.fromkeys((text_column, "title", "url")) if name in parquet.schema_arrow.names]
    batches = parquet.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns)
    while rows := _next_rows(batches, f"file {str(file)!r} is not Parquet after row {number}"):
        for row in rows:
            number += 1
            yield _document_of(row, text_column, f"file {str(file)!r}, row {number}")
    if number != parquet.metadata.num_rows:
        raise ValueError(f"file {str(file)!r} has {number} rows of {parquet.metadata.num_rows}; write it again.")


def _next_rows(batches: Any, where: str) -> list[dict[str, Any]]:
    """The rows of the next batch of a Parquet file; none at its end."""
    import pyarrow as pa

    try:
        return next((batch.to_pylist() for batch in batches if batch.num_rows), [])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} ({' '.join(str(error).split())}); write it again.") from error


def read_hub(name: str, text_column: str, split: str) -> Iterator[RawDocument]:
    """The rows of a hub data set, memory-mapped, a batch at a time.

    Args:
        name: ``name`` or ``name:configuration``.
        text_column: column of the text.
        split: split to read.

    Yields:
        Documents as they are written.

    Raises:
        ValueError: it does not load, or lacks the column.
    """
    import datasets

    path, _, configuration = name.partition(":")
    logger.info("no file or folder %s here: reading the hub's data set of that name", name)
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # no network, configuration or split
        raise ValueError(
            f"source {name!r} is no local path, and does not load as a hub data set with split {split!r}: "
            f"{' '.join(str(error).split())}"
        ) from error
    _require_column(text_column, rows.column_names, f"data set {name!r}")
    columns = [column for column in dict.fromkeys((text_column, "title", "url")) if column in rows.column_names]
    number = 0
    for batch in rows.select_columns(columns).iter(batch_size=ROWS_AT_A_TIME):
        for values in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            row = dict(zip(columns, values, strict=True))
            yield _document_of(row, text_column, f"data set {name!r}, row {number}")


def _document_of(row: Any, text_column: str, where: str) -> RawDocument:
    """The text and the title of a record."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; it must be an object with {text_column!r}.")
    _require_column(text_column, list(row), where)
    text, title = row[text_column], row.get("title")
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: {text_column!r} is a {type(text).__name__}; it must be text.")
    if is_broken(text or ""):
        raise ValueError(f"{where}: {text_column!r} holds half of a surrogate pair, which is no text; write it again.")
    lines = (text or "").splitlines()
    if any(len(line) > LONGEST_LINE for line in lines):
        raise ValueError(f"{where}: {text_column!r} has a paragraph of more than 32 MiB; break it into lines.")
    wiki = _WIKI_URL in str(row.get("url"))
    return RawDocument(lines, title.strip() if isinstance(title, str) else "", "wiki" if wiki else "record")


def _require_column(column: str, names: list[str], where: str) -> None:
    """Refuse data without the text column."""
    if column not in names:
        raise ValueError(
            f"{where} has no column {column!r}; it has {', '.join(map(str, names))}: choose one with text_column."
        )

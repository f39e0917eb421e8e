"""Examples of a GLUE task from local files: TSV, CSV, JSON, JSON lines; every wrong row is named by file and line.

TSV is GLUE's: a quote is a character of the text, a line is a row. CSV is Python's: quoted fields may hold commas and
line ends. A JSON file is a list of objects, or an object of objects. Columns have the hub's names, those of the
official archive (``Quality``, ``#1 String``, ``gold_label`` ...) or ``text_a``, ``text_b``, ``label``.

A row of a table with more or fewer columns than the header is an error. But a large labelled file may have a few of
them, at most one in a thousand, as the official QQP/train.tsv has: they are left out, and counted in a warning.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_soo.files import is_broken, parse_json, read_json_lines, read_lines
from hf_soo.glue.tasks import SCORE_RANGE, GlueTask

logger = logging.getLogger(__name__)

SUFFIXES = (".tsv", ".csv", ".json", ".jsonl", ".txt")  # .txt is read as TSV: MRPC's own files end so
MOST_BROKEN = 1 / 1000  # of the rows of a labelled table
COLA_COLUMNS = ("source", "label", "mark", "sentence")  # of CoLA's files, which have no header
Row = tuple[str, Mapping[str, Any]]  # where it stands, and its values by column
Cells = tuple[int, list[str]]  # number of the line, and its columns


@dataclass(frozen=True, slots=True)
class Examples:
    """One part of a task."""

    texts: tuple[list[str], ...]  # one list or two, of equal lengths
    labels: list[int] | list[float] | None  # None: a test part
    source: str  # a name for the record, no path

    def __len__(self) -> int:
        return len(self.texts[0])

    def head(self, count: int | None) -> Examples:
        """The first ``count`` examples; None: all."""
        labels = None if self.labels is None else self.labels[:count]
        return Examples(tuple(texts[:count] for texts in self.texts), labels, self.source)


def digest(parts: Sequence[Examples]) -> str:
    """What tells two data sets of a task apart: a hash of all texts and labels of its parts, in order."""
    sha = hashlib.sha256()
    for part in parts:
        for row in zip(*part.texts, part.labels or [None] * len(part), strict=True):
            sha.update(repr(row).encode())
    return sha.hexdigest()[:12]


def read_examples(file: str | Path, task: GlueTask, *, labelled: bool) -> Examples:
    """Read and check one file.

    Args:
        file: its ending says the format.
        task: which columns and labels there must be.
        labelled: False: a test part, whose labels are passed over where there are any.

    Raises:
        ValueError: no such file, another format, a malformed row, wrong columns, a wrong label, or no rows at all.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path} is no file; {task.title} needs it ({', '.join(SUFFIXES)}).")
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; readable are {', '.join(SUFFIXES)}.")
    if suffix.startswith(".json"):
        rows = (_json if suffix == ".json" else _json_lines)(path)
    else:
        lines, separator = (_csv(path), "commas") if suffix == ".csv" else (_tsv(path), "tabs")
        rows = _table(path, task, lines, separator, most_broken=MOST_BROKEN if labelled else 0.0)
    return collect(task, rows, f"{path.parent.name}/{path.name}", str(path), labelled=labelled)


def collect(task: GlueTask, rows: Iterator[Row], source: str, place: str, *, labelled: bool) -> Examples:
    """Check rows and put them into columns.

    Args:
        task: says which columns and labels there must be.
        rows: where each stands, and its values.
        source: for the record.
        place: the file, for messages.
        labelled: whether there must be labels.

    Raises:
        ValueError: a missing column, a wrong value, or no rows.
    """
    texts: tuple[list[str], ...] = tuple([] for _ in task.texts)
    labels: list[Any] = []
    empty: list[str] = []
    for where, row in rows:
        values = _named(task, row)
        needed = (*task.texts, "label") if labelled else task.texts
        if missing := [name for name in needed if values.get(name) is None]:
            raise ValueError(
                f"{where}: no {' and no '.join(map(repr, missing))} among the columns {', '.join(row)}; "
                f"{task.title} needs {', '.join(needed)}."
            )
        for name, column in zip(task.texts, texts, strict=True):
            if not isinstance(text := values[name], str) or is_broken(text):
                raise ValueError(f"{where}: {name} is {text!r}, which is no text.")
            column.append(text)
        if not all(values[name].strip() for name in task.texts):
            empty.append(where)
        if labelled:
            labels.append(_label(task, values["label"], where))
    if not texts[0]:
        raise ValueError(f"{place} holds no examples; {task.title} needs at least one.")
    if empty:
        logger.warning("%d of %d rows have an empty text; the first is %s", len(empty), len(texts[0]), empty[0])
    return Examples(texts, labels if labelled else None, source)


def _named(task: GlueTask, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's values by the hub's column names; a column that has such a name already comes first."""
    aliases = {**dict(zip(("text_a", "text_b"), task.texts, strict=False)), **task.aliases}
    return {aliases[name]: value for name, value in row.items() if name in aliases} | {
        name: value for name, value in row.items() if name in (*task.texts, "label")
    }


def _label(task: GlueTask, value: Any, where: str) -> int | float:
    """The class, or the score of a regression, that a word, a number or a number as text stands for."""
    text = str(value).strip()
    if task.regression:
        low, high = SCORE_RANGE
        try:
            score = math.nan if "_" in text else float(text)  # which Python reads over, as in 1_0
        except ValueError:
            score = math.nan
        if not low <= score <= high:
            raise ValueError(f"{where}: the score {value!r} is no number from {low:g} to {high:g}.")
        return score
    if text in task.labels:
        return task.labels.index(text)
    if text in (numbers := [str(number) for number in range(len(task.labels))]):
        return int(text)
    allowed = f"{', '.join(task.labels)}{f' or {numbers[0]} to {numbers[-1]}' if task.words else ''}"
    raise ValueError(f"{where}: the label {value!r} is none of {task.title}'s: {allowed}.")


def _tsv(path: Path) -> Iterator[Cells]:
    yield from ((number, line.split("\t")) for number, line in enumerate(read_lines(path), 1))


def _csv(path: Path) -> Iterator[Cells]:
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV ({error}).") from error


def _table(path: Path, task: GlueTask, lines: Iterator[Cells], separator: str, *, most_broken: float) -> Iterator[Row]:
    """Rows under a header; CoLA's files need none."""
    header: Sequence[str] | None = None
    broken: list[str] = []
    rows = 0
    for number, cells in lines:
        if header is None:
            header = _header(path, task, cells)
            if header is cells:
                continue
        if len(header) > 1 and not any(cells) and len(cells) < 2:
            continue  # an empty line
        rows += 1
        if len(cells) == len(header):
            yield f"{path}, line {number}", dict(zip(header, cells, strict=True))
            continue
        broken.append(f"{path}, line {number}: {len(cells)} columns, the header has {len(header)}")
    if len(broken) > most_broken * rows:
        raise ValueError(
            f"{broken[0]} ({', '.join(header or ())}); {len(broken)} of {rows} rows are so: fix or delete them "
            f"(columns are separated by {separator})."
        )
    if broken:
        logger.warning("left out %d of %d rows with too few or too many columns: %s", len(broken), rows, broken[0])


def _header(path: Path, task: GlueTask, first: list[str]) -> Sequence[str]:
    """The first line, or CoLA's columns where it is an example already."""
    if task.name == "cola" and "sentence" not in first and len(first) == len(COLA_COLUMNS):
        return COLA_COLUMNS
    if repeated := [name for name in dict.fromkeys(first) if first.count(name) > 1]:
        raise ValueError(f"{path}: the header has the column {repeated[0]!r} twice; rename or delete one of them.")
    return first


def _json(path: Path) -> Iterator[Row]:
    try:
        content = parse_json("\n".join(read_lines(path, longest=None)))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one object a line, whatever the file's name says
            yield from _json_lines(path)
            return
        raise ValueError(f"{path}, line {error.lineno}: no JSON ({error.msg}).") from error
    if not isinstance(content, dict | list):
        raise ValueError(f"{path} holds a {type(content).__name__}; a list of objects is needed.")
    for key, row in content.items() if isinstance(content, dict) else enumerate(content):
        yield _object(row, f"{path}, entry {key}")


def _json_lines(path: Path) -> Iterator[Row]:
    yield from (_object(row, f"{path}, line {number}") for number, row in read_json_lines(path))


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with columns.")
    return where, row

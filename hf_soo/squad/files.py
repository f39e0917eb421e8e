"""SQuAD's files: the official nested JSON, flat JSON lines with the hub's columns, and the hub's data sets.

A file is checked whole before anything is trained: what is wrong is named by file and question id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_soo.files import is_broken, parse_json

Answer = tuple[int, str]  # where it starts in the context, in characters, and its text


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a context; ``answers`` is empty when it has none, None when they are not known (a test set)."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None

    @property
    def given_answers(self) -> tuple[Answer, ...]:
        """The answers, where they are known."""
        assert self.answers is not None
        return self.answers


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one file, in its order."""

    source: str
    questions: tuple[Question, ...]
    has_impossible: bool  # the file itself says that some questions have no answer: SQuAD v2.0

    def head(self, count: int | None) -> QuestionSet:
        """The first ``count`` questions; None: all."""
        return self if count is None else QuestionSet(self.source, self.questions[:count], self.has_impossible)

    def can_be_scored(self, *, version_2: bool) -> bool:
        """Whether every question has its answers, as a test file's may not; with ``version_2`` no answer is one."""
        return all(each.answers or (version_2 and each.answers is not None) for each in self.questions)

    def check_answers(self, *, version_2: bool) -> None:
        """Every question must have its answers.

        Args:
            version_2: "no answer" counts as one.

        Raises:
            ValueError: a question has none.
        """
        for each in self.questions:
            if each.answers is None:
                raise ValueError(
                    f"{self.source}: question {each.id!r} has no 'answers'; only a test file may lack them."
                )
            if not each.answers and not version_2:
                raise ValueError(
                    f"{self.source}: question {each.id!r} has no answer span, which SQuAD v1.1 does not know; give "
                    "--version_2_with_negative for data of v2.0."
                )

    @classmethod
    def read(cls, file: str | Path) -> QuestionSet:
        """The questions of a local file, which may be of either layout.

        Args:
            file: ``{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}``, or a JSON
                object a line with the keys id, question, context, answers ``{"text": [...], "answer_start": [...]}``.

        Raises:
            ValueError: no such file, no JSON, other nesting, or a question that cannot be used.
        """
        path = Path(file).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); give a JSON file of SQuAD.") from error
        return _collect(str(file), _rows(str(file), text))

    @classmethod
    def of_hub(cls, name: str, split: str, cache_dir: str | None) -> QuestionSet:
        """The questions of a data set of the hub.

        Args:
            name: "squad", "squad_v2", "owner/name".
            split: "train" or "validation".
            cache_dir: of ``datasets``.

        Raises:
            ValueError: it cannot be loaded, has no such split or not SQuAD's columns.
        """
        import datasets

        path = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}.get(name, name)
        try:
            parts = datasets.load_dataset(path, cache_dir=cache_dir)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"dataset_name={name!r} cannot be loaded from the hub: {error}") from error
        if split not in parts:
            raise ValueError(f"dataset_name={name!r} has the parts {', '.join(parts)}; one named {split!r} is needed.")
        return _collect(f"{name}, {split}", parts[split])


def _collect(source: str, rows: Iterable[Any]) -> QuestionSet:
    """Check rows, mappings with the keys id, question, context, answers, and keep them."""
    found: dict[str, Question] = {}
    contexts: dict[str, str] = {}  # one string for all questions on a context, also where each row has a copy
    impossible = False
    for place, row in enumerate(rows):
        question = _question(source, place, row, contexts)
        if question.id in found:
            raise ValueError(f"{source}: the id {question.id!r} is there twice; every question needs its own.")
        found[question.id] = question
        impossible |= row.get("is_impossible") is True
    if not found:
        raise ValueError(f"{source}: holds no questions; give a JSON file of SQuAD.")
    return QuestionSet(source, tuple(found.values()), impossible)


def _rows(source: str, text: str) -> Iterator[Any]:
    """The flat rows of either layout."""
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if "\n" not in text.strip() or not text.lstrip().startswith("{") or error.msg != "Extra data":
            raise ValueError(f"{source}: not JSON ({error}); give a JSON file of SQuAD.") from error
        yield from _lines(source, text)
        return
    if isinstance(content, Mapping) and "context" in content:  # one line alone
        yield content
        return
    articles = content.get("data") if isinstance(content, Mapping) else None
    if not isinstance(articles, Sequence) or isinstance(articles, str):
        raise ValueError(f"{source}: has no list 'data'; give SQuAD's nesting, data > paragraphs > qas, or JSON lines.")
    for article in articles:
        if isinstance(article, Mapping) and "context" in article:  # flat rows under "data", as run_qa.py takes them
            yield article
        else:
            yield from _paragraphs(source, article)


def _lines(source: str, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: not JSON ({error}); give one object a line.") from error


def _paragraphs(source: str, article: Any) -> Iterator[dict[str, Any]]:
    for paragraph in _list(source, article, "paragraphs", "an article"):
        for qa in _list(source, paragraph, "qas", "a paragraph"):
            if not isinstance(qa, Mapping):
                raise ValueError(
                    f"{source}: an entry of 'qas' is a {type(qa).__name__}, not an object; see SQuAD's format."
                )
            row = {**qa, "context": paragraph.get("context")}
            if "answers" in qa:
                where = f"question {qa.get('id')!r}"
                answers = _list(source, qa, "answers", where)
                if not all(isinstance(answer, Mapping) for answer in answers):
                    raise ValueError(
                        f"{source}: {where}: 'answers' holds something else than objects; see SQuAD's format."
                    )
                row["answers"] = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
            yield row


def _list(source: str, holder: Any, key: str, what: str) -> Sequence[Any]:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, list):
        raise ValueError(f"{source}: {what} has no list {key!r}; SQuAD nests data > paragraphs > qas > answers.")
    return value


def _question(source: str, place: int, row: Any, contexts: dict[str, str]) -> Question:
    """A checked row."""
    name = row.get("id") if isinstance(row, Mapping) else None
    if not isinstance(name, str) or not name or is_broken(name):
        raise ValueError(
            f"{source}: question number {place + 1} has no text 'id' (got {name!r:.60}); every question needs one."
        )
    for key in ("question", "context"):
        if not isinstance(row.get(key), str) or not row[key].strip() or is_broken(row[key]):
            raise ValueError(
                f"{source}: question {name!r}: {key!r} is {row.get(key)!r:.60}; a text that is not empty is needed."
            )
    if not isinstance(impossible := row.get("is_impossible"), bool | None):
        raise ValueError(
            f"{source}: question {name!r}: 'is_impossible' is {impossible!r:.60}; true or false is needed, no text."
        )
    context = contexts.setdefault(row["context"], row["context"])
    return Question(name, row["question"].strip(), context, _answers(source, name, row.get("answers")))


def _answers(source: str, name: str, answers: Any) -> tuple[Answer, ...] | None:
    if answers is None:
        return None
    texts, starts = (answers.get(key) if isinstance(answers, Mapping) else None for key in ("text", "answer_start"))
    if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
        pairs = tuple(zip(starts, texts, strict=True))
        if all(type(start) is int and isinstance(text, str) and not is_broken(text) for start, text in pairs):
            return pairs
    raise ValueError(
        f"{source}: question {name!r}: every answer needs a text 'text' and a whole number 'answer_start'; got "
        f"{str(answers)[:80]}."
    )

"""The tokens of SQuAD's questions and contexts, and which of them are the answers.

Each question and each different context is tokenized once, in batches: SQuAD asks about five questions on a context.
An answer's tokens are all that touch its characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soo.squad.files import Question, QuestionSet

Ints = NDArray[np.integer[Any]]
BATCH = 1000  # texts tokenized at once: bounds the memory of the Python lists they come in


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around question and context, and the token types if the model has them."""

    before: Ints
    between: Ints
    after: Ints
    types: tuple[int, int] | None  # of the question's part and of the context's
    pad: int

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return len(self.before) + len(self.between) + len(self.after)

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """The special tokens that a tokenizer puts around a pair.

        Args:
            tokenizer: a fast tokenizer.

        Raises:
            ValueError: it is not fast, begins no pair with [CLS], or has no padding token.
        """
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; one with a tokenizer.json is needed.")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token; use the tokenizer of an encoder like BERT."
            )
        pair = tokenizer("a", "a")
        ids, owner = np.array(pair["input_ids"]), pair.sequence_ids(0)
        places = [[i for i, each in enumerate(owner) if each == part] for part in (0, 1)]
        if ids[0] != tokenizer.cls_token_id or not all(places) or places[0][0] > places[1][0]:
            raise ValueError(
                f"{type(tokenizer).__name__} does not write '[CLS] question [SEP] context [SEP]' (but {ids.tolist()} "
                "for 'a', 'a'); use the tokenizer of an encoder like BERT."
            )
        (begin, _), (left, right) = ((part[0], part[-1]) for part in places)
        types = pair.get("token_type_ids")
        return cls(
            before=ids[:begin],
            between=ids[places[0][-1] + 1 : left],
            after=ids[right + 1 :],
            types=None if types is None else (types[begin], types[left]),
            pad=tokenizer.pad_token_id,
        )


@dataclass(frozen=True, slots=True)
class _Ragged:
    """The tokens of texts of different lengths, one text behind the other."""

    values: Ints  # [sum of lengths]
    splits: Ints  # [texts + 1]

    def __getitem__(self, number: int) -> Ints:
        return self.values[self.splits[number] : self.splits[number + 1]]

    @property
    def lengths(self) -> Ints:
        """Tokens of each text: [texts]."""
        return np.diff(self.splits)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a set of questions, and where each token of a context lies in its text."""

    questions: _Ragged
    contexts: _Ragged
    spans: Ints  # [tokens of all contexts, 2]: first character, and the one after the last
    context_of: Ints  # [questions]
    cut: int  # questions that were longer than allowed

    @classmethod
    def of(cls, tokenizer: Any, asked: QuestionSet, max_query_length: int) -> Tokens:
        """The tokens of all questions and of all different contexts.

        Args:
            tokenizer: a fast tokenizer.
            asked: the questions.
            max_query_length: tokens that are kept of a question.

        Raises:
            ValueError: a context without a token.
        """
        numbers: dict[str, int] = {}
        context_of = np.array([numbers.setdefault(each.context, len(numbers)) for each in asked.questions])
        questions, _ = _encode(tokenizer, [each.question for each in asked.questions])
        contexts, spans = _encode(tokenizer, list(numbers))
        if (empty := np.flatnonzero(contexts.lengths[context_of] == 0)).size:
            raise ValueError(f"{asked.source}: question {asked.questions[empty[0]].id!r}: its context has no token.")
        long = questions.lengths > max_query_length
        return cls(_cut(questions, max_query_length), contexts, spans, context_of, int(long.sum()))


@dataclass(frozen=True, slots=True)
class Labels:
    """Where the answers are, in tokens of their contexts."""

    spans: Ints  # [questions, 2]: first and last token; -1 for none
    wrong: tuple[str, ...]  # ids: the answer is not in the context where the file says
    lost: tuple[str, ...]  # ids: no token touches the answer
    inexact: tuple[str, ...]  # ids: the tokens' text is more than the answer ("1973" of "1973s")

    @classmethod
    def of(cls, asked: QuestionSet, tokens: Tokens) -> Labels:
        """Each question's first answer in tokens of its context."""
        spans = np.full((len(asked.questions), 2), -1, dtype=np.int64)
        wrong, lost, inexact = [], [], []
        for number, each in enumerate(asked.questions):
            if not each.given_answers:
                continue
            begin, text = _stripped(*each.given_answers[0])
            if not text or begin < 0 or each.context[begin : begin + len(text)] != text:
                wrong.append(each.id)
                continue
            span, exact = _token_span(each, tokens, int(tokens.context_of[number]), begin, text)
            if span is None:
                lost.append(each.id)
            else:
                spans[number] = span
            if not exact:
                inexact.append(each.id)
        return cls(spans, tuple(wrong), tuple(lost), tuple(inexact))


def _token_span(each: Question, tokens: Tokens, context: int, begin: int, text: str) -> tuple[Any, bool]:
    """First and last token that touch [begin, begin + len(text)), or None; and whether their text is the answer."""
    spans = tokens.spans[tokens.contexts.splits[context] : tokens.contexts.splits[context + 1]]
    first = np.searchsorted(spans[:, 1], begin, side="right")  # the first that ends behind the answer's beginning
    last = np.searchsorted(spans[:, 0], begin + len(text), side="left") - 1  # the last that begins before its end
    if first > last:
        return None, True
    return (first, last), each.context[spans[first, 0] : spans[last, 1]].strip() == text


def _stripped(begin: int, text: str) -> tuple[int, str]:
    return begin + len(text) - len(text.lstrip()), text.strip()


def _encode(tokenizer: Any, texts: Sequence[str]) -> tuple[_Ragged, Ints]:
    """Token ids and character spans of each text, without special tokens."""
    ids: list[Ints] = []
    spans: list[Ints] = []
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH):
        coded = tokenizer(
            texts[start : start + BATCH],
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # "longer than the model's maximum": the windows see to that
        )
        lengths += map(len, coded["input_ids"])
        ids += [np.array(row, dtype=np.int32) for row in coded["input_ids"]]
        spans += [np.array(row, dtype=np.int32).reshape(-1, 2) for row in coded["offset_mapping"]]
    return _Ragged(np.concatenate(ids), np.concatenate(([0], np.cumsum(lengths)))), np.concatenate(spans)


def _cut(texts: _Ragged, length: int) -> _Ragged:
    """At most the first ``length`` tokens of each text."""
    lengths = texts.lengths
    place = np.arange(len(texts.values)) - np.repeat(texts.splits[:-1], lengths)
    return _Ragged(texts.values[place < length], np.concatenate(([0], np.cumsum(np.minimum(lengths, length)))))

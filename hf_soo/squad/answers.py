"""Answers from the logits of a question-answering head, in whole arrays.

In each window only tokens of the context may begin or end an answer. Among the ``n_best_size`` best beginnings i and
the as many best ends j, the pairs with

    i <= j,   j - i + 1 <= max_answer_length,   score = start[i] + end[j]

are candidates; a question's are those of all its windows, best first, as in ``run_qa.py``. With SQuAD v2.0 the null
score of a question is the smallest start[0] + end[0] of its windows, and its odds (null score - best score) above
``null_score_diff_threshold`` mean that it has no answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soo.files import write_atomically
from hf_soo.squad.files import QuestionSet
from hf_soo.squad.tokens import Ints
from hf_soo.squad.windows import Windows

Floats = NDArray[np.float32]
_Entry = tuple[str, float, float]  # text, start and end logit
CHUNK = 256  # windows at once: their pairs are [CHUNK, n_best_size²]


@dataclass(frozen=True, slots=True)
class AnswerConfig:
    """How answers are chosen."""

    n_best_size: int = 20
    max_answer_length: int = 30
    version_2: bool = False
    null_score_diff_threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model answers."""

    texts: dict[str, str]
    n_best: dict[str, list[dict[str, Any]]]
    null_odds: dict[str, float] | None

    def write(self, folder: Path, prefix: str = "") -> list[Path]:
        """predictions.json, nbest_predictions.json and, for v2.0, null_odds.json, each whole or not at all."""
        contents = {"predictions": self.texts, "nbest_predictions": self.n_best, "null_odds": self.null_odds}
        paths = []
        for name, content in contents.items():
            if content is not None:
                paths.append(folder / f"{prefix}{name}.json")
                write_atomically(paths[-1], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return paths


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Pairs of tokens, grouped by question, best first."""

    question: Ints  # [N]
    start: Floats  # [N]: logits
    end: Floats  # [N]
    span: Ints  # [N, 2]: characters of the context


def answer(start: Floats, end: Floats, windows: Windows, asked: QuestionSet, config: AnswerConfig) -> Predictions:
    """The answer to each question, and its ``n_best_size`` candidates with probabilities.

    Args:
        start: logits [windows, T].
        end: logits [windows, T].
        windows: in the order of the logits.
        asked: their questions.
        config: how to choose.
    """
    assert len(start) == len(end) == len(windows)
    start, end = (np.nan_to_num(np.asarray(each, dtype=np.float32)) for each in (start, end))
    found = _candidates(start, end, windows, config.n_best_size, config.max_answer_length)
    splits = np.searchsorted(found.question, np.arange(len(asked.questions) + 1))
    nulls = _null_logits(start, end, windows) if config.version_2 else None
    result = Predictions({}, {}, {} if config.version_2 else None)
    for number, each in enumerate(asked.questions):
        own = slice(splits[number], splits[number + 1])
        columns = (column[own].tolist() for column in (found.span, found.start, found.end))
        entries = [(each.context[a:b].strip(), s, e) for (a, b), s, e in zip(*columns, strict=True)]
        text, *logits = next((entry for entry in entries if entry[0]), ("", 0.0, 0.0))
        if nulls is not None and result.null_odds is not None:
            odds = result.null_odds[each.id] = float(nulls[number].sum()) - sum(logits)
            text = "" if odds > config.null_score_diff_threshold else text
            entries = _with_null(entries, nulls[number].tolist(), config.n_best_size)
        result.texts[each.id] = text
        result.n_best[each.id] = _with_probabilities(entries)
    return result


def _candidates(start: Floats, end: Floats, windows: Windows, n_best: int, max_length: int) -> _Candidates:
    """The best pairs of each question, at most ``n_best``."""
    parts = []
    for begin in range(0, len(windows), CHUNK):
        chunk = np.arange(begin, min(begin + CHUNK, len(windows)))
        offset, length = windows.offset[chunk, None], windows.length[chunk, None]
        place = np.arange(start.shape[1])
        outside = (place < offset) | (place >= offset + length)
        firsts, lasts = (_top(np.where(outside, -np.inf, each[chunk]), n_best) for each in (start, end))
        parts.append(_pairs(start, end, windows, chunk, firsts, lasts, n_best, max_length))
    question, window, first, last, score = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((-score, question))
    question = question[order]
    rank = np.arange(len(order)) - np.searchsorted(question, question)  # within the question
    kept = order[rank < n_best]
    window, first, last = window[kept], first[kept], last[kept]
    span = np.stack((windows.characters(window, first)[:, 0], windows.characters(window, last)[:, 1]), axis=-1)
    return _Candidates(question[rank < n_best], start[window, first], end[window, last], span)


def _pairs(
    start: Floats, end: Floats, windows: Windows, chunk: Ints, firsts: Ints, lasts: Ints, n_best: int, max_length: int
) -> tuple[Any, ...]:
    """The allowed pairs of some windows, at most ``n_best`` of each: question, window, first, last, score [N]."""
    at = chunk[:, None, None]
    first, last = np.broadcast_arrays(firsts[:, :, None], lasts[:, None, :])
    offset, length = windows.offset[at], windows.length[at]
    allowed = (first >= offset) & (first <= last) & (last < offset + length) & (last - first < max_length)
    score = np.where(allowed, start[at, first] + end[at, last], -np.inf)
    flat = [each.reshape(len(chunk), -1) for each in (np.broadcast_to(at, score.shape), first, last, score)]
    best = _top(flat[-1], n_best)
    window, first, last, score = (np.take_along_axis(each, best, axis=1) for each in flat)
    kept = np.isfinite(score)
    return windows.question[window[kept]], window[kept], first[kept], last[kept], score[kept]


def _top(values: NDArray[Any], count: int) -> Ints:
    """Where the largest ``count`` of each row are, in any order."""
    if count >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, -count, axis=1)[:, -count:]


def _null_logits(start: Floats, end: Floats, windows: Windows) -> Floats:
    """[questions, 2]: start[0] and end[0] of the window in which their sum is smallest."""
    order = np.lexsort((start[:, 0] + end[:, 0], windows.question))
    first = order[np.searchsorted(windows.question, np.arange(windows.question[-1] + 1))]
    return np.stack((start[first, 0], end[first, 0]), axis=-1)


def _with_null(entries: list[_Entry], null: list[float], n_best: int) -> list[_Entry]:
    """The candidates with "no answer" among them, which stays also where it is not one of the best."""
    nothing = ("", null[0], null[1])
    best = sorted([*entries, nothing], key=lambda entry: -entry[1] - entry[2])[:n_best]
    return best if nothing in best else [*best, nothing]


def _with_probabilities(entries: list[_Entry]) -> list[dict[str, Any]]:
    """Candidates as they are written; the probabilities are a softmax over their scores."""
    scores = np.array([start + end for _, start, end in entries])
    weights = np.exp(scores - scores.max()) if entries else scores
    return [
        {"text": text, "probability": weight, "start_logit": start, "end_logit": end}
        for (text, start, end), weight in zip(entries, (weights / weights.sum()).tolist(), strict=True)
    ]

"""Exact match and F1 of SQuAD, as the official ``evaluate-v1.1.py`` and ``evaluate-v2.0.py`` compute them.

    normal(s) = s in lower case, without ASCII punctuation, without the words a, an, the, white space squashed
    EM(p, g)  = [normal(p) = normal(g)]
    F1(p, g)  = 2PR / (P + R),  P and R over the multisets of words of normal(p) and normal(g)

A question counts with its best answer, and the score is the mean over all questions, in percent.

Deviation: evaluate-v2.0 leaves a question without a prediction out of the mean, or fails; here it counts 0 as in v1.1;
reason: a file that lacks the hard questions must not score better.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_soo.squad.files import Question

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SPLITS = {"HasAns_": True, "NoAns_": False}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Score:
    """What a set of predictions is worth, and which of them do not fit the questions."""

    metrics: dict[str, float]
    missing: tuple[str, ...]  # questions without a prediction
    unknown: tuple[str, ...]  # predictions for no question


def _normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact_match(prediction: str, answer: str) -> float:
    """1 when the two are equal after ``_normal``, else 0."""
    return float(_normal(prediction) == _normal(answer))


def _f1(prediction: str, answer: str) -> float:
    """F1 of the words, v1.1: 0 where no word is common, so also for two empty texts."""
    ours, theirs = _normal(prediction).split(), _normal(answer).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    # 2PR / (P + R) with P = common / |ours|, R = common / |theirs|
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _f1_or_empty(prediction: str, answer: str) -> float:
    """F1 of the words, v2.0: as ``_f1``, but 1 for two texts that are both empty after ``_normal``."""
    return _f1(prediction, answer) if _normal(prediction) and _normal(answer) else _exact_match(prediction, answer)


def score_v1(questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
    """SQuAD v1.1: ``exact_match`` and ``f1`` of the texts by question id, in percent."""
    answers = {each.id: [text for _, text in each.given_answers] for each in questions}
    metrics = {
        "exact_match": _percent(_best(_exact_match, answers, predictions).values(), len(answers)),
        "f1": _percent(_best(_f1, answers, predictions).values(), len(answers)),
    }
    return _score(metrics, answers, predictions)


def score_v2(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> Score:
    """SQuAD v2.0: the same over all questions, those with and those without an answer, and the best thresholds.

    Args:
        questions: with their answers; none means that "" is right.
        predictions: question id -> text, "" for no answer.
        null_odds: question id -> how sure it is that there is no answer; a missing one is 0. With them the result has
            ``best_exact`` and ``best_f1``: the scores if answers whose odds are above ``best_exact_thresh`` or
            ``best_f1_thresh`` were withdrawn.
        threshold: withdraw answers whose odds are above it; None: none.
    """
    answers = {each.id: [text for _, text in each.given_answers if _normal(text)] or [""] for each in questions}
    answerable = {each.id: bool(each.given_answers) for each in questions}
    given = {key: value for key, value in (null_odds or {}).items() if key in answers}
    odds = given | {key: 0.0 for key in answers if key not in given}  # the file's order decides between equals
    raw = {"exact": _best(_exact_match, answers, predictions), "f1": _best(_f1_or_empty, answers, predictions)}
    scores = raw
    if threshold is not None:
        withdrawn = {key for key in answers if key in predictions and odds[key] > threshold}
        scores = {
            name: {key: float(not answerable[key]) if key in withdrawn else score for key, score in each.items()}
            for name, each in raw.items()
        }
    groups = {"": list(answers)}
    groups |= {prefix: [key for key in answers if answerable[key] is has] for prefix, has in _SPLITS.items()}
    metrics = {
        prefix + name: _percent((each[key] for key in keys), len(keys))
        for prefix, keys in groups.items()
        for name, each in scores.items()
        if keys
    }
    if null_odds is not None:
        for name, each in raw.items():
            metrics |= _best_threshold(name, each, predictions, odds, answerable)
    return _score({"exact_match": metrics.pop("exact"), **metrics}, answers, predictions)


def _best(
    metric: Callable[[str, str], float], answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str]
) -> dict[str, float]:
    """Of each question the best over its answers; 0 without a prediction."""
    return {
        key: max(metric(predictions[key], text) for text in texts) if key in predictions else 0.0
        for key, texts in answers.items()
    }


def _best_threshold(
    name: str,
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    odds: Mapping[str, float],
    answerable: Mapping[str, bool],
) -> dict[str, float]:
    """Start with no answer given at all, then admit the questions by rising odds; where the sum is largest."""
    current = best = float(sum(not each for each in answerable.values()))
    threshold = 0.0
    for key in sorted(odds, key=odds.__getitem__):
        if key not in predictions:
            continue
        current += scores[key] if answerable[key] else -float(bool(predictions[key]))
        if current > best:
            best, threshold = current, odds[key]
    return {f"best_{name}": 100.0 * best / len(odds), f"best_{name}_thresh": threshold}


def _percent(values: Iterable[float], count: int) -> float:
    return 100.0 * sum(values) / count


def _score(metrics: dict[str, float], answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> Score:
    missing = tuple(key for key in answers if key not in predictions)
    return Score(metrics, missing, tuple(key for key in predictions if key not in answers))

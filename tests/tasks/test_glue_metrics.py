"""GLUE's metrics against the textbook, in plain Python; and what is defined where the textbook divides by zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest

from hf_soo.glue import metrics
from hf_soo.glue.tasks import TASKS


def counts(predictions: Sequence[int], labels: Sequence[int]) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    pairs = list(zip(predictions, labels, strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    product = math.fsum(a * b for a, b in zip(dx, dy, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def some_classes(rng: np.random.Generator, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, count, 200)
    return np.where(rng.random(200) < 0.7, labels, rng.integers(0, count, 200)), labels


def test_classification_is_the_textbooks(rng: np.random.Generator) -> None:
    predictions, labels = some_classes(rng)
    tp, fp, fn, tn = counts(predictions.tolist(), labels.tolist())
    assert min(tp, fp, fn, tn) > 10
    accuracy, f1 = (tp + tn) / 200, 2 * tp / (2 * tp + fp + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    for name in ("mrpc", "qqp"):
        assert metrics.score(TASKS[name], predictions, labels) == pytest.approx(
            {"accuracy": accuracy, "f1": f1, "combined_score": (accuracy + f1) / 2}, rel=1e-12
        )
    for name in ("sst2", "qnli", "rte", "wnli"):
        assert metrics.score(TASKS[name], predictions, labels) == {"accuracy": accuracy}
    assert metrics.score(TASKS["cola"], predictions, labels) == pytest.approx(
        {"matthews_correlation": matthews}, rel=1e-12
    )


def test_three_classes(rng: np.random.Generator) -> None:
    predictions, labels = some_classes(rng, 3)
    right = sum(p == label for p, label in zip(predictions.tolist(), labels.tolist(), strict=True))
    assert metrics.score(TASKS["mnli"], predictions, labels) == {"accuracy": right / 200}


def test_correlations_are_the_textbooks_with_ties(rng: np.random.Generator) -> None:
    labels = np.round(rng.uniform(0, 5, 120) * 4) / 4  # as in STS-B: many are equal
    predictions = (labels + rng.normal(0, 1, 120)).astype(np.float32)
    x, y = predictions.tolist(), labels.tolist()
    both = pearson(x, y), pearson(ranks(x), ranks(y))
    assert 0.5 < both[0] < 0.95 and both[0] != both[1]
    assert metrics.score(TASKS["stsb"], predictions, labels) == pytest.approx(
        {"pearson": both[0], "spearmanr": both[1], "combined_score": sum(both) / 2}, rel=1e-10
    )


@pytest.mark.parametrize(("name", "keys"), [("cola", ["matthews_correlation"]), ("stsb", list(TASKS["stsb"].metrics))])
@pytest.mark.parametrize("constant", ["predictions", "labels"])
def test_a_constant_correlates_with_nothing(
    name: str, keys: list[str], constant: str, caplog: pytest.LogCaptureFixture
) -> None:
    varied, same = np.array([0, 1, 1, 0]), np.ones(4, dtype=int)
    with caplog.at_level(logging.WARNING):
        pair = (same, varied) if constant == "predictions" else (varied, same)
        assert metrics.score(TASKS[name], *pair) == dict.fromkeys(keys, 0.0)
    assert f"All 4 {constant} are 1: the correlation is taken as 0" in caplog.text


def test_f1_without_a_positive_is_zero() -> None:
    found = metrics.score(TASKS["mrpc"], np.zeros(4, dtype=int), np.array([0, 1, 1, 1]))
    assert found == {"accuracy": 0.25, "f1": 0.0, "combined_score": 0.125}


def test_numbers_that_are_not_finite_are_not_a_correlation_of_zero() -> None:
    found = metrics.score(TASKS["stsb"], np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert all(math.isnan(value) for value in found.values())


def test_shapes_and_packages_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for predictions in (np.zeros((3, 1)), np.zeros(2)):
        with pytest.raises(ValueError, match=r"RTE: predictions have shape .* labels \(3,\)"):
            metrics.score(TASKS["rte"], predictions, np.zeros(3))
    metrics.check_installed()
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(ValueError, match=r"need SciPy; pip install 'hf-soo\[eval\]'"):
        metrics.check_installed()

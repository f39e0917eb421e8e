"""GLUE's metrics, as fractions from 0 to 1 (correlations from -1), computed by scikit-learn and SciPy.

A prediction that is the same for all examples has no correlation with anything: 0/0. It is defined as 0 here, with a
warning, as scikit-learn does for Matthews's; NaN would be an empty cell in a table, as if nothing had been measured.

Test predictions are written in the format of the GLUE server: a TSV ``index``, ``prediction`` a task.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_soo.files import write_atomically
from hf_soo.glue.tasks import SCORE_RANGE, GlueTask

logger = logging.getLogger(__name__)

Array = NDArray[np.generic]


def check_installed() -> None:
    """Refuse to start what could not be scored at its end.

    Raises:
        ValueError: scikit-learn or SciPy is missing.
    """
    missing = [name for module, name in (("sklearn", "scikit-learn"), ("scipy", "SciPy")) if find_spec(module) is None]
    if missing:
        raise ValueError(f"GLUE's metrics need {' and '.join(missing)}; pip install 'hf-soo[eval]'.")


def score(task: GlueTask, predictions: Array, labels: Array) -> dict[str, float]:
    """The official metrics of one part of a task; ``combined_score`` is the mean of the two where there are two.

    Args:
        task: says which metrics.
        predictions: classes or, in a regression, numbers [N].
        labels: of the same shape and kind.

    Raises:
        ValueError: the shapes are not equal, or there is nothing to score.
    """
    if predictions.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"{task.title}: predictions have shape {predictions.shape}, labels {labels.shape}; both must be [N], N > 0."
        )
    if task.regression:
        values = _correlations(predictions, labels)
    elif task.metrics[0] == "matthews_correlation":
        return {"matthews_correlation": _matthews(predictions, labels)}
    elif "f1" in task.metrics:
        values = {"accuracy": _accuracy(predictions, labels), "f1": _f1(predictions, labels)}
    else:
        return {"accuracy": _accuracy(predictions, labels)}
    return {**values, "combined_score": float(np.mean(list(values.values())))}


def _accuracy(predictions: Array, labels: Array) -> float:
    """The share of classes [N] that are right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(predictions: Array, labels: Array) -> float:
    """The harmonic mean of precision and recall of class 1; 0 where nothing is found."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: Array, labels: Array) -> float:
    """Matthews's correlation coefficient of classes [N]; 0 where predictions or labels are all of one class."""
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions, labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _correlations(predictions: Array, labels: Array) -> dict[str, float]:
    """Pearson's correlation, and Spearman's, which is that of the ranks, of numbers [N].

    Both are 0 where either side is constant, and NaN where a prediction is not finite.
    """
    from scipy.stats import pearsonr, spearmanr

    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, labels))
    if not np.isfinite(x).all():
        return {"pearson": float("nan"), "spearmanr": float("nan")}
    if _constant(predictions, labels):
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {"pearson": float(pearsonr(x, y).statistic), "spearmanr": float(spearmanr(x, y).statistic)}


def _constant(predictions: Array, labels: Array) -> bool:
    """Whether either side has one value only, and a warning if so."""
    for what, values in (("predictions", predictions), ("labels", labels)):
        if (values == values[0]).all():
            logger.warning("All %d %s are %s: the correlation is taken as 0", len(values), what, values[0])
            return True
    return False


def write_predictions(folder: Path, task: GlueTask, part: int, predicted: Array) -> Path:
    """Write the server's file of one test part whole or not at all.

    Args:
        folder: where to; made when absent.
        task: says whether labels are words, numbers, or scores, which are clipped to 0..5.
        part: its number among ``task.test_parts``.
        predicted: classes or scores [N].

    Returns:
        The file.
    """
    file = folder / f"{task.server_files[part]}.tsv"
    if task.regression:
        cells = [f"{value:.3f}" for value in np.clip(predicted, *SCORE_RANGE)]
    else:
        cells = [task.labels[int(value)] for value in predicted]
    rows = "".join(f"{index}\t{cell}\n" for index, cell in enumerate(cells))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"index\tprediction\n{rows}")
    return file

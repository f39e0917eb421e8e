"""Test predictions in the format of the GLUE server: a TSV ``index``, ``prediction`` a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf_soo.files import write_atomically
from hf_soo.glue.metrics import Array
from hf_soo.glue.tasks import SCORE_RANGE, GlueTask


def file_names(task: GlueTask) -> tuple[str, ...]:
    """The server's names of the files, one for each test part.

    Args:
        task: of GLUE.
    """
    return tuple(f"{task.title}{ending}.tsv" for ending in (("-m", "-mm") if len(task.test_parts) > 1 else ("",)))


def write_predictions(file: Path, task: GlueTask, predicted: Array) -> None:
    """Write one file whole or not at all.

    Args:
        file: in a folder that is made when absent.
        task: says whether labels are words, numbers, or scores, which are clipped to 0..5.
        predicted: classes or scores [N].
    """
    if task.regression:
        cells = [f"{value:.3f}" for value in np.clip(predicted, *SCORE_RANGE)]
    else:
        cells = [task.labels[int(value)] for value in predicted]
    rows = "".join(f"{index}\t{cell}\n" for index, cell in enumerate(cells))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"index\tprediction\n{rows}")

"""Where the examples of a GLUE task come from: the hub, the folders of GLUE's archive, or files of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Annotated, Any

from hf_soo.engine.checks import Bounds, Checked, Count
from hf_soo.files import readable
from hf_soo.glue.files import SUFFIXES, Examples, Row, collect, read_examples
from hf_soo.glue.tasks import DIAGNOSTIC, GlueTask
from hf_soo.runs.arguments import option

logger = logging.getLogger(__name__)

# The archive's names of the hub's parts, in order of preference.
FILE_STEMS = {
    "train": ("train",),
    "validation": ("dev", "validation"),
    "validation_matched": ("dev_matched", "validation_matched", "dev", "validation"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
    "test": ("test", "msr_paraphrase_test"),
    "test_matched": ("test_matched",),
    "test_mismatched": ("test_mismatched",),
    # in MNLI's folder, or in one beside it
    DIAGNOSTIC: ("diagnostic", "AX", "../diagnostic/diagnostic", "../AX/AX", "../AX/diagnostic", "../AX/test", "../AX"),
}
OPTIONAL = {  # a local copy may lack them; what is missing then
    "validation_mismatched": "not evaluated on", DIAGNOSTIC: "no AX.tsv for the server"
}  # fmt: skip


@dataclass
class GlueDataArguments(Checked):
    """Which examples; also flags of scripts/run_glue.py."""

    _argument_group_name = "data"

    task_name: list[str] | None = field(
        default=None, metadata={"help": "cola sst2 mrpc stsb qqp mnli qnli rte wnli, or all; several: a table."}
    )
    dataset_name: str = option("nyu-mll/glue", "Data set of the hub, whose configurations are the tasks.")
    data_dir: str | None = option(None, "Instead of the hub: a folder with GLUE's own (CoLA/train.tsv, ...).")
    train_file: str | None = option(None, "Instead of the hub: .tsv, .csv, .json or .jsonl with the hub's columns.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    test_file: str | None = option(None, "The same, to predict.")
    max_seq_length: Annotated[int, Bounds(8)] = option(128, "Longer texts are cut.")
    pad_to_max_length: bool = option(False, "Pad to max_seq_length, not to the longest of the batch.")
    max_train_samples: Count | None = option(None, "Train on the first so many examples.")
    max_eval_samples: Count | None = option(None, "Evaluate on the first so many examples.")
    max_predict_samples: Count | None = option(None, "Predict the first so many examples.")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is not allowed, or two exclude each other.
        """
        super().__post_init__()
        if self.data_dir is not None and self.files:
            raise ValueError(f"data_dir={self.data_dir!r} and {', '.join(self.files)} exclude each other; give one.")

    @property
    def names(self) -> list[str]:
        """The tasks as they were given."""
        return self.task_name or []

    @property
    def files(self) -> dict[str, str]:
        """The files of one's own, by flag."""
        given = {key: getattr(self, key) for key in ("train_file", "validation_file", "test_file")}
        return {key: value for key, value in given.items() if value is not None}


def load_part(task: GlueTask, part: str, data: GlueDataArguments) -> Examples | None:
    """One part of a task, checked; None where it is one that may be missing.

    Args:
        task: which.
        part: the hub's name of it.
        data: where from.

    Raises:
        ValueError: it is not there, or cannot be used as it is.
    """
    labelled = part.startswith(("train", "validation"))
    if data.files:
        return _own_file(task, part, data, labelled=labelled)
    if data.data_dir is None and part != DIAGNOSTIC:
        return _hub(task, data.dataset_name, task.name, part, labelled=labelled)
    if data.data_dir is None:
        return _hub_diagnostic(task, data.dataset_name)
    root = Path(data.data_dir).expanduser()
    with readable(root):
        folder = _folder(task, root)
    for stem in FILE_STEMS[part]:
        for suffix in SUFFIXES:
            if (file := Path(normpath(folder / f"{stem}{suffix}"))).is_file():
                return read_examples(file, task, labelled=labelled)
    if part in OPTIONAL:
        logger.warning("%s has no %s.tsv: %s", folder, FILE_STEMS[part][0], OPTIONAL[part])
        return None
    raise ValueError(f"{folder} has no {FILE_STEMS[part][0]}.tsv (nor .csv, .json, .jsonl); {task.title} needs it.")


def _own_file(task: GlueTask, part: str, data: GlueDataArguments, *, labelled: bool) -> Examples | None:
    flag = f"{part.split('_')[0]}_file"
    if part.endswith("_mismatched") or part == DIAGNOSTIC:
        return None
    if flag not in data.files:
        raise ValueError(f"{flag} is missing: {', '.join(data.files)} given without it; give all files that are used.")
    return read_examples(data.files[flag], task, labelled=labelled)


def _folder(task: GlueTask, root: Path) -> Path:
    """The task's folder, directly under the root or one deeper."""
    if not root.is_dir():
        raise ValueError(f"data_dir={str(root)!r} is no folder; give the one that holds {task.title}/train.tsv.")
    for name in (task.title, task.name):
        if (root / name).is_dir():
            return root / name
    if len(deeper := sorted(root.glob(f"*/{task.title}"))) == 1:
        return deeper[0]
    found = ", ".join(path.name for path in sorted(root.iterdir()) if path.is_dir()) or "no folders"
    raise ValueError(f"data_dir={str(root)!r} has no folder {task.title}; it has {found}.")


def _hub(task: GlueTask, name: str, configuration: str, split: str, *, labelled: bool) -> Examples:
    import datasets

    logger.info("reading %s, %s, %s, of the hub", name, configuration, split)
    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"dataset_name={name!r} ({configuration}, {split}) cannot be loaded: {error}; give --data_dir for local "
            "files."
        ) from error
    place = f"{name}, {configuration}, {split}"

    def numbered() -> Iterator[Row]:
        for number, row in enumerate(_rows(rows)):
            yield f"{place}, row {number}", row

    return collect(task, numbered(), name, place, labelled=labelled)


def _hub_diagnostic(task: GlueTask, name: str) -> Examples | None:
    """GLUE's diagnostic set; copies of GLUE of other names may lack it."""
    try:
        return _hub(task, name, "ax", "test", labelled=False)
    except ValueError as error:
        logger.warning("%s: %s", OPTIONAL[DIAGNOSTIC], error)
        return None


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))

"""The nine tasks of GLUE (Wang et al., ICLR 2019): what each classifies, by which labels, and what it is scored by.

| task | text | labels | official metrics |
|---|---|---|---|
| CoLA | a sentence | 0, 1 (acceptable) | Matthews correlation |
| SST-2 | a sentence | 0, 1 (positive) | accuracy |
| MRPC, QQP | two sentences, two questions | 0, 1 (same meaning) | accuracy, F1 |
| STS-B | two sentences | a score from 0 to 5 | Pearson, Spearman |
| MNLI | premise, hypothesis | entailment, neutral, contradiction | accuracy, matched and mismatched |
| QNLI | question, sentence | entailment, not_entailment | accuracy |
| RTE, WNLI | two sentences | entailment, not_entailment; 0, 1 | accuracy |

Labels are numbered as in the hub's ``nyu-mll/glue``, whose column names these are, too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ALL = "all"
SCORE_RANGE = (0.0, 5.0)  # of STS-B
DIAGNOSTIC = "diagnostic"  # GLUE's set of hand-made pairs, which has no score of its own


@dataclass(frozen=True, slots=True)
class GlueTask:
    """One task: its names, columns, labels, metrics, and the sizes of its official parts."""

    name: str  # of the hub's configuration: "sst2"
    title: str  # of the official archive's folder and of the server's files: "SST-2"
    texts: tuple[str, ...]  # one or two columns
    labels: tuple[str, ...]  # by number; none for a regression
    metrics: tuple[str, ...]  # official ones; those whose names end in _mm are of MNLI's mismatched part
    train_samples: int
    dev_samples: int
    # a column of the official files -> the hub's name of it
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def regression(self) -> bool:
        """Whether a number is predicted, not a class."""
        return not self.labels

    @property
    def words(self) -> bool:
        """Whether labels are words, in files and for the server."""
        return bool(self.labels) and not self.labels[0].isdigit()

    @property
    def evaluation_parts(self) -> tuple[str, ...]:
        """The hub's names of the dev parts; the first is the one that is evaluated while training."""
        return self._parts("validation")

    @property
    def test_parts(self) -> tuple[str, ...]:
        """The hub's names of the test parts; MNLI's model predicts the diagnostic set too."""
        return (*self._parts("test"), DIAGNOSTIC) if self.name == "mnli" else self._parts("test")

    @property
    def server_files(self) -> tuple[str, ...]:
        """The server's names of the predictions of each test part."""
        return (f"{self.title}-m", f"{self.title}-mm", "AX") if self.name == "mnli" else (self.title,)

    def _parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}_matched", f"{name}_mismatched") if self.name == "mnli" else (name,)


_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_TWO = ("accuracy", "f1", "combined_score")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", "CoLA", ("sentence",), _BINARY, ("matthews_correlation",), 8551, 1043),
        GlueTask("sst2", "SST-2", ("sentence",), _BINARY, ("accuracy",), 67349, 872),
        GlueTask(
            "mrpc", "MRPC", _PAIR, _BINARY, _TWO, 3668, 408,
            {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
        ),
        GlueTask(
            "stsb", "STS-B", _PAIR, (), ("pearson", "spearmanr", "combined_score"), 5749, 1500, {"score": "label"}
        ),
        GlueTask(
            "qqp", "QQP", ("question1", "question2"), _BINARY, _TWO, 363846, 40430, {"is_duplicate": "label"}
        ),
        GlueTask(
            "mnli", "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
            ("accuracy", "accuracy_mm"), 392702, 9815,
            {"gold_label": "label", "sentence1": "premise", "sentence2": "hypothesis"},
        ),
        GlueTask("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",), 104743, 5463),
        GlueTask("rte", "RTE", _PAIR, _ENTAILMENT, ("accuracy",), 2490, 277),
        GlueTask("wnli", "WNLI", _PAIR, _BINARY, ("accuracy",), 635, 71),
    )
}  # fmt: skip


def _find_task(name: str) -> GlueTask:
    """A task by its name, whichever of the usual spellings: "sst2", "SST-2", "sts_b"."""
    plain = re.sub(r"[\s_-]", "", name).lower()
    if plain not in TASKS:
        near = difflib.get_close_matches(plain, [*TASKS, ALL], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task_name={name!r} is no task of GLUE; {hint}Use {', '.join(TASKS)}, several, or {ALL!r}.")
    return TASKS[plain]


def find_tasks(names: Sequence[str]) -> list[GlueTask]:
    """Several tasks in the order given, each once; "all" is all nine.

    Args:
        names: of tasks; each may be a list with commas.

    Raises:
        ValueError: there is no such task, or none is named.
    """
    parts = [part for name in names for part in name.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"task_name is missing; give one of {', '.join(TASKS)}, several with commas, or {ALL!r}.")
    groups = (TASKS.values() if part.strip().lower() == ALL else (_find_task(part),) for part in parts)
    return list(dict.fromkeys(task for group in groups for task in group))

"""What ``scripts/run_squad.py`` reads, and its flags: model and questions, each checked before anything is trained.

Flags have the names of ``run_qa.py``.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_soo.engine.checks import Checked, Count, Whole
from hf_soo.runs.arguments import option
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.squad.files import QuestionSet
from hf_soo.squad.tokens import Labels, Template, Tokens
from hf_soo.squad.windows import Windows

logger = logging.getLogger(__name__)


@dataclass
class QaDataArguments(Checked):
    """Which questions, and how answers are chosen."""

    _argument_group_name = "data"

    dataset_name: str | None = option(None, "squad, squad_v2 or another data set of the hub with their columns.")
    train_file: str | None = option(None, "SQuAD's JSON, or JSON lines with the hub's columns.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    test_file: str | None = option(None, "The same, for --do_predict; answers may be missing.")
    max_seq_length: Count = option(384, "Tokens of a window, question and special tokens included.")
    doc_stride: Whole = option(128, "Context tokens that consecutive windows share.")
    max_query_length: Count = option(64, "Tokens that are kept of a question.")
    pad_to_max_length: bool = option(False, "Pad every batch to max_seq_length, not to its longest window.")
    version_2_with_negative: bool = option(
        False, "Some questions have no answer (SQuAD v2.0); not needed where the data say so."
    )
    null_score_diff_threshold: float = option(
        0.0, "v2.0: no answer where its score is better than the best answer's by more than this."
    )
    n_best_size: Count = option(20, "Candidates that are kept of a question.")
    max_answer_length: Count = option(30, "Tokens of an answer.")
    max_train_samples: Count | None = option(None, "Train on the first so many questions.")
    max_eval_samples: Count | None = option(None, "Evaluate on the first so many questions.")
    max_predict_samples: Count | None = option(None, "Predict the first so many questions.")


@dataclass(frozen=True, slots=True)
class Part:
    """The questions of one file as model inputs."""

    asked: QuestionSet
    windows: Windows
    description: dict[str, Any]


@dataclass(frozen=True, slots=True)
class QaData:
    """All that is trained, evaluated and predicted on."""

    train: Part | None
    validation: Part | None
    test: Part | None
    version_2: bool
    template: Template

    @property
    def parts(self) -> dict[str, Part]:
        """Those that there are, by name."""
        each = {"train": self.train, "eval": self.validation, "test": self.test}
        return {name: part for name, part in each.items() if part is not None}

    @classmethod
    def load(cls, data: QaDataArguments, args: RunTrainingArguments, tokenizer: Any, cache_dir: str | None) -> QaData:
        """Read, check and tokenize all questions of a run.

        Args:
            data: which, and how.
            args: what is done with them.
            tokenizer: a fast tokenizer.
            cache_dir: of downloads.

        Raises:
            ValueError: files, lengths or a tokenizer that cannot be used.
        """
        files = _read_files(data, args, cache_dir)
        version_2 = data.version_2_with_negative or any(each.has_impossible for each in files.values())
        for name, each in files.items():
            if name != "test":
                each.check_answers(version_2=version_2)
        template = Template.of(tokenizer)
        parts = {name: _part(each, name, data, tokenizer, template) for name, each in files.items()}
        return cls(parts.get("train"), parts.get("validation"), parts.get("test"), version_2, template)


def _read_files(data: QaDataArguments, args: RunTrainingArguments, cache_dir: str | None) -> dict[str, QuestionSet]:
    """The questions of every part that the run needs: "train", "validation", "test"."""
    needed = {
        "train": (args.do_train, data.train_file, data.max_train_samples),
        "validation": (args.do_eval, data.validation_file, data.max_eval_samples),
        "test": (args.do_predict, data.test_file, data.max_predict_samples),
    }
    found = {}
    for name, (wanted, file, count) in needed.items():
        if not wanted:
            continue
        if file is None and (data.dataset_name is None or name == "test"):
            way_out = f"give --{name}_file" + ("" if name == "test" else " or --dataset_name squad")
            raise ValueError(f"there are no questions to {_VERBS[name]}; {way_out}.")
        if file is not None:
            found[name] = QuestionSet.read(file).head(count)
        else:
            found[name] = QuestionSet.of_hub(str(data.dataset_name), name, cache_dir).head(count)
    return found


_VERBS = {"train": "train on", "validation": "evaluate on", "test": "predict"}


def _part(asked: QuestionSet, name: str, data: QaDataArguments, tokenizer: Any, template: Template) -> Part:
    """Model inputs; in training without the questions whose answer is not where the file says."""
    tokens = Tokens.of(tokenizer, asked, data.max_query_length)
    longest = int(tokens.questions.lengths.argmax())
    room = data.max_seq_length - template.size - int(tokens.questions.lengths[longest])
    if data.doc_stride >= room:
        raise ValueError(
            f"doc_stride={data.doc_stride} leaves no step: with max_seq_length={data.max_seq_length} only {room} "
            f"tokens of a context fit beside question {asked.questions[longest].id!r} of {asked.source}; give a "
            "smaller doc_stride or max_query_length, or a larger max_seq_length."
        )
    labels = None if name == "test" else Labels.of(asked, tokens)
    windows = Windows(tokens, template, data.max_seq_length, data.doc_stride, labels)
    description = {"questions": len(asked.questions), "digest": _digest(asked), "questions_cut": tokens.cut}
    if labels is not None:
        description |= {"answers_wrong": len(labels.wrong), "answers_lost": len(labels.lost)}
        description["answers_inexact"] = len(labels.inexact)
        _report(asked, labels, training=name == "train")
    if name == "train" and labels is not None:
        skipped = {*labels.wrong, *labels.lost}
        windows.keep(np.array([each.id not in skipped for each in asked.questions]))
    return Part(asked, windows, {"file": Path(asked.source).name, **description, "windows": len(windows)})


def _report(asked: QuestionSet, labels: Labels, *, training: bool) -> None:
    """Say which answers are not where the file says; refuse a file in which most are not."""
    skipped = [*labels.wrong, *labels.lost]
    if 2 * len(skipped) > len(asked.questions):
        raise ValueError(
            f"{asked.source}: {len(skipped)} of {len(asked.questions)} answers are not in their context at "
            f"'answer_start' (the first is of question {skipped[0]!r}); the file is damaged, or counts bytes "
            "instead of characters."
        )
    if skipped:
        what = "are left out" if training else "count in the scores, not in the loss's labels"
        logger.warning(
            "%s: the answers of %d questions are not in their context at 'answer_start' (%d) or in no token (%d); "
            "these questions %s: %s", asked.source, len(skipped), len(labels.wrong), len(labels.lost), what,
            ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else ""),
        )  # fmt: skip
    if labels.inexact:
        more = "%s: the tokens of %d answers hold more than the answer ('1973s' for '1973')"
        logger.info(more, asked.source, len(labels.inexact))


def _digest(asked: QuestionSet) -> str:
    """Equal for equal questions and answers."""
    digest = hashlib.sha256()
    for each in asked.questions:
        digest.update(repr((each.id, each.question, each.answers)).encode())
    return digest.hexdigest()[:16]

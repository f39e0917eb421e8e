"""Question answering on SQuAD as a task: what ``scripts/run_squad.py`` trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING as READERS
from transformers import AutoModelForQuestionAnswering, EvalPrediction, Trainer, TrainerCallback

from hf_soo.runs.finetuning import FineTuningTrainer, check_evaluation
from hf_soo.runs.pretrained import PretrainedArguments, find_pretrained, sizes, sketch_pretrained
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.runs.script import Domain
from hf_soo.runs.training import Task
from hf_soo.squad.answers import AnswerConfig, Predictions, answer
from hf_soo.squad.inputs import Part, QaData, QaDataArguments
from hf_soo.squad.metrics import score_v1, score_v2
from hf_soo.squad.windows import WindowCollator

logger = logging.getLogger(__name__)

DATA_SETTINGS = ("max_seq_length", "doc_stride", "max_query_length", "pad_to_max_length", "max_answer_length")


class SquadTask(Task):
    """Spans of a context that answer questions; measured by exact match and F1."""

    kind = "squad"
    title = "SQuAD"
    metrics = ("exact_match", "f1")
    card: Mapping[str, Any] = {"tasks": "question-answering", "language": "en", "dataset": "SQuAD"}

    def __init__(self, model: PretrainedArguments, data: QaDataArguments, args: RunTrainingArguments) -> None:
        """Read and check questions, tokenizer and configuration.

        Args:
            model: which.
            data: which questions, and how answers are chosen.
            args: what is done.

        Raises:
            ValueError: settings of the Trainer that keep no logits to answer from, or a best model by a metric that
                is not measured.
        """
        check_evaluation(args, self.metrics)
        self.settings, self.pretrained = data, find_pretrained(model, data.max_seq_length, READERS, "answer questions")
        self.data = QaData.load(data, args, self.pretrained.tokenizer, model.cache_dir)
        self.answers = AnswerConfig(
            data.n_best_size, data.max_answer_length, self.data.version_2, data.null_score_diff_threshold
        )
        self.latest: Predictions | None = None  # of the evaluation set

    def make_model(self, seed: int) -> nn.Module:
        """The pretrained encoder with a question-answering head."""
        return self.pretrained.load(AutoModelForQuestionAnswering, self.pretrained.config, seed)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """The model's shape, and the data with a digest of questions and answers."""
        config = self.pretrained.config
        data = {
            "version_2": self.data.version_2,
            **{key: getattr(self.settings, key) for key in DATA_SETTINGS},
            **{name: part.description for name, part in self.data.parts.items()},
        }
        return {"model": {"type": config.model_type, "start": self.pretrained.name, **sizes(config)}, "data": data}

    def make_trainer(
        self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]
    ) -> FineTuningTrainer:
        """The Trainer of a run."""
        self.latest = None
        settings, data = self.settings, self.data
        return FineTuningTrainer(
            model=model,
            args=args,
            data_collator=WindowCollator(data.template, settings.max_seq_length, always=settings.pad_to_max_length),
            train_dataset=None if data.train is None else data.train.windows,
            eval_dataset=None if data.validation is None else data.validation.windows,
            callbacks=callbacks,
            processing_class=self.pretrained.tokenizer,  # kept with every checkpoint
            compute_metrics=self._evaluate,
            preprocess_logits_for_metrics=_start_and_end,
        )

    def finish(self, trainer: Trainer) -> dict[str, float]:
        """Answer the questions of the evaluation set and of the test set; the first process writes the files."""
        folder, first = Path(str(trainer.args.output_dir)), trainer.is_world_process_zero()
        metrics: dict[str, float] = {}
        if self.data.validation is not None:
            if not self._is_latest(trainer):
                trainer.evaluate()
            assert self.latest is not None
            metrics |= self._score(self.data.validation, self.latest)
            if first:
                _write(self.latest, folder, "")
        if self.data.test is not None:
            output = trainer.predict(self.data.test.windows)
            predictions = self._answer(self.data.test, output.predictions)
            if self.data.test.asked.can_be_scored(version_2=self.data.version_2):
                scores = self._score(self.data.test, predictions)
                metrics |= {f"test_{name}": value for name, value in scores.items()}
            if first:
                _write(predictions, folder, "test_")
        return metrics

    def _is_latest(self, trainer: Trainer) -> bool:
        """Whether the answers at hand are those of the weights that the Trainer holds now."""
        steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return (
            self.latest is not None
            and not trainer.args.load_best_model_at_end
            and steps[-1:] == [trainer.state.global_step]
        )

    def _evaluate(self, prediction: EvalPrediction) -> dict[str, float]:
        part = self.data.validation
        assert part is not None
        self.latest = self._answer(part, prediction.predictions)
        return self._score(part, self.latest)

    def _answer(self, part: Part, logits: Any) -> Predictions:
        start, end = logits
        return answer(start, end, part.windows, part.asked, self.answers)

    def _score(self, part: Part, predictions: Predictions) -> dict[str, float]:
        questions = part.asked.questions
        if self.data.version_2:
            return score_v2(questions, predictions.texts, predictions.null_odds).metrics
        return score_v1(questions, predictions.texts).metrics


def _start_and_end(logits: Any, labels: Any) -> Any:
    """Without hidden states, which some models and configurations return too."""
    return logits[:2]


def _write(predictions: Predictions, folder: Path, prefix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    paths = predictions.write(folder, prefix)
    logger.info("Wrote %s", ", ".join(str(path) for path in paths))


def _sketch(model: PretrainedArguments, data: QaDataArguments) -> nn.Module | None:
    return sketch_pretrained(model, READERS)


DOMAIN = Domain("squad", SquadTask, (PretrainedArguments, QaDataArguments), _sketch, smooths_labels=False)

"""Fine-tuning on one task of GLUE: what ``scripts/run_glue.py`` trains."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainerCallback,
)

from hf_soo.glue.data import GlueDataArguments, load_part
from hf_soo.glue.files import Examples, digest
from hf_soo.glue.lora import AdapterTrainer, with_adapters
from hf_soo.glue.metrics import check_installed, score, write_predictions
from hf_soo.glue.model import GlueModelArguments, check_head, find_classifier, make_classifier
from hf_soo.glue.tasks import GlueTask, find_tasks
from hf_soo.runs.finetuning import FineTuningTrainer, best_class, check_evaluation
from hf_soo.runs.pretrained import Pretrained, sizes, sketch_pretrained
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.runs.script import Domain
from hf_soo.runs.training import Task

logger = logging.getLogger(__name__)

BEST = "best"  # prefix of the metrics of the checkpoint that load_best_model_at_end chose
MISMATCHED = "mm"


class GlueFineTuning(Task):
    """A pretrained model with a new head, on one task, measured by its official metrics."""

    kind = "glue"

    def __init__(
        self, task: GlueTask, pretrained: Pretrained, data: GlueDataArguments, args: RunTrainingArguments
    ) -> None:
        """Read and check all examples that the run will need; nothing is tokenised yet.

        Args:
            task: of GLUE.
            pretrained: the model.
            data: where the examples are.
            args: says which parts are needed.

        Raises:
            ValueError: files, a head or settings of the Trainer that cannot be used.
        """
        check_head(pretrained, task)
        if task.regression and args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: {task.title} has no classes; leave it out."
            )
        assert isinstance(pretrained.arguments, GlueModelArguments)
        self.task, self.pretrained, self.model, self.data = task, pretrained, pretrained.arguments, data
        self.title = f"{task.title}, {pretrained.name}"
        hub = {"dataset_tags": "nyu-mll/glue", "dataset_args": task.name, "dataset": f"GLUE {task.title}"}
        self.card = {"tasks": "text-classification", "language": "en", **hub}
        self.metrics = tuple(name for name in task.metrics if not name.endswith(f"_{MISMATCHED}"))
        check_evaluation(args, self.metrics)
        self.train: Examples | None = None
        self.evaluated: list[Examples] = []  # MNLI's has two, matched and mismatched
        self.tested: list[Examples] = []
        if args.do_train:
            self.train = self._part("train", data.max_train_samples)
        if args.do_eval:
            parts = (self._part(part, data.max_eval_samples) for part in task.evaluation_parts)
            self.evaluated = [part for part in parts if part is not None]
        if args.do_predict:
            parts = (self._part(part, data.max_predict_samples) for part in task.test_parts)
            self.tested = [part for part in parts if part is not None]

    def _part(self, part: str, count: int | None) -> Examples | None:
        examples = load_part(self.task, part, self.data)
        return None if examples is None else examples.head(count)

    def make_model(self, seed: int) -> nn.Module:
        """The pretrained encoder under a new head, with adapters where they are asked for."""
        model = make_classifier(self.pretrained, self.task, seed)
        return with_adapters(model, self.model) if self.model.lora_r is not None else model

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Model, task, and how many examples of which source."""
        measured = [part for part in (self.train, *self.evaluated) if part is not None]
        parts = measured or self.tested  # predictions change nothing of a run's record
        development = len(self.evaluated[0]) if self.evaluated else 0
        shape = sizes(model.config, "model_type", "hidden_dropout_prob")
        data = {
            "source": ", ".join(dict.fromkeys(part.source for part in parts)),
            "train_examples": len(self.train) if self.train else 0,
            "eval_examples": development,
            "train_subset": self.train is not None and len(self.train) != self.task.train_samples,
            "dev_subset": bool(self.evaluated) and development != self.task.dev_samples,
            "digest": digest(parts),
        }
        return {
            "model": {"name": self.pretrained.name, **shape, **self.model.adapters},
            "task": self.task.name,
            "data": data,
            "max_seq_length": self.data.max_seq_length,
            "pad_to_max_length": self.data.pad_to_max_length,
        }

    def make_trainer(
        self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]
    ) -> FineTuningTrainer:
        """The Trainer of a run."""
        kind = FineTuningTrainer if self.model.lora_r is None else AdapterTrainer
        trainer = kind(
            model=model,
            args=args,
            data_collator=self._collator(),
            train_dataset=None if self.train is None else self._tokenised(self.train),
            eval_dataset=self._tokenised(self.evaluated[0]) if self.evaluated else None,
            processing_class=self.pretrained.tokenizer,
            callbacks=callbacks,
            compute_metrics=self._scores,
            preprocess_logits_for_metrics=_numbers if self.task.regression else best_class,
        )
        if isinstance(trainer, AdapterTrainer):
            trainer.make_adapted = partial(self.make_model, args.seed)
        return trainer

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        return score(self.task, np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    def _collator(self) -> DataCollatorWithPadding:
        length = self.data.max_seq_length
        positions = self.pretrained.positions()
        fits = positions is None or -(-length // 8) * 8 <= positions  # rounding up must not leave the last position
        return DataCollatorWithPadding(
            self.pretrained.tokenizer,
            padding="max_length" if self.data.pad_to_max_length else "longest",
            max_length=length if self.data.pad_to_max_length else None,
            pad_to_multiple_of=8 if fits else None,
        )

    def _tokenised(self, examples: Examples) -> Dataset:
        names = [f"text_{index}" for index in range(len(examples.texts))]
        columns: dict[str, Any] = dict(zip(names, examples.texts, strict=True))
        if examples.labels is not None:
            columns["label"] = examples.labels
        tokenizer, length = self.pretrained.tokenizer, self.data.max_seq_length

        def tokenise(rows: dict[str, Any]) -> Any:
            return tokenizer(*(rows[name] for name in names), truncation=True, max_length=length, padding=False)

        return Dataset.from_dict(columns).map(tokenise, batched=True, remove_columns=names, desc="tokenising")

    def finish(self, trainer: Any) -> dict[str, float]:
        """MNLI's other part, the best checkpoint's metrics where that is the model now, and the test predictions."""
        metrics: dict[str, float] = {}
        if self.evaluated and trainer.args.load_best_model_at_end and trainer.args.do_train:
            measured = trainer.evaluate(metric_key_prefix=BEST)
            metrics |= {name: measured[f"{BEST}_{name}"] for name in self.metrics}
            metrics["eval_loss"] = measured[f"{BEST}_loss"]
        for other in self.evaluated[1:]:
            measured = trainer.evaluate(self._tokenised(other), metric_key_prefix=MISMATCHED)
            metrics[f"accuracy_{MISMATCHED}"] = measured[f"{MISMATCHED}_accuracy"]
        for number, examples in enumerate(self.tested):
            predicted = np.asarray(trainer.predict(self._tokenised(examples)).predictions)
            if trainer.is_world_process_zero():
                folder = Path(trainer.args.output_dir) / "predictions"
                logger.info("wrote %s", write_predictions(folder, self.task, number, predicted))
        return metrics


def _numbers(logits: Tensor | tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    """The predicted numbers [B] of a regression, of logits [B, 1], which some models return as the first of a tuple."""
    return (logits[0] if isinstance(logits, tuple) else logits).squeeze(-1)


def _one_task(model: GlueModelArguments, data: GlueDataArguments, args: RunTrainingArguments) -> GlueFineTuning:
    """The task of a single run; `sweep` makes those of a table.

    Raises:
        ValueError: several tasks are named, or what cannot be used.
    """
    check_installed()
    tasks = find_tasks(data.names)
    if len(tasks) > 1:
        raise ValueError(f"task_name={','.join(data.names)} names {len(tasks)} tasks, and this is one run; give one.")
    return GlueFineTuning(tasks[0], find_classifier(model, data.max_seq_length), data, args)


def sketch(model: GlueModelArguments, data: GlueDataArguments) -> nn.Module | None:
    """A model of the same layers, with its adapters, before its weights are read."""
    found = sketch_pretrained(model, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    return found if found is None or model.lora_r is None else with_adapters(found, model)


DOMAIN = Domain("glue", _one_task, (GlueModelArguments, GlueDataArguments), sketch)

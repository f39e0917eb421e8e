"""The head of a GLUE run: made for the task, and refused where it is one of another."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, PretrainedConfig

from hf_soo.engine.checks import Count
from hf_soo.glue.tasks import GlueTask
from hf_soo.runs.arguments import option
from hf_soo.runs.pretrained import Pretrained, PretrainedArguments, find_pretrained


@dataclass
class GlueModelArguments(PretrainedArguments):
    """Which pretrained model, and what becomes of its head."""

    ignore_mismatched_sizes: bool = option(False, "Replace a head that was made for another number of labels.")
    lora_r: Count | None = option(None, "Train adapters of this rank (LoRA) and the head; None: all weights.")
    lora_alpha: Count | None = option(None, "Their scale is lora_alpha / lora_r; None: lora_r.")
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers with adapters, or all-linear; None: PEFT's for the model."}
    )

    def __post_init__(self) -> None:
        """Check the adapters.

        Raises:
            ValueError: a value is not allowed, or given without a rank.
        """
        super().__post_init__()
        for name in ("lora_alpha", "lora_targets"):
            if self.lora_r is None and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r} without lora_r; give the rank of the adapters.")

    @property
    def alpha(self) -> int:
        """The adapters' α; 1 without any."""
        return self.lora_alpha or self.lora_r or 1

    @property
    def adapters(self) -> dict[str, Any]:
        """What a record says of the adapters; nothing where there are none."""
        if self.lora_r is None:
            return {}
        return {"lora": {"r": self.lora_r, "alpha": self.alpha, "targets": self.lora_targets}}


def find_classifier(arguments: GlueModelArguments, max_seq_length: int) -> Pretrained:
    """A pretrained model that can classify; arguments and errors as those of ``find_pretrained``."""
    return find_pretrained(arguments, max_seq_length, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "classify sequences")


def make_classifier(found: Pretrained, task: GlueTask, seed: int) -> nn.Module:
    """The model with a head for the task.

    Args:
        found: the model.
        task: says how many labels.
        seed: of the weights that the checkpoint does not have.
    """
    assert isinstance(found.arguments, GlueModelArguments)
    replaced = found.arguments.ignore_mismatched_sizes
    config = _task_config(found.config, task)
    return found.load(AutoModelForSequenceClassification, config, seed, ignore_mismatched_sizes=replaced)


def check_head(found: Pretrained, task: GlueTask) -> None:
    """Refuse a fine-tuned model whose head is of another task.

    Args:
        found: the model.
        task: the task to train or to evaluate.

    Raises:
        ValueError: the head has another number of labels, or they stand in another order.
    """
    assert isinstance(found.arguments, GlueModelArguments)
    config, name = found.config, found.arguments.model_name_or_path
    fine_tuned = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
    if not fine_tuned:
        return
    wanted = len(task.labels) or 1
    if config.num_labels != wanted:
        if found.arguments.ignore_mismatched_sizes:
            return
        raise ValueError(
            f"{name!r} has a head with {config.num_labels} labels, {task.title} needs {wanted}; give "
            "--ignore_mismatched_sizes to put a new head in its place."
        )
    theirs = [str(label).lower() for _, label in sorted((config.id2label or {}).items())]
    if sorted(theirs) == sorted(task.labels) and theirs != list(task.labels):
        raise ValueError(
            f"{name!r} has the labels {', '.join(theirs)}, {task.title} has them in the order {', '.join(task.labels)}."
        )


def _task_config(config: PretrainedConfig, task: GlueTask) -> PretrainedConfig:
    """A copy of the configuration with the task's labels; dropout and everything else stay."""
    kept = copy.deepcopy(config)
    kept.problem_type = "regression" if task.regression else "single_label_classification"
    labels = task.labels or ("score",)
    kept.id2label, kept.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
    return kept

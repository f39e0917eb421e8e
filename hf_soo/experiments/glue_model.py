"""The model of a GLUE run and its tokenizer, checked against each other and against the task before training."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PretrainedConfig,
    set_seed,
)

from hf_soo.flags import option
from hf_soo.tasks.bert import check_vocabulary
from hf_soo.tasks.glue import GlueTask

logger = logging.getLogger(__name__)


@dataclass
class GlueModelArguments:
    """Which pretrained model."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(None, "Folder of a pretrained model, or its name on the hub.")
    config_name: str | None = option(None, "Of another configuration; None: the model's.")
    tokenizer_name: str | None = option(None, "Of another tokenizer; None: the model's.")
    cache_dir: str | None = option(None, "Where models of the hub are kept; None: transformers' place.")
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    ignore_mismatched_sizes: bool = option(False, "Replace a head that was made for another number of labels.")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model that is not loaded yet: where it is, its configuration and its tokenizer."""

    arguments: GlueModelArguments
    config: PretrainedConfig
    tokenizer: Any

    @property
    def name(self) -> str:
        """For a record: the folder's name, or the hub's."""
        assert self.arguments.model_name_or_path is not None
        path = Path(self.arguments.model_name_or_path).expanduser()
        return path.absolute().name if path.is_dir() else str(path)

    def positions(self) -> int | None:
        """The longest input; None where positions are relative."""
        count: int | None = getattr(self.config, "max_position_embeddings", None)
        offset = "roberta" in self.config.model_type or self.config.model_type == "camembert"
        # RoBERTa numbers its positions from padding_idx + 1.
        return count - self.config.pad_token_id - 1 if count is not None and offset else count

    def make(self, task: GlueTask, seed: int) -> nn.Module:
        """The model with a head for the task.

        Args:
            task: says how many labels.
            seed: of the weights that the checkpoint does not have.

        Raises:
            ValueError: the weights cannot be loaded, or are not those of the model.
        """
        set_seed(seed)
        assert self.arguments.model_name_or_path is not None
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.arguments.model_name_or_path,
                config=task_config(self.config, task),
                output_loading_info=True,
                dtype=torch.float32,  # not the checkpoint's: weights in half precision lose small steps
                ignore_mismatched_sizes=self.arguments.ignore_mismatched_sizes,
                cache_dir=self.arguments.cache_dir,
                revision=self.arguments.model_revision,
            )
        except Exception as error:  # safetensors, pickle, OSError, RuntimeError: none of them says which flag it was
            raise ValueError(_not_loaded("model_name_or_path", self.arguments.model_name_or_path, error)) from error
        encoder = f"{model.base_model_prefix}."
        missing = sorted(key for key in found["missing_keys"] if key.startswith(encoder) and "pooler" not in key)
        if missing:
            raise ValueError(
                f"model_name_or_path={self.arguments.model_name_or_path!r}: its weights lack {len(missing)} of the "
                f"tensors of a {self.config.model_type} (the first is {missing[0]}); it is another model's folder."
            )
        assert isinstance(model, nn.Module)
        return model


def find_pretrained(arguments: GlueModelArguments, max_seq_length: int) -> Pretrained:
    """Read configuration and tokenizer, and refuse what would fail in training.

    Args:
        arguments: which model.
        max_seq_length: of the inputs.

    Raises:
        ValueError: there is no such model, it cannot classify, its tokenizer does not fit, or it has fewer positions.
    """
    name = arguments.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing; give a folder, or a name on the hub: bert-base-uncased.")
    config = _load(AutoConfig, "config_name" if arguments.config_name else "model_name_or_path", arguments)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name!r} is a model of the kind {config.model_type!r}, which does not classify sequences.")
    tokenizer = _load(AutoTokenizer, "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path", arguments)
    found = Pretrained(arguments, config, tokenizer)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no padding token; use a model of the kind of BERT.")
    check_tokenizer(config, len(tokenizer), arguments.tokenizer_name or name)
    if (positions := found.positions()) is not None and max_seq_length > positions:
        raise ValueError(f"max_seq_length={max_seq_length}, but {name} has {positions} positions; give {positions}.")
    return found


def check_tokenizer(config: PretrainedConfig, size: int, name: str) -> None:
    """Refuse a tokenizer that was not made for the checkpoint.

    Args:
        config: of the model.
        size: entries of the tokenizer's vocabulary.
        name: of the tokenizer, for the message.

    Raises:
        ValueError: the two sizes do not belong together.
    """
    try:
        if isinstance(config, BertConfig):
            check_vocabulary(config, size)
        elif not 0.95 * config.vocab_size <= size <= config.vocab_size:  # some are rounded up, by less than 1 %
            raise ValueError(f"the vocabulary has {size} entries but config.vocab_size is {config.vocab_size}")
    except ValueError as error:
        raise ValueError(f"The tokenizer of {name!r} does not fit the model: {error}.") from error


def check_head(found: Pretrained, task: GlueTask) -> None:
    """Refuse a fine-tuned model whose head is of another task.

    Args:
        found: the model.
        task: the task to train or to evaluate.

    Raises:
        ValueError: the head has another number of labels, or they stand in another order.
    """
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


def task_config(config: PretrainedConfig, task: GlueTask) -> PretrainedConfig:
    """A copy of the configuration with the task's labels; dropout and everything else stay.

    Args:
        config: of the pretrained model.
        task: says which labels.
    """
    kept = copy.deepcopy(config)
    kept.problem_type = "regression" if task.regression else "single_label_classification"
    labels = task.labels or ("score",)
    kept.id2label, kept.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
    return kept


def _load(loader: Any, flag: str, arguments: GlueModelArguments) -> Any:
    name = getattr(arguments, flag)
    if (folder := Path(name).expanduser()).is_dir() and not (folder / "config.json").is_file() and loader is AutoConfig:
        raise ValueError(f"{flag}={name!r} is a folder without config.json; give one that save_pretrained wrote.")
    try:
        return loader.from_pretrained(name, cache_dir=arguments.cache_dir, revision=arguments.model_revision)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError and the hub's own
        raise ValueError(_not_loaded(flag, name, error)) from error


def _not_loaded(flag: str, name: str | None, error: Exception) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{flag}={name!r} is no folder of a model, nor a model of the hub that can be read: {said[0]}"

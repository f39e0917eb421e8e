"""What the Trainer's own arguments may be: transformers itself takes NaN, -1 micro-batches and the text "false"."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, Literal

from transformers import TrainingArguments

from hf_soo.engine.checks import Count, NonNegative, Positive, Seed, Share, Whole, hints_of, options, require

FIELDS: dict[str, Any] = {
    "learning_rate": NonNegative, "weight_decay": NonNegative, "max_grad_norm": NonNegative | None,
    "adam_beta1": Share, "adam_beta2": Share, "adam_epsilon": NonNegative, "label_smoothing_factor": Share,
    "neftune_noise_alpha": NonNegative | None, "num_train_epochs": Positive, "max_steps": Literal[-1] | Count,
    "warmup_steps": NonNegative, "per_device_train_batch_size": Count, "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count, "eval_accumulation_steps": Count | None,
    "logging_steps": Positive, "eval_steps": Positive | None, "save_steps": Positive, "eval_delay": NonNegative,
    "save_total_limit": Count | None, "torch_empty_cache_steps": Count | None,
    "seed": Seed, "data_seed": Whole | None,
    "dataloader_num_workers": Whole, "dataloader_prefetch_factor": Count | None,
    "ddp_bucket_cap_mb": Count | None, "ddp_timeout": Count,
}  # fmt: skip
"""The numbers that have a range; of every other number and flag of the Trainer the type is checked."""
_PLAIN = {int, float, bool, type(None)}


def check_fields(given: TrainingArguments) -> None:
    """Check numbers, flags and words, before the Trainer's arguments work with them.

    Args:
        given: as the user set them; what is left at its default is as good as it is.

    Raises:
        ValueError: a value is not allowed.
    """
    hints = hints_of(TrainingArguments)
    for field in dataclasses.fields(TrainingArguments):
        name, value = field.name, getattr(given, field.name)
        hint = FIELDS.get(name, hints[name])
        words = [part for part in options(hint) if isinstance(part, type) and issubclass(part, Enum)]
        if value is field.default:
            continue
        if name in FIELDS or {*options(hint)} <= _PLAIN:
            require(name, value, hint)
        elif words and isinstance(value, str) and not isinstance(value, Enum):
            require(name, value, Literal[tuple(str(word.value) for word in words[0])])

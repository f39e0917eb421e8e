"""What the Trainer's own arguments may be: transformers itself takes NaN, -1 micro-batches and the text "false"."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

import torch
from transformers import TrainingArguments, get_scheduler

from hf_soo.engine.checks import Count, NonNegative, Positive, Seed, Share, Whole, hints_of, options, require, shown
from hf_soo.optimizers.schedules import poly_warmup

POLY_WARMUP = "poly_warmup"
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
        elif words and not isinstance(value, Enum):
            require(name, value, Literal[tuple(str(word.value) for word in words[0])])


def check_schedule(args: TrainingArguments, own: Mapping[str, Any]) -> None:
    """Make the learning rate's schedule once, and look at its rates, before it is needed.

    Args:
        args: the Trainer's, read.
        own: the arguments of ``POLY_WARMUP``.

    Raises:
        ValueError: the schedule refuses its arguments, or gives a rate that is no number.
    """
    total = args.max_steps if args.max_steps > 0 else 1_000_000 + int(args.warmup_steps)
    warmup, optimizer = args.get_warmup_steps(total), torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name, given = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)), args.lr_scheduler_kwargs
    if name != POLY_WARMUP:
        require("lr_scheduler_kwargs", given, dict | None)
    steps = (0, warmup, (warmup + total) // 2, total - 1)
    try:
        if name == POLY_WARMUP:
            schedule: Any = poly_warmup(optimizer, warmup, total, **own)
        else:
            assert not isinstance(given, str)
            schedule = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=given)
        for rate in (each(step) for each in getattr(schedule, "lr_lambdas", ()) for step in steps):
            require("the rate", rate, float)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type={name!r} with lr_scheduler_kwargs={shown(given)}, {warmup} of {total} steps of "
            f"warm-up: {error}"
        ) from error

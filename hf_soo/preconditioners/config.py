"""What the methods' settings share: how they are made from keywords, a schedule, batch size, dtypes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch

from hf_soo.engine.checks import unknown_key
from hf_soo.engine.layers import accumulation_dtype

C = TypeVar("C")
StateDtype = Literal["float32", "bfloat16"]


def make_config(method: str, cls: type[C], settings: Mapping[str, Any]) -> C:
    """A method's frozen Config from keywords.

    Args:
        method: the method's name, for the message.
        cls: its Config dataclass.
        settings: keyword -> value.

    Returns:
        The config, checked.

    Raises:
        ValueError: a key is unknown (the valid ones are listed) or a value is refused.
    """
    valid = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in valid:
            raise ValueError(unknown_key(f"setting of {method!r}", str(key), [*valid, "apply_to"]))
    return cls(**settings)


def prototype_updates_at(step: int, period: int) -> bool:
    """Whether the prototype's schedule updates in a step: from 0, in strides of clamp(⌊log₄(t+1)⌋, 1, period).

    The stride is k while t + 1 < 4ᵏ⁺¹, so a division for each k tells.

    Args:
        step: t.
        period: the longest stride.
    """
    start, stride = 0, 1
    while stride < period and step >= (end := 4 ** (stride + 1) - 1):  # the first t with a longer stride
        start += math.ceil((end - start) / stride) * stride
        stride += 1
    return step >= start and (step - start) % stride == 0


def stored_dtype(state_dtype: StateDtype, model: torch.dtype) -> torch.dtype:
    """The dtype of a state; "float32" is float64 for a float64 model."""
    return torch.bfloat16 if state_dtype == "bfloat16" else accumulation_dtype(model)

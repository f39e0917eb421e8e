"""What methods that learn from the gradient alone share: their report of an update, their batch size, their dtypes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.checks import require_count, require_in
from hf_soo.engine.layers import accumulation_dtype
from hf_soo.engine.preconditioner import Outcome, Updated

StateDtype = Literal["float32", "bfloat16"]


def learned(size: Tensor, valid: Tensor) -> Updated:
    """The report of an update of layers of which the gradient is the one side.

    Args:
        size: |g|² of each layer, [L].
        valid: whether its gradient could be used, bool [L].
    """
    return Updated((~valid * Outcome.NOT_FINITE.value)[:, None], size[:, None])  # Outcome.UPDATED is 0


def check_batch_size(batch_size: int | None) -> None:
    """Check B: the averaged loss terms of a step, over all processes; None until somebody fills it in.

    Raises:
        ValueError: it is neither None nor a whole number >= 1.
    """
    if batch_size is not None:
        require_count("batch_size", batch_size, 1)


def check_state_dtype(state_dtype: StateDtype) -> None:
    """Check the name of a dtype.

    Raises:
        ValueError: it is neither "float32" nor "bfloat16".
    """
    require_in("state_dtype", state_dtype, ("float32", "bfloat16"))


def stored_dtype(state_dtype: StateDtype, model: torch.dtype) -> torch.dtype:
    """The dtype of a state; "float32" is float64 for a float64 model.

    Args:
        state_dtype: the setting.
        model: the parameter's dtype.
    """
    return torch.bfloat16 if state_dtype == "bfloat16" else accumulation_dtype(model)

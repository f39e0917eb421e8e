"""Learning-rate schedules of the BERT pretraining recipe (NVIDIA DeepLearningExamples, `PolyWarmUpScheduler`).

    p = (step + 1) / total
    lr · p / warmup        while p < warmup
    lr · (1 - p)^degree    afterwards

The decay is not rescaled at the join, so the rate jumps from the peak to peak · (1 - warmup)^degree; that is the
recipe's curve (Transformers' `get_polynomial_decay_schedule_with_warmup` decays from the full peak: another one).
"""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def poly_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, degree: float = 0.5) -> LambdaLR:
    """Linear warm-up, then polynomial decay to 0 at the last step; 0 for any step after it.

    The scheduler's ``step`` is called after the optimizer's; its state holds numbers alone.

    Args:
        optimizer: whose groups are scheduled.
        num_warmup_steps: steps of warm-up; 0 starts with the decay.
        num_training_steps: steps in total.
        degree: exponent of the decay.

    Raises:
        ValueError: if a value is outside its range.
    """
    if num_training_steps < 1:
        raise ValueError(f"poly_warmup: num_training_steps={num_training_steps!r} must be 1 or more.")
    if not 0 <= num_warmup_steps <= num_training_steps:
        raise ValueError(
            f"poly_warmup: num_warmup_steps={num_warmup_steps!r} must lie in [0, {num_training_steps}], the total."
        )
    if not degree > 0:
        raise ValueError(f"poly_warmup: degree={degree!r} must be positive.")
    # A partial pickles, and unlike a lambda's it survives the scheduler's state_dict.
    return LambdaLR(
        optimizer, partial(_poly_warmup_factor, warmup=num_warmup_steps, total=num_training_steps, degree=degree)
    )


def _poly_warmup_factor(step: int, *, warmup: int, total: int, degree: float) -> float:
    """The factor of the peak rate, in [0, 1], in a step, from 0."""
    if step + 1 < warmup:
        return (step + 1) / warmup
    return float(max(0.0, 1.0 - (step + 1) / total) ** degree)  # clamped: a negative base would give a complex number

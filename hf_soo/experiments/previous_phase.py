"""BERT's second phase goes on from the first: its weights, and the base's moments with their step set to zero.

As in NVIDIA's recipe (DeepLearningExamples, LanguageModeling/BERT), which loads model and optimizer state, sets the
optimizer's step to 0 and starts a new schedule. The factors start fresh: they belong to the short sequences.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.integrations.across import saved_base_state
from hf_soo.integrations.checkpoints import (
    PRECONDITIONER_FILE,
    TRAINER_STATE_FILE,
    last_whole_checkpoint,
    load_whole,
    why_not_whole,
)
from hf_soo.optimizers.bases import BASES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreviousPhase:
    """A whole checkpoint of an earlier run.

    Args:
        folder: the checkpoint.
        steps: how many that run had done.
        base: class of its base optimizer; None: it was none of ours, or it kept the weights alone.
    """

    folder: str
    steps: int
    base: str | None

    def describe(self, base: str) -> dict[str, Any]:
        """What a run JSON says of it.

        Args:
            base: of the run that goes on from here, named as ``base_optim`` is.
        """
        ours = BASES[base].cls.__name__ if base in BASES else base.rpartition(":")[2]
        before = {"steps": self.steps, "base": self.base}
        return {"previous_phase": before, "moments": "kept" if ours == self.base else "fresh"}


def find_phase(folder: str) -> PreviousPhase:
    """The checkpoint to go on from.

    Args:
        folder: a checkpoint, or the output folder of a run, whose newest whole checkpoint is taken.

    Raises:
        ValueError: there is no whole checkpoint.
    """
    reason = why_not_whole(folder)
    checkpoint = folder if reason is None else last_whole_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"previous_phase={folder!r} is no whole checkpoint ({reason}) and holds none; give the output_dir of the "
            "run before, which must have kept checkpoints (save_strategy), or model_name_or_path for weights alone."
        )
    state = json.loads((Path(checkpoint) / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    saved = load_whole(checkpoint, PRECONDITIONER_FILE)
    return PreviousPhase(str(checkpoint), int(state["global_step"]), None if saved is None else str(saved["base"]))


def take_moments(optimizer: PreconditionedOptimizer, phase: PreviousPhase) -> None:
    """Give the base the moments of the phase before, at step zero; every rank must call it.

    Learning rates, weight decay and every other setting stay this run's own. A base of another class starts fresh, and
    a warning says so: its moments would mean something else.

    Args:
        optimizer: ours, before its first step.
        phase: where from.

    Raises:
        ValueError: the checkpoint's moments are of another model.
    """
    base = type(optimizer.base).__name__
    if phase.base != base:
        logger.warning("the moments of %s start fresh: %s has those of %s", base, phase.folder, phase.base)
        return
    saved = saved_base_state(optimizer, phase.folder)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {name: {key: _start(key, value) for key, value in entry.items()} for name, entry in saved["state"].items()}
    optimizer.load_base_state({"groups": groups, "state": state})


def _start(key: str, value: Any) -> Any:
    """A value of the state, as it is; the step counter at zero."""
    if key != "step":
        return value
    return value.new_zeros(value.shape) if isinstance(value, Tensor) else type(value)(0)

"""BERT's second phase goes on from the first: its weights, and the base's moments with their step set to zero.

As in NVIDIA's recipe (DeepLearningExamples, LanguageModeling/BERT), which loads model and optimizer state, sets the
optimizer's step to 0 and starts a new schedule. The factors start fresh: they belong to the short sequences.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.files import read_object
from hf_soo.integrations.checkpoints import (
    PRECONDITIONER_FILE,
    TRAINER_STATE_FILE,
    last_whole_checkpoint,
    load_whole,
    why_not_whole,
)
from hf_soo.integrations.reshard import saved_base_state
from hf_soo.optimizers.bases import BASES
from hf_soo.runs.resume import SETTINGS_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreviousPhase:
    """A whole checkpoint of an earlier run.

    Args:
        folder: the checkpoint; where ``began`` is set, the newest of the run itself.
        steps: how many that run had done.
        base: class of its base optimizer; None: it was none of ours, or it kept the weights alone.
        began: digest of the weights that this run began with, where the phase before has been deleted since.
    """

    folder: str
    steps: int
    base: str | None
    began: str | None = None

    def describe(self, base: str) -> dict[str, Any]:
        """What a run JSON says of it, for a run over ``base``, named as ``base_optim`` is."""
        ours = BASES[base].cls.__name__ if base in BASES else base.rpartition(":")[2]
        before = {"steps": self.steps, "base": self.base}
        return {"previous_phase": before, "moments": "kept" if ours == self.base else "fresh"}

    @classmethod
    def find(cls, folder: str, output_dir: Path | None = None) -> PreviousPhase:
        """The checkpoint to go on from.

        Args:
            folder: a checkpoint, or the output folder of a run that has ended, whose newest whole checkpoint is taken.
            output_dir: of the run that goes on; if that has a checkpoint of its own, ``folder`` may be gone.

        Raises:
            ValueError: there is no whole checkpoint, its weights are in parts, the run before has not ended, or its
                loss was not finite.
        """
        reason = why_not_whole(folder)
        checkpoint = folder if reason is None else last_whole_checkpoint(folder)
        if checkpoint is None:
            if output_dir is not None and (begun := _begun(output_dir)) is not None:
                logger.warning(
                    "previous_phase=%r is gone; this run has begun, and goes on from %s", folder, begun.folder
                )
                return begun
            raise ValueError(
                f"previous_phase={folder!r} is no whole checkpoint ({reason}) and holds none; give the output_dir of "
                "the run before, which must have kept checkpoints (save_strategy), or model_name_or_path for "
                "weights alone."
            )
        state = read_object(Path(checkpoint) / TRAINER_STATE_FILE)
        _check_ended(state, checkpoint, asked_for=checkpoint == folder)
        if not any(Path(checkpoint).glob("model*.safetensors")):
            raise ValueError(
                f"previous_phase: {checkpoint} has no whole weights (model.safetensors); let the run before write "
                "them: stage3_gather_16bit_weights_on_model_save: true (ZeRO-3), fsdp_state_dict_type: "
                "FULL_STATE_DICT (FSDP2)."
            )
        saved = load_whole(checkpoint, PRECONDITIONER_FILE, mmap=True)  # the factors may be gigabytes
        return cls(str(checkpoint), int(state["global_step"]), None if saved is None else str(saved["base"]))


def _begun(output_dir: Path) -> PreviousPhase | None:
    """What a run that has begun wrote down of the phase before it; None: it has not, or has no whole checkpoint."""
    own, file = last_whole_checkpoint(output_dir), output_dir / SETTINGS_FILE
    settings = read_object(file) if file.is_file() else {}
    if own is None or "previous_phase" not in settings:
        return None
    return PreviousPhase(own, **settings["previous_phase"], began=settings["initial_weights"])


def _check_ended(state: dict[str, Any], checkpoint: str, asked_for: bool) -> None:
    """Refuse weights that diverged, and the newest of a run that stopped on its way, which nobody has asked for."""
    if not all(math.isfinite(entry.get("loss", 0.0)) for entry in state.get("log_history", ())):
        raise ValueError(f"previous_phase: the loss of {checkpoint} is not finite; give an earlier checkpoint.")
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    ended = control.get("should_training_stop", False) or state["global_step"] >= state.get("max_steps", 0)
    if not (asked_for or ended):
        raise ValueError(
            f"previous_phase: {checkpoint} is the newest checkpoint of a run that has not ended "
            f"({state['global_step']} of {state['max_steps']} steps); let it end, or give the checkpoint itself as "
            "previous_phase."
        )


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
        found = "none of hf_soo's" if phase.base is None else f"those of {phase.base}"
        logger.warning("the moments of %s start fresh: %s has %s", base, phase.folder, found)
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

"""Which checkpoint a run goes on from; never, silently, that of a run with other settings."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_soo.experiments.callbacks import kept_curve
from hf_soo.experiments.run_arguments import RunTrainingArguments
from hf_soo.experiments.runs import RunRecord, jsonable, reach
from hf_soo.files import write_atomically
from hf_soo.integrations.checkpoints import last_whole_checkpoint

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"
# A run may be prolonged; everything else that a record says must be as it was.
MAY_CHANGE = frozenset({"max_steps", "num_train_epochs"})
# With a global batch, which stays as it was, so may how it is made. Step k then takes the examples it would have taken
# (the sampler's order is one, and a step takes the next global batch of it); how they are dealt to ranks and
# micro-batches changes, and with it dropout and the order of sums.
HOW_THE_BATCH_IS_MADE = frozenset({"processes", "per_device_train_batch_size", "gradient_accumulation_steps"})


class OutputFolder(TrainerCallback):
    """The folder of a run's checkpoints: what to resume from, and whose they are."""

    def __init__(self, args: RunTrainingArguments, record: RunRecord, *, restart: bool) -> None:
        """Look at the folder; change nothing yet.

        Args:
            args: `output_dir` and `resume_from_checkpoint`.
            record: of the run to come.
            restart: begin anew, whatever is there.
        """
        self.folder = args.folder
        self.restart = restart
        settings = {"optimizer": record.optimizer, "base": record.base, "seed": record.seed, **record.config}
        self.settings: dict[str, Any] = json.loads(json.dumps(jsonable(settings)))  # as it will be read back
        self._asked = args.resume_from_checkpoint

    def checkpoint(self) -> str | None:
        """The checkpoint to go on from: the one asked for, else the last whole one in the folder, else none.

        Raises:
            ValueError: the folder holds checkpoints of a run with other settings.
        """
        if self._asked is not None:
            return str(self._asked)
        last = None if self.restart else last_whole_checkpoint(self.folder)
        if last is not None:
            self._check_same()
            logger.info("Resuming from %s; --restart begins anew", last)
        return last

    def _check_same(self) -> None:
        file = self.folder / SETTINGS_FILE
        if not file.is_file():  # checkpoints of another script: the Trainer's own checks must do
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        free = MAY_CHANGE if self.settings.get("global_batch_size") is None else MAY_CHANGE | HOW_THE_BATCH_IS_MADE
        for key in sorted((set(before) | set(self.settings)) - free):
            if before.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.folder} holds checkpoints of a run with {key}={before.get(key)!r}, now "
                    f"{self.settings.get(key)!r}; give --restart to delete them, or another --output_dir."
                )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Only now, with model and optimizer built, delete what a restart replaces, and say whose folder this is."""
        if args.process_index != 0:
            return
        if self.restart:
            for old in self.folder.glob("checkpoint-*"):
                shutil.rmtree(old)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / SETTINGS_FILE, json.dumps(self.settings, indent=1) + "\n")


def is_finished(checkpoint: str | None, args: RunTrainingArguments, target: float | None = None) -> bool:
    """Whether a checkpoint is of the last step already; the Trainer would do one step too many from there.

    Args:
        checkpoint: a checkpoint folder, or None.
        args: says how long the run is.
        target: the evaluation loss that it stops at.
    """
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if target is not None and reach(kept_curve(state), target)["steps"] is not None:
        return True
    if args.max_steps > 0:
        return bool(state.global_step >= args.max_steps)
    return bool(state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs)

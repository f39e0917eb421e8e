"""Which checkpoint a run goes on from; never, silently, that of a run with other settings."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_soo.files import read_object, write_atomically
from hf_soo.integrations.checkpoints import newest_whole, require_whole
from hf_soo.runs.callbacks import RecordCallback, kept_curve
from hf_soo.runs.record import RunRecord, check_same, reach, read_run
from hf_soo.runs.run_arguments import RunTrainingArguments

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"
# A run may be prolonged; everything else that a record says must be as it was.
_MAY_CHANGE = frozenset({"max_steps", "num_train_epochs"})
# With a global batch, which stays as it was, so may how it is made. Step k then takes the examples it would have taken
# (the sampler's order is one, and a step takes the next global batch of it); how they are dealt to ranks and
# micro-batches changes, and with it dropout and the order of sums.
_HOW_THE_BATCH_IS_MADE = frozenset({"processes", "per_device_train_batch_size", "gradient_accumulation_steps"})


class OutputFolder(TrainerCallback):
    """The folder of a run's checkpoints: what to resume from, and whose they are."""

    def __init__(self, args: RunTrainingArguments, record: RunRecord, *, restart: bool) -> None:
        """Look at the folder; change nothing yet.

        Args:
            args: ``output_dir`` and ``resume_from_checkpoint``.
            record: of the run to come.
            restart: begin anew, whatever is there.
        """
        self.folder = args.folder
        self._args = args
        self.restart = restart
        self.settings = record.settings
        self._asked = args.resume_from_checkpoint
        # but batches of like lengths are drawn in rounds of all processes' micro-batches
        deals_alike = args.global_batch_size is not None and args.train_sampling_strategy != "group_by_length"
        self._free = _MAY_CHANGE | _HOW_THE_BATCH_IS_MADE if deals_alike else _MAY_CHANGE

    def checkpoint(self) -> str | None:
        """The checkpoint to go on from: the one asked for, else the last whole one in the folder, else none.

        Raises:
            ValueError: the one asked for is not whole, or the folder holds checkpoints of a run with other settings.
        """
        if self._asked is not None:
            require_whole(self._args, self._asked)
            return str(self._asked)
        last = None if self.restart else newest_whole(self._args)
        if last is not None:
            self._check_same()
            logger.info("Resuming from %s; --restart begins anew", last)
        return last

    def _check_same(self) -> None:
        file = self.folder / SETTINGS_FILE
        if not file.is_file():  # checkpoints of another script: the Trainer's own checks must do
            return
        try:
            before = read_object(file)
        except ValueError as error:
            raise ValueError(f"{error}; delete that file to go on unchecked, or give --restart.") from error
        way_out = "give --restart to delete them, or another --output_dir"
        check_same(before, self.settings, f"{self.folder} holds checkpoints", way_out, self._free)

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


def kept_record(file: Path) -> RunRecord | None:
    """The record of a run that the same command would only repeat; None: there is none, or it was stopped or failed."""
    record = read_run(file) if file.is_file() else None
    return record if record is not None and record.status in ("completed", "diverged") else None


def take_trained(trainer: Trainer, keeper: RecordCallback, checkpoint: str) -> None:
    """Weights and record of a last checkpoint, or the best one's weights where the run ends with those.

    The Trainer itself would train a step too many from there.

    Raises:
        ValueError: the weights are in parts that only a run that trains puts together.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{checkpoint} is the last checkpoint of a run that was trained, but its JSON is missing or says that it "
            "failed; the checkpoint is sharded, and only training puts it together: give --restart to run it again, or "
            "a larger --max_steps (a lower --target_eval_loss) to go on."
        )
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    keeper.restore(trainer.state)

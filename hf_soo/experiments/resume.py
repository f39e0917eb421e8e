"""Which checkpoint a run goes on from; never that of a run with other settings, silently."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState

from hf_soo.experiments.pretraining_arguments import PretrainingArguments
from hf_soo.experiments.runs import RunRecord, jsonable
from hf_soo.integrations.checkpoints import last_whole_checkpoint
from hf_soo.tasks.wordpiece import write_atomically

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"
# A run may be prolonged; everything else that a record says must be as it was.
MAY_CHANGE = frozenset({"max_steps", "num_train_epochs"})


def resume_from(args: PretrainingArguments, record: RunRecord, *, restart: bool) -> str | None:
    """The checkpoint to go on from: the one asked for, else the last in `output_dir`, else none.

    Args:
        args: `output_dir` and `resume_from_checkpoint`.
        record: of the run to come; its settings are kept in `output_dir` and compared at the next start.
        restart: delete the checkpoints of `output_dir` and begin anew.

    Raises:
        ValueError: `output_dir` holds checkpoints of a run with other settings.
    """
    folder = args.folder
    if args.resume_from_checkpoint is not None:
        return str(args.resume_from_checkpoint)
    with args.main_process_first(desc="looking for a checkpoint"):
        if restart and args.process_index == 0:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        last = last_whole_checkpoint(folder)
        settings = jsonable({"optimizer": record.optimizer, "base": record.base, "seed": record.seed, **record.config})
        if last is not None:
            _check_same(folder, settings)
            logger.info("Resuming from %s; --restart begins anew", last)
        elif args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
    return last


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS_FILE
    if not file.is_file():  # checkpoints of another script: the Trainer's own checks must do
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for key in sorted((set(before) | set(settings)) - MAY_CHANGE):
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{folder} holds checkpoints of a run with {key}={before.get(key)!r}, now {settings.get(key)!r}; "
                "give --restart to delete them and begin anew, or another --output_dir."
            )


def is_finished(checkpoint: str | None, args: PretrainingArguments) -> bool:
    """Whether a checkpoint is of the last step already; the Trainer would do one step too many from there.

    Args:
        checkpoint: a checkpoint folder, or None.
        args: says how long the run is.
    """
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if args.max_steps > 0:
        return bool(state.global_step >= args.max_steps)
    return bool(state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs)

"""Training runs of any task: one run is (task, optimizer) -> ``RunRecord``, written as JSON however it ends.

Two runs that are compared share task and seed and, as the hash in their records shows, every initial weight; they
differ in the optimizer's own settings alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_soo import machine
from hf_soo.engine.comm import Communicator, text_of
from hf_soo.integrations.agreement import WAY_OUT, name_of
from hf_soo.integrations.card import plain_settings
from hf_soo.outputs import folder_to_write
from hf_soo.runs.callbacks import RecordCallback, RunProgress
from hf_soo.runs.record import RunRecord, file_name, reach, recording
from hf_soo.runs.resume import OutputFolder, is_finished, kept_record, take_trained
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments

logger = logging.getLogger(__name__)

METHOD_SETTINGS = ("optim_args", "base_optim_args")


class Task(ABC):
    """What is trained, on what: all that runs of one kind do not share with runs of another."""

    kind: str = "run"  # of a record: which report reads it
    title: str  # over a picture
    metrics: tuple[str, ...] = ()  # what an evaluation measures besides its loss
    card: Mapping[str, Any] = {}  # what the model card says of the task: arguments of `Trainer.create_model_card`

    @abstractmethod
    def make_model(self, seed: int) -> nn.Module:
        """The model with its initial weights, of that seed."""

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """What the record says of model and data."""

    def describe_start(self, args: RunTrainingArguments) -> dict[str, Any]:
        """What the record says, besides, of how one run of this task starts; a comparison has two.

        Raises:
            ValueError: this task cannot be trained in these settings.
        """
        return {}

    @abstractmethod
    def make_trainer(self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]) -> Trainer:
        """The Trainer of a run, with its collators, the task's own callbacks and those given."""

    def finish(self, trainer: Trainer) -> dict[str, float]:
        """What is done with the trained and evaluated model, on every process: predictions, for example.

        Returns:
            Metrics for the record.
        """
        return {}


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One run's settings, besides those of its task."""

    run: RunArguments
    training: RunTrainingArguments
    callbacks: tuple[TrainerCallback, ...] = ()  # of who runs it, after the run's own

    @property
    def results_dir(self) -> Path:
        """Where the run's JSON goes."""
        return Path(self.run.results_dir or self.training.folder / "runs")

    @property
    def name(self) -> str:
        """The name given, or one made of optimizer, base, learning rate and their settings: "mkor-lamb-lr0.02"."""
        if self.run.name is not None:
            return self.run.name
        args = self.training
        names = dict.fromkeys((args.optimizer_name, args.base_name))
        settings = [item for key in METHOD_SETTINGS for item in getattr(args.parsed, key).items()]
        parts = [*names, f"lr{args.learning_rate:g}", *(f"{key}{value}" for key, value in settings)]
        parts += [] if args.do_train else ["eval"]  # beside the JSON of the run that trained
        return file_name("-".join(parts))


def train(job: Job, task: Task) -> list[RunRecord]:
    """One run, or two that are compared; writes their JSONs.

    Args:
        job: all settings.
        task: what is trained.

    Returns:
        The record of the run, and that of the one it was compared with.

    Raises:
        ValueError: settings that cannot be, or checkpoints of another run in the output folder.
        RuntimeError: the two runs did not start from the same weights.
    """
    if job.run.compare_with is None:
        return [_train_one(job, task)]
    first, second = compared(job)
    _begin(second, task)  # refuses what it must before the first run has taken its hours
    records = [_train_one(first, task), _train_one(second, task)]
    hashes = [record.config["initial_weights"] for record in records]
    if hashes[0] != hashes[1]:
        raise RuntimeError(f"The runs started from different weights ({hashes[0]}, {hashes[1]}); nothing to compare.")
    goal = job.run.target_eval_loss
    if goal is None and records[1].status == "completed":
        goal = records[1].final.get("eval_loss")
    if goal is not None:
        for record in records:
            record.target = (record.target or {}) | reach(record.curve, goal)
            _write(record, first)
    return records


def compared(job: Job) -> tuple[Job, Job]:
    """The two jobs of a comparison; their checkpoints lie apart, their JSONs together.

    Raises:
        ValueError: settings of the second optimizer that cannot be, or both runs are the same.
    """
    output, run = job.training.folder, dataclasses.replace(job.run, results_dir=str(job.results_dir))
    first = dataclasses.replace(job.training, output_dir=str(output / f"1-{job.training.optimizer_name}"))
    try:
        second = job.training.compared(job.run, str(output / f"2-{job.run.compare_with}"))
    except ValueError as error:
        raise ValueError(f"compare_with={job.run.compare_with!r}: {error}") from error
    jobs = (
        dataclasses.replace(job, run=run, training=first),
        # the second run is the reference: it has its whole length, and its whole curve
        dataclasses.replace(job, run=dataclasses.replace(run, name=None, target_eval_loss=None), training=second),
    )
    names = [each.name for each in jobs]
    if names[0] == names[1]:
        raise ValueError(f"compare_with: both runs are {names[0]!r}; change the optimizer or a compare_* setting.")
    return jobs


def _begin(job: Job, task: Task) -> tuple[nn.Module, RunRecord, OutputFolder, str | None]:
    """The model, the record, the folder, and the checkpoint to go on from.

    Raises:
        ValueError: the settings are not the task's, or the folder holds checkpoints of another run.
        OSError: nothing can be written where the record goes.
    """
    args = job.training
    model = task.make_model(args.seed)
    record = describe(job, task, model)
    _compare_ranks(job, record)
    output = OutputFolder(args, record, restart=job.run.restart)
    checkpoint = output.checkpoint() if args.do_train else None
    if args.process_index == 0:
        folder_to_write("results_dir", job.results_dir).mkdir(parents=True, exist_ok=True)
    return model, record, output, checkpoint


def _train_one(job: Job, task: Task) -> RunRecord:
    """Train, resuming where there is a checkpoint, and write the run's JSON, however it ends."""
    args = job.training
    model, record, output, checkpoint = _begin(job, task)
    target = job.run.target_eval_loss
    finished = is_finished(checkpoint, args, target)
    kept = kept_record(job.results_dir / f"{record.name}.json") if finished else None
    _agree({"checkpoint": name_of(checkpoint), "finished": kept is not None})  # seen on each node's own disk
    if kept is not None:
        logger.warning("%s is finished already; --restart runs it again", record.name)
        if target is not None and target != (kept.target or {}).get("eval_loss"):
            kept.target = (kept.target or {"stopped": False}) | reach(kept.curve, target)
            _write(kept, job)
        return kept
    with recording(record, job.results_dir if args.process_index == 0 else None):
        keeper = RecordCallback(record, task.metrics, target)
        trainer = task.make_trainer(model, args, [output, keeper, *job.callbacks])
        if trainer.pop_callback(ProgressCallback) is not None:  # not with disable_tqdm, and a notebook has its own
            trainer.add_callback(RunProgress(record, target))
        try:
            if finished:  # and ended before its evaluation did
                assert checkpoint is not None
                take_trained(trainer, keeper, checkpoint)
            elif args.do_train:
                trainer.train(resume_from_checkpoint=checkpoint)
            if args.do_train:
                _keep_model(trainer)
            evaluated = [point["step"] for point in record.curve if point["eval_loss"] is not None]
            if args.do_eval and record.status == "completed" and record.steps not in evaluated:
                trainer.evaluate()
            if record.status == "completed":
                record.final |= task.finish(trainer)
        finally:
            record.peak_memory_bytes = machine.peak_memory_bytes(args.device)
        if target is not None:
            record.target = reach(record.curve, target)
            record.target["stopped"] = record.target["steps"] is not None and record.steps < trainer.state.max_steps
    if args.do_train and args.save_strategy != SaveStrategy.NO:
        source = {"dataset": record.document()["config"].get("data", {}).get("source")}
        (trainer.push_to_hub if args.push_to_hub else trainer.create_model_card)(**{**source, **task.card})
    return record


def _compare_ranks(job: Job, record: RunRecord) -> None:
    """Before they look for a checkpoint together.

    Raises:
        ValueError: the ranks were given other settings, data or initial weights.
    """
    shared = {key: value for key, value in vars(job.run).items() if key not in ("name", "results_dir", "traceback")}
    resume = {"resume_from_checkpoint": name_of(job.training.resume_from_checkpoint)}
    given = shared | {"name": record.name, "seed": record.seed, "do_train": job.training.do_train} | resume
    _agree(given | record.settings)


def _agree(given: Mapping[str, Any]) -> None:
    Communicator().agree({key: text_of(value) for key, value in given.items()}, "the run's", WAY_OUT)


def _keep_model(trainer: Trainer) -> None:
    """The trained model in ``output_dir`` itself, for ``from_pretrained``; not for runs that keep nothing."""
    if trainer.args.save_strategy != SaveStrategy.NO:
        trainer.save_model()


def describe(job: Job, task: Task, model: nn.Module) -> RunRecord:
    """The record of a run that has not begun: what it is, on what, in which settings."""
    args = job.training
    # The usual order is not named: runs that were recorded before there was another one compare, and resume.
    order = (
        {} if args.train_sampling_strategy == "random" else {"train_sampling_strategy": args.train_sampling_strategy}
    )
    config = {
        "initial_weights": _weights_hash(model),
        **task.describe(model),
        **task.describe_start(args),
        **order,
        "processes": args.world_size,
        **plain_settings(args),
        **{key: getattr(args.parsed, key) for key in METHOD_SETTINGS},
    }
    return RunRecord(
        job.name, args.optimizer_name, args.base_name, config, args.seed, kind=task.kind,
        device=machine.device_name(args.device), versions=machine.versions(), commit=machine.commit(),
        code=machine.code(), parameters=sum(parameter.numel() for parameter in model.parameters()),
    )  # fmt: skip


def _weights_hash(model: nn.Module) -> str:
    """A digest of every weight and its name; equal for equal initial weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(record: RunRecord, job: Job) -> None:
    if job.training.process_index == 0:
        record.write(job.results_dir)

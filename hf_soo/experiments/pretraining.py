"""BERT pretraining runs: what `scripts/pretrain_bert.py` is made of.

One run is (model, data, optimizer) -> `RunRecord`. Two runs that are compared share data, seed and, as the hash in
their records shows, every initial weight; they differ in the optimizer's own settings alone.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_soo.experiments import machine
from hf_soo.experiments.callbacks import RecordCallback
from hf_soo.experiments.pretraining_arguments import DataArguments, ModelArguments, PretrainingArguments, RunArguments
from hf_soo.experiments.pretraining_inputs import PretrainingData, load_data, make_model, weights_hash
from hf_soo.experiments.resume import OutputFolder, is_finished
from hf_soo.experiments.runs import RunRecord, reach, read_run, recording
from hf_soo.integrations.arguments import parse_settings
from hf_soo.integrations.trainer import SecondOrderTrainer
from hf_soo.registry import METHODS
from hf_soo.tasks.masking import PretrainingCollator
from hf_soo.tasks.wordpiece import SpecialIds

logger = logging.getLogger(__name__)

EVAL_SEED = 0  # of the masks of every evaluation, whatever the run's seed: losses of different seeds compare
# What a record says of the Trainer's settings; with model and data they decide whether two runs can be compared.
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "precondition_include",
    "precondition_exclude",
)
METHOD_SETTINGS = ("optim_args", "base_optim_args")


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One run's four groups of settings."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: PretrainingArguments

    @property
    def results_dir(self) -> Path:
        """Where the run's JSON goes."""
        return Path(self.run.results_dir or self.training.folder / "runs")


def pretrain(job: Job) -> list[RunRecord]:
    """One run, or two that are compared; writes their JSONs.

    Args:
        job: all settings.

    Returns:
        The record of the run, and that of the one it was compared with.

    Raises:
        ValueError: settings that cannot be.
        RuntimeError: the two runs did not start from the same weights.
    """
    data = load_data(job.data, job.training)
    if job.run.compare_with is None:
        return [train_one(job, data)]
    first, second = _compared(job)
    records = [train_one(first, data), train_one(second, data)]
    hashes = [record.config["initial_weights"] for record in records]
    if hashes[0] != hashes[1]:
        raise RuntimeError(f"The runs started from different weights ({hashes[0]}, {hashes[1]}); nothing to compare.")
    if (goal := records[1].final.get("eval_loss")) is not None and records[1].status == "completed":
        for record in records:
            record.target = reach(record.curve, goal)
            _write(record, first)
    return records


def _compared(job: Job) -> tuple[Job, Job]:
    """The two jobs of a comparison; their checkpoints lie apart, their JSONs together."""
    output, run = job.training.folder, dataclasses.replace(job.run, results_dir=str(job.results_dir))
    first = dataclasses.replace(job.training, output_dir=str(output / f"1-{optimizer_name(job.training)}"))
    second = job.training.compared(job.run, str(output / f"2-{job.run.compare_with}"))
    jobs = (
        dataclasses.replace(job, run=run, training=first),
        dataclasses.replace(job, run=dataclasses.replace(run, name=None), training=second),
    )
    names = [run_name(each) for each in jobs]
    if names[0] == names[1]:
        raise ValueError(f"compare_with: both runs are {names[0]!r}; change the optimizer or a compare_* setting.")
    return jobs


def train_one(job: Job, data: PretrainingData) -> RunRecord:
    """Train, resuming where there is a checkpoint, and write the run's JSON, however it ends.

    Args:
        job: all settings.
        data: what to train on.

    Raises:
        ValueError: settings that cannot be, or checkpoints of another run in the output folder.
    """
    args = job.training
    model = make_model(job.model, data, args.seed)
    record = describe(job, model, data)
    output = OutputFolder(args, record, restart=job.run.restart)
    checkpoint = output.checkpoint()
    if is_finished(checkpoint, args):
        return _finished(record, job)
    with recording(record, job.results_dir if args.process_index == 0 else None):
        trainer = make_trainer(job, model, data, [output, RecordCallback(record)])
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            evaluated = [point["step"] for point in record.curve if point["eval_loss"] is not None]
            if record.status == "completed" and record.steps not in evaluated:
                trainer.evaluate()
        finally:
            record.peak_memory_bytes = machine.peak_memory_bytes(args.device)
        if job.run.target_eval_loss is not None:
            record.target = reach(record.curve, job.run.target_eval_loss)
    return record


def make_trainer(
    job: Job, model: nn.Module, data: PretrainingData, callbacks: list[TrainerCallback]
) -> PretrainingTrainer:
    """The Trainer of a run, its callbacks and both collators.

    Args:
        job: all settings.
        model: with its initial weights.
        data: what to train and evaluate on.
        callbacks: besides the one that tells the collator the epoch.
    """
    training = _collator(job.data, data.ids, seed=job.training.seed)
    trainer = PretrainingTrainer(
        model=model,
        args=job.training,
        data_collator=training,
        train_dataset=data.train,
        eval_dataset=data.eval,
        callbacks=[EpochCallback(training), *callbacks],
    )
    trainer.eval_collator = _collator(job.data, data.ids, seed=EVAL_SEED)
    return trainer


def _collator(data: DataArguments, ids: SpecialIds, seed: int) -> PretrainingCollator:
    return PretrainingCollator(
        ids, masking=data.masking, mask_prob=data.mask_prob, max_predictions=data.max_predictions, seed=seed
    )


class PretrainingTrainer(SecondOrderTrainer):
    """Evaluates with a collator of its own, whose epoch stands still: the same masks at every evaluation."""

    eval_collator: PretrainingCollator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation batches.

        Args:
            eval_dataset: see `Trainer`.
        """
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training


class EpochCallback(TrainerCallback):
    """Tells the collator which epoch's masks to draw."""

    def __init__(self, collator: PretrainingCollator) -> None:
        """Keep the collator.

        Args:
            collator: of the training batches.
        """
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also right after a resume in the middle of an epoch: the whole part is the epoch's number."""
        self.collator.set_epoch(int(state.epoch or 0))


def describe(job: Job, model: nn.Module, data: PretrainingData) -> RunRecord:
    """The record of a run that has not begun: what it is, on what, in which settings.

    Args:
        job: all settings.
        model: with its initial weights.
        data: what it is trained on.
    """
    args = job.training
    config = {
        "model": model_description(model),
        "data": data.description,
        "initial_weights": weights_hash(model),
        "processes": args.world_size,
        **{key: _plain(getattr(args, key)) for key in SETTINGS},
        **{key: parse_settings(key, getattr(args, key)) for key in METHOD_SETTINGS},
    }
    record = RunRecord(run_name(job), optimizer_name(args), base_name(args), config, args.seed)
    record.parameters = sum(parameter.numel() for parameter in model.parameters())
    record.describe_machine(args.device)
    return record


def optimizer_name(args: PretrainingArguments) -> str:
    """The optimizer as text, also where the Trainer made an enum of it.

    Args:
        args: the settings.
    """
    return str(_plain(args.optim))


def base_name(args: PretrainingArguments) -> str:
    """The base that steps: the one asked for, else the method's own; the optimizer itself where it has none.

    Args:
        args: the settings.
    """
    method = METHODS.get(optimizer_name(args))
    return args.base_optim or (method.base if method else optimizer_name(args))


def run_name(job: Job) -> str:
    """The name given, or one made of optimizer, base, learning rate and their settings: "mkor-lamb-lr0.02".

    Args:
        job: all settings.
    """
    if job.run.name is not None:
        return job.run.name
    args = job.training
    names = dict.fromkeys((optimizer_name(args), base_name(args)))
    settings = [item for key in METHOD_SETTINGS for item in parse_settings(key, getattr(args, key)).items()]
    parts = [*names, f"lr{args.learning_rate:g}", *(f"{key}{value}" for key, value in settings)]
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


def model_description(model: nn.Module) -> dict[str, int | float]:
    """Shape and dropout, as the model's configuration has them.

    Args:
        model: a BERT.
    """
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {key: getattr(model.config, key) for key in (*keys, "hidden_dropout_prob")}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _write(record: RunRecord, job: Job) -> None:
    if job.training.process_index == 0:
        record.write(job.results_dir)


def _finished(record: RunRecord, job: Job) -> RunRecord:
    """The record that the finished run left."""
    path = job.results_dir / f"{record.name}.json"
    if not path.is_file():
        raise ValueError(
            f"{job.training.output_dir} holds the last checkpoint of a finished run, but {path} is missing; give "
            "--restart to run it again, or a larger --max_steps to go on."
        )
    logger.warning("%s is finished already; --restart runs it again", record.name)
    return read_run(path)

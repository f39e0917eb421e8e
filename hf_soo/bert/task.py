"""BERT pretraining as a task: what ``scripts/pretrain_bert.py`` trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import BertTokenizer, TrainerCallback

from hf_soo.bert.inputs import DataArguments, ModelArguments, PretrainingData, make_model, sketch
from hf_soo.bert.length_sampler import LengthGroupedSampler, example_lengths
from hf_soo.bert.masking import PretrainingCollator
from hf_soo.bert.metrics import METRICS, prediction_sums, pretraining_metrics
from hf_soo.bert.previous_phase import PreviousPhase, take_moments
from hf_soo.integrations.checkpoints import CHECKPOINT_NAME
from hf_soo.integrations.trainer import SecondOrderTrainer
from hf_soo.registry import METHODS
from hf_soo.runs.callbacks import EpochCallback
from hf_soo.runs.pretrained import sizes
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.runs.script import Domain
from hf_soo.runs.training import Task

EVAL_SEED = 0  # of the masks of every evaluation, whatever the run's seed: losses of different seeds compare


class PretrainingTask(Task):
    """Masked words and next sentence on prepared text."""

    kind = "pretraining"
    title = "BERT pretraining"
    metrics = METRICS

    def __init__(self, model: ModelArguments, data: DataArguments, args: RunTrainingArguments) -> None:
        """Load the data, or prepare it.

        Args:
            model: which BERT.
            data: which text, and how it is masked.
            args: ``output_dir`` is where a corpus is prepared.

        Raises:
            ValueError: two models to start from, or one that is not there.
        """
        self.masking, self.asked, self.model = data, model, model
        self.phase: PreviousPhase | None = None
        if model.previous_phase is not None:
            _check_phase(model, args)
            self.phase = PreviousPhase.find(model.previous_phase, args.folder if args.do_train else None)
            self.model = dataclasses.replace(model, model_name_or_path=self.phase.folder)
        self.data: PretrainingData = PretrainingData.load(data, args)

    def make_model(self, seed: int) -> nn.Module:
        """A BERT for the vocabulary of the data."""
        return make_model(self.model, self.data, seed)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """The model's shape and dropout, and the data."""
        # the weights at hand are no longer those it began with, once the phase before has been deleted
        began = {} if self.phase is None or self.phase.began is None else {"initial_weights": self.phase.began}
        return {"model": sizes(model.config, "hidden_dropout_prob"), "data": self.data.description, **began}

    def describe_start(self, args: RunTrainingArguments) -> dict[str, Any]:
        """The phase before, and whether this optimizer takes its moments."""
        if self.phase is None:
            return {}
        _check_phase(self.asked, args)
        return self.phase.describe(args.base_name)

    def make_trainer(
        self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]
    ) -> _PretrainingTrainer:
        """The Trainer of a run, its callbacks and both collators."""
        training = self._collator(args.seed)
        trainer = _PretrainingTrainer(
            model=model,
            args=args,
            data_collator=training,
            train_dataset=self.data.train,
            eval_dataset=self.data.eval,
            compute_metrics=pretraining_metrics,
            callbacks=[EpochCallback(training), *callbacks],
            processing_class=BertTokenizer(vocab=self.data.vocab_file),  # kept with every checkpoint
        )
        trainer.eval_collator = self._collator(EVAL_SEED)
        trainer.phase = self.phase
        return trainer

    def _collator(self, seed: int) -> PretrainingCollator:
        settings = {key: getattr(self.masking, key) for key in ("masking", "mask_prob", "max_predictions")}
        return PretrainingCollator(self.data.ids, **settings, seed=seed)


class _PretrainingTrainer(SecondOrderTrainer):
    """Goes on from an earlier phase; evaluates with a collator of its own, which draws the same masks every time.

    Of the logits only sums are kept. ``train_sampling_strategy="group_by_length"`` is resumed exactly.
    """

    eval_collator: PretrainingCollator
    phase: PreviousPhase | None = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """A run that begins, and is not resumed, takes the moments of the phase before."""
        fresh = self.phase if resume_from_checkpoint is None else None
        if fresh is not None and fresh.began is not None:
            raise ValueError("previous_phase is gone: this run can be resumed, and not begin anew; drop --restart.")
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if fresh is not None:
            assert self.second_order is not None  # the task has refused others
            self._attach()
            take_moments(self.second_order, fresh)
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        lengths = example_lengths(train_dataset or self.train_dataset, self.args.length_column_name)
        round_size = self._train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(lengths, round_size, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation batches."""
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As Trainer's: the loss; instead of logits, which are too large to keep, the sums [B, 4]; and labels."""
        step: tuple[Tensor | None, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, logits, labels = step
        if logits is None:  # the loss alone was asked for
            return loss, None, None
        sums = prediction_sums(logits[0], logits[1], labels=labels[0], next_sentence_label=labels[1])
        return loss, sums, labels[1]


def _check_phase(model: ModelArguments, args: RunTrainingArguments) -> None:
    """Refuse what a phase cannot go on with."""
    assert model.previous_phase is not None
    if model.model_name_or_path is not None:
        raise ValueError(
            f"model_name_or_path={model.model_name_or_path!r} and previous_phase={model.previous_phase!r}; give one: "
            "weights alone, or weights and moments."
        )
    if args.optimizer_name not in METHODS:
        raise ValueError(
            f"previous_phase with optim={args.optimizer_name!r}, which is transformers' own and cannot take moments "
            "over; use model_name_or_path for the weights alone, or one of hf_soo's optimizers."
        )
    before = Path(model.previous_phase).resolve()
    if args.folder.resolve() == (before.parent if CHECKPOINT_NAME.fullmatch(before.name) else before):
        raise ValueError(
            f"previous_phase={model.previous_phase!r} is this run's output_dir, and its checkpoints would be taken for "
            "this run's own; give another output_dir."
        )


DOMAIN = Domain("bert", PretrainingTask, (ModelArguments, DataArguments), sketch, smooths_labels=False)

"""A script as transformers' run_glue.py is written: three dataclasses of flags, a metric, a callback, checkpoints."""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    hidden_size: int = field(default=16, metadata={"help": "Width of the model."})
    dropout: float = field(default=0.1, metadata={"help": "Of hidden states and attention."})


@dataclass
class DataTrainingArguments:
    max_seq_length: int = field(default=12, metadata={"help": "Longer sequences would be cut."})
    max_train_samples: int = field(default=96, metadata={"help": "Examples to train on."})


class Sentences(Dataset):
    """Random words, padded; the label says whether a word of the first half stands first."""

    def __init__(self, size: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, 60, (size, length), generator=generator)
        self.mask = torch.arange(length) < torch.randint(4, length + 1, (size, 1), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self.ids[index] * self.mask[index], self.mask[index].long()
        return {"input_ids": ids, "attention_mask": mask, "labels": (ids[0] < 32).long()}


class LossWriter(TrainerCallback):
    """A callback of the script's own."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    assert isinstance(training_args, TrainingArguments)
    set_seed(training_args.seed)
    config = BertConfig(
        vocab_size=64, hidden_size=model_args.hidden_size, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, hidden_dropout_prob=model_args.dropout,
        attention_probs_dropout_prob=model_args.dropout,
    )  # fmt: skip
    train = Sentences(data_args.max_train_samples, data_args.max_seq_length, 0)
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=training_args,
        train_dataset=train,
        eval_dataset=Sentences(32, data_args.max_seq_length, 1),
        compute_metrics=compute_metrics,
        callbacks=[LossWriter()],
    )
    assert isinstance(trainer, Trainer) and type(trainer).__name__ == "Trainer"
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint is None and os.path.isdir(training_args.output_dir):
            checkpoint = get_last_checkpoint(training_args.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()

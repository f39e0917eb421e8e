"""Language modelling as a task: what ``hf-soo pretrain`` trains with ``task: lm``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_soo.integrations.trainer import SecondOrderTrainer
from hf_soo.lm.data import TextArguments, TextData, Windows
from hf_soo.lm.model import LanguageModelArguments, make_language_model, shaped_model
from hf_soo.runs.callbacks import EpochCallback
from hf_soo.runs.pretrained import sizes
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.runs.script import Domain
from hf_soo.runs.training import Task


class LanguageModelling(Task):
    """The next symbol, or masked ones; measured by cross entropy in nats a predicted symbol."""

    kind = "lm"

    def __init__(self, model: LanguageModelArguments, text: TextArguments, args: RunTrainingArguments) -> None:
        """Read the text.

        Args:
            model: its shape.
            text: which, and what is predicted of it.
            args: ``data_seed``, or ``seed``, says which windows are trained on.

        Raises:
            ValueError: the text cannot be read, or is too short.
        """
        self.model, self.text, self.data = model, text, TextData.load(text)
        self.title = f"{text.objective} language model, {self.data.description['source']}"

    def make_model(self, seed: int) -> nn.Module:
        """A new model for these symbols."""
        return make_language_model(self.model, self.text, self.data, seed)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """The model's shape, and the text with a digest of its symbols and the entropy of their frequencies."""
        config: Any = model.config
        shape = sizes(config, "hidden_dropout_prob", "tie_word_embeddings")
        return {"model": {"type": config.model_type, **shape}, "data": self.data.description}

    def make_trainer(
        self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]
    ) -> SecondOrderTrainer:
        """The Trainer of a run."""
        masking: dict[str, Any] = {"mask": self.data.mask, "mask_prob": self.text.mask_prob}
        seed = args.seed if args.data_seed is None else args.data_seed
        train = Windows(self.data.train, self.text.window, seed=seed, **masking)
        return SecondOrderTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=Windows(self.data.eval, self.text.window, count=self.text.max_eval_samples, **masking),
            callbacks=[EpochCallback(train), *callbacks],
        )


def _sketch(model: LanguageModelArguments, text: TextArguments) -> nn.Module:
    return shaped_model(model, text, 256)


DOMAIN = Domain("lm", LanguageModelling, (LanguageModelArguments, TextArguments), _sketch)

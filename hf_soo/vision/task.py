"""Image classification as a task: what ``scripts/run_vision.py`` trains."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction, TrainerCallback

from hf_soo.integrations.trainer import SecondOrderTrainer
from hf_soo.runs.finetuning import best_class
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.runs.script import Domain
from hf_soo.runs.training import Task
from hf_soo.vision.data import SPLIT_SEED, ImageCollator, ImageData, ImageDataConfig
from hf_soo.vision.models import ImageModelConfig, make_image_model, shaped_model


class VisionTask(Task):
    """Images and their classes; measured by cross entropy and accuracy on held-out images."""

    kind = "vision"
    metrics = ("accuracy",)

    def __init__(self, model: ImageModelConfig, data: ImageDataConfig, args: RunTrainingArguments) -> None:
        """Read the images; one process of several decodes them first, the others find them in the cache."""
        self.model, self.title = model, f"{model.model} on {data.dataset}"
        self.dataset, self.card = data.dataset, {"tasks": "image-classification", "dataset": data.dataset}
        with args.in_turn():
            self.data = ImageData.load(data)

    def make_model(self, seed: int) -> nn.Module:
        """A new classifier for these images."""
        return make_image_model(self.model, self.data, seed)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """All settings of the model's shape, and the data with a hash of its pixels."""
        data = {
            "dataset": self.dataset,
            "classes": len(self.data.classes),
            "shape": list(self.data.shape),
            "train_examples": len(self.data.train),
            "eval_examples": len(self.data.eval),
            "split_seed": SPLIT_SEED,
            "digest": self.data.digest(),
        }
        return {"model": {"type": self.model.model, **self.model.shape(self.data.shape[1])}, "data": data}

    def make_trainer(
        self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]
    ) -> SecondOrderTrainer:
        """The Trainer of a run."""
        return SecondOrderTrainer(
            model=model,
            args=args,
            data_collator=ImageCollator(self.data.shape),
            train_dataset=self.data.train,
            eval_dataset=self.data.eval,
            callbacks=callbacks,
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=best_class,
        )


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images whose class is right."""
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, prediction.label_ids)))}


def _sketch(model: ImageModelConfig, data: ImageDataConfig) -> nn.Module:
    side = data.image_size or 4 * (model.patch_size or 8)
    return shaped_model(model, (data.num_channels or 1, side, side), ("0", "1"))


DOMAIN = Domain("vision", VisionTask, (ImageModelConfig, ImageDataConfig), _sketch)

"""Image classification as a task: what `scripts/run_vision.py` trains."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from hf_soo.integrations.trainer import SecondOrderTrainer
from hf_soo.runs.run_arguments import RunTrainingArguments
from hf_soo.runs.training import Task
from hf_soo.vision.data import SPLIT_SEED, ImageCollator, ImageDataConfig, digest, load_images
from hf_soo.vision.models import ImageModelConfig, make_image_model


class VisionTask(Task):
    """Images and their classes; measured by cross entropy and accuracy on held-out images."""

    kind = "vision"
    metrics = ("accuracy",)

    def __init__(self, model: ImageModelConfig, data: ImageDataConfig, args: RunTrainingArguments) -> None:
        """Read the images; one process of several decodes them first, the others find them in the cache.

        Args:
            model: which classifier.
            data: which images.
            args: says which process this is.
        """
        self.model, self.title = model, f"{model.model} on {data.dataset}"
        self.dataset = data.dataset
        with args.main_process_first(desc="reading images"):
            self.data = load_images(data)

    def make_model(self, seed: int) -> nn.Module:
        """A new classifier for these images.

        Args:
            seed: of the initial weights.
        """
        return make_image_model(self.model, self.data, seed)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """All settings of the model's shape, and the data with a hash of its pixels.

        Args:
            model: the classifier.
        """
        data = {
            "dataset": self.dataset,
            "classes": len(self.data.classes),
            "shape": list(self.data.shape),
            "train_examples": len(self.data.train),
            "eval_examples": len(self.data.eval),
            "split_seed": SPLIT_SEED,
            "digest": digest(self.data),
        }
        return {"model": {"type": self.model.model, **self.model.shape(self.data.shape[1])}, "data": data}

    def make_trainer(
        self, model: nn.Module, args: RunTrainingArguments, callbacks: list[TrainerCallback]
    ) -> SecondOrderTrainer:
        """The Trainer of a run.

        Args:
            model: with its initial weights.
            args: the Trainer's settings.
            callbacks: all of them.
        """
        return SecondOrderTrainer(
            model=model,
            args=args,
            data_collator=ImageCollator(self.data.shape),
            train_dataset=self.data.train,
            eval_dataset=self.data.eval,
            callbacks=callbacks,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=best_class,
        )


def best_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The class with the largest logit: all that the accuracy needs to keep of an evaluation.

    Args:
        logits: [B, classes].
        labels: [B], not used.
    """
    return logits.argmax(-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images whose class is right.

    Args:
        prediction: predicted and true classes.
    """
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, prediction.label_ids)))}

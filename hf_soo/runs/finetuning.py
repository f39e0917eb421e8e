"""What the fine-tuning tasks have in common: evaluations that must cover every example, in its order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_soo.integrations.trainer import SecondOrderTrainer


def check_evaluation(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """Refuse settings that would fail at the first evaluation, or at the last.

    Args:
        args: the Trainer's settings.
        metrics: that an evaluation measures besides its loss.

    Raises:
        ValueError: settings that keep no logits to score, or a best model by a metric that is not measured.
    """
    if args.prediction_loss_only or args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise ValueError(
            "prediction_loss_only, batch_eval_metrics and eval_do_concat_batches=False leave no logits to score; "
            "leave them out."
        )
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in {"loss", *metrics}:
        raise ValueError(f"metric_for_best_model={best!r} is not measured; use loss, {' or '.join(metrics)}.")


def best_class(logits: Tensor | tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    """The class with the largest logit, [B], of logits [B, classes] (the first of a tuple)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class FineTuningTrainer(SecondOrderTrainer):
    """Evaluates all examples in their order, whatever the training's sampling does with its own."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation batches, of every example in its order."""
        with _all_in_order(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The test batches, of every example in its order."""
        with _all_in_order(self.args):
            return super().get_test_dataloader(test_dataset)


@contextmanager
def _all_in_order(args: TrainingArguments) -> Iterator[None]:
    """Meanwhile the Trainer groups nothing by length, and drops no batch that is not full."""
    asked = args.train_sampling_strategy, args.dataloader_drop_last
    args.train_sampling_strategy, args.dataloader_drop_last = "random", False
    try:
        yield
    finally:
        args.train_sampling_strategy, args.dataloader_drop_last = asked

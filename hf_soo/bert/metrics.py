"""What an evaluation of pretraining measures besides its loss.

    mlm_loss       mean cross entropy over all masked tokens of the evaluation set (not the mean of batch means)
    mlm_accuracy   share of the masked tokens whose most likely word is the right one
    nsp_accuracy   share of the pairs whose second segment is judged rightly

Logits are [B, P, V]: they are reduced to four numbers an example where they are made, and only those are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_soo.bert.model import IGNORE

METRICS = ("mlm_loss", "mlm_accuracy", "nsp_accuracy")


def prediction_sums(
    prediction_logits: Tensor, seq_relationship_logits: Tensor, labels: Tensor, next_sentence_label: Tensor
) -> Tensor:
    """Reduce the logits of a batch to sums of each example.

    Args:
        prediction_logits: [B, P, V], or [N, V] of the N labels that are not -100, in row order.
        seq_relationship_logits: [B, 2].
        labels: [B, P], or [B, T]; -100 marks what is not predicted.
        next_sentence_label: [B].

    Returns:
        fp32 [B, 4]: masked tokens, the sum of their cross entropies, those predicted rightly, and 1 where the next
        sentence is judged rightly.
    """
    predicted = labels != IGNORE
    logits = prediction_logits if prediction_logits.ndim == 2 else prediction_logits[predicted]
    words = labels[predicted]
    example = predicted.nonzero()[:, 0]

    def of_examples(values: Tensor) -> Tensor:
        return torch.zeros(len(labels), device=labels.device).index_add_(0, example, values.float())

    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), words, reduction="none")
    next_is_right = seq_relationship_logits.argmax(-1) == next_sentence_label.flatten()
    columns = [predicted.sum(1), of_examples(losses), of_examples(logits.argmax(-1) == words), next_is_right]
    return torch.stack([column.float() for column in columns], dim=1)


def pretraining_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """``METRICS`` of an evaluation whose predictions are the ``prediction_sums`` of every example, [examples, 4]."""
    sums = torch.as_tensor(evaluated.predictions)
    tokens, loss, right, next_right = sums.double().sum(0).tolist()
    values = (loss / tokens, right / tokens) if tokens else (math.nan, math.nan)
    return dict(zip(METRICS, (*values, next_right / len(sums)), strict=True))

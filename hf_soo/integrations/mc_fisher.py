"""Labels drawn from a transformers model's own outputs, for the Monte-Carlo Fisher (``fisher="mc"``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_soo.engine.fisher import IGNORED, sampled_cross_entropy, sampled_squared_error


def sampled_loss(model: nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Tensor:
    """A head's loss with labels drawn from its outputs, averaged as the head averages: 0-d, on the outputs' graph.

    Args:
        model: the bare model.
        inputs: what it got, with its labels.
        outputs: what it returned for them.

    Raises:
        NotImplementedError: the head's outputs are none that this knows.
    """
    if "prediction_logits" in outputs:  # BERT's two pretraining heads
        terms = []
        if inputs.get("labels") is not None:
            logits, labels = outputs["prediction_logits"], inputs["labels"]
            labels = labels if labels.shape == logits.shape[:-1] else labels[labels != IGNORED]  # gathered by the head
            terms.append(sampled_cross_entropy(logits, labels))
        if inputs.get("next_sentence_label") is not None:
            terms.append(sampled_cross_entropy(outputs["seq_relationship_logits"], inputs["next_sentence_label"]))
        return torch.stack(terms).sum()
    logits, labels = outputs.get("logits"), inputs.get("labels")
    if isinstance(logits, Tensor) and isinstance(labels, Tensor):
        if labels.is_floating_point() and labels.numel() == logits.numel():
            return sampled_squared_error(logits)
        if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
            return sampled_cross_entropy(logits, labels)
    raise NotImplementedError(
        f"fisher='mc' cannot draw labels for {type(model).__name__} with outputs {sorted(outputs)} and inputs "
        f"{sorted(inputs)}; use fisher='empirical', or a loop of your own with optimizer.backward_sampled."
    )

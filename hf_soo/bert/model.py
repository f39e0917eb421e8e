"""BERT pretraining whose head sees the masked positions alone.

Same loss as ``transformers.BertForPreTraining``,

    loss = mean CE(MLM over labels != -100) + mean CE(NSP),

but the hidden states h [B, T, H] are gathered to the masked positions *before* transform and decoder, so logits are
[B, P, V] instead of [B, T, V]: at T=512, P=80 that is 6.4 times less head work and memory
(NVIDIA DeepLearningExamples, LanguageModeling/BERT, ``sequence_output_is_dense``).

Deviations from ``BertForPreTraining``, each for a reason:
- A batch without any label gives an MLM loss of zero with zero gradients, not NaN: one empty rank must not end a run.
- The loss is the sum of the terms whose labels are given; the parent silently returns no loss when one is missing.
- Half-precision logits are raised to fp32 for the cross entropy, which is cheap once they are gathered.
- ``accepts_loss_kwargs = False``: the parent's ``**kwargs`` make Trainer skip the division by the accumulation steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForPreTraining
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils.generic import can_return_tuple

IGNORE = -100


def _sizes(hidden: int, layers: int) -> dict[str, int]:
    """Heads of 64 and an MLP of four times the width, as in every published BERT."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}


SIZES = {  # of a `BertConfig`, by name
    "toy": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},  # for tests
    "tiny": _sizes(128, 2),  # Turc et al., 2019
    "mini": _sizes(256, 4),
    "small": _sizes(512, 4),
    "medium": _sizes(512, 8),
    "base": _sizes(768, 12),  # Devlin et al., 2019
    "large": _sizes(1024, 24),
    "large2": _sizes(1024, 2),  # two layers of it: what a step costs, without the wait
}


class GatheredBertForPreTraining(BertForPreTraining):  # type: ignore[no-untyped-call]
    """``BertForPreTraining`` with the same parameters and state_dict, whose MLM head runs on masked positions only."""

    accepts_loss_kwargs = False

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        masked_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> BertForPreTrainingOutput:
        """Run the encoder, then the heads on what the loss needs.

        Args:
            input_ids: token ids [B, T].
            attention_mask: 1 for tokens, 0 for padding [B, T].
            token_type_ids: 0 for segment A, 1 for segment B [B, T].
            position_ids: positions [B, T]; counted from 0 when absent.
            inputs_embeds: embeddings [B, T, H] in place of ``input_ids``.
            labels: with ``masked_positions`` [B, P], without it [B, T]; -100 marks what the loss ignores.
            next_sentence_label: 0 = B follows A, 1 = B is random [B].
            masked_positions: indices into T of the masked tokens [B, P], padded with 0 where the label is -100.
                All shapes are static then, which ``torch.compile`` and CUDA graphs like.
            **kwargs: passed on to ``BertModel`` (``output_hidden_states``, ``output_attentions``, ...).

        Returns:
            ``prediction_logits`` are [B, P, V] with ``masked_positions``; [N, V], N labels in row order, with
            ``labels`` alone; [B, T, V] with neither.

        Raises:
            ValueError: ``labels`` do not have the shape of ``masked_positions``.
        """
        if masked_positions is not None and labels is not None and labels.shape != masked_positions.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, masked_positions {tuple(masked_positions.shape)}; give "
                "labels [B, P] with masked_positions [B, P], or labels [B, T] without masked_positions."
            )
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden, labels = _gather_masked(outputs.last_hidden_state, labels, masked_positions)
        prediction_logits, seq_relationship_logits = self.cls(hidden, outputs.pooler_output)
        return BertForPreTrainingOutput(
            loss=_pretraining_loss(prediction_logits, labels, seq_relationship_logits, next_sentence_label),
            prediction_logits=prediction_logits,
            seq_relationship_logits=seq_relationship_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def row_masks(self, masked_positions: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Which rows of the MLM head are no padding, for statistics of its layers.

        Args:
            masked_positions: as for ``forward``; position 0, never masked, fills what a sequence has fewer.
            **inputs: the rest of what it gets.
        """
        return {} if masked_positions is None else {"cls.predictions": masked_positions != 0}


def _gather_masked(
    hidden: Tensor, labels: Tensor | None, masked_positions: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, P, H] at the positions [B, P]; else those [N, H] with a label, and its labels [N]; else all."""
    if masked_positions is not None:
        index = masked_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index), labels
    if labels is not None:
        keep = labels != IGNORE
        return hidden[keep], labels[keep]
    return hidden, None


def _pretraining_loss(
    prediction_logits: Tensor,
    labels: Tensor | None,
    seq_relationship_logits: Tensor,
    next_sentence_label: Tensor | None,
) -> Tensor | None:
    """Sum of the mean cross entropies whose labels are given; None when none is."""
    terms = []
    if labels is not None:
        terms.append(_mean_cross_entropy(prediction_logits.flatten(0, -2), labels.flatten()))
    if next_sentence_label is not None:
        terms.append(_mean_cross_entropy(seq_relationship_logits, next_sentence_label.flatten()))
    return torch.stack(terms).sum() if terms else None


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labels != -100 of logits [N, C]; zero, and with zero gradients, when there is none."""
    total = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum", ignore_index=IGNORE
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


def name_bias_once(model: BertForPreTraining) -> None:
    """Leave the vocabulary's bias to the decoder; its other name, ``cls.predictions.bias``, goes.

    The two are one parameter, and FSDP2 refuses a parameter that two of its groups hold (accelerate puts the decoder in
    a group of its own). ``from_pretrained`` ties the names again, whichever of them a checkpoint has.

    Args:
        model: with an untouched head; changed in place.
    """
    del model.cls.predictions._parameters["bias"]

"""The gathered head against transformers' BertForPreTraining."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from hf_soo.bert.model import GatheredBertForPreTraining, _gather_masked
from hf_soo.runs.pretrained import check_vocabulary

CONFIG = BertConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def twins() -> tuple[GatheredBertForPreTraining, BertForPreTraining]:
    """Both models with the same weights, in float64 so that only real differences show."""
    reference = BertForPreTraining(CONFIG).double()
    gathered = GatheredBertForPreTraining(CONFIG).double()
    gathered.load_state_dict(reference.state_dict())
    return gathered, reference


def batch() -> dict[str, Tensor]:
    """Four pairs of length 16 to 10 with 3, 2, 1 and 4 masked positions."""
    attention_mask = (torch.arange(16) < torch.tensor([[16], [14], [10], [16]])).long()
    labels = torch.full((4, 16), -100)
    for row, positions in enumerate([[1, 5, 9], [2, 13], [4], [3, 4, 5, 15]]):
        labels[row, positions] = torch.randint(97, (len(positions),))
    return {
        "input_ids": torch.randint(97, (4, 16)),
        "attention_mask": attention_mask,
        "token_type_ids": (torch.arange(16) > 7).long().expand(4, 16) * attention_mask,
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }


def gathered_batch(full: dict[str, Tensor], width: int = 6) -> dict[str, Tensor]:
    """The same batch with positions and labels [B, width]."""
    positions, labels = torch.zeros(4, width, dtype=torch.long), torch.full((4, width), -100)
    for row in range(4):
        where = (full["labels"][row] != -100).nonzero().flatten()
        positions[row, : len(where)] = where
        labels[row, : len(where)] = full["labels"][row, where]
    return {**full, "labels": labels, "masked_positions": positions}


@pytest.mark.parametrize("static", [True, False])
def test_loss_and_gradients_equal_transformers(static: bool) -> None:
    gathered, reference = twins()
    full = batch()
    loss = gathered(**(gathered_batch(full) if static else full)).loss
    expected = reference(**full).loss
    assert abs(loss.item() - expected.item()) < 1e-12  # float64; the sums run in another order
    loss.backward()
    expected.backward()
    worst = max(
        (p.grad - q.grad).abs().max().item()
        for p, q in zip(gathered.parameters(), reference.parameters(), strict=True)
        if q.grad is not None
    )
    assert worst < 1e-12
    assert all(p.grad is not None for p in gathered.parameters())


def test_float32_loss_equals_transformers_to_1e_6() -> None:
    gathered, reference = twins()
    full = batch()
    loss, expected = gathered.float()(**gathered_batch(full)).loss, reference.float()(**full).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_exist_for_masked_positions_only() -> None:
    gathered, _ = twins()
    full = batch()
    assert gathered(**gathered_batch(full)).prediction_logits.shape == (4, 6, 97)
    assert gathered(**full).prediction_logits.shape == (10, 97)  # 3 + 2 + 1 + 4 labels
    assert gathered(full["input_ids"]).prediction_logits.shape == (4, 16, 97)
    assert gathered(full["input_ids"]).loss is None


@pytest.mark.parametrize("static", [True, False])
def test_no_label_gives_zero_mlm_loss_and_finite_gradients(static: bool) -> None:
    gathered, _ = twins()
    full = batch()
    full["labels"].fill_(-100)
    full = gathered_batch(full) if static else full
    loss = gathered(**full).loss
    nsp_alone = gathered(**{**full, "labels": None}).loss
    assert loss.item() == pytest.approx(nsp_alone.item(), rel=1e-12)
    loss.backward()
    assert gathered.cls.predictions.bias.grad.abs().max().item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in gathered.parameters() if p.grad is not None)


def test_loss_is_the_sum_of_the_given_terms() -> None:
    gathered, _ = twins()
    full = gathered_batch(batch())
    both = gathered(**full).loss.item()
    mlm = gathered(**{**full, "next_sentence_label": None}).loss.item()
    nsp = gathered(**{**full, "labels": None}).loss.item()
    assert both == pytest.approx(mlm + nsp, rel=1e-12)


def test_half_precision_logits_are_summed_in_float32() -> None:
    gathered, _ = twins()
    loss = gathered.bfloat16()(**gathered_batch(batch())).loss
    assert loss.dtype == torch.float32


def test_state_dict_goes_both_ways_and_decoder_stays_tied(tmp_path: Path) -> None:
    gathered, reference = twins()
    assert gathered.state_dict().keys() == reference.state_dict().keys()
    reference.load_state_dict(gathered.state_dict())
    assert gathered.cls.predictions.decoder.weight is gathered.bert.embeddings.word_embeddings.weight
    gathered.save_pretrained(tmp_path)
    for cls in (GatheredBertForPreTraining, BertForPreTraining):
        loaded = cls.from_pretrained(tmp_path, dtype=torch.float64)
        assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), gathered.parameters(), strict=True))


def test_trainer_must_divide_the_loss_by_the_accumulation_steps() -> None:
    assert GatheredBertForPreTraining.accepts_loss_kwargs is False


def test_gather_keeps_the_rows_of_the_positions() -> None:
    hidden = torch.arange(2 * 3 * 2.0).view(2, 3, 2)
    kept, _ = _gather_masked(hidden, None, torch.tensor([[2, 0], [1, 1]]))
    assert kept.tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_labels_of_another_shape_are_refused() -> None:
    gathered, _ = twins()
    full = batch()
    with pytest.raises(
        ValueError, match=r"labels have shape \(4, 16\), masked_positions \(4, 6\); give labels \[B, P\]"
    ):
        gathered(**full, masked_positions=torch.zeros(4, 6, dtype=torch.long))


@pytest.mark.parametrize(("vocab_size", "model_size"), [(30522, 30522), (30522, 30528), (97, 97)])
def test_matching_vocabulary_is_accepted(vocab_size: int, model_size: int) -> None:
    check_vocabulary(BertConfig(vocab_size=model_size), vocab_size)


@pytest.mark.parametrize(("vocab_size", "model_size"), [(30522, 4000), (4000, 30522), (30522, 30523)])
def test_other_vocabulary_is_refused(vocab_size: int, model_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocabulary has {vocab_size} .* config.vocab_size is {model_size};"):
        check_vocabulary(BertConfig(vocab_size=model_size), vocab_size)

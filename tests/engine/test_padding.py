"""Padding is no part of the statistics: a batch padded further gives the same ones, and unpadded batches theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig

import hf_soo
from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments

LENGTHS = (9, 16, 5, 12)
METHODS = {"mkor": {}, "mkor_dense": {"representation": "dense"}, "mkor_rank2": {"rank": 2}, "eva": {}, "eva_f": {}}


def bert(attention: str = "sdpa") -> GatheredBertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    return GatheredBertForPreTraining(config).double().train()


def batch(width: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (len(LENGTHS), 16), generator=chance)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "input_ids": F.pad(ids, (0, width - 16)) * mask,
        "attention_mask": mask,
        "masked_positions": torch.tensor([[1, 4], [3, 8], [2, 3], [5, 9]]),
        "labels": torch.randint(5, 40, (len(LENGTHS), 2), generator=chance),
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }


def make(model: torch.nn.Module, method: str) -> PreconditionedOptimizer:
    settings = METHODS.get(method, {})
    return hf_soo.build_optimizer(method.split("_d")[0].split("_r")[0], model, lr=0.01, exclude=[r"^cls\."], **settings)


def factors(optimizer: PreconditionedOptimizer) -> dict[str, Tensor]:
    """Every factor by layer and name."""
    found = {}
    for name, state in optimizer.stages.states.items():
        for side, factor in state.items():
            for key, value in factor.items() if isinstance(factor, dict) else [("", factor)]:
                if isinstance(value, Tensor) and value.is_floating_point():
                    found[f"{name} {side} {key}"] = value.clone()
    return found


def after_two_steps(
    method: str, width: int, *, masked: bool = True, model: Any = None, told: bool = True
) -> dict[str, Tensor]:
    """With ``mask_rows`` or without; ``told``: the model is asked what it was given."""
    model = model or bert()
    optimizer = make(model, method)
    if not told:
        optimizer.stages.capture.padding.remove()
    for _ in range(2):
        for rows in (slice(0, 2), slice(2, 4)):  # micro-batches with unequal numbers of tokens
            inputs = {key: value[rows] for key, value in batch(width).items()}
            optimizer.mask_rows(inputs["attention_mask"] if masked else None)
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return factors(optimizer) | {name: p.detach().clone() for name, p in model.named_parameters()}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys() and len(one) > 20
    # below 1e-12: the key projection's output gradients sum to zero, and Eva keeps what rounding leaves
    return max(((a - other[name]).norm() / a.norm().clamp(min=1e-12)).item() for name, a in one.items())


# fp64, sums of other lengths; where the mask is left out, the difference is that of the methods' direction
CLOSE, FAR = 1e-9, 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_more_padding_changes_nothing(method: str) -> None:
    assert worst(after_two_steps(method, 16), after_two_steps(method, 32)) < CLOSE
    plain = after_two_steps(method, 32, masked=False)  # a loop of one's own, which says nothing
    assert worst(after_two_steps(method, 16), plain) < CLOSE
    unknown = [after_two_steps(method, width, masked=False, told=False) for width in (16, 32)]
    assert worst(*unknown) > FAR


def test_a_mask_without_padding_changes_not_a_bit() -> None:
    def full(masked: bool) -> dict[str, Tensor]:
        model = bert()
        optimizer = make(model, "mkor")
        inputs = batch(16) | {"attention_mask": torch.ones(4, 16, dtype=torch.long)}
        if masked:
            optimizer.mask_rows(inputs["attention_mask"])
        model(**inputs).loss.backward()
        optimizer.step()
        return factors(optimizer)

    masked, unmasked = full(True), full(False)
    assert len(masked) > 20 and all(torch.equal(value, unmasked[name]) for name, value in masked.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_is_masked_when_it_runs_again(reentrant: bool) -> None:
    model = bert()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert worst(after_two_steps("mkor", 24), after_two_steps("mkor", 24, model=model)) < CLOSE


def test_eager_attention_gives_padding_no_gradient_either() -> None:
    eager = [after_two_steps("mkor", width, model=bert("eager")) for width in (16, 32)]
    assert worst(*eager) < CLOSE


def test_trainer_hands_the_mask_over(tmp_path: Path) -> None:
    def run(width: int) -> dict[str, Tensor]:
        rows = [{key: value[i] for key, value in batch(width).items()} for i in range(4)]
        args = SecondOrderTrainingArguments(
            output_dir=str(tmp_path), optim="mkor", learning_rate=0.01, max_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            dataloader_pin_memory=False, max_grad_norm=0, precondition_exclude=[r"^cls\."],
        )  # fmt: skip
        trainer = SecondOrderTrainer(
            model=bert(), args=args, train_dataset=Dataset.from_list(rows).with_format("torch")
        )
        trainer.train()
        return factors(trainer.second_order)

    assert worst(run(16), run(32)) < CLOSE

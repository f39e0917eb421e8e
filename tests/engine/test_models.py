"""Every method trains a tiny BERT, GPT-2, ViT and a LoRA fine-tune for 30 steps, on real text and real digits.

A fallback that is not expected fails the test: a layer without statistics, a factor that does not decompose, a P that
is not finite.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_soo
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.routing import summary
from hf_soo.registry import METHODS
from hf_soo.text.corpus import Corpus

STEPS, ROWS, LENGTH, SYMBOLS = 30, 8, 24, 128
Batch = dict[str, Tensor]


def text_ids() -> Tensor:
    """The beginning of Python's own help texts, a symbol for each character."""
    sentences = itertools.chain.from_iterable(itertools.islice(Corpus("embedded"), 60))
    text = " ".join(itertools.islice(sentences, 400))
    return torch.tensor([min(ord(character), SYMBOLS - 1) for character in text[: STEPS * ROWS * LENGTH]])


@pytest.fixture(scope="module")
def text() -> Tensor:
    """[steps, rows, length]"""
    return text_ids().view(STEPS, ROWS, LENGTH)


def masked(ids: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(ids.shape, generator=generator) < 0.3
    return {"input_ids": ids.masked_fill(chosen, 1), "labels": ids.masked_fill(~chosen, -100)}


def capitals(ids: Tensor) -> Batch:
    """Does the text hold a capital letter in its first half?"""
    half = ids[:, : LENGTH // 2]
    return {"input_ids": ids, "labels": ((half >= ord("A")) & (half <= ord("Z"))).any(1).long()}


def bert_config(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=SYMBOLS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


def bert(text: Tensor) -> tuple[nn.Module, list[Batch]]:
    return BertForMaskedLM(bert_config()), [masked(ids) for ids in text]


def gpt2(text: Tensor) -> tuple[nn.Module, list[Batch]]:
    config = GPT2Config(
        vocab_size=SYMBOLS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), [{"input_ids": ids, "labels": ids} for ids in text]


def vit(text: Tensor) -> tuple[nn.Module, list[Batch]]:
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    batch = {"pixel_values": images[:32], "labels": labels[:32]}  # 30 fresh batches are too few for a ViT to learn from
    model = ViTForImageClassification(config)
    scale_by_inputs(model)
    return model, [batch] * STEPS


def scale_by_inputs(model: nn.Module) -> None:
    """Weights of variance 1 / inputs: with transformers' .02, other in other versions, 30 steps barely start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)


def lora(text: Tensor) -> tuple[nn.Module, list[Batch]]:
    model = BertForSequenceClassification(bert_config(num_labels=2))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    return adapted, [capitals(ids) for ids in text]


MODELS: dict[str, Callable[[Tensor], tuple[nn.Module, list[Batch]]]] = {
    "bert": bert, "gpt2": gpt2, "vit": vit, "lora": lora,
}  # fmt: skip

# About what each needs on these models; LoRA's adapters take ten times more, as usual.
SETTINGS: dict[str, dict[str, Any]] = {
    "mkor": {"lr": 1e-2}, "muon_mkor": {"lr": 0.02, "base_args": {"rest_lr": 3e-3}},
    "mkor_h": {"lr": 1e-2, "min_steps": 20, "patience": 1, "rate_fraction": 100.0},
    "eva": {"lr": 0.05}, "eva_f": {"lr": 0.05}, "eva_s": {"lr": 0.05},
    "kfac_expand": {"lr": 0.05}, "kfac_reduce": {"lr": 0.05},
    "kaisa": {"lr": 1e-2}, "foof": {"lr": 0.1}, "newton_muon": {"lr": 0.02, "base_args": {"rest_lr": 3e-3}},
    "if_shampoo": {"lr": 1e-3, "batch_size": 32, "factor_lr": 0.1}, "rf_rmsprop": {"lr": 1e-2, "batch_size": 32},
    "shampoo": {"lr": 3e-3}, "soap": {"lr": 3e-3},
    "lamb": {"lr": 1e-2}, "adamw": {"lr": 3e-3}, "sgd": {"lr": 0.1}, "rmsprop": {"lr": 1e-3},
    "muon": {"lr": 0.02, "rest_lr": 3e-3},
}  # fmt: skip
LORA_RATE = 5.0
IMAGE_RATES = {
    "lamb": 3e-3, "sgd": 0.03, "rmsprop": 1e-3, "muon": 0.02, "newton_muon": 0.02, "muon_mkor": 0.02,
    "rf_rmsprop": 1e-2, "if_shampoo": 3e-3,
}  # fmt: skip


def settings_for(name: str, kind: str) -> dict[str, Any]:
    """For a ViT over AdamW where the method takes a base."""
    settings = dict(SETTINGS.get(name, {"lr": 1e-2}))
    if kind == "lora":
        settings["lr"] *= LORA_RATE
    if kind == "vit":
        settings["lr"] = IMAGE_RATES.get(name, 3e-3)
        if METHODS[name].config is not None and name not in IMAGE_RATES:
            settings["base"] = "adamw"
    return settings


def expected_fallbacks(kind: str, optimizer: hf_soo.PreconditionedOptimizer, step: int) -> float:
    """LoRA starts with B = 0, so nothing flows back into the A matrices before factors are due again."""
    method = optimizer.preconditioner
    seen = any(method.updates_at(t) for t in range(1, step + 1))
    return 4.0 if kind == "lora" and not seen and isinstance(method.recorder, FactorRecorder) else 0.0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", hf_soo.available())
def test_trains(name: str, kind: str, text: Tensor) -> None:
    torch.manual_seed(0)
    model, data = MODELS[kind](text)
    model.train()
    optimizer = hf_soo.build_optimizer(name, model, weight_decay=0.01, **settings_for(name, kind))
    losses = []
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        loss = model(**batch).loss
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        health = optimizer.health()
        if health and not optimizer.switched:
            assert health["fallback_layers"] == expected_fallbacks(kind, optimizer, step), (step, health)
    first, last = statistics.mean(losses[:3]), statistics.mean(losses[-5:])
    assert last < (0.6 if kind == "vit" else 0.97) * first, (losses, summary(optimizer.routing()))
    assert optimizer.switched == (name == "mkor_h")

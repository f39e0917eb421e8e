"""PEFT's adapters under transformers' Trainer, by the mixin and by the factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments, optimizer_factory
from tests.clients.toys import COMMON, FACTORY, METHODS, assert_exact, ours

DATA = [
    {
        "input_ids": torch.randint(5, 30, (8,), generator=torch.Generator().manual_seed(i)),
        "attention_mask": torch.ones(8, dtype=torch.long),
        "labels": torch.tensor(i % 2),
    }
    for i in range(16)
]
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(target_modules=["query", "value"], r=2),
    "every Linear": LoraConfig(target_modules="all-linear", r=2, use_rslora=True, task_type="SEQ_CLS"),
    "a new head": LoraConfig(target_modules=["query"], r=2, modules_to_save=["classifier"]),
    "dora": LoraConfig(target_modules=["query", "value"], r=2, use_dora=True),
    "biases": LoraConfig(target_modules=["query", "value"], r=2, bias="lora_only"),
}
ALONE = {kind: LoraConfig(target_modules=["query", "value"], r=2) for kind in ("half precision", "a name of its own")}
VECTORS: dict[str, Any] = {
    "ia3": IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type="SEQ_CLS"),
    "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
}


def adapted(kind: str) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    half = kind == "half precision"  # as QLoRA's adapters are; PEFT would load them as fp32
    model = BertForSequenceClassification(config).to(torch.bfloat16 if half else torch.float32)
    name = "mine" if kind == "a name of its own" else "default"
    return get_peft_model(model, {**ADAPTERS, **VECTORS, **ALONE}[kind], name, autocast_adapter_dtype=not half)


def made(kind: str, method: str, folder: Path, **settings: Any) -> Trainer:
    shared = {"model": adapted(kind), "train_dataset": DATA, "eval_dataset": DATA}
    if method == "factory":
        args = TrainingArguments(str(folder), **COMMON | settings)
        return Trainer(args=args, optimizer_cls_and_kwargs=optimizer_factory("mkor", **FACTORY), **shared)
    given = METHODS.get(method, {"optim": method})
    return SecondOrderTrainer(args=SecondOrderTrainingArguments(str(folder), **COMMON | given | settings), **shared)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("method", [*METHODS, "factory"])
def test_trains_evaluates_and_resumes(method: str, kind: str, tmp_path: Path) -> None:
    trainer = assert_exact(lambda: made(kind, method, tmp_path), tmp_path)
    fresh = dict(adapted(kind).named_parameters())
    after = dict(trainer.model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, fresh[name])}
    assert moved == {name for name, p in after.items() if p.requires_grad}
    assert {f"{layer.name}.weight" for layer in ours(trainer).layers} <= moved


def test_adapters_in_half_precision_stay_so(tmp_path: Path) -> None:
    kept = assert_exact(lambda: made("half precision", "mkor", tmp_path), tmp_path).model.state_dict()
    assert {tensor.dtype for name, tensor in kept.items() if "lora_" in name} == {torch.bfloat16}


def test_an_adapter_of_another_name_lies_in_its_folder(tmp_path: Path) -> None:
    trainer = assert_exact(lambda: made("a name of its own", "mkor", tmp_path), tmp_path)
    assert all(layer.name.endswith(".mine") for layer in ours(trainer).layers)
    assert (tmp_path / "checkpoint-3" / "mine" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_are_the_bases(kind: str, tmp_path: Path) -> None:
    """And the head that such an adapter trains with them is preconditioned."""
    trainer = assert_exact(lambda: made(kind, "mkor", tmp_path), tmp_path)
    (layer,) = ours(trainer).layers
    assert layer.name.endswith("classifier.modules_to_save.default")
    rest = {rule for name, rule in ours(trainer).routing().items() if "classifier" not in name}
    assert rest and all(rule.startswith("AdamW: ") for rule in rest)

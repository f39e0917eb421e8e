"""TRL's Trainers: supervised fine-tuning, preferences, with and without LoRA, by the mixin and by the factory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import hf_soo
from hf_soo.integrations.trainer import SecondOrderTrainerMixin, SecondOrderTrainingArguments, optimizer_factory
from tests.clients.toys import COMMON, FACTORY, METHODS, assert_exact, llama, ours, sentence, tokenizer


@dataclass
class SFTArguments(SFTConfig, SecondOrderTrainingArguments):
    """The library's class first."""


@dataclass
class DPOArguments(DPOConfig, SecondOrderTrainingArguments):
    """The library's class first."""


@dataclass
class RewardArguments(RewardConfig, SecondOrderTrainingArguments):
    """The library's class first."""


class MySFTTrainer(SecondOrderTrainerMixin, SFTTrainer):
    """The mixin first."""


class MyDPOTrainer(SecondOrderTrainerMixin, DPOTrainer):
    """The mixin first."""


@dataclass
class GRPOArguments(GRPOConfig, SecondOrderTrainingArguments):
    """The library's class first."""


class MyGRPOTrainer(SecondOrderTrainerMixin, GRPOTrainer):
    """The mixin first."""


class MyRewardTrainer(SecondOrderTrainerMixin, RewardTrainer):
    """The mixin first."""


TEXTS = Dataset.from_dict({"text": [sentence(i) for i in range(16)]})
PAIRS = Dataset.from_dict(
    {
        "prompt": [sentence(i, 3) + " " for i in range(16)],
        "chosen": [sentence(i + 100, 3) for i in range(16)],
        "rejected": [sentence(i + 200, 3) for i in range(16)],
    }
)
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
BEFORE_THE_DEFAULT = pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.23"), raises=AssertionError, strict=True,
    reason="beside a second adapter the stock Trainer loads no default one, with torch's AdamW as well",
)  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "factory"])
def test_supervised_fine_tuning(method: str, lora: bool, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        shared = {"model": llama(), "train_dataset": TEXTS, "eval_dataset": TEXTS, "processing_class": tokenizer()}
        shared |= {"peft_config": LORA} if lora else {}
        if method == "factory":
            args = SFTConfig(str(tmp_path), max_length=16, **COMMON)
            return SFTTrainer(args=args, optimizer_cls_and_kwargs=optimizer_factory("mkor", **FACTORY), **shared)
        args = SFTArguments(str(tmp_path), max_length=16, **COMMON, **METHODS[method])
        return MySFTTrainer(args=args, **shared)

    trainer = assert_exact(make, tmp_path)
    names = [layer.name for layer in ours(trainer).layers]
    assert len(names) == (2 * 2 * 2 if lora else 2 * 7)
    assert all(".lora_" in name for name in names) == lora


KINDS = ["whole", "adapter", "adapter and its reference"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*METHODS, "handed over"])
def test_preferences(method: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The reference, another model or the same one with another adapter, is neither captured nor moved."""
    if (method, kind) == ("handed over", "adapter and its reference"):
        request.applymarker(BEFORE_THE_DEFAULT)

    def make() -> Any:
        torch.manual_seed(0)
        model: Any = llama()
        shared: dict[str, Any] = {"train_dataset": PAIRS, "eval_dataset": PAIRS, "processing_class": tokenizer()}
        if kind == "whole":
            shared["ref_model"] = llama(1)
        elif kind == "adapter":
            shared["peft_config"] = LORA
        else:
            model = get_peft_model(model, LORA)
        if method != "handed over":
            args = DPOArguments(str(tmp_path), max_length=16, **COMMON, **METHODS[method])
            return MyDPOTrainer(model=model, args=args, **shared)
        trainer = DPOTrainer(model=model, args=DPOConfig(str(tmp_path), max_length=16, **COMMON), **shared)
        trainer.optimizer_cls_and_kwargs = optimizer_factory("mkor", **FACTORY)  # no argument of this Trainer
        return trainer

    trainer = assert_exact(make, tmp_path)
    optimizer = ours(trainer)
    assert len(optimizer.layers) == (2 * 7 if kind == "whole" else 2 * 2 * 2)
    if kind == "whole":
        assert all(
            torch.equal(a, b) for a, b in zip(trainer.ref_model.parameters(), llama(1).parameters(), strict=True)
        )
        assert not any(module._forward_hooks for module in trainer.ref_model.modules())
    else:
        assert all(".default" in layer.name for layer in optimizer.layers)
        fresh = {name: p for name, p in make().model.named_parameters() if ".default" not in name}
        assert all(torch.equal(p, trainer.model.get_parameter(name)) for name, p in fresh.items())
    cosines = [float(row["cos"]) for row in optimizer.diagnostics().values()]
    assert len(cosines) == len(optimizer.layers) and max(cosines) < 0.9999


def test_a_reference_pass_adds_no_statistics(tmp_path: Path) -> None:
    """Which the log-probabilities of the reference, computed beforehand, would have to show."""
    factors = []
    for beforehand in (False, True):
        torch.manual_seed(0)
        args = DPOArguments(
            str(tmp_path), max_length=16, precompute_ref_log_probs=beforehand, **COMMON | {"save_strategy": "no"},
            **METHODS["kfac"],
        )  # fmt: skip
        trainer = MyDPOTrainer(
            model=llama(), args=args, train_dataset=PAIRS, processing_class=tokenizer(), peft_config=LORA
        )
        trainer.train()
        factors.append(ours(trainer).second_order_state()["layers"])
    for name, tensors in factors[0].items():
        for key, tensor in tensors.items():
            # the same log-probabilities, summed in batches of another order
            assert torch.allclose(tensor, factors[1][name][key], rtol=1e-4, atol=1e-7), f"{name} {key}"


def test_a_reward_model(tmp_path: Path) -> None:
    """Its head is new, and trained."""

    def make() -> Any:
        torch.manual_seed(0)
        config = llama().config
        config.num_labels = 1
        args = RewardArguments(str(tmp_path), max_length=16, **COMMON, **METHODS["mkor"])
        return MyRewardTrainer(
            model=LlamaForSequenceClassification(config), args=args, train_dataset=PAIRS.remove_columns("prompt"),
            eval_dataset=PAIRS.remove_columns("prompt"), processing_class=tokenizer(),
        )  # fmt: skip

    trainer = assert_exact(make, tmp_path)
    assert ours(trainer).routing()["score.weight"].startswith("AdamW: one output")


def test_a_policy_that_generates(tmp_path: Path) -> None:
    """Its batches are lists; what it generates, and scores without gradients, is not captured."""

    def make() -> Any:
        torch.manual_seed(0)
        args = GRPOArguments(
            str(tmp_path), num_generations=2, max_completion_length=4, **COMMON | METHODS["kfac"],
        )  # fmt: skip
        return MyGRPOTrainer(
            model=llama(), args=args, train_dataset=PAIRS.select_columns("prompt"),
            eval_dataset=PAIRS.select_columns("prompt"), processing_class=tokenizer(),
            reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
        )  # fmt: skip

    trainer = assert_exact(make, tmp_path)
    assert len(ours(trainer).layers) == 2 * 7


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    """``optimizers``, which every Trainer takes: a rate for the adapters' B, as LoRA+ has it."""

    def make() -> Any:
        torch.manual_seed(0)
        model = get_peft_model(llama(), LORA)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if "lora_A" in name]},
            {"params": [p for name, p in named if "lora_B" in name], "lr": 2e-2},
        ]
        optimizer = hf_soo.build_optimizer("mkor", model, params=groups, **FACTORY)
        return SFTTrainer(
            model=model, args=SFTConfig(str(tmp_path), max_length=16, **COMMON), train_dataset=TEXTS,
            eval_dataset=TEXTS, processing_class=tokenizer(), optimizers=(optimizer, None),
        )  # fmt: skip

    trainer = assert_exact(make, tmp_path)
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [5e-3, 2e-2]

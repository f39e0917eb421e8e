"""sentence-transformers' Trainers: losses with parameters, rates by name, several losses; the mixin and the factory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Value
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
    models,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

import hf_soo
from hf_soo.integrations.checkpoints import write_manifest
from hf_soo.integrations.trainer import SecondOrderTrainerMixin, SecondOrderTrainingArguments, optimizer_factory
from tests.clients.toys import COMMON, FACTORY, METHODS, assert_exact, bert_folder, ours, sentence


@dataclass
class Arguments(SentenceTransformerTrainingArguments, SecondOrderTrainingArguments):
    """The library's class first."""


@dataclass
class CrossArguments(CrossEncoderTrainingArguments, SecondOrderTrainingArguments):
    """The library's class first."""


class MyTrainer(SecondOrderTrainerMixin, SentenceTransformerTrainer):
    """The mixin first."""


class MyCrossTrainer(SecondOrderTrainerMixin, CrossEncoderTrainer):
    """The mixin first."""


PAIRS = Dataset.from_dict(
    {
        "a": [sentence(i, 4) for i in range(16)],
        "b": [sentence(i + 100, 7) for i in range(16)],
        "label": [i % 2 for i in range(16)],
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_folder(tmp_path_factory.mktemp("encoder"))


def encoder(folder: str) -> SentenceTransformer:
    torch.manual_seed(0)
    return SentenceTransformer(
        modules=[models.Transformer(folder, max_seq_length=16), models.Pooling(16)], device="cpu"
    )


def made(
    kind: str, method: str, folder: str, output: Path, *, trainer: Any = MyTrainer, **overrides: Any
) -> SentenceTransformerTrainer:
    model, data = encoder(folder), PAIRS
    loss: Any = losses.MultipleNegativesRankingLoss(model)
    if kind != "pairs":
        loss = losses.SoftmaxLoss(model, 16, num_labels=2)
    if kind == "several":
        loss = {"first": loss, "second": losses.CosineSimilarityLoss(model)}
        data = {"first": PAIRS, "second": PAIRS}  # type: ignore[assignment]
    if kind == "pairs":
        data = PAIRS.remove_columns("label")
    settings = COMMON | overrides
    shared = {"model": model, "train_dataset": data, "eval_dataset": data, "loss": loss}
    if method == "factory":
        args = SentenceTransformerTrainingArguments(str(output), **settings)
        return SentenceTransformerTrainer(
            args=args, optimizer_cls_and_kwargs=optimizer_factory("mkor", **FACTORY), **shared
        )
    return trainer(args=Arguments(str(output), **settings, **METHODS[method]), **shared)


def loss_modules(trainer: Any) -> tuple[Any, ...]:
    return tuple(trainer.loss.values()) if isinstance(trainer.loss, dict) else (trainer.loss,)


@pytest.mark.parametrize("kind", ["pairs", "classifier", "several"])
@pytest.mark.parametrize("method", METHODS)
def test_trains_evaluates_and_resumes(method: str, kind: str, folder: str, tmp_path: Path) -> None:
    trainer = assert_exact(lambda: made(kind, method, folder, tmp_path), tmp_path, loss_modules)
    assert len(ours(trainer).layers) == 2 * 6 + 1
    assert (tmp_path / "checkpoint-3" / "loss.pt").is_file() == (kind != "pairs")


def test_by_the_factory(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = assert_exact(lambda: made("pairs", "factory", folder, tmp_path), tmp_path)
    assert ours(trainer).name == "mkor" and "num_items_in_batch" not in caplog.text  # the loss is not the model's


def test_rates_by_name_and_a_classifier_that_moves(folder: str, tmp_path: Path) -> None:
    """Equal, group by group, to transformers' AdamW with the same arguments."""
    rates = {}
    for optim in ("adamw_torch", "mkor"):
        mapping = {"classifier": 5e-2, r"layer\.1": 1e-4}
        method = METHODS["mkor"] if optim == "mkor" else {}
        args = Arguments(
            str(tmp_path), learning_rate_mapping=mapping, **COMMON | {"max_steps": 2, "save_strategy": "no"}, **method
        )
        model = encoder(folder)
        loss = losses.SoftmaxLoss(model, 16, num_labels=2)
        before = loss.classifier.weight.detach().clone()
        trainer = MyTrainer(model=model, args=args, train_dataset=PAIRS, loss=loss)
        trainer.train()
        assert not torch.equal(before, loss.classifier.weight)
        names = {id(p): name for name, p in loss.named_parameters()}
        groups = trainer.optimizer.param_groups
        rates[optim] = {
            names[id(p)]: (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]
        }
    assert rates["mkor"] == rates["adamw_torch"] and {rate for rate, _ in rates["mkor"].values()} == {5e-3, 5e-2, 1e-4}
    routing = ours(trainer).routing()
    assert routing["loss.classifier.weight"] == "AdamW"


def test_adamw_is_theirs(folder: str, tmp_path: Path) -> None:
    """Our "adamw" goes the way of transformers' over the same groups, with padding and a loss that is trained."""
    weights = []
    for settings in ({"optim": "adamw_torch"}, {"optim": "adamw"}):
        args = Arguments(str(tmp_path), adam_beta2=0.98, **COMMON | {"save_strategy": "no"}, **settings)
        model = encoder(folder)
        loss = losses.SoftmaxLoss(model, 16, num_labels=2)
        MyTrainer(model=model, args=args, train_dataset=PAIRS, loss=loss).train()
        weights.append(torch.cat([p.detach().flatten() for p in loss.parameters()]))
    # torch's fused kernel against its loop, six steps
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-5)


def test_a_loss_that_no_group_has_is_an_error(folder: str, tmp_path: Path) -> None:
    trainer = made("classifier", "mkor", folder, tmp_path)
    trainer.optimizer_cls_and_kwargs = optimizer_factory("mkor", **FACTORY)
    with pytest.raises(ValueError, match=r"trainable parameters are in no group .*: loss.classifier.weight"):
        trainer.train()


def test_a_loss_of_an_optimizer_of_ones_own(folder: str, tmp_path: Path) -> None:
    """The stock Trainer with a loss's parameters: groups of one's own."""

    def make() -> Any:
        model = encoder(folder)
        loss = losses.SoftmaxLoss(model, 16, num_labels=2)
        optimizer = hf_soo.build_optimizer("mkor", model, params=loss.parameters(), **FACTORY)
        args = SentenceTransformerTrainingArguments(str(tmp_path), **COMMON)
        return SentenceTransformerTrainer(
            model=model, args=args, train_dataset=PAIRS, loss=loss, optimizers=(optimizer, None)
        )

    trainer = make()
    before = trainer.loss.classifier.weight.detach().clone()
    trainer.train()
    assert ours(trainer).steps == 6 and not torch.equal(before, trainer.loss.classifier.weight)


def test_a_checkpoint_without_its_loss(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an older version, or the stock Trainer, wrote it; and one of another loss."""
    trainer = made("classifier", "mkor", folder, tmp_path, max_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    state = torch.load(checkpoint / "loss.pt", weights_only=True)
    assert set(state) == {f"loss.{name}" for name, _ in trainer.loss.named_parameters() if "classifier" in name}
    other = made("classifier", "mkor", folder, tmp_path)
    other.loss = losses.SoftmaxLoss(other.model, 16, num_labels=3)
    with pytest.raises(ValueError, match=r"loss\.pt is of another loss"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "loss.pt").unlink()
    write_manifest(checkpoint, "whole", 3, hashed=True)
    with caplog.at_level(logging.WARNING):
        made("classifier", "mkor", folder, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert "has no loss.pt: the loss's own tensors (loss.classifier.weight, ...) start anew" in caplog.text


def test_the_best_model_is_loaded_at_the_end(folder: str, tmp_path: Path) -> None:
    trainer = made(
        "classifier", "mkor", folder, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True
    )
    trainer.train()
    loaded = SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())


def test_accumulation_is_the_mean_of_the_micro_batches(folder: str, tmp_path: Path) -> None:
    """A classifier's loss is a mean over pairs, so halves of a batch add up to it."""
    weights = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = made(
            "classifier", "mkor", folder, tmp_path, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, max_steps=3, save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    # fp32 sums in another order, through three steps of AdamW
    assert torch.allclose(*weights, rtol=0, atol=2e-4)


def test_a_cross_encoder(folder: str, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        model = CrossEncoder(folder, num_labels=1, max_length=16, device="cpu")
        data = PAIRS.cast_column("label", Value("float32"))
        args = CrossArguments(str(tmp_path), **COMMON, **METHODS["mkor"])
        return MyCrossTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data, loss=BinaryCrossEntropyLoss(model)
        )

    trainer = assert_exact(make, tmp_path)
    assert ours(trainer).name == "mkor"

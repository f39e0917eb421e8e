"""The model of a GLUE run: heads, positions, padding, tokenizers, and folders that hold another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    MPNetConfig,
    RobertaConfig,
)

from hf_soo.bert.model import GatheredBertForPreTraining, name_bias_once
from hf_soo.glue.data import GlueDataArguments
from hf_soo.glue.model import GlueModelArguments, find_classifier, make_classifier
from hf_soo.glue.task import GlueFineTuning, _numbers
from hf_soo.glue.tasks import TASKS
from hf_soo.runs.finetuning import best_class
from hf_soo.runs.pretrained import Pretrained, _check_tokenizer
from hf_soo.runs.run_arguments import RunTrainingArguments
from tests.tasks.glue_cases import make_model, write_archive


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_model(root / "tiny")
    write_archive(root / "glue")
    return root


def fine_tuning(world: Path, folder: Path, task: str = "rte", **data: Any) -> GlueFineTuning:
    given = GlueDataArguments(data_dir=str(world / "glue"), **{"max_seq_length": 24, **data})
    pretrained = find_classifier(GlueModelArguments(model_name_or_path=str(folder)), given.max_seq_length)
    args = RunTrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to="none")
    return GlueFineTuning(TASKS[task], pretrained, given, args)


def test_heads_come_from_the_seed_and_encoders_from_the_folder(world: Path, tmp_path: Path) -> None:
    """The folder is one of scripts/pretrain_bert.py, whose vocabulary's bias has one name."""
    config = BertConfig.from_pretrained(world / "tiny")
    pretrained = GatheredBertForPreTraining(config)
    name_bias_once(pretrained)
    pretrained.save_pretrained(tmp_path / "pre")
    for file in (world / "tiny").glob("*token*"):
        shutil.copy(file, tmp_path / "pre")
    task = fine_tuning(world, tmp_path / "pre")
    weights = [task.make_model(seed).state_dict() for seed in (0, 0, 1)]
    for name, tensor in pretrained.bert.state_dict().items():
        assert torch.equal(weights[0][f"bert.{name}"], tensor), name
    assert torch.equal(weights[0]["classifier.weight"], weights[1]["classifier.weight"])
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])
    assert weights[0]["classifier.weight"].shape == (2, 16)


def test_configuration_tokenizer_and_revision_are_those_asked_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the weights are fp32, whatever the checkpoint has."""
    shutil.copytree(world / "tiny", tmp_path / "half")
    BertModel.from_pretrained(world / "tiny", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    BertConfig.from_pretrained(world / "tiny", hidden_dropout_prob=0.3).save_pretrained(tmp_path / "config")
    given = GlueModelArguments(
        model_name_or_path=str(tmp_path / "half"),
        config_name=str(tmp_path / "config"),
        tokenizer_name=str(world / "tiny"),
        cache_dir=str(tmp_path / "cache"),
        model_revision="v2",
    )
    asked = []
    for loader in (AutoConfig, AutoTokenizer, AutoModelForSequenceClassification):
        loaded = loader.from_pretrained

        def spy(name: str, loaded: Any = loaded, **kwargs: Any) -> Any:
            asked.append((Path(name).name, kwargs["revision"], Path(kwargs["cache_dir"]).name))
            return loaded(name, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    model = make_classifier(find_classifier(given, 24), TASKS["rte"], 0)
    assert list(dict.fromkeys(asked)) == [(name, "v2", "cache") for name in ("config", "tiny", "half")]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.hidden_dropout_prob == 0.3


def test_models_that_return_more_than_logits() -> None:
    logits = torch.tensor([[0.1, 0.7], [0.9, 0.2]])
    assert best_class((logits, logits), None).tolist() == best_class(logits, None).tolist() == [1, 0]
    assert _numbers((logits[:, :1], logits), None).tolist() == _numbers(logits[:, :1], None).tolist()


def test_tokenizers_of_other_kinds_of_model() -> None:
    """Rounded up is fine; an empty one, which transformers makes where it finds no files, is not."""
    config = DebertaV2Config(vocab_size=128100)
    _check_tokenizer(config, 128001, "x")
    for size in (5, 128101):
        with pytest.raises(ValueError, match=f"The tokenizer of 'x' does not fit the model: the vocabulary has {size}"):
            _check_tokenizer(config, size, "x")


def test_padding(world: Path, tmp_path: Path) -> None:
    """To the longest (17), a multiple of 8 unless that is past the last position; or all to max_seq_length."""
    for positions, given, width in (
        (32, {}, 24),
        (32, {"max_seq_length": 20}, 24),
        (20, {"max_seq_length": 20}, 17),
        (32, {"max_seq_length": 32, "pad_to_max_length": True}, 32),
    ):
        task = fine_tuning(world, make_model(tmp_path / str(positions), positions), **given)
        assert task.train is not None
        rows = task._tokenised(task.train)
        assert rows.column_names == ["label", "input_ids", "token_type_ids", "attention_mask"]
        longest = max(range(48), key=lambda index: len(rows[index]["input_ids"]))
        batch = task._collator()([rows[longest], rows[0]])
        assert batch["input_ids"].shape == (2, width), given
        assert batch["labels"].tolist() == [longest % 2, 0]
        assert task.make_model(0)(**batch).logits.shape == (2, 2)


def test_positions() -> None:
    """RoBERTa numbers them from two; MPNet does, too, and its tokenizer alone says so; DeBERTa's does not."""
    for config, longest, expected in (
        (RobertaConfig(max_position_embeddings=514), 10**30, 512),
        (MPNetConfig(max_position_embeddings=514), 512, 512),
        (DebertaV2Config(max_position_embeddings=512), 10**30, 512),
        (BertConfig(max_position_embeddings=1024), 512, 1024),
    ):
        tokenizer = SimpleNamespace(model_max_length=longest)
        assert Pretrained(GlueModelArguments("x"), config, tokenizer).positions() == expected, config.model_type


def test_a_regression_has_one_number_and_squared_error(world: Path) -> None:
    task = fine_tuning(world, world / "tiny", "stsb")
    assert task.train is not None
    batch = task._collator()([task._tokenised(task.train)[index] for index in range(4)])
    output = task.make_model(0)(**batch)
    assert output.logits.shape == (4, 1)
    assert output.loss.item() == pytest.approx(((output.logits[:, 0] - batch["labels"]) ** 2).mean().item(), rel=1e-6)
    assert batch["labels"].tolist() == [0.0, 4.625, 0.25, 4.5]


def test_fine_tuned_heads(world: Path, tmp_path: Path) -> None:
    """A head of another task is refused, or replaced on request; so are labels in another order."""
    config = BertConfig.from_pretrained(world / "tiny", num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    config = BertConfig.from_pretrained(world / "tiny", id2label={0: "not_entailment", 1: "entailment"})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "swapped")
    for folder in ("three", "swapped"):
        for file in (world / "tiny").glob("*token*"):
            shutil.copy(file, tmp_path / folder)
    with pytest.raises(ValueError, match="has a head with 3 labels, RTE needs 2; give --ignore_mismatched_sizes"):
        fine_tuning(world, tmp_path / "three")
    with pytest.raises(ValueError, match="has the labels not_entailment, entailment, RTE has them in the order ent"):
        fine_tuning(world, tmp_path / "swapped")
    given = GlueModelArguments(model_name_or_path=str(tmp_path / "three"), ignore_mismatched_sizes=True)
    model = make_classifier(find_classifier(given, 24), TASKS["rte"], 0)
    assert model.classifier.weight.shape == (2, 16)


def test_weights_of_another_model_are_refused(world: Path, tmp_path: Path) -> None:
    """They would leave the encoder at random values, and the run would look like one."""
    shutil.copytree(world / "tiny", tmp_path / "other")
    config = json.loads((world / "tiny" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"its weights lack 16 of the tensors of a bert \(the first is bert.encoder.l"):
        fine_tuning(world, tmp_path / "other").make_model(0)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is no folder of a model, nor a model of the hub that can be read"):
        fine_tuning(world, tmp_path / "other").make_model(0)

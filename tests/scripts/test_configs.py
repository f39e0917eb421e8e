"""Every YAML under configs/ parses, builds its optimizer, and says what STYLE asks of a header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig

import hf_soo
from hf_soo.bert.arguments import DataArguments, ModelArguments
from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.integrations.arguments import parse_settings
from hf_soo.reproduce.table import PAPER
from hf_soo.runs import arguments
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.vision.data import ImageDataConfig, load_images
from hf_soo.vision.models import ImageModelConfig, make_image_model

ROOT = Path(__file__).resolve().parents[2]
PRETRAINING = sorted(path for folder in ("smoke", "pretrain") for path in (ROOT / "configs" / folder).glob("*.yaml"))
VISION = sorted((ROOT / "configs" / "vision").glob("*.yaml"))
CLASSES = (ModelArguments, DataArguments, RunArguments, RunTrainingArguments)
VISION_CLASSES = (ImageModelConfig, ImageDataConfig, RunArguments, RunTrainingArguments)
# What siblings may differ in: the optimizer's own keys, and where its checkpoints lie.
OPTIMIZER_KEYS = {
    "optim", "optim_args", "base_optim", "base_optim_args", "learning_rate", "max_grad_norm", "precondition_exclude",
    "weight_decay", "output_dir",
}  # fmt: skip


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_the_configs_that_the_readme_names_are_there() -> None:
    wiki = [f"pretrain/bert_mini_wiki_{name}" for name in ("mkor", "mkor_muon", "lamb", "adamw", "eva_f", "muon")]
    vision = [f"vision/{name}" for name in ("vit_digits_adamw", "vit_digits_kfac_reduce", "resnet_digits_adamw")]
    assert {*wiki, *vision, "smoke/mkor", "smoke/lamb"} <= {ids(path) for path in (*PRETRAINING, *VISION)}


@pytest.mark.parametrize("path", PRETRAINING, ids=ids)
def test_parses_and_builds_its_optimizer(path: Path) -> None:
    model_flags, data, run, training = arguments.parse(CLASSES, ["--config", str(path), "--use_cpu", "true"])
    assert (data.data_dir is None) != (data.corpus is None)
    check_values(path, model_flags, data, run, training)
    torch.manual_seed(0)
    model = GatheredBertForPreTraining(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    check_optimizer(training, model)


@pytest.mark.parametrize("path", VISION, ids=ids)
def test_parses_and_builds_its_optimizer_for_images(path: Path) -> None:
    flags = ["--config", str(path), "--use_cpu", "true", "--max_train_samples", "64"]
    model, data, run, training = arguments.parse(VISION_CLASSES, flags)
    check_values(path, training, model, data, run)
    check_optimizer(training, make_image_model(model, load_images(data), seed=0))


def check_values(path: Path, *parsed: Any) -> None:
    """Every scalar of the YAML is the value of the field of that name, which one of the parsed has."""
    for key, value in yaml.safe_load(path.read_text()).items():
        (owner,) = (each for each in parsed if hasattr(each, key))
        if isinstance(value, int | float | bool) and key != "save_strategy":
            assert getattr(owner, key) == value, key


def check_optimizer(training: RunTrainingArguments, model: torch.nn.Module) -> None:
    """It can be built, with the learning rates of the YAML."""
    optimizer = hf_soo.build_optimizer(
        training.optim,
        model,
        lr=training.learning_rate,
        base=training.base_optim,
        base_args=parse_settings("base_optim_args", training.base_optim_args),
        weight_decay=training.weight_decay,
        include=training.precondition_include,
        exclude=training.precondition_exclude,
        **parse_settings("optim_args", training.optim_args),
    )
    expected = {training.learning_rate, *(value for key, value in _rates(training) if key == "rest_lr")}
    assert {group["lr"] for group in optimizer.param_groups} == expected


def _rates(training: RunTrainingArguments) -> list[tuple[str, Any]]:
    both = (parse_settings(key, getattr(training, key)) for key in ("optim_args", "base_optim_args"))
    return [item for settings in both for item in settings.items()]


@pytest.mark.parametrize("path", PRETRAINING, ids=ids)
def test_lamb_clips_by_itself(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    lamb = "lamb" in (config["optim"], config.get("base_optim", "lamb" if config["optim"] == "mkor" else ""))
    assert (config["max_grad_norm"] == 0.0) == lamb


PHASES = [f"pretrain/bert_{size}_phase{phase}" for size in ("large", "base", "small", "mini") for phase in (1, 2)]
NAMES = ("lamb", "adamw", "muon", "mkor", "mkor_muon", "mkor_h", "eva", "kaisa")


@pytest.mark.parametrize(
    "family", ["smoke/", "pretrain/bert_mini_wiki_", "vision/vit_digits_", *(f"{p}_" for p in PHASES)]
)
def test_siblings_differ_in_optimizer_keys_alone(family: str) -> None:
    paths = sorted((ROOT / "configs").glob(f"{family}*.yaml"))
    first, *others = (yaml.safe_load(path.read_text()) for path in paths)
    assert others
    # the paper's phase 2 is shorter for the second-order methods: the number of steps is what its table compares
    free = OPTIMIZER_KEYS | ({"max_steps"} if "large_phase2" in family else set())
    for other in others:
        assert {key for key in {*first, *other} if first.get(key) != other.get(key)} <= free


@pytest.mark.parametrize("family", PHASES)
def test_every_phase_has_every_optimizer(family: str) -> None:
    for name in NAMES:
        config = yaml.safe_load((ROOT / "configs" / f"{family}_{name}.yaml").read_text())
        optim, base = ("mkor", "muon") if name == "mkor_muon" else (name, config.get("base_optim"))
        assert (config["optim"], config.get("base_optim")) == (optim, base)
        assert ("previous_phase" in config) == ("phase2" in family) != ("preset" in config)


def test_the_published_recipe_of_bert_large() -> None:
    """bert_recipes.md 1: NVIDIA's two phases, and the steps of the MKOR paper's table."""
    recipe = {1: (7038, 65536, 0.006, 0.2843, 20, "data/phase1"), 2: (1563, 32768, 0.004, 0.128, 80, "data/phase2")}
    for phase, (steps, batch, rate, warmup, predictions, data) in recipe.items():
        config = yaml.safe_load((ROOT / "configs" / "pretrain" / f"bert_large_phase{phase}_lamb.yaml").read_text())
        assert (config["max_steps"], config["global_batch_size"], config["learning_rate"]) == (steps, batch, rate)
        assert (config["warmup_steps"], config["max_predictions"], config["data_dir"]) == (warmup, predictions, data)
        assert (config["lr_scheduler_type"], config["weight_decay"]) == ("poly_warmup", 0.01)
    table = {"lamb": 1563, "kaisa": 1000, "mkor": 1000, "mkor_h": 600, "eva": 1000}
    for name, steps in table.items():
        config = yaml.safe_load((ROOT / "configs" / "pretrain" / f"bert_large_phase2_{name}.yaml").read_text())
        assert (config["max_steps"], config["learning_rate"]) == (steps, 0.004)
        header = (ROOT / "configs" / "pretrain" / f"bert_large_phase2_{name}.yaml").read_text().split("# optimizer")[0]
        f1 = f"{PAPER[name][1]:.2f}"
        assert PAPER[name][0] == steps and f"{steps:,} steps, SQuAD v1.1 F1 {f1}." in header
        assert f"{f1} (published)" in header


@pytest.mark.parametrize("path", [*PRETRAINING, *VISION], ids=ids)
def test_header_says_paper_hardware_batch_command_and_expectation(path: Path) -> None:
    check_header(path)


def check_header(path: Path, reproduced: str = "") -> None:
    """The comment above a recipe says what STYLE asks of it; `reproduced` is "yes" or "no" where that is known."""
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    words = ("Paper table:", "Hardware:", "lobal batch", "Command: accelerate launch", "xpected")
    for word in (*words, f"reproduced here: {reproduced}", f"configs/{ids(path)}.yaml"):
        assert word in header[0], word

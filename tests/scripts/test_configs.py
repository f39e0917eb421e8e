"""Every recipe under configs/ parses to the settings it always had, and builds its optimizer; headers say enough."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

import hf_soo
from hf_soo.bert.inputs import DataArguments, ModelArguments
from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.integrations.arguments import parse_settings
from hf_soo.registry import METHODS
from hf_soo.reproduce.table import PAPER
from hf_soo.runs import arguments
from hf_soo.runs.recipes import optimizer_names, read_recipe
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.vision.data import ImageData, ImageDataConfig
from hf_soo.vision.models import ImageModelConfig, make_image_model

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "configs" / "pretrain"
SETTINGS: dict[str, dict[str, dict[str, Any]]] = json.loads((ROOT / "tests" / "fixtures" / "recipes.json").read_text())
RECIPES = [(workload, name) for workload, cases in SETTINGS.items() for name in cases if name != "every"]
WORKLOADS = [PRETRAIN / f"{workload}.yaml" for workload in SETTINGS]
OPTIMIZERS = [PRETRAIN / f"{name}.yaml" for name in sorted({name for _, name in RECIPES})]
SHARED = [PRETRAIN / f"bert_phase{phase}.yaml" for phase in (1, 2)]
SMOKE = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))
VISION = sorted((ROOT / "configs" / "vision").glob("*.yaml"))
CLASSES = (ModelArguments, DataArguments, RunArguments, RunTrainingArguments)
VISION_CLASSES = (ImageModelConfig, ImageDataConfig, RunArguments, RunTrainingArguments)
# What siblings may differ in: the optimizer's own keys, and where its checkpoints lie.
OPTIMIZER_KEYS = {
    "optim", "optim_args", "base_optim", "base_optim_args", "learning_rate", "max_grad_norm", "precondition_exclude",
    "weight_decay", "output_dir",
}  # fmt: skip
NAMES = ("lamb", "adamw", "muon", "mkor", "mkor_muon", "mkor_h", "eva", "kaisa")


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def flags_of(workload: str, optimizer: str) -> list[str]:
    """Both files of a recipe."""
    return [item for name in (workload, optimizer) for item in ("--config", str(PRETRAIN / f"{name}.yaml"))]


def settings_of(parsed: tuple[Any, ...]) -> dict[str, Any]:
    """Every setting by name, the optimizer's own as mappings."""
    found = {field.name: getattr(each, field.name) for each in parsed for field in dataclasses.fields(each)}
    return found | {key: parse_settings(key, found[key]) for key in ("optim_args", "base_optim_args")}


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    return settings_of(parse([]))


def test_every_file_belongs_to_a_recipe() -> None:
    assert sorted([*WORKLOADS, *OPTIMIZERS, *SHARED]) == sorted(PRETRAIN.iterdir()) and len(RECIPES) == 70
    for workload in WORKLOADS:
        assert optimizer_names(workload) == sorted(name for name in SETTINGS[workload.stem] if name != "every")


@pytest.mark.parametrize(("workload", "optimizer"), RECIPES)
def test_a_recipe_has_the_settings_that_it_always_had(workload: str, optimizer: str, defaults: dict[str, Any]) -> None:
    """Those of the one file that it was, so that its runs can be resumed; and its optimizer is built."""
    parsed = parse(flags_of(workload, optimizer))
    assert settings_of(parsed) == defaults | SETTINGS[workload]["every"] | SETTINGS[workload][optimizer]
    check_pretraining(parsed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
@pytest.mark.parametrize("workload", WORKLOADS, ids=ids)
def test_the_order_of_the_files_does_not_matter(workload: Path, optimizer: Path) -> None:
    """For no key stands in both; a combination that is no recipe is refused in both orders."""
    if optimizer.stem in optimizer_names(workload):
        assert read_recipe([workload, optimizer]) == read_recipe([optimizer, workload])
        return
    for files in ([workload, optimizer], [optimizer, workload], [workload]):
        with pytest.raises(ValueError, match="no learning_rate and no output_dir without an optimizer's file"):
            read_recipe(files)


@pytest.mark.parametrize("path", SMOKE, ids=ids)
def test_a_smoke_run_parses_and_builds_its_optimizer(path: Path) -> None:
    parsed = parse(["--config", str(path)])
    check_values(path, *parsed)
    check_pretraining(parsed)


def parse(flags: list[str]) -> tuple[Any, ...]:
    return arguments.parse(CLASSES, [*flags, "--use_cpu", "true"])


def check_pretraining(parsed: tuple[Any, ...]) -> None:
    _, data, _, training = parsed
    assert (data.data_dir is None) != (data.corpus is None)
    torch.manual_seed(0)
    model = GatheredBertForPreTraining(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    check_optimizer(training, model)
    lamb = "lamb" in (training.optim, training.base_optim or METHODS[training.optim].base)
    assert (training.max_grad_norm == 0.0) == lamb  # it clips by itself


@pytest.mark.parametrize("path", VISION, ids=ids)
def test_parses_and_builds_its_optimizer_for_images(path: Path) -> None:
    flags = ["--config", str(path), "--use_cpu", "true", "--max_train_samples", "64"]
    model, data, run, training = arguments.parse(VISION_CLASSES, flags)
    check_values(path, training, model, data, run)
    check_optimizer(training, make_image_model(model, ImageData.load(data), seed=0))


def check_values(path: Path, *parsed: Any) -> None:
    """Every scalar of the YAML is the value of the field of that name, which one of the parsed has."""
    for key, value in read_recipe([path]).items():
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


def test_siblings_differ_in_optimizer_keys_alone() -> None:
    for siblings in (SMOKE, [path for path in VISION if path.stem.startswith("vit_digits")]):
        first, *others = (read_recipe([path]) for path in siblings)
        assert others
        for other in others:
            assert {key for key in {*first, *other} if first.get(key) != other.get(key)} <= OPTIMIZER_KEYS


@pytest.mark.parametrize("workload", SETTINGS)
def test_optimizers_of_a_workload_differ_in_optimizer_keys_alone(workload: str) -> None:
    # the paper's phase 2 is shorter for the second-order methods: the number of steps is what its table compares
    free = OPTIMIZER_KEYS | ({"max_steps"} if workload == "bert_large_phase2" else set())
    for optimizer in optimizer_names(PRETRAIN / f"{workload}.yaml"):
        assert SETTINGS[workload][optimizer].keys() <= free
        assert read_recipe([PRETRAIN / f"{optimizer}.yaml"]).keys() <= OPTIMIZER_KEYS


@pytest.mark.parametrize("size", ["large", "base", "small", "mini"])
@pytest.mark.parametrize("phase", [1, 2])
def test_every_phase_has_every_optimizer(size: str, phase: int) -> None:
    workload = f"bert_{size}_phase{phase}"
    assert optimizer_names(PRETRAIN / f"{workload}.yaml") == sorted(NAMES)
    for name in NAMES:
        config = recipe(workload, name)
        assert config["optim"] == ("mkor" if name == "mkor_muon" else name)
        assert ("previous_phase" in config) == (phase == 2) != ("preset" in config)


def recipe(workload: str, optimizer: str) -> dict[str, Any]:
    return read_recipe([PRETRAIN / f"{workload}.yaml", PRETRAIN / f"{optimizer}.yaml"])


def test_the_published_recipe_of_bert_large() -> None:
    """bert_recipes.md 1: NVIDIA's two phases, and the steps of the MKOR paper's table."""
    published = {1: (7038, 65536, 0.006, 0.2843, 20, "data/phase1"), 2: (1563, 32768, 0.004, 0.128, 80, "data/phase2")}
    for phase, (steps, batch, rate, warmup, predictions, data) in published.items():
        config = recipe(f"bert_large_phase{phase}", "lamb")
        assert (config["max_steps"], config["global_batch_size"], config["learning_rate"]) == (steps, batch, rate)
        assert (config["warmup_steps"], config["max_predictions"], config["data_dir"]) == (warmup, predictions, data)
        assert (config["lr_scheduler_type"], config["weight_decay"]) == ("poly_warmup", 0.01)
    table = {"lamb": 1563, "kaisa": 1000, "mkor": 1000, "mkor_h": 600, "eva": 1000}
    text = (PRETRAIN / "bert_large_phase2.yaml").read_text()
    for name, steps in table.items():
        config = recipe("bert_large_phase2", name)
        assert (config["max_steps"], config["learning_rate"]) == (steps, 0.004) and PAPER[name][0] == steps
        said = rf"  {name}: .*# {steps:,} steps, SQuAD v1\.1 F1 {PAPER[name][1]:.2f} \(published\)"
        assert re.search(said, text) is not None


@pytest.mark.parametrize("path", [*SMOKE, *VISION], ids=ids)
def test_header_says_paper_hardware_batch_command_and_expectation(path: Path) -> None:
    check_header(path)


@pytest.mark.parametrize("path", WORKLOADS, ids=ids)
def test_header_of_a_workload(path: Path) -> None:
    check_header(path)
    text = path.read_text()
    assert f"--config configs/pretrain/{path.stem}.yaml --config configs/pretrain/OPTIMIZER.yaml\n" in text
    shared = next((file for file in SHARED if f"extends: {file.name}\n" in text), path)
    assert "#   hf-soo prepare" in shared.read_text()


@pytest.mark.parametrize("path", OPTIMIZERS, ids=ids)
def test_header_of_an_optimizer(path: Path) -> None:
    assert re.match(rf"# [A-Z].* --config configs/pretrain/{path.stem}\.yaml\.\n(?!#)", path.read_text())


def check_header(path: Path, reproduced: str = "") -> None:
    """The comment above a recipe says what STYLE asks of it; `reproduced` is "yes" or "no" where that is known."""
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    words = ("Paper table:", "Hardware:", "lobal batch", "Command: accelerate launch", "xpected")
    for word in (*words, f"reproduced here: {reproduced}", f"configs/{ids(path)}.yaml"):
        assert word in header[0], word

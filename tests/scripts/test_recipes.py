"""Every workload and every optimizer of BERT's recipes starts: at a reduced size, it takes two steps."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts.script_runs import ROOT, load_script, only_run, prepare_corpus

PRETRAIN = ROOT / "configs" / "pretrain"
# each workload once, each optimizer once; test_configs parses and builds every combination
RECIPES = {
    "bert_large_phase1": "kaisa", "bert_large_phase2": "mkor_h", "bert_base_phase1": "eva", "bert_base_phase2": "muon",
    "bert_small_phase1": "adamw", "bert_small_phase2": "mkor_muon", "bert_mini_phase1": "lamb",
    "bert_mini_phase2": "mkor", "bert_mini_wiki": "eva_f",
}  # fmt: skip
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "32"]
STEPS = ["--max_steps", "2", "--global_batch_size", "4", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
HERE = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]
QUICK = ["--eval_strategy", "no", "--do_train", "true", "--dataloader_pin_memory", "false", "--max_eval_samples", "4"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_bert")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def phase_1(script: ModuleType, prepared: Path) -> Path:
    """What phase 2 goes on from: LAMB's phase 1, of BERT-Large's recipe."""
    out = prepared.parent / "phase1"
    flags = [*reduced("bert_large_phase1", "lamb", prepared, out), "--save_strategy", "steps", "--save_steps", "2"]
    assert script.main(flags) == 0
    return out


def reduced(workload: str, optimizer: str, data: Path, out: Path) -> list[str]:
    configs = [item for name in (workload, optimizer) for item in ("--config", str(PRETRAIN / f"{name}.yaml"))]
    folders = ["--data_dir", str(data), "--output_dir", str(out), "--results_dir", str(out / "runs")]
    return [*configs, *folders, *SMALL, *STEPS, *HERE, *QUICK]


def test_every_file_is_tried() -> None:
    files = {path.stem for path in PRETRAIN.iterdir()}
    assert files == {*RECIPES, *RECIPES.values(), "bert_phase1", "bert_phase2"}


@pytest.mark.parametrize("workload", RECIPES)
def test_takes_two_steps(workload: str, script: ModuleType, prepared: Path, phase_1: Path, tmp_path: Path) -> None:
    phase = ["--previous_phase", str(phase_1)] if workload.endswith("_phase2") else []
    flags = [*reduced(workload, RECIPES[workload], prepared, tmp_path), "--save_strategy", "no", *phase]
    assert script.main(flags) == 0
    run = only_run(tmp_path / "runs")
    assert (run["status"], run["steps"], len(run["curve"])) == ("completed", 2, 2)
    assert run["config"]["gradient_accumulation_steps"] == 2
    first = run["curve"][0]["train_loss"]
    assert 4.0 < first < 7.0  # ln(120 words) + ln(2) is 5.5
    assert ("previous_phase" in run["config"]) == bool(phase)

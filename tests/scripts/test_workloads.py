"""Every recipe of configs/workloads says what it needs and what it costs, and starts: reduced, it takes two steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_soo import cli
from hf_soo.domains import domain_of
from hf_soo.runs.recipes import read_recipe
from hf_soo.runs.script import COMMANDS
from tests.scripts.script_runs import ROOT, prepare_corpus, write_corpus
from tests.scripts.test_recipes_finetuning import fill

FOLDER = ROOT / "configs" / "workloads"
WORKLOADS = sorted(FOLDER.glob("*.yaml"))
TASKS = {
    "byte_bert": "lm", "byte_gpt": "lm", "byte_gpt_batch16": "lm", "byte_gpt_batch256": "lm",
    "byte_gpt_embedded": "lm", "minilm_glue": "glue", "minilm_lora": "glue",
    "minilm_squad": "squad", "phase2_bert": "bert", "vit_digits": "vision", "wordpiece_bert": "bert",
}  # fmt: skip
HERE = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
STEPS = [*HERE, "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"]
BATCH = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8"]
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"]


def ids(path: Path) -> str:
    return path.stem


def test_every_workload_is_there() -> None:
    assert {path.stem for path in WORKLOADS} == set(TASKS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes' folders hold, in small."""
    root = fill(tmp_path_factory.mktemp("workloads"))
    (root / "lm").mkdir()
    write_corpus(root / "lm")
    (root / "bert").mkdir()
    prepare_corpus(root / "bert")
    phase_1 = [*PLAIN, "--optim", "lamb", "--save_strategy", "steps", "--output_dir", str(root / "phase1")]
    flags = ["--config", str(FOLDER / "wordpiece_bert.yaml"), *STEPS, *BATCH, *reduced("wordpiece_bert", root)]
    assert cli.main(["pretrain", *flags, *phase_1]) == 0
    return root


PLAIN = ["--optim_args", "{}"]  # of another optimizer than the recipe's


def reduced(workload: str, world: Path) -> list[str]:
    """The flags that make it small, by its domain."""
    model = {"glue": "glue_model", "squad": "squad_model"}.get(TASKS[workload], "")
    pretrained = ["--model_name_or_path", str(world / model)]
    squad = ["--train_file", str(world / "train.json"), "--validation_file", str(world / "dev.json")]
    lengths = ["--max_seq_length", "24", "--doc_stride", "4", "--max_query_length", "8"]
    bert = ["--data_dir", str(world / "bert" / "data"), *SMALL, "--intermediate_size", "32", "--max_eval_samples", "4"]
    flags = {
        "lm": [*SMALL, "--max_eval_samples", "4", "--source", str(world / "lm")],
        "bert": [*bert, "--global_batch_size", "4"],
        "glue": [*pretrained, "--data_dir", str(world / "glue"), "--max_seq_length", "24"],
        "squad": [*pretrained, *squad, *lengths],
        "vision": ["--max_train_samples", "64"],
    }[TASKS[workload]]
    if workload.endswith("embedded"):
        flags = flags[:-2]  # its text is there
    return [*flags, *(["--previous_phase", str(world / "phase1")] if workload == "phase2_bert" else [])]


@pytest.mark.parametrize("path", WORKLOADS, ids=ids)
def test_takes_two_steps(path: Path, world: Path, tmp_path: Path) -> None:
    where = ["--output_dir", str(tmp_path), "--results_dir", str(tmp_path / "runs")]
    flags = ["--config", str(path), *STEPS, *BATCH, *where, *reduced(path.stem, world)]
    assert cli.main([COMMANDS[TASKS[path.stem]], *flags]) == 0
    runs = [json.loads(file.read_text()) for file in sorted((tmp_path / "runs").glob("*.json"))]
    count = 4 if TASKS[path.stem] == "glue" else 1  # a run for each of its tasks
    assert [(run["status"], run["steps"]) for run in runs] == [("completed", 2)] * count
    assert all(isinstance(run["final"]["eval_loss"], float) for run in runs)


@pytest.mark.parametrize("path", WORKLOADS, ids=ids)
def test_is_parsed_as_it_stands(path: Path, tmp_path: Path) -> None:
    """By the domain that it names: every value of the file is that of the setting; no curve is without evaluations."""
    flags = ["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    domain = domain_of(flags)
    assert domain.name == TASKS[path.stem] and not path.read_text().count("{optimizer}")
    parsed = domain.settings(flags, more=_more(domain.name))
    given: dict[str, Any] = read_recipe([path])
    for key, value in given.items():
        (owner,) = (each for each in parsed if hasattr(each, key))
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert getattr(owner, key) == value, key
    training = parsed[-1]
    assert str(training.eval_strategy.value) in {"steps", "epoch"} and given["logging_steps"] == 25
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    assert schedule in {"linear", "cosine", "poly_warmup"} and training.warmup_steps > 0
    assert not (training.bf16 or training.fp16 or training.seed) and (given.get("save_total_limit", 1) == 1)


def _more(name: str) -> tuple[type, ...]:
    from hf_soo.glue import sweep

    return (sweep._SeedArguments,) if name == "glue" else ()


@pytest.mark.parametrize("path", WORKLOADS, ids=ids)
def test_header_says_data_entropy_target_cost_command_and_expectation(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    command = f"# Command: hf-soo {COMMANDS[TASKS[path.stem]]} --config configs/workloads/{path.stem}.yaml\n"
    for word in (command, "ntropy of ", "Learnt: ", "Cost: ", " on one CPU core", "Expected", "reproduced here: "):
        assert word in header[0], word

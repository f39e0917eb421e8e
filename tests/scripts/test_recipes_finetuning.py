"""Every workload and every optimizer of GLUE's and SQuAD's recipes starts: reduced, it takes two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.squad_data import colour_questions, save_model, write
from tests.scripts.script_runs import ROOT, load_script
from tests.tasks.glue_cases import make_model, write_archive

# each workload with AdamW, and one with MKOR; every combination is parsed and built in the scripts' own tests
GLUE, SQUAD = (
    [*sorted(folder.glob("*_adamw.yaml")), folder / "bert_base_mkor.yaml"]
    for folder in (ROOT / "configs" / "glue", ROOT / "configs" / "squad")
)
HERE = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]
QUICK = ["--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"]
STEPS = [*HERE, *QUICK, "--do_train", "true", "--dataloader_pin_memory", "false", "--per_device_train_batch_size", "8"]


def fill(root: Path) -> Path:
    """Tiny models, GLUE's archive and SQuAD's files in a folder."""
    make_model(root / "glue_model")
    write_archive(root / "glue", train=16, dev=4)
    save_model(root / "squad_model")
    for part, count in (("train", 16), ("dev", 4)):
        write(root / f"{part}.json", colour_questions(count, seed=0, words=24))
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("recipes"))


def finished(folder: Path) -> list[tuple[str, int]]:
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [(run["status"], run["steps"]) for run in runs]


@pytest.mark.parametrize("config", GLUE, ids=lambda path: path.stem)
def test_glue_takes_two_steps(config: Path, world: Path, tmp_path: Path) -> None:
    places = ["--model_name_or_path", str(world / "glue_model"), "--data_dir", str(world / "glue")]
    out = ["--output_dir", str(tmp_path), "--results_dir", str(tmp_path / "runs")]
    flags = ["--config", str(config), *places, *out, *STEPS, "--task_name", "mrpc", "stsb", "--max_seq_length", "24"]
    assert load_script("run_glue").main(flags) == 0
    assert finished(tmp_path / "runs") == [("completed", 2)] * 2


@pytest.mark.parametrize("config", SQUAD, ids=lambda path: path.stem)
def test_squad_takes_two_steps(config: Path, world: Path, tmp_path: Path) -> None:
    files = ["--train_file", str(world / "train.json"), "--validation_file", str(world / "dev.json")]
    places = ["--model_name_or_path", str(world / "squad_model"), *files]
    out = ["--output_dir", str(tmp_path), "--results_dir", str(tmp_path / "runs")]
    lengths = ["--max_seq_length", "24", "--doc_stride", "4", "--max_query_length", "8"]
    assert load_script("run_squad").main(["--config", str(config), *places, *out, *STEPS, *lengths]) == 0
    assert finished(tmp_path / "runs") == [("completed", 2)]

"""`run_glue.py --lora_r`: adapters and head are trained, checkpoints go on, whole weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_soo.glue.command import main
from tests.scripts.script_runs import check_error, only_run
from tests.tasks.glue_cases import make_model, write_archive, write_tests

COMMON = [
    "--task_name", "mrpc", "--optim", "mkor", "--base_optim", "adamw", "--learning_rate", "0.02",
    "--max_seq_length", "24", "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "16",
    "--logging_steps", "1",
    "--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "no", "--report_to", "none",
    "--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--seed", "3",
]  # fmt: skip
LORA = ["--lora_r", "4", "--lora_alpha", "8", "--lora_targets", "query", "value"]

RATE = ["--learning_rate", "0.05"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    make_model(root / "tiny")
    write_tests(write_archive(root / "glue"))
    return root


def run(world: Path, out: Path, *flags: str, steps: int = 6) -> dict[str, Any]:
    places = ["--model_name_or_path", str(world / "tiny"), "--data_dir", str(world / "glue"), "--output_dir", str(out)]
    assert main([*places, *COMMON, *flags, "--max_steps", str(steps)]) == 0
    return only_run(out / "runs")


def losses(record: dict[str, Any]) -> list[float]:
    return [point["train_loss"] for point in record["curve"]]


def predictions(folder: Path) -> str:
    return (folder / "predictions" / "MRPC.tsv").read_text()


def test_adapters_are_trained_resumed_and_merged(world: Path, tmp_path: Path) -> None:
    """Also predicts: with the adapters, and with the whole weights that were kept, the same."""
    record = run(world, tmp_path / "out", *LORA, "--do_train", "--do_eval", "--do_predict", *RATE, steps=60)
    assert record["config"]["model"]["lora"] == {"r": 4, "alpha": 8, "targets": ["query", "value"]}
    # the first word says the label: chance is ln 2 and 0.5
    assert record["curve"][-1]["train_loss"] < 0.3 and record["final"]["accuracy"] >= 0.7
    kept, began = load_file(tmp_path / "out" / "model.safetensors"), load_file(world / "tiny" / "model.safetensors")
    assert not [name for name in kept if "lora" in name or "base_layer" in name] and "classifier.weight" in kept
    moved = {name for name, value in began.items() if not torch.equal(value, kept[f"bert.{name}"])}
    assert moved == {f"encoder.layer.0.attention.self.{each}.weight" for each in ("query", "value")}
    checkpoint = tmp_path / "out" / "checkpoint-60"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    adapters = load_file(checkpoint / "adapter_model.safetensors")
    assert {tuple(value.shape) for name, value in adapters.items() if "lora_A" in name} == {(4, 16)}
    again = ["--model_name_or_path", str(tmp_path / "out"), "--do_predict", "--output_dir", str(tmp_path / "again")]
    assert main([*COMMON, "--data_dir", str(world / "glue"), *again]) == 0
    assert predictions(tmp_path / "again") == predictions(tmp_path / "out")


def test_a_resumed_run_is_the_same_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    first = run(world, tmp_path / "first", *LORA)
    run(world, tmp_path / "resumed", *LORA, steps=3)
    (only,) = (tmp_path / "resumed" / "runs").glob("*.json")
    only.unlink()
    assert losses(run(world, tmp_path / "resumed", *LORA)) == losses(first) and len(losses(first)) == 6
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "resumed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_average_is_kept_where_it_is_what_was_evaluated(world: Path, tmp_path: Path) -> None:
    flags = [*LORA, "--base_optim_args", "ema_decay=0.5", "--do_eval", "true", *RATE]
    record = run(world, tmp_path / "out", "--do_train", "true", *flags)
    kept = ["--model_name_or_path", str(tmp_path / "out"), "--data_dir", str(world / "glue")]
    assert main([*COMMON, *kept, "--do_eval", "--output_dir", str(tmp_path / "again")]) == 0
    found = only_run(tmp_path / "again" / "runs")["final"]["eval_loss"]
    assert found == pytest.approx(record["final"]["eval_loss"], abs=1e-5)  # merged: another order of the same sums


def test_all_linear_layers(world: Path, tmp_path: Path) -> None:
    record = run(world, tmp_path, "--lora_r", "2", "--lora_targets", "all-linear", "--save_strategy", "no", steps=1)
    whole = run(world, tmp_path / "whole", "--save_strategy", "no", steps=1)
    # rank 2: 2 (in + out) numbers for each of 5 layers of 16 x 16 (the pooler too) and 2 of 16 x 32; and a second head
    assert record["parameters"] - whole["parameters"] == 2 * (5 * 32 + 2 * 48) + (2 * 16 + 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "0"], "lora_r=0 is not allowed; give a whole number >= 1"),
        (["--lora_alpha", "2"], "lora_alpha=2 without lora_r"),
        (["--lora_targets", "query"], "lora_targets=['query'] without lora_r"),
        (["--lora_r", "2", "--lora_alpha", "-1"], "lora_alpha=-1 is not allowed; give a whole number >= 1"),
        (["--lora_r", "2", "--lora_targets", "x"], "lora_targets=['x'] with a BertForSequenceClassification: "),
    ],
)
def test_refusals(
    flags: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--model_name_or_path", str(world / "tiny"), "--data_dir", str(world / "glue")]
    assert main([*places, *COMMON, "--output_dir", str(tmp_path), *flags]) == 1
    check_error(capsys, message)

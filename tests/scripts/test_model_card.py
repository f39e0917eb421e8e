"""The commands leave a model card with their results beside the model, and push it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import trainer as trainer_module

from hf_soo.domains import main as pretrain
from hf_soo.glue.command import main as glue
from tests.scripts.launch_runs import TINY
from tests.scripts.script_runs import only_run, prepare_corpus
from tests.tasks.glue_cases import make_model, write_archive
from tests.trainer.test_card import LocalHub, blocks

RUN = ["--optim", "mkor", "--learning_rate", "0.02", "--max_steps", "2", "--report_to", "none", "--use_cpu", "true"]


def test_a_run_leaves_its_card_where_it_leaves_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(prepare_corpus(tmp_path))
    flags = [*TINY, *RUN, "--data_dir", data, "--eval_strategy", "steps", "--eval_steps", "1"]
    words = ["/v/bin/python", "/v/bin/hf-soo", "pretrain", "--config", "mkor.yaml", "--data_dir", data]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert pretrain([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    run = only_run(tmp_path / "out" / "runs")
    assert " on the text.txt dataset.\n" in text
    for key, value in run["final"].items():
        assert f"- `{key}`: `{value:.6g}`\n" in text
    (_, settings), command, (_, shown) = blocks(text)
    assert command == ("bash", "hf-soo pretrain --config mkor.yaml --data_dir data")
    assert json.loads(settings)["optimizer"]["history"] == 32
    found = json.loads(shown)
    assert found.pop("curve") == [{k: v for k, v in point.items() if k != "health"} for point in run.pop("curve")]
    assert found == {key: value for key, value in run.items() if key not in ("workload", "method")}
    assert str(tmp_path) not in text
    assert pretrain([*flags, "--output_dir", str(tmp_path / "none"), "--save_strategy", "no"]) == 0
    assert not (tmp_path / "none" / "README.md").exists()


def test_what_is_pushed_has_the_results_and_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are merged in what is kept, and so in what is pushed."""
    monkeypatch.setattr(trainer_module, "hf_api", lambda: LocalHub(tmp_path / "hub"))
    places = ["--model_name_or_path", str(make_model(tmp_path / "tiny")), "--output_dir", str(tmp_path / "mine")]
    flags = ["--data_dir", str(write_archive(tmp_path / "glue")), "--task_name", "mrpc", "--max_seq_length", "24"]
    lora = ["--lora_r", "2", "--lora_targets", "query", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
    assert glue([*places, *flags, *RUN, *lora, "--push_to_hub", "true", "--hub_strategy", "end"]) == 0
    pushed = tmp_path / "hub" / "me" / "mine"
    card, run = ModelCard.load(pushed / "README.md"), only_run(pushed / "runs")
    assert card.data["hf_soo"]["optimizer"] == "mkor" and card.data.datasets == ["nyu-mll/glue"]
    (result,) = [each for each in card.data.eval_results if each.metric_type == "accuracy"]
    assert result.metric_value == run["final"]["accuracy"] and result.dataset_name == "GLUE MRPC"
    assert (pushed / "model.safetensors").is_file() and not list(pushed.glob("adapter_*"))

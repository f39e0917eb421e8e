"""Phase 2 after phase 1: the same weights and moments at step zero, a schedule and factors of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_soo.bert.previous_phase import PreviousPhase
from hf_soo.integrations.checkpoints import write_manifest
from tests.scripts.script_runs import check_error, load_script, only_run, prepare_corpus

MODEL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--dropout", "0"]
OTHER = ["--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
SAVING = ["--dataloader_pin_memory", "false", "--max_grad_norm", "0", "--save_strategy", "steps", "--save_steps", "2"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_bert")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("phases"))


@pytest.fixture(scope="module")
def phase_1(script: ModuleType, prepared: Path) -> Path:
    """Four steps of LAMB."""
    out = prepared.parent / "phase1"
    assert script.main(flags(prepared, out, "--optim", "lamb", "--max_steps", "4", "--learning_rate", "0.006")) == 0
    return out


def flags(prepared: Path, out: Path, *more: str) -> list[str]:
    return ["--data_dir", str(prepared), "--output_dir", str(out), *MODEL, *OTHER, *SAVING, *more]


def state(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("optim", ["lamb", "mkor"])
def test_weights_and_moments_go_on_and_the_steps_begin_anew(
    script: ModuleType, prepared: Path, phase_1: Path, tmp_path: Path, optim: str
) -> None:
    """With a learning rate of 0 the weights stand still, and the moments decay as the recipe says."""
    more = ["--optim", optim, "--previous_phase", str(phase_1), "--learning_rate", "0", "--max_steps", "2"]
    assert script.main(flags(prepared, tmp_path / "out", *more)) == 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    before, after = (load_file(folder / "model.safetensors") for folder in (phase_1 / "checkpoint-4", checkpoint))
    assert all(torch.equal(before[name], after[name]) for name in before) and set(before) == set(after)
    old, new = state(phase_1 / "checkpoint-4"), state(checkpoint)
    assert {float(entry["step"]) for entry in old["state"].values()} == {4.0}
    assert {float(entry["step"]) for entry in new["state"].values()} == {2.0}
    assert [group["lr"] for group in new["param_groups"]] == [0.0, 0.0]
    for number, entry in old["state"].items():
        left = entry["exp_avg_sq"] * 0.999**2  # two decays, and what two squared gradients added
        assert bool((new["state"][number]["exp_avg_sq"] >= left * (1 - 1e-5)).all())
        assert float(left.sum()) > 0 or float(entry["exp_avg_sq"].sum()) == 0
    (run,) = (json.loads(file.read_text()) for file in (tmp_path / "out" / "runs").glob("*.json"))
    assert run["config"]["previous_phase"] == {"steps": 4, "base": "Lamb"} and run["config"]["moments"] == "kept"


@pytest.mark.parametrize("gone", [False, True])
def test_an_interrupted_phase_2_resumes_from_its_own_checkpoint(
    script: ModuleType,
    prepared: Path,
    phase_1: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    gone: bool,
) -> None:
    """Also where phase 1 has been deleted meanwhile; it cannot begin anew then."""
    before = shutil.copytree(phase_1, tmp_path / "phase1")
    more = ["--optim", "mkor", "--previous_phase", str(before), "--learning_rate", "0.01", "--max_steps", "4"]
    given = flags(prepared, tmp_path / "out", *more)
    assert script.main(given) == 0
    whole, run = state(tmp_path / "out" / "checkpoint-4"), only_run(tmp_path / "out" / "runs")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    shutil.rmtree(tmp_path / "out" / "runs")
    if gone:
        shutil.rmtree(before)
    assert script.main(given) == 0
    again = state(tmp_path / "out" / "checkpoint-4")
    for number, entry in whole["state"].items():
        assert all(torch.equal(entry[key], again["state"][number][key]) for key in entry)
    assert only_run(tmp_path / "out" / "runs")["config"] == run["config"]
    if gone:
        assert script.main([*given, "--restart"]) == 1
        check_error(capsys, "this run can be resumed, and not begin anew; drop --restart")
        assert (tmp_path / "out" / "checkpoint-4").is_dir()
        assert script.main([*given, "--do_eval", "true"]) == 1  # evaluation alone is of phase 1's weights
        check_error(capsys, "is no whole checkpoint")


def test_another_base_starts_fresh_and_says_so(
    script: ModuleType, prepared: Path, phase_1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["--optim", "adamw", "--previous_phase", str(phase_1), "--learning_rate", "0.001", "--max_steps", "1"]
    assert script.main(flags(prepared, tmp_path / "out", *more)) == 0
    assert "the moments of AdamW start fresh" in caplog.text and "has those of Lamb" in caplog.text
    (run,) = (json.loads(file.read_text()) for file in (tmp_path / "out" / "runs").glob("*.json"))
    assert run["config"]["moments"] == "fresh"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_name_or_path", "elsewhere"], "give one: weights alone, or weights and moments"),
        (["--optim", "adafactor"], "transformers' own and cannot take moments over"),
        (["--compare_with", "adafactor"], "transformers' own and cannot take moments over"),
        (["--output_dir", "{phase_1}"], "is this run's output_dir"),
        (["--output_dir", "{phase_1}", "--previous_phase", "{phase_1}/checkpoint-4"], "is this run's output_dir"),
    ],
)
def test_refused(
    script: ModuleType,
    prepared: Path,
    phase_1: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    given = flags(prepared, tmp_path / "out", "--optim", "lamb", "--previous_phase", str(phase_1))
    assert script.main([*given, *(flag.format(phase_1=phase_1) for flag in more)]) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out").exists() and (phase_1 / "checkpoint-4").is_dir()


def test_a_comparison_says_of_each_run_which_moments_it_has(
    script: ModuleType, prepared: Path, phase_1: Path, tmp_path: Path
) -> None:
    more = ["--optim", "adamw", "--previous_phase", str(phase_1), "--compare_with", "lamb", "--max_steps", "1"]
    assert script.main(flags(prepared, tmp_path, *more)) == 0
    runs = {run["optimizer"]: run for run in (json.loads(file.read_text()) for file in (tmp_path / "runs").iterdir())}
    assert {name: run["config"]["moments"] for name, run in runs.items()} == {"adamw": "fresh", "lamb": "kept"}


def test_a_phase_1_that_has_not_ended_is_taken_only_where_it_is_asked_for(phase_1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(phase_1, tmp_path / "phase1")
    assert PreviousPhase.find(str(folder)).steps == 4
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-2 is the newest .* has not ended \(2 of 4 steps\)"):
        PreviousPhase.find(str(folder))
    assert PreviousPhase.find(str(folder / "checkpoint-2")).steps == 2
    file = folder / "checkpoint-2" / "trainer_state.json"
    stopped = json.loads(file.read_text())
    stopped["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] = True  # at a target
    file.write_text(json.dumps(stopped))
    write_manifest(file.parent, "whole", 2, hashed=True)
    assert PreviousPhase.find(str(folder)).steps == 2
    file.write_text(json.dumps(stopped | {"log_history": [{"loss": float("nan"), "step": 2}]}))
    write_manifest(file.parent, "whole", 2, hashed=True)
    with pytest.raises(ValueError, match=r"the loss of .*checkpoint-2 is not finite"):
        PreviousPhase.find(str(folder / "checkpoint-2"))


def test_weights_in_pieces_are_refused(phase_1: Path, tmp_path: Path) -> None:
    """As FSDP2 and ZeRO-3 write them unless they are told otherwise."""
    folder = shutil.copytree(phase_1 / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    write_manifest(folder, "fsdp2", 4, hashed=True)
    with pytest.raises(ValueError, match=r"checkpoint-4 has no whole weights .* FULL_STATE_DICT"):
        PreviousPhase.find(str(folder))


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no whole checkpoint .* and holds none"):
        PreviousPhase.find(str(tmp_path))

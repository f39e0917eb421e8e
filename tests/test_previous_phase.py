"""Phase 2 after phase 1: the same weights and moments at step zero, a schedule and factors of its own."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_soo.experiments.previous_phase import find_phase
from hf_soo.tasks.pretraining_data import PrepareConfig, prepare
from tests.script_runs import check_error, load_script

MODEL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--dropout", "0"]
OTHER = ["--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
SAVING = ["--dataloader_pin_memory", "false", "--max_grad_norm", "0", "--save_strategy", "steps", "--save_steps", "2"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_bert")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 documents of 6 sentences."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abdeilmnorst", k=5)) for _ in range(60)]
    documents = ["\n".join(f"The {' '.join(chance.choices(words, k=6))}." for _ in range(6)) for _ in range(24)]
    root = tmp_path_factory.mktemp("phases")
    (root / "text.txt").write_text("\n\n".join(documents) + "\n")
    prepare(
        PrepareConfig(str(root / "text.txt"), str(root / "data"), vocab_size=110, max_seq_length=32, eval_documents=0.2)
    )
    return root / "data"


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


def test_an_interrupted_phase_2_resumes_from_its_own_checkpoint(
    script: ModuleType, prepared: Path, phase_1: Path, tmp_path: Path
) -> None:
    more = ["--optim", "mkor", "--previous_phase", str(phase_1), "--learning_rate", "0.01", "--max_steps", "4"]
    assert script.main(flags(prepared, tmp_path / "out", *more)) == 0
    whole = state(tmp_path / "out" / "checkpoint-4")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    shutil.rmtree(tmp_path / "out" / "runs")
    assert script.main(flags(prepared, tmp_path / "out", *more)) == 0
    again = state(tmp_path / "out" / "checkpoint-4")
    for number, entry in whole["state"].items():
        assert all(torch.equal(entry[key], again["state"][number][key]) for key in entry)


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
    given = flags(prepared, tmp_path / "out", "--optim", "lamb", "--previous_phase", str(phase_1), *more)
    assert script.main(given) == 1
    check_error(capsys, message)


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no whole checkpoint .* and holds none"):
        find_phase(str(tmp_path))

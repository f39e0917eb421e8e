"""scripts/run_vision.py: a whole run in a process of its own, resume, comparison, and every way to be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from hf_soo.runs.record import read_run
from tests.scripts.launch_runs import run_script
from tests.scripts.script_runs import check_error, load_script, only_run

KEYS = [
    "name", "kind", "workload", "method", "optimizer", "base", "config", "seed", "status", "device", "versions",
    "arithmetic", "commit", "code", "parameters", "steps", "seconds", "curve", "final", "target", "peak_memory_bytes",
    "health", "routing", "search",
]  # fmt: skip
CONFIG = """
optim: mkor
base_optim: adamw
learning_rate: 0.002
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
max_train_samples: 64
max_eval_samples: 50
max_steps: 6
per_device_train_batch_size: 16
eval_strategy: steps
eval_steps: 2
logging_steps: 2
save_strategy: steps
save_steps: 4
lr_scheduler_type: cosine
report_to: none
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("run_vision")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]


def points(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(point.get(key) for key in ("step", "train_loss", "eval_loss", "accuracy")) for point in run["curve"]]


def test_a_run_from_the_shell(flags: list[str], tmp_path: Path) -> None:
    """YAML and a flag over it; one JSON with the fixed keys, a table with the accuracy."""
    done = run_script("scripts/run_vision.py", *flags, "--learning_rate", "0.004")
    run = only_run(tmp_path / "out" / "runs")
    assert list(run) == KEYS
    assert (run["name"], run["status"], run["optimizer"], run["base"]) == (
        "mkor-adamw-lr0.004", "completed", "mkor", "adamw",
    )  # fmt: skip
    assert run["kind"] == "vision" and run["method"]["base"] == "adamw" and run["workload"]["seed"] == run["seed"]
    assert [step for step, *_ in points(run)] == [2, 4, 6] and run["steps"] == 6
    health = [point["health"] for point in run["curve"]]
    assert health[-1] == run["health"] and len({row["cos_median"] for row in health}) == 3
    assert 0 < health[0]["distance_median"] < health[0]["distance_max"]  # |F - I|
    assert run["routing"]["mkor -> AdamW"]["parameters"] > 4
    assert all(1 <= len(said["first"]) <= min(2, said["parameters"]) for said in run["routing"].values())
    assert run["final"].keys() == {"train_loss", "eval_loss", "accuracy"}
    assert (run["final"]["eval_loss"], run["final"]["accuracy"]) == points(run)[-1][2:]
    assert 2.0 < run["final"]["eval_loss"] < 2.6 and run["final"]["accuracy"] * 50 == pytest.approx(
        round(run["final"]["accuracy"] * 50)
    )
    assert run["config"]["model"] == {
        "type": "vit", "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "dropout": 0.0,
    }  # fmt: skip
    data = run["config"]["data"]
    assert (data["dataset"], data["train_examples"], data["eval_examples"]) == ("digits", 64, 50)
    assert (run["config"]["learning_rate"], run["config"]["lr_scheduler_type"]) == (0.004, "cosine")
    assert f"| mkor | adamw | 0.004 | {run['final']['eval_loss']:.3f} | {run['final']['accuracy']:.3f} |" in done.stdout
    assert str(tmp_path) not in json.dumps(run)
    assert read_run(next((tmp_path / "out" / "runs").glob("*.json"))).steps == 6


def test_resume_equals_undisturbed(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(flags) == 0
    whole = only_run(out / "runs")
    weights = (out / "checkpoint-6" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-6")  # as if it had been killed between 4 and 6
    shutil.rmtree(out / "runs")
    assert script.main(flags) == 0
    resumed = only_run(out / "runs")
    assert points(resumed) == points(whole)
    assert resumed["final"] == whole["final"]
    assert (out / "checkpoint-6" / "model.safetensors").read_bytes() == weights
    assert script.main(flags) == 0  # finished: nothing is trained, and the JSON stays as it is
    assert only_run(out / "runs") == resumed


def test_a_resume_that_evaluates_no_more_keeps_the_metrics(
    script: ModuleType, flags: list[str], tmp_path: Path
) -> None:
    """The last evaluation lies before the checkpoint: its accuracy comes from there, like its loss."""
    assert script.main([*flags, "--max_steps", "4"]) == 0
    first = only_run(tmp_path / "out" / "runs")
    assert script.main([*flags, "--max_steps", "5", "--eval_strategy", "no"]) == 0
    run = only_run(tmp_path / "out" / "runs")
    assert points(run)[:2] == points(first) and points(run)[-1][0] == 5
    assert run["final"]["accuracy"] == points(run)[-1][3] is not None


def test_accumulation_does_not_change_the_loss_of_either_model(
    script: ModuleType, flags: list[str], tmp_path: Path
) -> None:
    resnet = ["--config", str(tmp_path / "resnet.yaml"), "--output_dir", str(tmp_path / "out")]
    text = CONFIG.replace("hidden_size: 16\nnum_hidden_layers: 1\nnum_attention_heads: 2\n", "model: resnet\n")
    (tmp_path / "resnet.yaml").write_text(text)
    for name, given in (("vit", flags), ("resnet", resnet)):
        for size, steps in ((16, 1), (8, 2)):
            halves = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]
            more = ["--max_steps", "1", "--logging_steps", "1", "--restart", "--name", f"{name}{steps}"]
            assert script.main([*given, *halves, *more]) == 0
    one, two, three, four = (
        read_run(tmp_path / "out" / "runs" / f"{name}.json").final["train_loss"]
        for name in ("vit1", "vit2", "resnet1", "resnet2")
    )
    assert one == pytest.approx(two, rel=1e-5)
    assert three == pytest.approx(four, rel=0.2)  # batch norm sees other batches; twice as large would be wrong


def test_comparison(script: ModuleType, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*flags, "--compare_with", "sgd", "--compare_learning_rate", "0.1"]) == 0
    runs = tmp_path / "out" / "runs"
    mkor, sgd = (json.loads((runs / f"{name}.json").read_text()) for name in ("mkor-adamw-lr0.002", "sgd-lr0.1"))
    assert mkor["config"]["initial_weights"] == sgd["config"]["initial_weights"]
    assert points(mkor)[0] != points(sgd)[0]
    assert sgd["target"]["eval_loss"] == sgd["final"]["eval_loss"]
    assert "wrote" in capsys.readouterr().out and (tmp_path / "out" / "comparison.png").is_file()


def test_a_folder_of_images(
    script: ModuleType, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    photos = tmp_path / "photos"
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (photos / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (8 + index, 8), colour).save(photos / name / f"{index}.png")
    more = ["--dataset", str(photos), "--image_size", "8", "--learning_rate", "0.02", "--max_steps", "12"]
    assert script.main([*flags, *more, "--save_strategy", "no"]) == 0
    run = only_run(tmp_path / "out" / "runs")
    assert run["final"]["accuracy"] == 1.0 and run["final"]["eval_loss"] < 0.3
    assert (run["config"]["data"]["dataset"], run["config"]["data"]["shape"]) == ("photos", [3, 8, 8])
    (photos / "red" / "5.png").write_text("no image")
    assert script.main([*flags, *more, "--restart"]) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--patchsize", "2"], "unknown flag '--patchsize'; did you mean '--patch_size'?"),
        (["--hidden_sizes", "8", "8"], "hidden_sizes=[8, 8] has no effect with model='vit'"),
        (["--patch_size", "3"], "patch_size=3 does not divide image_size=8"),
        (["--optim", "mkr"], "mkr"),
        (["--optim_args", "update_perod=1"], "Did you mean 'update_period'?"),
        (["--dataset", "./absent"], "dataset='./absent' is no folder"),
        (
            ["--dataset", "owner/absent"],
            "dataset='owner/absent' is neither 'digits' nor a folder here, and cannot be loaded from the hub: ",
        ),
        (["--num_channels", "2"], "num_channels"),
        (["--config", "absent.yaml"], "No file 'absent.yaml', and no recipe of that name"),
    ],
)
def test_bad_input_is_one_line_and_no_run(
    script: ModuleType,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert script.main([*flags, *more]) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out" / "runs").exists()


def test_an_unknown_key_of_the_yaml(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("patch_sise: 2")
    assert script.main(["--config", str(tmp_path / "run.yaml")]) == 1
    check_error(capsys, "unknown key 'patch_sise'; did you mean 'patch_size'?")


def test_ctrl_c_says_how_to_go_on(
    script: ModuleType,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return step(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        assert script.main(flags) == 130
    assert "stopped; the same command goes on from the last checkpoint" in capsys.readouterr().err
    stopped = only_run(tmp_path / "out" / "runs")
    assert (stopped["status"], stopped["steps"]) == ("stopped", 5)
    assert script.main(flags) == 0
    assert only_run(tmp_path / "out" / "runs")["status"] == "completed"


def test_help_is_grouped(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and "[--config FILE.yaml] [--flag value ...]\n" in text.splitlines(True)[0]
    places = [text.index(f"\n{group}:") for group in ("model", "data", "run")]
    assert places == sorted(places) and "    accelerate launch -m hf_soo.vision --config" in text

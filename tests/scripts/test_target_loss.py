"""--target_eval_loss stops a run at the loss, keeps its checkpoint, and does not train it on."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import ANY

import pytest

from hf_soo.runs.record import reach
from tests.scripts.launch_runs import TINY
from tests.scripts.script_runs import load_script, prepare_corpus

RUN = [
    *TINY, "--dropout", "0", "--optim", "mkor", "--learning_rate", "0.02", "--max_steps", "6", "--eval_strategy",
    "steps", "--eval_steps", "2", "--logging_steps", "2", "--save_strategy", "steps", "--save_steps", "5",
    "--report_to", "none", "--use_cpu", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_bert")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*RUN, "--data_dir", str(prepare_corpus(tmp_path_factory.mktemp("text")))]


def run_of(folder: Path, name: str) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((folder / "runs" / f"{name}.json").read_text())
    return run


def at(run: dict[str, Any], step: int) -> float:
    (loss,) = [point["eval_loss"] for point in run["curve"] if point["step"] == step]
    return float(loss)


def test_a_run_stops_at_its_target_and_is_then_finished(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    compare = ["--compare_with", "lamb", "--compare_learning_rate", "0.01"]
    assert script.main([*flags, *compare, "--output_dir", str(tmp_path / "whole")]) == 0
    whole, lamb = (run_of(tmp_path / "whole", name) for name in ("mkor-lamb-lr0.02", "lamb-lr0.01"))
    assert whole["target"] == reach(whole["curve"], lamb["final"]["eval_loss"])  # to the other's loss, nobody stopped
    target = (at(whole, 2) + at(whole, 4)) / 2
    out = tmp_path / "out"
    stopping = [*flags, *compare, "--output_dir", str(out), "--target_eval_loss", str(target)]
    assert script.main(stopping) == 0
    mkor, other = run_of(out, "mkor-lamb-lr0.02"), run_of(out, "lamb-lr0.01")
    assert (mkor["status"], mkor["steps"], at(mkor, 4)) == ("completed", 4, at(whole, 4))
    assert mkor["target"]["steps"] == pytest.approx(3.0) and mkor["target"]["stopped"] is True
    assert mkor["curve"][0]["seconds"] < mkor["target"]["seconds"] < mkor["seconds"]
    # the reference goes on to its end, whether or not it gets there
    assert (other["status"], other["steps"]) == ("completed", 6)
    assert other["target"] == reach(other["curve"], target)
    assert [path.name for path in sorted((out / "1-mkor").glob("checkpoint-*"))] == ["checkpoint-4"]

    assert script.main(stopping) == 0
    assert run_of(out, "mkor-lamb-lr0.02") == mkor
    assert script.main([*stopping, "--target_eval_loss", "99"]) == 0  # a higher one: nothing is trained for it either
    higher = run_of(out, "mkor-lamb-lr0.02")
    assert higher == mkor | {"target": {"eval_loss": 99.0, "steps": 2.0, "seconds": ANY, "stopped": True}}
    assert script.main([*stopping, "--target_eval_loss", "0.1"]) == 0  # a lower one: it goes on, and never gets there
    longer = run_of(out, "mkor-lamb-lr0.02")
    assert longer["steps"] == 6 and [at(longer, k) for k in (2, 4, 6)] == [at(whole, k) for k in (2, 4, 6)]
    assert longer["target"] == {"eval_loss": 0.1, "steps": None, "seconds": None, "stopped": False}


def test_nothing_is_kept_where_nothing_was_to_be_kept(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    keep = ["--save_strategy", "no", "--output_dir", str(tmp_path), "--target_eval_loss", "99"]
    assert script.main([*flags, *keep]) == 0
    run = run_of(tmp_path, "mkor-lamb-lr0.02")
    assert (run["steps"], run["target"]["steps"], run["target"]["stopped"]) == (2, 2.0, True)
    assert not list(tmp_path.glob("checkpoint-*"))

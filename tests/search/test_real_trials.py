"""Trials that really train: a kill, a resume, and the command line of the JSON give the same losses to the last bit."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_soo import cli
from hf_soo.runs.record import RunRecord, read_run

ROOT = Path(__file__).resolve().parents[2]
WORKLOAD = f"""
extends: {ROOT / "configs" / "workloads" / "byte_gpt_embedded.yaml"}
hidden_size: 64
num_hidden_layers: 1
window: 32
max_eval_samples: 32
max_steps: 40
eval_steps: 10
save_steps: 10
"""
SPACE = """
optim: mkor
base_optim: muon
optim_args: {update_period: 2}
base_optim_args: {ns_dtype: float32}
space:
  learning_rate: {log_uniform: [0.0001, 0.1], grid: [0.02, 0.0001]}
"""
"""The trial that is killed comes after the other then, and must be the better one for the stopping rule: each version
of Python has another text, and larger rates are too close on it."""


def worker(folder: Path) -> subprocess.Popen[bytes]:
    flags = [str(folder / "mkor.yaml"), "--workload", str(folder / "tiny.yaml"), "--trials", "2"]
    command = [sys.executable, "-m", "hf_soo.cli", "search", *flags, "--results", str(folder / "results")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def losses(run: RunRecord) -> list[tuple[int, float]]:
    return [(point["step"], point["eval_loss"]) for point in run.curve if point["eval_loss"] is not None]


def wait_for(folder: Path, pattern: str) -> None:
    for _ in range(600):
        if list(folder.glob(pattern)):
            return
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in {folder}")


@pytest.mark.slow
def test_killed_resumed_and_rerun_by_hand_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(WORKLOAD)
    (tmp_path / "mkor.yaml").write_text(SPACE)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = worker(tmp_path)
        wait_for(tmp_path / "results" / ".search" / "runs" / "tiny", "*000*/checkpoint-*")
        process.send_signal(number)
        process.communicate(timeout=120)
        time.sleep(2.0)
        assert not list((tmp_path / "results" / "tiny").glob("*.json"))
    process = worker(tmp_path)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said.decode()
    found = {file.stem: read_run(file) for file in (tmp_path / "results" / "tiny").glob("*.json")}
    assert set(found) == {"mkor-wide-000-seed0", "mkor-wide-001-seed0"}
    killed = found["mkor-wide-000-seed0"]
    assert killed.status == "completed" and [step for step, _ in losses(killed)] == [10, 20, 30, 40]
    assert all("health" not in point for point in killed.curve) and killed.search["params"] == {"learning_rate": 0.02}

    monkeypatch.chdir(tmp_path)
    program, *command = shlex.split(killed.search["command"])
    assert program == "hf-soo" and cli.main([*command, "--output_dir", "by_hand"]) == 0
    (by_hand,) = (tmp_path / "by_hand" / "runs").glob("*.json")
    assert losses(read_run(by_hand)) == losses(killed)
    assert not list((tmp_path / "results" / ".search" / "runs" / "tiny").iterdir()), "checkpoints are removed"

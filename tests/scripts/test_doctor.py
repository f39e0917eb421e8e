"""hf-soo doctor: what works here, by steps that were taken; what fails says why, and ends nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hf_soo import doctor
from tests.scripts.script_runs import ROOT

REPORT: dict[str, Any] = {
    "platform": "Linux", "versions": {"python": "3.11.2", "hf-soo": "1.0", "torch": "2.13.0"}, "commit": "abc",
    "missing": {"": ["datasets<6,>=5 (here 4.0)"], "search": ["optuna"]}, "device": "CPU, 2 threads", "cores": 4,
    "gpus": [], "memory_bytes": 8e9, "free_memory_bytes": 1.5e9, "bf16_speed": 0.04,
    "tries": {"fp32 on cpu": "", "DDP over nccl": "torch sees no GPU"},
}  # fmt: skip


def test_a_report_to_read() -> None:
    assert doctor.text(REPORT).splitlines() == [
        "hf_soo 1.0 at commit abc, Python 3.11.2, Linux",
        "torch 2.13.0",
        "not here: datasets<6,>=5 (here 4.0), for every command (pip install 'hf-soo')",
        "not here: optuna, for hf-soo search (pip install 'hf-soo[search]')",
        "CPU, 2 threads of 4 cores; GPUs: none",
        "memory: 1.5 of 8.0 GB are free",
        "bf16 is not fast on this CPU: a product takes 25 of its time in fp32; leave --bf16 out here",
        "works  fp32 on cpu",
        "no     DDP over nccl: torch sees no GPU",
    ]
    other = doctor.text({**REPORT, "commit": None, "memory_bytes": None, "gpus": ["H"], "bf16_speed": 2.0})
    assert "hf_soo 1.0, Python" in other and "GPUs: H\nbf16 is fast on this CPU: a product takes 0.5 of" in other


def test_what_is_missing_is_named_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=2.0", "datasets<1,>=0.5", 'optuna-none; extra == "search"', 'hf-soo[search]; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda name: [*wanted, 'pytest-none; extra == "test"'])
    here = metadata.version("datasets")
    versions, missing = doctor._packages()
    assert missing == {"": [f"datasets<1,>=0.5 (here {here})"], "search": ["optuna-none"]}
    assert versions == {"numpy": metadata.version("numpy"), "datasets": here}

    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert doctor._packages() == ({}, {})


def test_every_extra_of_a_user_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    assert set(extras) - {"test", "docs", "dev", "all"} == set(doctor._EXTRAS) - {""}


def test_every_try_is_answered(tmp_path: Path) -> None:
    """In a folder with a name of its own, after three tries that crash, hang and fail."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.scripts.doctor_tries", "reports/doctor.json"], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *shown = done.stdout.splitlines()
    assert json.loads(head) == ["the process ended with -9", "RuntimeError: no kernel at all", "no answer after 2 s"]
    report = json.loads((folder / "reports" / "doctor.json").read_text())
    assert report["tries"].pop("DDP over nccl") == "torch sees no GPU"
    assert report["tries"] == dict.fromkeys([
        "fp32 on cpu", "bf16 autocast on cpu", "fp16 autocast on cpu", "DDP over gloo", "FSDP2 over gloo",
        "ZeRO-2 over gloo", "writing in this folder", "locks in it, which keep a second run out of an output_dir",
    ], "")  # fmt: skip
    assert report["memory_bytes"] > report["free_memory_bytes"] > 0 and report["bf16_speed"] > 0
    assert "works  FSDP2 over gloo" in shown and "no     DDP over nccl: torch sees no GPU" in shown
    assert str(tmp_path) not in json.dumps(report) and [path.name for path in folder.iterdir()] == ["reports"]

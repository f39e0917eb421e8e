"""A small search: its files, and what is left of it when workers have been at it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hf_soo.runs.record import RunRecord, read_run
from hf_soo.search.spaces import Space
from hf_soo.search.stages import Stage
from tests.search.stand_in import STEPS

STAND_IN = (sys.executable, "-m", "tests.search.stand_in")
SPACE = """
optim: sgd
space:
  learning_rate: {log_uniform: [0.005, 0.16], grid: [0.02, 0.04, 0.01, 0.08, 0.005, 0.16]}
"""
QUEUE = """
jobs:
  - {workload: toy, space: sgd, stage: wide, trials: 6, whole: true}
  - {workload: toy, space: sgd, stage: confirm, trials: 2, seeds: [1, 2, 3, 4]}
"""


def files(folder: Path, space: str = SPACE, queue: str = QUEUE) -> Path:
    """The files of a search in a folder, and the folder of its results."""
    for name, text in {
        "workloads/toy.yaml": f"max_steps: {STEPS}\nheld_out: choose\n",
        "search/sgd.yaml": space,
        "search/all.queue.yaml": queue,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "results" / "toy").mkdir(parents=True, exist_ok=True)
    return folder / "results"


def stage(folder: Path, name: str = "wide", settings: int = 6, **more: Any) -> Stage:
    """A stage of the small search."""
    space = Space.read(folder / "search" / "sgd.yaml")
    return Stage(folder / "workloads" / "toy.yaml", space, name, settings, **more)


def runs(results: Path) -> dict[str, RunRecord]:
    """What there is, by name."""
    return {file.stem: read_run(file) for file in sorted((results / "toy").glob("*.json"))}


def starts(results: Path) -> Counter[str]:
    """How often each trial was started."""
    return Counter((results / "toy" / "starts.txt").read_text().split())

"""Queues: files of stages, most telling first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_soo.engine.checks import Count, Seed, require
from hf_soo.runs.recipes import read_recipe, unknown_name
from hf_soo.runs.shipped import find
from hf_soo.search.evidence import STAGES
from hf_soo.search.spaces import Space
from hf_soo.search.stages import Stage

_SETTINGS = {"wide": 24, "narrow": 12, "confirm": 2}
_SEEDS = {"wide": (0,), "narrow": (0,), "confirm": (1, 2, 3, 4)}
_JOB_KEYS = ("workload", "space", "stage", "trials", "seeds", "whole")


def make_stage(
    workload: str | Path, space: str | Path, name: str, trials: int | None, seeds: Sequence[int] | None, whole: bool
) -> Stage:
    """A stage with what is usual where nothing is said.

    Args:
        workload: its recipe, or its name.
        space: its file, or its name.
        name: "wide", "narrow" or "confirm".
        trials: settings to try.
        seeds: of each setting.
        whole: stop none.

    Raises:
        ValueError: numbers that cannot be, a workload that is not there, or a space that cannot be read.
    """
    require("trials", trials, Count | None)
    require("seeds", seeds, list[Seed] | None)
    require("whole", whole, bool)
    number = _SETTINGS[name] if trials is None else trials
    chosen = tuple(_SEEDS[name] if seeds is None else seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds={list(chosen)} must be given, each once.")
    (file,), (recipe,) = find([space], "search"), find([workload], "workloads")
    return Stage(recipe, Space.read(file), name, number, chosen, whole)


def read_queue(queue: str | Path) -> list[Stage]:
    """The stages of a queue's file; workloads and spaces are files as from its folder, or named.

    Args:
        queue: ``jobs: [{workload, space, stage, trials, seeds, whole}, ...]``, most telling first; or its name.

    Raises:
        ValueError: no such file, a job with unknown keys or without a workload and a space, or one that cannot be.
    """
    (file,) = find([queue], "search")
    jobs = read_recipe([file], known={"jobs": Any}).get("jobs")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise ValueError(f"{file}: no 'jobs'; give 'jobs: [{{workload: NAME, space: NAME, stage: wide}}]'.")
    return [_job(file, number, job) for number, job in enumerate(jobs, start=1)]


def _job(file: Path, number: int, job: dict[str, Any]) -> Stage:
    where = f"{file}, job {number}"
    for key in job:
        if key not in _JOB_KEYS:
            raise ValueError(f"{where}: {unknown_name('key', str(key), _JOB_KEYS)}")
    if missing := {"workload", "space"}.difference(job):
        raise ValueError(f"{where}: no {' and no '.join(sorted(missing))}.")
    name, trials, seeds = job.get("stage", "wide"), job.get("trials"), job.get("seeds")
    if name not in STAGES:
        raise ValueError(f"{where}: stage={name!r} is none of {', '.join(STAGES)}.")
    workload, space = (
        path if path.is_file() else text
        for text, folder in ((str(job["workload"]), "../workloads/"), (str(job["space"]), ""))
        for path in (file.parent / (text if text.endswith(".yaml") else f"{folder}{text}.yaml"),)
    )
    try:
        return make_stage(workload, space, name, trials, seeds, job.get("whole", False))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

"""A suite of benchmarks, job by job, in as many calls as it takes: ``hf-soo bench --suite gpu``.

Each job is a process of its own, which writes its JSON itself. ``RESULTS/suite_NAME.json`` says how each one ended,
written after each; the next call goes on with the others. A job that the call's end stopped is started again and keeps
the methods that it has measured; one that fails twice, or gets no further in a whole call, is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import hf_soo
from hf_soo import machine
from hf_soo.bench.jobs import SUITES, TINY, Job
from hf_soo.engine.checks import Checked, Positive
from hf_soo.files import jsonable, parse_json, write_atomically
from hf_soo.progress import Progress
from hf_soo.runs.arguments import option

_TRIES = 2
_LEAST = 60.0  # seconds of a call that a job is begun with, unless it is the first
_ROOT = Path(hf_soo.__file__).resolve().parents[1]  # of a clone, where the tests are
DONE, SOME_FAILED, MORE = 0, 1, 3
"""Exit codes: all is done; what failed twice is left; the same line again goes on."""


@dataclass
class SuiteConfig(Checked):
    """Many benchmarks in one line."""

    _argument_group_name = "suite"

    suite: Literal["cpu", "gpu"] | None = option(None, "Go through the jobs of hf_soo/bench/jobs.py.")
    results: str = option("results/bench", "Folder of its JSONs.")
    minutes: Positive = option(9.0, "Of one call: it ends before, and the same line goes on where it stopped.")
    scale: Literal["full", "tiny"] = option("full", "tiny: all jobs on a toy model on the CPU, to see that they run.")
    tensors_file: str | None = option(None, "--tensors of the jobs that pretrain.")


Launch = Callable[[list[str], float], tuple[int | None, str]]
"""(command's words, seconds) -> its exit code, None where it was stopped, and the end of what it said on stderr."""


def run_suite(config: SuiteConfig, launch: Launch | None = None) -> int:
    """Go through the jobs that are left.

    Args:
        config: which, and where their results go.
        launch: runs a command; None: in a process of its own.

    Returns:
        ``DONE``, ``SOME_FAILED`` or ``MORE``.

    Raises:
        ValueError: there is no GPU for the suite.
    """
    assert config.suite is not None
    device = torch.device("cuda" if config.suite == "gpu" and config.scale == "full" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("suite='gpu', but torch sees no GPU; --scale tiny runs all its jobs on the CPU.")
    folder, began = Path(config.results), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"suite_{config.suite}.json"
    known: dict[str, Any] = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    about = {"kind": "suite", "suite": config.suite, "scale": config.scale, "device": machine.device_name(device)}
    ended: dict[str, dict[str, Any]] = known.get("jobs", {})
    first, jobs = True, [job for job in SUITES[config.suite] if _is_here(job)]
    over = sum(_over(ended.get(job.name, {})) for job in jobs)
    bar = Progress(desc=f"suite {config.suite}", unit="job", total=len(jobs), initial=over)
    for job in jobs:
        if _over(ended.get(job.name, {})):
            continue
        left = 60 * config.minutes - (time.monotonic() - began)
        if left < _LEAST and not first:
            break
        Progress.write(f"{job.name}: {job.words}")
        ended[job.name] = _run(job, config, left, ended.get(job.name, {}), first, launch or _in_a_process)
        Progress.write(f"{job.name}: {ended[job.name]['status']} {ended[job.name]['said']}".rstrip())
        text = json.dumps(jsonable({**about, "versions": machine.versions(), "jobs": ended}), indent=1)
        write_atomically(path, text + "\n")
        first = False
        bar.update(_over(ended[job.name]))
    bar.close()
    states = [ended.get(job.name, {}) for job in jobs]
    if not all(map(_over, states)):
        print(f"{sum(not _over(state) for state in states)} of {len(states)} jobs are left; the same line goes on.")
        return MORE
    failed = [job.name for job, state in zip(jobs, states, strict=True) if state["status"] != "done"]
    print(f"{len(states)} jobs are over" + (f"; failed: {', '.join(failed)}." if failed else "."))
    return SOME_FAILED if failed else DONE


def _is_here(job: Job) -> bool:
    """Whether there is what it runs: a wheel has no tests."""
    words = shlex.split(job.words)
    if words[0] != "pytest" or (_ROOT / words[-1]).is_file():
        return True
    print(f"{job.name}: left out; {words[-1]} is in a clone of the project alone.")
    return False


def _over(state: dict[str, Any]) -> bool:
    """Whether a job is not begun again."""
    return state.get("status") == "done" or state.get("tries", 0) >= _TRIES


def _run(
    job: Job, config: SuiteConfig, left: float, before: dict[str, Any], first: bool, launch: Launch
) -> dict[str, Any]:
    """One try: how it ended."""
    file = Path(config.results) / f"{job.name}.json"
    was, began = _content(file), time.monotonic()
    code, said = launch(_words(job, config, file), left)
    further = _content(file) != was
    # what the call's end stopped before its time, or what got further, may be tried as often again
    tried = code is not None or (first and not further)
    return {
        "status": {0: "done", None: "stopped"}.get(code, "failed"),
        "tries": before.get("tries", 0) + tried,
        "seconds": before.get("seconds", 0.0) + time.monotonic() - began,
        "said": "" if code == 0 else said,
        "commit": machine.commit(),
    }


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def _words(job: Job, config: SuiteConfig, file: Path) -> list[str]:
    """The command of a job, with the place of its JSON; in a dry run with what makes it small."""
    words = shlex.split(job.words)
    command = words[0]
    if config.scale == "tiny":
        words += shlex.split(TINY[command])
        for flag, small in (("--width", "64"), ("--train_minutes", "0.01"), ("--vocabulary", "200")):
            words += [flag, small] if flag in words else []
    if "--train_minutes" in words:
        words += [] if config.tensors_file is None else ["--tensors", config.tensors_file]
    elif command == "bench":
        words += ["--resume", "true"]
    return words if command == "pytest" else [*words, "--json", str(file)]


def _in_a_process(words: list[str], seconds: float) -> tuple[int | None, str]:
    module = ["pytest"] if words[0] == "pytest" else ["hf_soo.cli", words[0]]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        command = [sys.executable, "-m", *module, *words[1:]]
        where = _ROOT if words[0] == "pytest" else None
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, cwd=where)
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # with the processes that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        return code, " ".join(errors.read().split())[-500:]

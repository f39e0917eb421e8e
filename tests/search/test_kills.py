"""Workers that are killed: no trial that ended is lost, none is repeated, and what was at work is taken up again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_soo.search.locks import StorageLock
from tests.search import cases

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
# each step takes .1 s, so that a trial is worth killing
SLOW = cases.SPACE.replace("optim: sgd", "optim: sgd\nwarmup_steps: 0.1")
SHORT = cases.SPACE.replace(", 0.08, 0.005, 0.16]", "]")  # three rates
SHORT_QUEUE = cases.QUEUE.replace("trials: 6", "trials: 3").replace("trials: 2", "trials: 1").replace(", 3, 4]", "]")


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.search.work", str(folder), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def losses(results: Path) -> dict[str, list[float]]:
    return {name: [point["eval_loss"] for point in run.curve] for name, run in cases.runs(results).items()}


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    whole = cases.files(tmp_path / "whole", SLOW)
    finish(start(tmp_path / "whole"))
    results, moments = cases.files(tmp_path / "killed", SLOW), random.Random(0)
    ended: dict[str, int] = {}
    for _ in range(KILLS):
        worker = start(tmp_path / "killed")
        time.sleep(moments.uniform(1.0, 8.0))
        worker.send_signal(moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        worker.communicate(timeout=60)
        time.sleep(1.0)  # the trial of a killed worker ends after its step
        now = {file.name: file.stat().st_mtime_ns for file in (results / "toy").glob("*.json")}
        assert ended.items() <= now.items(), "a trial was lost, or run again"
        ended = now
    finish(start(tmp_path / "killed"))
    assert losses(results) == losses(whole) and len(losses(whole)) == 14
    started = cases.starts(results)
    assert sum(started.values()) <= 14 + KILLS, "more starts than trials and kills"
    assert not list((results / "toy").glob("*partial*"))


def test_the_storage_is_made_again_from_the_jsons(tmp_path: Path) -> None:
    results = cases.files(tmp_path, SHORT, SHORT_QUEUE)
    finish(start(tmp_path))
    before = cases.starts(results)
    assert len(before) == 5 and set(before.values()) == {1}
    for file in (results / ".search").rglob("storage*"):
        file.unlink()
    removed = ["sgd-wide-001-seed0", "sgd-confirm-001-seed2"]
    kept = losses(results)
    for name in removed:
        (results / "toy" / f"{name}.json").unlink()
    finish(start(tmp_path))
    assert cases.starts(results) - before == dict.fromkeys(removed, 1)
    assert losses(results) == kept


def test_two_workers_share_a_queue_and_no_trial(tmp_path: Path) -> None:
    results = cases.files(tmp_path, SHORT.replace("optim: sgd", "optim: sgd\nwarmup_steps: 0.1"), SHORT_QUEUE)
    workers = [start(tmp_path), start(tmp_path)]
    for worker in workers:
        finish(worker)
    assert len(cases.runs(results)) == 5
    assert set(cases.starts(results).values()) == {1}


def test_half_a_line_in_the_storage_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "storage.jsonl"
    for text, mended in {'{"a": 1}\n{"b"': '{"a": 1}\n', '{"b"': "", "": "", '{"a": 1}\n': '{"a": 1}\n'}.items():
        file.write_text(text)
        lock = StorageLock(file)
        lock.acquire()
        lock.release()
        assert file.read_text() == mended

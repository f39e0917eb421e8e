"""Workers that are killed: no trial that ended is lost, none is repeated, and what was at work is taken up again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hf_soo.search.locks import StorageLock
from tests.search import cases
from tests.search.work import start

KILLS = 20
# each step takes .2 s, so that a trial is worth killing
SLOW = cases.SPACE.replace("optim: sgd", "optim: sgd\nwarmup_steps: 0.2")


def finish(process: BaseProcess, folder: Path) -> None:
    process.join(120)
    assert process.exitcode == 0, (folder / "worker.log").read_text()


def losses(results: Path) -> dict[str, list[float]]:
    return {name: [point["eval_loss"] for point in run.curve] for name, run in cases.runs(results).items()}


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    whole = cases.files(tmp_path / "whole", SLOW)
    undisturbed = start(tmp_path / "whole")
    results, moments = cases.files(tmp_path / "killed", SLOW), random.Random(0)
    ended: dict[str, int] = {}
    for _ in range(KILLS):
        worker = start(tmp_path / "killed")
        time.sleep(moments.uniform(0.1, 1.6))
        assert worker.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself: nothing was left to do
            os.kill(worker.pid, moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        worker.join(60)
        assert worker.exitcode is not None, "the worker hangs"
        time.sleep(0.3)  # the trial of a killed worker ends after its step
        now = {file.name: file.stat().st_mtime_ns for file in (results / "toy").glob("*.json")}
        assert ended.items() <= now.items(), "a trial was lost, or run again"
        ended = now
    finish(start(tmp_path / "killed"), tmp_path / "killed")
    finish(undisturbed, tmp_path / "whole")
    assert losses(results) == losses(whole) and len(losses(whole)) == 14
    started = cases.starts(results)
    assert sum(started.values()) <= 14 + KILLS, "more starts than trials and kills"
    assert not list((results / "toy").glob("*partial*"))


def test_the_storage_is_made_again_from_the_jsons(tmp_path: Path) -> None:
    results = cases.files(tmp_path)
    finish(start(tmp_path), tmp_path)
    before = cases.starts(results)
    assert len(before) == 14 and set(before.values()) == {1}
    for file in (results / ".search").rglob("storage*"):
        file.unlink()
    removed = ["sgd-wide-004-seed0", "sgd-confirm-005-seed2"]
    kept = losses(results)
    for name in removed:
        (results / "toy" / f"{name}.json").unlink()
    finish(start(tmp_path), tmp_path)
    assert cases.starts(results) - before == dict.fromkeys(removed, 1)
    assert losses(results) == kept


def test_two_workers_share_a_queue_and_no_trial(tmp_path: Path) -> None:
    results = cases.files(tmp_path, SLOW)
    workers = [start(tmp_path), start(tmp_path)]
    for worker in workers:
        finish(worker, tmp_path)
    assert len(cases.runs(results)) == 14
    assert set(cases.starts(results).values()) == {1}


def test_half_a_line_in_the_storage_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "storage.jsonl"
    for text, mended in {'{"a": 1}\n{"b"': '{"a": 1}\n', '{"b"': "", "": "", '{"a": 1}\n': '{"a": 1}\n'}.items():
        file.write_text(text)
        lock = StorageLock(file)
        lock.acquire()
        lock.release()
        assert file.read_text() == mended

"""Workers in processes of their own, whose trials are stand-ins: both are forks of a process that has imported all.

A kill of a real worker hits it somewhere in the same steps; what differs is that nobody waits for imports.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from hf_soo.search import worker
from hf_soo.search.orders import Order
from hf_soo.search.queue import read_queue
from hf_soo.search.worker import Place, Worker
from tests.search import stand_in


class Fork:
    """What a worker uses of ``subprocess.Popen``, for a stand-in: the same descriptors, a session of its own."""

    def __init__(self, command: list[str], *, stdout: Any, pass_fds: tuple[int, ...], **_: Any) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for descriptor in (1, 2):
                os.dup2(stdout.fileno(), descriptor)
            kept = {0, 1, 2, *pass_fds}
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor not in kept:
                    try:
                        os.close(descriptor)
                    except OSError:  # that of the listing itself
                        continue
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
            logging.disable()
            code = stand_in.main(Order(**json.loads(command[-1])))
            sys.stdout.flush()
        finally:
            os._exit(code)

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is None or timeout > 60, "a trial that is told to end ends at once"
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    kill = terminate


def start(folder: Path, log: Path | None = None) -> BaseProcess:
    """A worker at the queue of a folder; its output goes to ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_work, args=(folder, log or folder / "worker.log"))
    process.start()
    return process


def _work(folder: Path, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = log.open("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.subprocess, "Popen", Fork)
        stages = read_queue(folder / "search" / "all.queue.yaml")
        sys.exit(Worker(stages, Place.of(folder / "results"), command=("stand_in",)).run())

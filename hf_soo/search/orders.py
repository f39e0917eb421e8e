"""What a worker tells a trial's process, what that says meanwhile, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
from types import FrameType
from typing import Any

from hf_soo.runs.record import RunRecord

GIVEN_BACK = 75  # exit code: ended before its time, with nothing to keep but a checkpoint


@dataclasses.dataclass(frozen=True)
class Order:
    """What a trial's process is told.

    ``flags`` are those of its command line, ``name`` is its JSON's, in ``results``; ``scratch`` is the folder of its
    checkpoints, ``search`` what its record says of it, ``channel`` the descriptor of the socket to the worker.
    """

    flags: list[str]
    name: str
    results: str
    scratch: str
    search: dict[str, Any]
    channel: int


class Channel:
    """A trial's end of the socket to its worker."""

    def __init__(self, descriptor: int) -> None:
        """Take SIGTERM from now on.

        Args:
            descriptor: of the socket.
        """
        self.stopped_at: int | None = None
        self._stream = socket.socket(fileno=descriptor).makefile("rw", encoding="utf-8")
        self._worker = os.getppid()
        self._ending = False
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True

    def ask(self, step: int, loss: float) -> bool:
        """Whether to go on after an evaluation.

        Args:
            step: at which.
            loss: of the evaluation.
        """
        try:
            self._stream.write(json.dumps({"step": step, "loss": loss}) + "\n")
            self._stream.flush()
            answer = self._stream.readline().strip()
        except OSError:
            answer = ""
        if answer == "stop":
            self.stopped_at = step
        elif answer != "go":  # the worker is gone
            self._ending = True
        return self.stopped_at is None

    def is_ending(self) -> bool:
        """Whether the run must end now: it was told to, or nobody waits for it."""
        self._ending = self._ending or os.getppid() != self._worker
        return self._ending


def write(order: Order, record: RunRecord, stopped_at: int | None = None) -> None:
    """Keep what a trial was, with a thin curve, and remove its scratch folder.

    Args:
        order: of the trial.
        record: of its run.
        stopped_at: the step at which the rule stopped it.
    """
    record.name, record.search = order.name, order.search | {"stopped_at": stopped_at}
    if stopped_at is not None and record.status == "completed":
        record.status = "stopped"
    record.curve = [
        {key: value for key, value in point.items() if key != "health"} | {"seconds": round(point["seconds"], 3)}
        for point in record.curve
        if point["eval_loss"] is not None
    ]
    record.write(order.results, indent=None)
    shutil.rmtree(order.scratch, ignore_errors=True)

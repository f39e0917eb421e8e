"""Tries that do not end well, and then the whole doctor: ``python -m tests.scripts.doctor_tries REPORT``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from hf_soo import doctor
from hf_soo.cli import main


def crash(where: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(where: str) -> None:
    time.sleep(100)


def fail(where: str) -> None:
    print("not the answer")
    raise RuntimeError(f"no {where}\nat all")


if __name__ == "__main__":
    said = [doctor._answer(doctor._Try("t", step, "kernel", 2)) for step in (crash, fail)]
    doctor._LIMIT, usual = 2.0, doctor._LIMIT
    print(json.dumps([*said, doctor._answer(doctor._Try("t", hang))]))
    doctor._LIMIT = usual
    sys.exit(main(["doctor", "--json", sys.argv[1]]))

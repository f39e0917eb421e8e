"""A worker in a process of its own, whose trials are stand-ins: FOLDER [SECONDS]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hf_soo.search.queue import read_queue
from hf_soo.search.worker import Place, Worker
from tests.search.cases import STAND_IN


def main(folder: Path, until: float | None) -> int:
    stages = read_queue(folder / "search" / "all.queue.yaml")
    return Worker(stages, Place.of(folder / "results"), until=until, command=STAND_IN).run()


if __name__ == "__main__":
    seconds = [time.time() + float(text) for text in sys.argv[2:]]
    sys.exit(main(Path(sys.argv[1]), *seconds or [None]))

"""Functions on several gloo ranks, each a process of its own, forked from a server that has imported what they need."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 240.0


@dataclass
class Ended:
    """How a rank ended.

    Args:
        code: its exit code, negative for a signal; None: it was still running at the deadline.
        error: the traceback of what it raised, or of a crash in native code, or "".
        result: what it returned.
        seconds: from its first line to its last.
    """

    code: int | None
    error: str
    result: Any
    seconds: float


class Ranks:
    """``function(rank, world, *args)`` on every rank; each may fail, die or hang, and is not waited for by the others.

    The server that they are forked from starts no group, no device and no thread but Arrow's allocator's, which can be
    forked; spawning would cost seconds.
    """

    def __init__(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> None:
        """Start them.

        Args:
            world: how many.
            function: importable by its name.
            args: what it gets after its rank and the world's size.
            timeout: of the process group, in seconds.
        """
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks.preload"])
        # by file: a tensor in a process's arguments costs a file descriptor; and the server has its first environment
        torch.save((args, dict(os.environ)), Path(self.folder.name) / "args")
        self.processes = [
            context.Process(target=_rank, args=(rank, world, self.folder.name, timeout, function), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, deadline: float = 90.0, sleeping: int | None = None) -> list[Ended]:
        """How each rank ended; those that have not after ``deadline`` seconds are killed, ``sleeping`` before that."""
        end = time.monotonic() + deadline
        for rank, process in enumerate(self.processes):
            if rank != sleeping:
                process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        ended = [Ended(code, *self._report(rank)) for rank, code in enumerate(codes)]
        self.folder.cleanup()
        return ended

    def _report(self, rank: int) -> tuple[str, Any, float]:
        folder = Path(self.folder.name)
        if (file := folder / f"report{rank}").exists():
            return torch.load(file, weights_only=False)
        fault = folder / f"fault{rank}"
        return fault.read_text() if fault.exists() else "", None, 0.0


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, world, *args)`` returned on each rank; a failing or hanging rank fails the caller."""
    ended = Ranks(world, _until_all_are_done, function, *args, timeout=TIMEOUT).wait(TIMEOUT)
    if any(rank.code != 0 for rank in ended):
        codes, errors = [rank.code for rank in ended], [rank.error for rank in ended if rank.error]
        raise RuntimeError(f"ranks failed: exit codes {codes} (None: it hung)\n" + "\n".join(errors))
    return [rank.result for rank in ended]


def _until_all_are_done(rank: int, world: int, function: Callable[..., Any], *args: Any) -> Any:
    result = function(rank, world, *args)
    dist.barrier()
    return result


def _rank(rank: int, world: int, folder: str, timeout: float, function: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    start, error, result = time.monotonic(), "", None
    # a crash in native code says its traceback there
    faulthandler.enable(os.open(f"{folder}/fault{rank}", os.O_WRONLY | os.O_CREAT))
    try:
        args, environment = torch.load(Path(folder) / "args", weights_only=False)
        os.environ |= environment | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        result = function(rank, world, *args)
    except BaseException:
        error = traceback.format_exc()
    torch.save((error, result, time.monotonic() - start), f"{folder}/partial{rank}")
    os.replace(f"{folder}/partial{rank}", f"{folder}/report{rank}")
    os._exit(bool(error))  # no destructor may wait for a peer that is gone

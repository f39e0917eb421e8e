"""Run a function on several gloo ranks, each a process of its own; a failing or hanging rank fails the caller."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 240.0


def rank_context() -> Any:
    """Ranks are forked from a server that has imported what they need, once for a test session: spawning costs seconds.

    The server itself starts no thread, group or device.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.preload"])
    return context


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world, *args)`` on every rank; what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        context = rank_context()
        # by file: a tensor in a process's arguments costs a file descriptor; and the server has its first environment
        torch.save((args, dict(os.environ)), Path(folder) / "args")
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, function), daemon=True) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        if errors or hanging or any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            raise RuntimeError(f"ranks failed: exit codes {codes}, hanging {hanging}\n" + "\n".join(errors))
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    args, environment = torch.load(Path(folder) / "args", weights_only=False)
    os.environ |= environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        torch.save(function(rank, world, *args), Path(folder) / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)

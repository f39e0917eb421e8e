"""Two ranks save one checkpoint, or one each where every node has a disk of its own; what one refuses, both refuse."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_soo.integrations.checkpoints import why_not_whole
from hf_soo.integrations.saving import hold
from tests.ranks.distributed import run_ranks
from tests.ranks.fault_checkpoints import error_of
from tests.trainer.test_saving import run


def saved(rank: int, world: int, output: str) -> dict[str, Any]:
    found: dict[str, Any] = {"locked": locked(rank, Path(output) / "locked")}
    whole = run(Path(output) / "one")
    found["one"] = same_again(rank, Path(output) / "one", whole)
    os.environ["LOCAL_RANK"] = "0"  # from here on each rank is a node
    for case, folder in {"shared": "shared", "apart": f"disk{rank}"}.items():
        assert torch.equal(run(Path(output) / folder, save_on_each_node=True), whole)
        found[case] = same_again(rank, Path(output) / folder, whole, save_on_each_node=True)
    found["states"] = sorted(path.name for path in (Path(output) / f"disk{rank}" / "checkpoint-4").glob("rng_state*"))
    return found


def locked(rank: int, folder: Path) -> str:
    """What a rank says where another process trains already; only process 0 asks for the lock."""
    child = 0
    if rank == 0:
        child = os.fork()
        if child == 0:
            hold(folder)
            (folder / "held").touch()
            signal.pause()
        while not (folder / "held").exists():
            pass
    dist.barrier()
    error = error_of(run, folder)
    dist.barrier()
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return error


def same_again(rank: int, folder: Path, whole: torch.Tensor, **settings: Any) -> tuple[list[str | None], bool]:
    """Whether each checkpoint is whole, and whether a run that goes on from the second ends where the first did."""
    dist.barrier()
    reasons = [why_not_whole(folder / f"checkpoint-{step}") for step in (2, 4, 6)]
    dist.barrier()
    if rank == 0 or folder.name.startswith("disk"):
        shutil.rmtree(folder / "checkpoint-6")
    dist.barrier()
    return reasons, torch.equal(run(folder, resume=True, **settings), whole)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, saved, str(tmp_path_factory.mktemp("saving")))


@pytest.mark.parametrize("case", ["one", "shared", "apart"])
def test_every_checkpoint_is_whole_and_resumed(case: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found[case] == ([None, None, None], True)


def test_a_node_has_its_own_ranks_states(ranks: list[dict[str, Any]]) -> None:
    assert [found["states"] for found in ranks] == [["rng_state_0.pth"], ["rng_state_1.pth"]]


def test_a_folder_in_use_is_refused_by_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["locked"] == ranks[1]["locked"]
    assert "locked is in use: process" in ranks[0]["locked"]

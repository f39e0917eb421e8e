"""One byte of a checkpoint of ZeRO-2's two ranks is another one: both ranks name the file, or go on from an older."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.compare.spread import SMALL, UNDER
from tests.ranks import cells
from tests.ranks.distributed import run_ranks
from tests.ranks.fault_runs import warnings_of
from tests.trainer.test_damage import CHANGES, changed, one_byte_changes, only_decides, verdict

ZERO_2 = next(strategy for strategy in UNDER if strategy.name == "ZeRO-2 x 2")
REALLY_RESUMED = (0, 150)
"""Of the changes that are refused; of those that are not, all."""


def trainer_of(folder: Path) -> Any:
    """Six steps, of which 2, 4 and 6 are saved."""
    trainer = cells.make_trainer(ZERO_2, cells.METHODS["mkor"], "resume", folder, cells.Sentences(), **SMALL)
    trainer.args.save_steps = 2
    return trainer


def trained(folder: Path, resume: bool = False) -> torch.Tensor:
    trainer = trainer_of(folder)
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.state.global_step == cells.STEPS
    cells.assert_spread(ZERO_2, trainer)
    return cells.whole_weights(trainer)


def damaged(rank: int, world: int, output: str) -> dict[str, Any]:
    cells.stay_on_gloo()
    run = Path(output) / "run"
    whole, messages = trained(run), warnings_of("hf_soo")
    newest, trainer = run / "checkpoint-4", trainer_of(run)
    changes = list(one_byte_changes(newest, seed=18))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(run / "checkpoint-6")
    dist.barrier()
    found: list[str] = []
    apart: dict[str, float] = {}
    for number, (file, *change) in enumerate(changes):
        if rank == 0:
            damage = changed(file, *change)  # type: ignore[arg-type]
            damage.__enter__()
        dist.barrier()
        with only_decides():
            found.append(verdict(trainer, newest, file, messages))
        if found[-1] == "taken" or number in REALLY_RESUMED:
            copy = Path(output) / str(number)
            if rank == 0:
                shutil.copytree(run, copy)
            dist.barrier()
            apart[f"{number}, {file.name} {found[-1]}"] = float((trained(copy, resume=True) - whole).abs().max())
        dist.barrier()
        if rank == 0:
            damage.__exit__(None, None, None)
    cells.forget(ZERO_2)
    return {"found": found, "apart": apart}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, damaged, str(tmp_path_factory.mktemp("zero2")))


def test_one_byte_under_zero_2(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["found"] == ranks[1]["found"] and len(ranks[0]["found"]) == CHANGES
    assert ranks[0]["found"].count("taken") <= CHANGES // 50  # spaces of a JSON
    for found in ranks:
        assert len(found["apart"]) >= len(REALLY_RESUMED)
        assert set(found["apart"].values()) == {0.0}, found["apart"]

"""How far a reader has to walk: the package's files that a plain optimizer step visits, and the moves between them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import hf_soo

PACKAGE = str(Path(hf_soo.__file__).parent)
INLINE = {"<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>"}  # read where they stand; 3.12 inlines some


@dataclass
class Journey:
    """The calls of functions of the package in the order in which a profiler sees them, as "file:function"."""

    calls: list[str]

    @property
    def stations(self) -> list[str]:
        """The file of each call."""
        return [call.partition(":")[0] for call in self.calls]

    @property
    def files(self) -> int:
        """How many files are visited."""
        return len(set(self.stations))

    @property
    def moves(self) -> int:
        """How often a call is in another file than the call before it; the first one is a move."""
        return sum(here != before for before, here in zip([None, *self.stations[:-1]], self.stations, strict=True))


def plain_step(method: str) -> Journey:
    """Follow one step of a single nn.Linear in one process that updates no factor and refreshes no inverse."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = hf_soo.build_optimizer(method, model, lr=0.01, warmup_updates=2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        if optimizer.steps == 4:
            break
        optimizer.step()
    calls: list[str] = []

    def follow(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name not in INLINE:
            calls.append(f"{code.co_filename.removeprefix(PACKAGE)[1:]}:{code.co_name}")

    sys.setprofile(follow)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return Journey(calls)


@pytest.mark.parametrize(("method", "most_files", "most_moves"), [("mkor", 13, 51), ("kfac_expand", 11, 32)])
def test_a_plain_step_stays_in_few_files(method: str, most_files: int, most_moves: int) -> None:
    """MKOR over LAMB and K-FAC over SGD: the numbers are printed, and the whole walk if it is too long."""
    journey = plain_step(method)
    found = f"{method}: {len(journey.calls)} calls in {journey.files} files with {journey.moves} moves between files"
    print(found)
    within = journey.files <= most_files and journey.moves <= most_moves
    assert within, "\n".join([f"{found}; allowed are {most_files} and {most_moves}:", *journey.calls])

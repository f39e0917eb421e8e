"""The spaces and queues that are shipped: each flag is one, and every method of a table has as many trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_soo.domains import domain_of
from hf_soo.search.queue import read_queue
from hf_soo.search.spaces import Space
from hf_soo.search.stages import Stage, Trial

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SPACES = sorted(path for path in (CONFIGS / "search").glob("*.yaml") if ".queue" not in path.name)
QUEUES = sorted((CONFIGS / "search").glob("*.queue.yaml"))


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_every_setting_is_one_that_a_run_takes(file: Path, tmp_path: Path) -> None:
    stage = Stage(CONFIGS / "workloads" / "byte_gpt.yaml", Space.read(file))
    for number, params in enumerate(stage.space.wide(16)[-6:]):
        flags = stage.flags(Trial(number, params, 0))
        job, _ = domain_of(flags).parse([*flags, "--output_dir", str(tmp_path)])
        assert job.training.learning_rate == params["learning_rate"]
        assert job.training.parsed.optimizer is not None


@pytest.mark.parametrize("file", QUEUES, ids=lambda file: file.stem)
def test_methods_of_a_queue_are_tuned_alike(file: Path) -> None:
    """Of one workload, whatever is tuned over all its settings has the same stages, and so have the grids of rates."""
    stages = read_queue(file)
    assert all(stage.recipe["task"] in ("lm", "bert", "vision") for stage in stages)
    told = {(stage.name, stage.settings, stage.seeds, stage.whole) for stage in stages if len(stage.space.ranges) > 2}
    assert {(name, number) for name, number, _, _ in told} <= {
        ("wide", 6), ("wide", 24), ("narrow", 8), ("confirm", 1), ("confirm", 2)
    }  # fmt: skip
    assert {whole for name, number, _, whole in told if (name, number) == ("wide", 24)} <= {False}
    assert all(whole for name, number, _, whole in told if (name, number) == ("wide", 6))


def test_grids_are_as_large_for_every_method_and_lie_in_their_ranges() -> None:
    for file in SPACES:
        ranges = Space.read(file).ranges
        rates = ranges["learning_rate"]
        assert len(rates.grid) == (2 if len(ranges) <= 2 else 6), file.stem  # of one option alone: at two rates
        assert all(rates.values[0] <= rate <= rates.values[1] for rate in rates.grid), file.stem

"""accelerate's save_state and torch's distributed checkpoint carry the factors: a run goes on from them bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.distributed import run_ranks
from tests.ranks.saved_by_others import ACCELERATED, METHODS, OPTIONS, saved_by_others


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, ...], Any]]:
    return run_ranks(2, saved_by_others, str(tmp_path_factory.mktemp("saved")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ACCELERATED)
def test_accelerate_carries_the_factors(how: str, method: str, found: list[dict[tuple[str, ...], Any]]) -> None:
    assert [rank[how, method] for rank in found] == [{"same": True, "steps": True}] * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchs_distributed_checkpoint_carries_the_factors(
    strategy: str, options: str, method: str, found: list[dict[tuple[str, ...], Any]]
) -> None:
    assert [rank[strategy, options, method] for rank in found] == [{"same": True, "steps": True}] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_state_without_factors_is_refused(strategy: str, found: list[dict[tuple[str, ...], Any]]) -> None:
    for rank in found:
        said = rank["without factors", strategy]
        assert said["kept"], "asking for the state of an optimizer whose base has none was a step"
        assert said["error"].startswith("this checkpoint has no state of 'eva'")

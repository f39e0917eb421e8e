"""Checkpoints that an older version wrote, one under each strategy, are resumed and end where that version ended."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from hf_soo.integrations.checkpoints import last_whole_checkpoint, strategy_in
from tests.compare.spread import FIXTURES, KEPT, SMALL, UNDER, named, place, resume
from tests.ranks.cells import Strategy

# Of weights of order 0.1 to 1 after three more steps: another machine's products round otherwise.
TOLERANCE = 1e-5


@pytest.mark.parametrize("strategy", UNDER, ids=lambda strategy: strategy.name)
def test_a_kept_checkpoint_is_resumed(strategy: Strategy) -> None:
    found = resume(strategy, KEPT, FIXTURES, SMALL)
    for method in KEPT:
        kept = load_file(place(FIXTURES, strategy.name, method) / "weights.safetensors")
        weights = named(found[method], **SMALL)
        assert kept.keys() == weights.keys()
        apart = {name: float((weights[name] - weight.flatten()).abs().max()) for name, weight in kept.items()}
        assert max(apart.values()) <= TOLERANCE, (method, apart)


@pytest.mark.parametrize("strategy", UNDER, ids=lambda strategy: strategy.name)
def test_it_is_whole_as_far_as_its_sizes_tell(strategy: Strategy, caplog: pytest.LogCaptureFixture) -> None:
    """Its manifest has neither hashes nor a step, and that is said once."""
    run = place(FIXTURES, strategy.name, KEPT[0])
    checkpoint = run / "checkpoint-3"
    assert json.loads((checkpoint / "manifest.json").read_text()).keys() == {"strategy", "files"}
    assert last_whole_checkpoint(run) == str(checkpoint) and strategy_in(checkpoint) is not None
    assert caplog.messages == [f"{checkpoint} has no hashes of its files: they cannot be checked against damage"]

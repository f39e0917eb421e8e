"""Checkpoints that an older version wrote, one under each strategy, are resumed and end where that version ended."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

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

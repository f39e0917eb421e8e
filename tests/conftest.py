"""Fixtures of the whole suite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for each test, whichever tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of its own, for tests in numpy."""
    return np.random.default_rng(0)

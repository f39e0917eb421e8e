"""Batches of examples of like length, so that little of a batch is padding.

transformers' own sampler for ``train_sampling_strategy="group_by_length"`` draws from a generator that a resume does
not restore, reads every example where the data have no column of lengths, and makes a whole optimizer step of one
length.
Here the order is a function of (seed, epoch):

    a random permutation, cut into pools of 50 rounds; each pool sorted by length; cut into rounds; the rounds shuffled

A round is what all processes take at once. It is of one length nearly, an optimizer step of several rounds is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from torch.utils.data import Sampler

POOL = 50


class LengthGroupedSampler(Sampler[int]):
    """Indices of a data set, in rounds of like length."""

    def __init__(self, lengths: npt.NDArray[np.int64], round_size: int, seed: int) -> None:
        """Start with epoch 0.

        Args:
            lengths: of the examples.
            round_size: examples that all processes take at once.
            seed: of the order; the same on every process.
        """
        self.lengths = lengths
        self.round_size = round_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Give this epoch's order from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng((self.seed, self.epoch))
        order = chance.permutation(len(self.lengths))
        pool = POOL * self.round_size
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            whole, rest = np.split(part, [len(part) // self.round_size * self.round_size])
            rounds = whole.reshape(-1, self.round_size)
            yield from rounds[chance.permutation(len(rounds))].ravel().tolist()
            yield from rest.tolist()  # of the last pool alone: an incomplete round must come last


def example_lengths(dataset: Any, column: str) -> npt.NDArray[np.int64]:
    """Tokens of every example of a ``datasets.Dataset``: from its column of lengths, else counted, unread."""
    if column in dataset.column_names:
        return np.asarray(dataset.with_format("numpy")[column][:], dtype=np.int64)
    tables = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]).astype(np.int64)

"""Masks for masked-language modelling, made in the collator: new masks each epoch, no copies on disk.

Two ways to choose the tokens, from an example x of length n that includes [CLS] and [SEP]s:

    exact      k = min(max_predictions, max(1, round(p n))) positions, drawn without replacement
               (google-research/bert, create_pretraining_data.py)
    bernoulli  each position with probability p, no cap
               (transformers, DataCollatorForLanguageModeling)

then 80 % become [MASK], 10 % a word of the whole vocabulary, 10 % stay. [CLS], [SEP] and [PAD] are never chosen.

The mask of an example is a pure function of (seed, epoch, example_id): the counter-based generator Philox is keyed
with them. So it depends on no worker, rank, batch, order or resume, and two ranks that see the same example in the
same epoch mask it alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_soo.bert.data.wordpiece import SpecialIds

IGNORE = -100
Masking = Literal["exact", "bernoulli"]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class PretrainingCollator:
    """Examples of a prepared data set -> a masked batch for ``GatheredBertForPreTraining``.

    Under Trainer set ``remove_unused_columns=False``, as the columns read here are no arguments of the model, and call
    ``set_epoch`` at the start of each epoch. An evaluation collator stays at epoch 0, so that it always masks alike.
    """

    def __init__(
        self,
        ids: SpecialIds,
        *,
        masking: Masking = "exact",
        mask_prob: float = 0.15,
        max_predictions: int = 20,
        pad_to: int | None = None,
        seed: int = 0,
    ) -> None:
        """Set up the collator.

        Args:
            ids: vocabulary size and ids of the special tokens (``wordpiece.special_ids``).
            masking: "exact" gives ``masked_positions`` and ``labels`` [B, ``max_predictions``]; "bernoulli" gives
                ``labels`` [B, T] without a cap.
            mask_prob: share of the tokens that are predicted.
            max_predictions: cap of "exact": 20 at length 128, 80 at 512.
            pad_to: length of every batch; None pads to the longest example, rounded up to a multiple of 8.
            seed: masks are a function of seed, epoch and example.

        Raises:
            ValueError: a value is out of its range.
        """
        if masking not in get_args(Masking):
            raise ValueError(f"masking is {masking!r}; it must be one of {', '.join(get_args(Masking))}.")
        if not 0.0 < mask_prob < 1.0:
            raise ValueError(f"mask_prob is {mask_prob}; it must lie between 0 and 1 (BERT: 0.15).")
        if max_predictions < 1:
            raise ValueError(
                f"max_predictions is {max_predictions}; it must be at least 1 (BERT: 20 at length 128, 80 at 512)."
            )
        if pad_to is not None and pad_to < 1:
            raise ValueError(f"pad_to is {pad_to}; it must be a length, or None for the longest example of the batch.")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must lie in [0, 2**63).")
        self.ids, self.masking, self.mask_prob, self.max_predictions = ids, masking, mask_prob, max_predictions
        self.pad_to, self.seed = pad_to, seed
        # In shared memory: persistent workers of a DataLoader see set_epoch without being restarted.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch whose masks are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the masks of this epoch from now on.

        Args:
            epoch: number of the epoch.

        Raises:
            ValueError: the epoch is negative or 2**32 and more.
        """
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch is {epoch}; it must lie in [0, 2**32).")
        self._epoch.fill_(epoch)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad, mask and label a batch.

        Args:
            examples: rows with the columns input_ids, segment_b_start, next_sentence_label and example_id.

        Returns:
            int64 tensors input_ids, attention_mask, token_type_ids [B, T], next_sentence_label [B], and labels (with
            masked_positions under "exact").

        Raises:
            ValueError: a column is missing or an example is longer than ``pad_to``.
        """
        columns = _columns(examples)
        lengths = np.array([len(row) for row in columns["input_ids"]])
        width = self._width(int(lengths.max()))
        position = np.arange(width)
        tokens = np.full((len(examples), width), self.ids.pad, dtype=np.int64)
        uniform = np.ones((3, len(examples), width))
        for i, (row, example_id) in enumerate(zip(columns["input_ids"], columns["example_id"], strict=True)):
            tokens[i, : lengths[i]] = row
            uniform[:, i, : lengths[i]] = self._random(int(example_id)).random((3, int(lengths[i])))
        token_mask = position < lengths[:, None]
        eligible = token_mask & ~np.isin(tokens, (self.ids.pad, self.ids.cls, self.ids.sep))
        if self.masking == "exact":
            count = _predictions_per_example(lengths, self.mask_prob, self.max_predictions)
            chosen = _choose_exactly(uniform[0], eligible, count)
        else:
            chosen = (uniform[0] < self.mask_prob) & eligible
        in_b = token_mask & (position >= np.array(columns["segment_b_start"])[:, None])
        batch = {
            "input_ids": _replace_tokens(tokens, chosen, uniform[1], uniform[2], self.ids),
            "attention_mask": token_mask.astype(np.int64),
            "token_type_ids": in_b.astype(np.int64),
            "next_sentence_label": np.array(columns["next_sentence_label"], dtype=np.int64),
            **self._labels(tokens, chosen),
        }
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _random(self, example_id: int) -> np.random.Generator:
        """The generator of one example in the current epoch."""
        key = np.array([self.seed, self.epoch << 32 | example_id], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _width(self, longest: int) -> int:
        """Length of the batch."""
        if self.pad_to is None:
            return -(-longest // 8) * 8
        if longest > self.pad_to:
            raise ValueError(
                f"an example has {longest} tokens but pad_to is {self.pad_to}; "
                "raise pad_to or prepare shorter sequences."
            )
        return self.pad_to

    def _labels(self, tokens: Ints, chosen: Bools) -> dict[str, Ints]:
        """Labels [B, T], or positions and labels [B, max_predictions] in ascending order, padded with 0 and -100."""
        if self.masking == "bernoulli":
            return {"labels": np.where(chosen, tokens, IGNORE)}
        shape = (len(tokens), self.max_predictions)
        positions, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        row, position = np.nonzero(chosen)
        slot = (np.cumsum(chosen, axis=1) - 1)[row, position]
        positions[row, slot] = position
        labels[row, slot] = tokens[row, position]
        return {"masked_positions": positions, "labels": labels}


def _predictions_per_example(lengths: Ints, mask_prob: float, max_predictions: int) -> Ints:
    """min(max_predictions, max(1, round(mask_prob n))) of lengths n [B]; halves go to even, as with ``round``."""
    count: Ints = np.clip(np.rint(lengths * mask_prob), 1, max_predictions).astype(np.int64)
    return count


def _choose_exactly(score: Floats, eligible: Bools, count: Ints) -> Bools:
    """The ``count`` [B] eligible positions with the lowest random score, all [B, T]: a draw without replacement."""
    rank = np.argsort(np.argsort(np.where(eligible, score, np.inf), axis=1, kind="stable"), axis=1)
    return (rank < count[:, None]) & eligible


def _replace_tokens(tokens: Ints, chosen: Bools, action: Floats, word: Floats, ids: SpecialIds) -> Ints:
    """80 % of the chosen tokens become [MASK], 10 % a word of the whole vocabulary, 10 % stay; all [B, T].

    ``action`` and ``word`` are uniform in [0, 1): what happens to each token, and which word a random one is.
    """
    masked = np.where(chosen & (action < 0.8), ids.mask, tokens)
    random = chosen & (action >= 0.8) & (action < 0.9)
    return np.where(random, (word * ids.size).astype(np.int64), masked)


def _columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of the rows, or an error that names the missing one."""
    if not examples:
        raise ValueError("the batch has no examples; it must have at least one.")
    names = ("input_ids", "segment_b_start", "next_sentence_label", "example_id")
    missing = [name for name in names if name not in examples[0]]
    if missing:
        raise ValueError(
            f"the examples lack {', '.join(missing)} (they have {', '.join(sorted(examples[0]))}); "
            "use a prepared data set, and under Trainer set remove_unused_columns=False."
        )
    return {name: [example[name] for example in examples] for name in names}

"""Masks: how many, where, what they become, and that they depend on (seed, epoch, example) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_soo.bert.data.wordpiece import SpecialIds
from hf_soo.bert.masking import PretrainingCollator, _choose_exactly, _predictions_per_example

IDS = SpecialIds(size=1000, pad=0, unk=1, cls=2, sep=3, mask=4)


def example(example_id: int, length: int = 128) -> dict[str, Any]:
    """[CLS] A [SEP] B [SEP] of ordinary words that tell their position, B from the middle on."""
    words = [100 + i for i in range(length)]
    middle = length // 2
    words[0], words[middle - 1], words[-1] = IDS.cls, IDS.sep, IDS.sep
    return {
        "input_ids": words,
        "segment_b_start": middle,
        "next_sentence_label": example_id % 2,
        "example_id": example_id,
    }


def test_counts_are_google_s() -> None:
    lengths = np.array([5, 10, 30, 50, 128, 512])
    expected = [min(20, max(1, round(n * 0.15))) for n in lengths.tolist()]
    assert _predictions_per_example(lengths, 0.15, 20).tolist() == expected == [1, 2, 4, 8, 19, 20]


def test_exact_batch_in_every_detail() -> None:
    examples = [example(i, length) for i, length in enumerate((128, 60, 9))]
    batch = PretrainingCollator(IDS, max_predictions=20)(examples)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 128),
        "attention_mask": (3, 128),
        "token_type_ids": (3, 128),
        "next_sentence_label": (3,),
        "masked_positions": (3, 20),
        "labels": (3, 20),
    }
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [128, 60, 9]
    assert batch["token_type_ids"].sum(1).tolist() == [64, 30, 5]
    assert batch["next_sentence_label"].tolist() == [0, 1, 0]
    assert (batch["labels"] != -100).sum(1).tolist() == [19, 9, 1]
    for row, original in enumerate(examples):
        n = int((batch["labels"][row] != -100).sum())
        positions = batch["masked_positions"][row]
        assert positions[n:].tolist() == [0] * (20 - n)
        assert positions[:n].tolist() == sorted(set(positions[:n].tolist()))  # without replacement
        assert batch["labels"][row, :n].tolist() == [original["input_ids"][p] for p in positions[:n]]
        untouched = [p for p in range(len(original["input_ids"])) if p not in positions[:n].tolist()]
        assert batch["input_ids"][row, untouched].tolist() == [original["input_ids"][p] for p in untouched]
        assert batch["input_ids"][row, len(original["input_ids"]) :].eq(IDS.pad).all()


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_special_tokens_are_never_chosen(masking: Any) -> None:
    collate = PretrainingCollator(IDS, masking=masking, mask_prob=0.9, max_predictions=200)
    batch = collate([example(i, 8 + i) for i in range(40)])
    labels = batch["labels"]
    assert not torch.isin(labels, torch.tensor([IDS.pad, IDS.cls, IDS.sep])).any()
    assert (labels != -100).sum() > 500


def test_cap_above_the_number_of_words_takes_all_words() -> None:
    chosen = _choose_exactly(np.array([[0.3, 0.1, 0.2]]), np.array([[True, False, True]]), np.array([3]))
    assert chosen.tolist() == [[True, False, True]]


def test_bernoulli_rate_and_replacement_shares() -> None:
    examples = [example(i) for i in range(2000)]
    batch = PretrainingCollator(IDS, masking="bernoulli", seed=3)(examples)
    chosen = batch["labels"] != -100
    words = 2000 * 125
    assert chosen.sum().item() == pytest.approx(0.15 * words, rel=0.02)  # 4.0 standard deviations are 1.9 %
    new, old = batch["input_ids"][chosen], batch["labels"][chosen]
    total = len(old)
    assert (new == IDS.mask).sum().item() / total == pytest.approx(0.8, abs=0.01)
    assert (new == old).sum().item() / total == pytest.approx(0.1, abs=0.01)
    random = new[(new != IDS.mask) & (new != old)]
    assert len(random) / total == pytest.approx(0.1, abs=0.01)
    assert 0 <= random.min() < 20 and 980 < random.max() < 1000  # the whole vocabulary, special tokens too
    assert random.double().mean().item() == pytest.approx(499.5, abs=20)  # 4 standard deviations of the mean


def test_exact_positions_are_uniform() -> None:
    batch = PretrainingCollator(IDS)([example(i) for i in range(3000)])
    counts = torch.bincount(batch["masked_positions"][batch["labels"] != -100], minlength=128)
    words = torch.tensor([i not in (0, 63, 127) for i in range(128)])
    assert counts[~words].sum() == 0
    # 19 of 125 words: 456 per position, standard deviation 19.7; the largest of 125 stays within 4.5 of them.
    assert (counts[words] - 3000 * 19 / 125).abs().max() < 4.5 * 19.7


def masks(collate: PretrainingCollator, ids: list[int]) -> dict[int, list[int]]:
    """Masked positions of each example, by id."""
    batch = collate([example(i, 40 + i) for i in ids])
    return {
        i: positions[labels != -100].tolist()
        for i, positions, labels in zip(ids, batch["masked_positions"], batch["labels"], strict=True)
    }


def test_masks_depend_on_the_example_not_on_the_batch() -> None:
    together = masks(PretrainingCollator(IDS, seed=7), [5, 0, 11, 2])
    apart = [masks(PretrainingCollator(IDS, seed=7, pad_to=96), [i]) for i in (2, 11, 0, 5)]
    assert together == {i: positions for one in apart for i, positions in one.items()}


def test_masks_change_with_seed_epoch_and_example() -> None:
    first, second = PretrainingCollator(IDS, seed=1), PretrainingCollator(IDS, seed=2)
    assert masks(first, [9]) != masks(second, [9])
    epoch_0 = masks(first, [9])
    first.set_epoch(1)
    epoch_1 = masks(first, [9])
    assert first.epoch == 1 and epoch_1 != epoch_0
    first.set_epoch(0)
    assert masks(first, [9]) == epoch_0
    # Neighbours in every coordinate: the same length, so equal masks would show.
    batches = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        batches.append(first([example(i) for i in (0, 1)])["masked_positions"])
    rows = torch.cat(batches)
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_persistent_workers_see_the_epoch() -> None:
    collate = PretrainingCollator(IDS, seed=5)
    loader = DataLoader(
        [example(i) for i in range(8)], batch_size=2, num_workers=2, collate_fn=collate, persistent_workers=True
    )
    here = PretrainingCollator(IDS, seed=5)
    for epoch in range(2):
        collate.set_epoch(epoch)
        here.set_epoch(epoch)
        for index, batch in enumerate(loader):
            expected = here([example(2 * index), example(2 * index + 1)])
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("longest", "width"), [(16, 16), (17, 24), (121, 128)])
def test_batch_is_padded_to_a_multiple_of_8(longest: int, width: int) -> None:
    assert PretrainingCollator(IDS)([example(0, longest), example(1, 10)])["input_ids"].shape == (2, width)


def test_pad_to_fixes_the_width_and_refuses_longer_examples() -> None:
    assert PretrainingCollator(IDS, pad_to=50)([example(0, 10)])["input_ids"].shape == (1, 50)
    with pytest.raises(ValueError, match="an example has 60 tokens but pad_to is 50; raise pad_to"):
        PretrainingCollator(IDS, pad_to=50)([example(0, 60)])


def test_numpy_rows_give_the_same_batch() -> None:
    as_lists = [example(i) for i in range(3)]
    as_arrays = [{key: np.array(value, dtype=np.int32) for key, value in row.items()} for row in as_lists]
    a, b = PretrainingCollator(IDS)(as_lists), PretrainingCollator(IDS)(as_arrays)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"masking": "whole"}, "masking is 'whole'; it must be one of exact, bernoulli"),
        ({"mask_prob": 1.5}, "mask_prob is 1.5"),
        ({"max_predictions": 0}, "max_predictions is 0"),
        ({"pad_to": 0}, "pad_to is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainingCollator(IDS, **config)


def test_missing_column_names_the_trainer_flag() -> None:
    with pytest.raises(ValueError, match=r"lack example_id .*remove_unused_columns=False"):
        PretrainingCollator(IDS)([{k: v for k, v in example(0).items() if k != "example_id"}])


def test_bad_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch is -1"):
        PretrainingCollator(IDS).set_epoch(-1)

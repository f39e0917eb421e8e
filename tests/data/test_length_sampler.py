"""--train_sampling_strategy group_by_length: less padding, the same examples, an order that a resume repeats."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_soo.bert.data.wordpiece import SpecialIds
from hf_soo.bert.length_sampler import LengthGroupedSampler, example_lengths
from hf_soo.bert.masking import PretrainingCollator
from tests.ranks.test_global_batch import train_and_watch
from tests.scripts.launch_runs import TINY
from tests.scripts.script_runs import only_run, prepare_corpus

LENGTHS = np.random.default_rng(0).integers(8, 129, 3285)
ROUND = 16


def drawn(epoch: int = 0, seed: int = 0) -> list[int]:
    sampler = LengthGroupedSampler(LENGTHS, ROUND, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def padded_share(order: list[int]) -> float:
    """Share of padding in the collator's batches."""
    collator = PretrainingCollator(SpecialIds(size=30, pad=0, unk=1, cls=2, sep=3, mask=4))
    real = total = 0
    for start in range(0, 50 * ROUND, ROUND):
        rows = [
            {"input_ids": [2] + [7] * (LENGTHS[i] - 1), "segment_b_start": 4, "next_sentence_label": 0, "example_id": i}
            for i in order[start : start + ROUND]
        ]
        mask = collator(rows)["attention_mask"]
        real, total = real + int(mask.sum()), total + mask.numel()
    return 1 - real / total


def test_padding_shrinks() -> None:
    """Lengths spread evenly over 8 to 128, batches of 16."""
    order = drawn()
    assert sorted(order) == list(range(len(LENGTHS)))
    assert padded_share(np.random.default_rng(0).permutation(len(LENGTHS)).tolist()) == pytest.approx(0.46, abs=0.02)
    assert padded_share(order) == pytest.approx(0.064, abs=0.005)  # of it 0.05 for multiples of 8
    last = LENGTHS[order[-(len(LENGTHS) % ROUND) :]]
    assert len(last) == 5 and last.max() - last.min() < 20  # the incomplete round is the last


def test_a_step_of_several_rounds_has_several_lengths() -> None:
    means = LENGTHS[drawn()[: 200 * ROUND]].reshape(200, ROUND).mean(1)
    assert means.std() > 30 and means.reshape(25, 8).mean(1).std() < 16  # 35/sqrt(8) = 12, were rounds independent


def test_the_order_is_that_of_seed_and_epoch() -> None:
    assert drawn() == drawn()
    assert len({tuple(drawn(*key)) for key in ((0, 0), (1, 0), (0, 1), (1, 1))}) == 4


def test_lengths_are_those_of_the_column_or_counted() -> None:
    data = Dataset.from_dict({"input_ids": [[1] * k for k in (3, 5, 2, 8)], "length": [30, 50, 20, 80]})
    assert example_lengths(data, "length").tolist() == [30, 50, 20, 80]
    assert example_lengths(data.select([2, 0]), "length").tolist() == [20, 30]
    assert example_lengths(data, "absent").tolist() == [3, 5, 2, 8]
    assert example_lengths(data.select([2, 0]), "absent").tolist() == [2, 3]


def test_resume_in_the_second_epoch(tmp_path: Path) -> None:
    """48 examples, 6 steps an epoch: from step 8 on as if nothing had happened."""
    data, out = prepare_corpus(tmp_path, eval_documents=0.1), tmp_path / "out"
    flags = [
        *TINY, "--data_dir", str(data), "--output_dir", str(out), "--optim", "mkor", "--use_cpu", "true", "--report_to",
        "none", "--seed", "5", "--do_train", "true", "--max_train_samples", "48", "--global_batch_size", "8",
        "--max_steps", "10", "--save_strategy", "steps", "--save_steps", "8", "--train_sampling_strategy",
        "group_by_length",
    ]  # fmt: skip
    whole = train_and_watch(flags)
    assert sorted(whole[:48]) == sorted(set(whole[:48])) and whole[48:56] != whole[:8]
    losses = only_run(out / "runs")["curve"]
    shutil.rmtree(out / "checkpoint-10")
    assert train_and_watch(flags)[:16] == whole[64:80]
    run = only_run(out / "runs")
    assert run["curve"] == losses and run["config"]["train_sampling_strategy"] == "group_by_length"
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=2, now 1"
    ):  # rounds of other sizes: another order
        train_and_watch([*flags, "--per_device_train_batch_size", "8", "--max_steps", "12"])
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length', now None"):
        train_and_watch([*flags[:-1], "random", "--max_steps", "12"])

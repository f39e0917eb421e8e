"""--global_batch_size: the accumulation follows from it, also across a resume on another number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_soo.bert.masking import PretrainingCollator
from hf_soo.bert.task import PretrainingTask
from hf_soo.runs import arguments
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments, _accumulation_steps
from hf_soo.runs.training import Job, train
from tests.ranks.distributed import run_ranks
from tests.scripts.launch_runs import CLASSES, TINY
from tests.scripts.script_runs import ROOT, only_run, prepare_corpus

GLOBAL = 8


def parsed(folder: Path, *flags: str) -> tuple[RunArguments, RunTrainingArguments]:
    common = ("--output_dir", str(folder), "--use_cpu", "true", "--report_to", "none", "--optim", "mkor")
    run, training = arguments.parse((RunArguments, RunTrainingArguments), [*common, *flags])
    return run, training


@pytest.mark.parametrize(
    ("size", "micro", "processes", "steps"), [(65536, 64, 8, 128), (32768, 32, 64, 16), (8, 8, 1, 1), (12, 2, 3, 2)]
)
def test_accumulation_follows(size: int, micro: int, processes: int, steps: int) -> None:
    assert _accumulation_steps(size, micro, processes) == steps


@pytest.mark.parametrize(
    ("size", "micro", "processes", "message"),
    [
        (100, 8, 2, r"=100 is no multiple of 16, per_device_train_batch_size=8 on 2 processes; "
                    r"global_batch_size 96 or 112, or per_device_train_batch_size 2 or 5 or 10 would fit\."),
        (24, 32, 1, r"global_batch_size 32 or 64, or per_device_train_batch_size 8 or 12 or 24 would fit\."),
        (25, 4, 2, r"global_batch_size 24 or 32 would fit\."),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_made_says_what_can(size: int, micro: int, processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _accumulation_steps(size, micro, processes)


def test_arguments(tmp_path: Path) -> None:
    assert parsed(tmp_path)[1].gradient_accumulation_steps == 1
    assert parsed(tmp_path, "--gradient_accumulation_steps", "3")[1].gradient_accumulation_steps == 3
    batch = ("--global_batch_size", "24", "--per_device_train_batch_size", "4")
    run, training = parsed(tmp_path, *batch, "--compare_with", "lamb")
    other = training.compared(run, str(tmp_path / "2"))
    for args in (training, other, parsed(tmp_path, *batch, "--gradient_accumulation_steps", "6")[1]):
        assert (args.global_batch_size, args.gradient_accumulation_steps) == (24, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gradient_accumulation_steps", "1"), "=1, but global_batch_size=24 .*=4 on 1 processes is 6; leave one"),
        (("--per_device_train_batch_size", "5"), "no multiple of 5"),
        (("--auto_find_batch_size", "true"), "auto_find_batch_size=True changes the micro-batch"),
    ],
)
def test_conflicts(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, "--global_batch_size", "24", "--per_device_train_batch_size", "4", *flags)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunTrainingArguments, "n_gpu", property(lambda self: 2))
    parsed(tmp_path, "--gradient_accumulation_steps", "3")
    with pytest.raises(ValueError, match="global_batch_size=24 with 2 GPUs in one process; start one process for each"):
        parsed(tmp_path, "--global_batch_size", "24")


def test_deepspeeds_auto_values_are_filled_with_it(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    config = str(ROOT / "configs" / "deepspeed" / "zero1.json")
    try:
        _, args = parsed(
            tmp_path, "--global_batch_size", "24", "--per_device_train_batch_size", "4", "--deepspeed", config
        )
        filled = args.hf_deepspeed_config.config
    finally:
        unset_hf_deepspeed_config()
    assert (filled["train_batch_size"], filled["gradient_accumulation_steps"]) == (24, 6)


def train_and_watch(flags: list[str]) -> list[int]:
    """Train; the training examples that this process took, in order."""
    taken: list[int] = []
    collate = PretrainingCollator.__call__

    def watching(self: PretrainingCollator, examples: Any) -> Any:
        taken.extend(example["example_id"] for example in examples)
        return collate(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingCollator, "__call__", watching)
        model, data, run, training = arguments.parse(CLASSES, flags)
        train(Job(run, training), PretrainingTask(model, data, training))
    return taken


def on_a_rank(rank: int, world: int, flags: list[str]) -> list[int]:
    return train_and_watch([*flags, "--ddp_backend", "gloo"])


def steps_of(taken: list[list[int]], steps: int) -> list[set[int]]:
    """The examples of each optimizer step, over processes that take alike."""
    each = GLOBAL // len(taken)  # a last micro-batch may have been fetched ahead
    return [{i for mine in taken for i in mine[k * each : (k + 1) * each]} for k in range(steps)]


def test_resume_on_another_number_of_processes_keeps_the_global_batch(tmp_path: Path) -> None:
    folder, out = prepare_corpus(tmp_path, eval_documents=0.1), tmp_path / "out"
    flags = [
        *TINY, "--data_dir", str(folder), "--optim", "mkor", "--use_cpu", "true", "--report_to", "none", "--seed", "5",
        "--do_train", "true", "--global_batch_size", str(GLOBAL), "--save_strategy", "steps", "--save_steps", "2",
    ]  # fmt: skip
    whole = train_and_watch([*flags, "--max_steps", "4", "--output_dir", str(tmp_path / "whole")])
    first = [*flags, "--max_steps", "2", "--output_dir", str(out), "--per_device_train_batch_size", "2"]
    ranks = run_ranks(2, on_a_rank, first)
    settings = json.loads((out / "run_settings.json").read_text())
    assert [settings[key] for key in ("global_batch_size", "processes", "gradient_accumulation_steps")] == [8, 2, 2]
    resumed = train_and_watch([*flags, "--max_steps", "4", "--output_dir", str(out)])
    assert steps_of(ranks, 2) + steps_of([resumed], 2) == steps_of([whole], 4)
    config = only_run(out / "runs")["config"]
    assert [config[key] for key in ("global_batch_size", "processes", "gradient_accumulation_steps")] == [8, 1, 2]
    with pytest.raises(ValueError, match="global_batch_size=8, now 16; give --restart"):
        train_and_watch([*flags, "--max_steps", "4", "--output_dir", str(out), "--global_batch_size", "16"])

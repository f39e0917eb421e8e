"""How the tests run a script: by ``hf-soo run``, by Python alone, and as it would be changed by hand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_soo import cli

HERE = Path(__file__).parent
FLAGS = [
    "--do_train", "--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "8",
    "--learning_rate", "0.01", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
    "--use_cpu", "true",
]  # fmt: skip
MKOR = ["--optim", "mkor", "--base_optim", "lamb", "--optim_args", "update_period=2"]
BY_HAND = {
    "classify.py": {
        "    Trainer,\n": "",
        "    TrainingArguments,\n": "",
        "\nlogger =": "\nfrom hf_soo.integrations.trainer import SecondOrderTrainer as Trainer\n"
        "from hf_soo.integrations.trainer import SecondOrderTrainingArguments as TrainingArguments\nlogger =",
        '__name__ == "Trainer"': '__name__ == "SecondOrderTrainer"',
    },
    "translate.py": {
        "class Arguments(Seq2SeqTrainingArguments):": "class Arguments(Seq2SeqTrainingArguments, Ours):",
        "class WeightedTrainer(": "class Weighted(",
        "\ndef main(": "\nclass WeightedTrainer(SecondOrderTrainerMixin, Weighted):\n    pass\n\n\ndef main(",
        "\n@dataclass\nclass Arguments": "\nfrom hf_soo.integrations.trainer import SecondOrderTrainerMixin\n"
        "from hf_soo.integrations.trainer import SecondOrderTrainingArguments as Ours\n@dataclass\nclass Arguments",
    },
}
"""Script -> what one replaces in it to use our classes: the mixin before, our arguments behind."""


def ours(script: str | Path, *flags: str) -> int:
    return cli.main(["run", str(HERE / script), *flags])


def plain(script: str | Path, *flags: str) -> Any:
    """Its exit code."""
    before, sys.argv = sys.argv, [str(HERE / script), *flags]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def by_hand(script: str, folder: Path, *flags: str) -> Any:
    text = (HERE / script).read_text(encoding="utf-8")
    for old, new in BY_HAND[script].items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / script).write_text(text, encoding="utf-8")
    return plain(folder / script, *flags)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest of two models' weights."""
    assert one.keys() <= other.keys()  # FSDP2 writes tied weights under both names
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def history(folder: Path) -> list[dict[str, Any]]:
    """What the Trainer logged, without what depends on the clock."""
    rows = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in rows]

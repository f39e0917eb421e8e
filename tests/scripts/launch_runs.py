"""What the tests of the launch kit share: how its files are read, and tiny settings to run them with."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_soo.bert.arguments import DataArguments, ModelArguments
from hf_soo.runs import arguments
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from tests.scripts.script_runs import ROOT

TINY = shlex.split(
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --max_eval_samples 8 --dataloader_pin_memory false "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --disable_tqdm true"
)
CLASSES = (ModelArguments, DataArguments, RunArguments, RunTrainingArguments)


def launcher_arguments(*flags: str) -> Namespace:
    """What `accelerate launch FLAGS` makes of its flags and its file."""
    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(list(flags)))
    return given


def script_arguments(*flags: str) -> tuple[Any, ...]:
    """What pretrain_bert.py makes of its flags; --use_cpu, because bf16 is refused with neither a GPU nor it."""
    return arguments.parse(CLASSES, [*flags, "--use_cpu", "true"])


def environment(**more: str) -> dict[str, str]:
    """That of a run on CPUs."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | more

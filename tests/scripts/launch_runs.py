"""Scripts in processes of their own, by accelerate's launcher too; how the launch kit is read; tiny settings."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_soo.bert.inputs import DataArguments, ModelArguments
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
    usual = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    return os.environ | usual | more


def run_script(
    script: str, *flags: str, launcher: Sequence[str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """A script of the repository from the shell.

    Args:
        script: its path from the root.
        flags: its flags.
        launcher: flags of ``accelerate launch``, which then starts it, on a port that is free; None: python starts it.
        check: it must come to a good end.
    """
    accelerate = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--mixed_precision", "no"]
    start = [] if launcher is None else [*accelerate, *launcher]
    command = [sys.executable, *start, script, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 or not check, done.stderr[-6000:]
    return done

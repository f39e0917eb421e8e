"""Pretrain BERT (masked words and next sentence) with any optimizer of hf_soo, from a YAML file and flags over it.

    accelerate launch scripts/pretrain_bert.py --config configs/smoke/mkor.yaml
    accelerate launch scripts/pretrain_bert.py --config configs/smoke/mkor.yaml --compare_with lamb
    accelerate launch scripts/pretrain_bert.py --config configs/pretrain/bert_mini_wiki_mkor.yaml --learning_rate 0.01

Every field of TrainingArguments is a flag and a YAML key. The run goes on from the last checkpoint in --output_dir
unless --restart is given. It leaves one JSON in OUTPUT_DIR/runs; with --compare_with, two and a picture of both curves.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.util import find_spec

import torch

from hf_soo.experiments import arguments, report
from hf_soo.experiments.pretraining import Job, pretrain
from hf_soo.experiments.pretraining_arguments import DataArguments, ModelArguments, PretrainingArguments, RunArguments
from hf_soo.experiments.runs import status_of


def main(flags: list[str] | None = None) -> int:
    """Run; 0 when it trained (also when it diverged), 1 with one line on stderr for an error, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_soo").setLevel(logging.INFO)
    given = sys.argv[1:] if flags is None else flags
    try:
        run(given)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        expected = not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError)
        if "--traceback" in given or not (expected or status_of(error) == "oom"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def run(flags: list[str]) -> None:
    """Parse, train, and on the first process print the table and draw the picture."""
    classes = (ModelArguments, DataArguments, RunArguments, PretrainingArguments)
    job = Job(*arguments.parse(classes, flags, description=(__doc__ or "").partition("\n")[0]))
    if job.run.compare_with is not None and find_spec("matplotlib") is None:
        raise ValueError("compare_with draws a picture and matplotlib is not installed; pip install 'hf-soo[report]'.")
    check_processes(job)
    records = pretrain(job)
    if job.training.process_index != 0:
        return
    print(report.table(records), end="")
    if job.run.compare_with is not None:
        picture = job.training.folder / "comparison.png"
        report.picture(records, picture, title=f"BERT pretraining, {records[0].parameters / 1e6:.1f} M parameters")
        print(f"wrote {picture}")


def check_processes(job: Job) -> None:
    """Refuse processes that would each train alone: what torchrun starts without a GPU, unless the Trainer is told."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != job.training.world_size:
        raise ValueError(
            f"The launcher started {started} processes, the Trainer sees {job.training.world_size}; "
            "without GPUs add --use_cpu true."
        )


if __name__ == "__main__":
    sys.exit(main())

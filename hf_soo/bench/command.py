"""Time optimizers against AdamW(foreach=True): step, capture, whole train step, state, memory.

    hf-soo bench --preset large2 --optim mkor,lamb,eva,eva_f --threads 1 --rounds 5 --json bench.json
    hf-soo bench --preset mini --optim mkor+adamw,mkor+lamb,mkor:history=64+adamw
    hf-soo bench --preset bert-large --device cuda --autocast true --batch_size 32 --seq_length 512
    hf-soo bench --suite gpu            again and again until it says that all is done; --suite cpu likewise

All figures are ratios to AdamW(foreach=True) of the same process and round: absolute times drift with whatever else the
machine does. On one CPU thread the clock is the process's CPU time, else wall time after a synchronisation.
scripts/bench_step.py is the same.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from hf_soo.bench import report
from hf_soo.bench.measure import parse_pairs, run
from hf_soo.bench.pretraining import Sequences, TrainConfig, pretrain
from hf_soo.bench.suite import SuiteConfig, run_suite
from hf_soo.bench.workload import BenchConfig
from hf_soo.files import jsonable, write_atomically
from hf_soo.outputs import file_to_write
from hf_soo.progress import Progress
from hf_soo.runs.arguments import parse
from hf_soo.runs.script import guarded


def main(flags: list[str] | None = None) -> int:
    """Measure and print a row a method; 1 with one line on stderr for an error, 130 after Ctrl-C."""
    codes: list[int] = []
    stopped = "error: interrupted; the methods measured so far are kept"
    return guarded(lambda given: codes.append(_dispatch(given)), flags, stopped) or sum(codes)


def _dispatch(flags: list[str]) -> int:
    """A suite, a pretraining, or the table."""
    config, several, training = parse((BenchConfig, SuiteConfig, TrainConfig), flags, __doc__ or "", "bench")
    if several.suite is not None:
        return run_suite(several)
    if training.tensors_from is not None:
        if training.tensors is None:
            raise ValueError("tensors_from without tensors: give --tensors FILE, where they are written to.")
        Sequences.prepared(training.tensors_from, training.most_sequences).write(training.tensors)
    elif training.train_minutes is not None:
        pair, *others = parse_pairs(config.optim, config.base)
        if others:
            raise ValueError(f"optim={config.optim!r} names several; train_minutes is for one at a time.")
        record = pretrain(config, training, pair.build, dict(pair.settings))
        print(f"{record.name}: {record.status}, {record.steps} steps, {record.final}")
    else:
        _print_and_keep(config)
    return 0


def _print_and_keep(config: BenchConfig) -> None:
    """In this process, or in as many as there are ranks."""
    if config.ranks == 1:
        _show_and_keep(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (config, folder), nprocs=config.ranks)  # type: ignore[no-untyped-call]


def _rank(rank: int, config: BenchConfig, folder: str) -> None:
    """One of the processes that share a step; the first one speaks for all."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=config.ranks)
    try:
        if rank == 0:
            _show_and_keep(config)
        else:
            run(replace(config, json=None), lambda results: None)
    finally:
        dist.destroy_process_group()


def _show_and_keep(config: BenchConfig) -> None:
    shown: list[str] = []
    file = file_to_write("--json", config.json) if config.json else None

    def show(results: dict[str, Any]) -> None:
        if not shown:
            Progress.write(report.heading(results))
        shown.append(report.line(results["rows"][-1], report.columns(results), results["rows"]))
        Progress.write(shown[-1])
        if file:
            write_atomically(file, json.dumps(jsonable(results), indent=1, ensure_ascii=False) + "\n")

    print(report.roofline(run(config, show)), end="")

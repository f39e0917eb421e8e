"""Time optimizers against AdamW(foreach=True): step, capture, whole train step, state, memory.

    python scripts/bench_step.py --preset large2 --optim mkor,lamb,eva,eva_f --threads 1 --rounds 5 --json bench.json
    python scripts/bench_step.py --preset mini --optim mkor+adamw,mkor+lamb,mkor:history=64+adamw
    python scripts/bench_step.py --preset bert-large --device cuda --autocast true --batch_size 32 --seq_length 512

All figures are ratios to AdamW(foreach=True) of the same process and round. `hf-soo bench` is the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_soo.bench import report
from hf_soo.bench.bench import run
from hf_soo.bench.workload import BenchConfig
from hf_soo.files import write_atomically
from hf_soo.runs.arguments import parse
from hf_soo.runs.record import jsonable
from hf_soo.runs.script import guarded


def main(flags: list[str] | None = None) -> int:
    """Measure and print a row a method; 1 with one line on stderr for an error, 130 after Ctrl-C."""
    return guarded(_measure, flags, stopped="error: interrupted; the methods measured so far are kept")


def _measure(flags: list[str]) -> None:
    (config,) = parse((BenchConfig,), flags, __doc__ or "")

    def show(results: dict[str, Any]) -> None:
        if len(results["rows"]) == 1:
            print(report.heading(results))
        print(report.line(results["rows"][-1]), flush=True)
        if config.json:
            Path(config.json).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(config.json), json.dumps(jsonable(results), indent=1, ensure_ascii=False) + "\n")

    run(config, show)

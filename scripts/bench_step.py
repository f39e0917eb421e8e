"""Time optimizers against AdamW(foreach=True): step, capture, whole train step, state, memory.

    python scripts/bench_step.py --preset large2 --optim mkor,lamb,eva,eva_f --threads 1 --rounds 5 --json bench.json
    python scripts/bench_step.py --preset mini --optim mkor+adamw,mkor+lamb,mkor:history=64+adamw
    python scripts/bench_step.py --preset bert-large --device cuda --autocast true --batch_size 32 --seq_length 512

All figures are ratios to AdamW(foreach=True) of the same process and round.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "step": "step_ratio",
    "min": "step_ratio_min",
    "max": "step_ratio_max",
    "plain": "plain_step_ratio",
    "update": "update_step_ratio",
    "capture": "capture_ratio",
    "train step": "train_step_ratio",
    "state B/param": "state_bytes_per_parameter",
    "memory": "peak_memory_ratio",
}


def heading(results: dict[str, Any]) -> str:
    """What was measured, and the head of the table."""
    reference = results["reference"]
    return (
        f"{results['preset']}: {results['parameters'] / 1e6:.1f}M parameters on {results['device']}; AdamW(foreach) "
        f"{reference['adamw_foreach_seconds'] * 1e3:.1f} ms a step, fused {reference['adamw_fused_ratio']:.2f} of it\n"
        f"| {'optimizer':<16} | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}"
    )


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = ("" if row[key] is None else f"{row[key]:.2f}" for key in COLUMNS.values())
    name = row["optimizer"] if row["base"] == row["optimizer"] else f"{row['optimizer']}+{row['base']}"
    return (
        f"| {name:<16} | "
        + " | ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, COLUMNS, strict=True))
        + " |"
    )


def main() -> int:
    """Parse the flags, measure, print a row a method; 1 after an error, 130 after Ctrl-C."""
    from transformers import HfArgumentParser

    from hf_soo.experiments.bench import run
    from hf_soo.experiments.runs import jsonable
    from hf_soo.experiments.workload import BenchConfig
    from hf_soo.tasks.wordpiece import write_atomically

    try:
        (config,) = HfArgumentParser(BenchConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()

        def report(results: dict[str, Any]) -> None:
            if len(results["rows"]) == 1:
                print(heading(results))
            print(line(results["rows"][-1]), flush=True)
            if config.json:
                Path(config.json).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(Path(config.json), json.dumps(jsonable(results), indent=1, ensure_ascii=False) + "\n")

        run(config, report)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the methods measured so far are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

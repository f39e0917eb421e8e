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


def main() -> int:
    """Parse the flags, measure, print a row a method; 1 after an error, 130 after Ctrl-C."""
    from transformers import HfArgumentParser

    from hf_soo.bench import report as bench_report
    from hf_soo.bench.bench import run
    from hf_soo.bench.workload import BenchConfig
    from hf_soo.files import write_atomically
    from hf_soo.runs.record import jsonable

    try:
        (config,) = HfArgumentParser(BenchConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()

        def report(results: dict[str, Any]) -> None:
            if len(results["rows"]) == 1:
                print(bench_report.heading(results))
            print(bench_report.line(results["rows"][-1]), flush=True)
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

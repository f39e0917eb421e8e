"""What ``hf-soo report`` prints of a folder, by what lies there."""

from __future__ import annotations

from pathlib import Path

from hf_soo.bench import report as bench_report
from hf_soo.glue import table as glue_table
from hf_soo.reproduce import table as reproduce_table
from hf_soo.runs import report
from hf_soo.runs.record import RunRecord, read_runs


def report_of(folder: str | Path) -> tuple[list[RunRecord], str]:
    """The table of a folder, and its runs where one picture can show them.

    Args:
        folder: of run JSONs of one workload, or of runs on GLUE, or of JSONs of ``scripts/bench_step.py``; or OUTPUT/
            results of ``scripts/reproduce.sh``.

    Raises:
        ValueError: nothing of these is there, or runs of different workloads.
    """
    if (Path(folder) / reproduce_table.PHASE_2_FOLDER).is_dir():
        return [], reproduce_table.text_of(Path(folder))
    if benchmarks := bench_report.read_benchmarks(folder):
        return [], "\n".join(map(bench_report.table, benchmarks))
    records = read_runs(folder)
    if any(map(glue_table.is_glue, records)):
        return [], glue_table.table(records)
    return records, report.table(records)

"""What ``hf-soo report`` prints of a folder, by what lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_soo.bench import report as bench_report
from hf_soo.glue import table as glue_table
from hf_soo.reproduce import table as reproduce_table
from hf_soo.runs import report
from hf_soo.runs.record import RunRecord, kind_of, read_documents, read_runs

# By the kind of the JSONs; of a folder of several kinds, the first. All other runs have a table and a picture.
REPORTS: dict[str, Callable[[Path], str]] = {"bench": bench_report.text_of, "glue": glue_table.text_of}


def report_of(folder: str | Path) -> tuple[list[RunRecord], str]:
    """The table of a folder, and its runs where one picture can show them.

    Args:
        folder: of run JSONs of one workload, or of runs on GLUE, or of JSONs of ``scripts/bench_step.py``; or OUTPUT/
            results of ``scripts/reproduce.sh``.

    Raises:
        ValueError: nothing of these is there, or runs of different workloads.
    """
    folder = Path(folder)
    if (folder / reproduce_table.PHASE_2_FOLDER).is_dir():
        return [], reproduce_table.text_of(folder)
    kinds = {kind_of(document) for document in read_documents(folder).values()}
    for kind, text_of in REPORTS.items():
        if kind in kinds:
            return [], text_of(folder)
    records = read_runs(folder)
    return records, report.table(records)

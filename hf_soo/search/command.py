"""Search over the settings of an optimizer on a workload: each trial is a run of its own, with a JSON.

    hf-soo search muon --workload byte_gpt --dry_run
    hf-soo search muon --workload byte_gpt --trials 24
    hf-soo search muon --workload byte_gpt --stage confirm --seed 1 2 3 4
    hf-soo search --queue first_table.queue --hours 8 --results results/evidence

SPACE, workload and queue are YAML files, or the names of those of `hf-soo recipes search` and `workloads`.
The same command goes on where it was stopped, on any number of cores at once. The JSONs in RESULTS/WORKLOAD are all
that is needed for it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hf_soo.domains import domain_of
from hf_soo.engine.checks import Positive, require
from hf_soo.outputs import folder_to_write
from hf_soo.runs.script import guarded
from hf_soo.search.evidence import STAGES, Evidence

if TYPE_CHECKING:  # these need Optuna, which --help does not
    from hf_soo.search.stages import Stage
    from hf_soo.search.worker import Place

_STOPPED = "stopped; the trial at hand was given back, and the same command goes on"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every flag.")


def main(flags: list[str] | None = None) -> int:
    """Search; 0 when all was done or the time was over, 1 after an error, 130 after Ctrl-C.

    Args:
        flags: None: those of the process.
    """
    code = 0

    def body(given: list[str]) -> None:
        nonlocal code
        options = _parser().parse_args(given)
        if find_spec("optuna") is None:
            raise ValueError("a search needs Optuna, which is not installed; pip install 'hf-soo[search]'.")
        code = _search(options)

    return guarded(body, flags, _STOPPED) or code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-soo search", usage="%(prog)s SPACE.yaml --workload FILE.yaml [--flag value ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("space", nargs="?", metavar="SPACE.yaml", help="what is searched")
    parser.add_argument("--workload", metavar="FILE.yaml", help="recipe of what is trained")
    parser.add_argument("--stage", choices=STAGES, default="wide", help="default: wide")
    parser.add_argument("--trials", type=int, metavar="N", help="settings to try; default 24, narrow 12, confirm 2")
    parser.add_argument("--seed", type=int, nargs="+", metavar="S", help="of each setting; default 0, confirm 1 2 3 4")
    parser.add_argument("--whole", action="store_true", help="stop no trial that falls behind; confirm never does")
    parser.add_argument("--queue", metavar="FILE", help="jobs, most telling first, instead of one space")
    parser.add_argument("--until", metavar="HH:MM", help="give back the trial at hand and end at this time")
    parser.add_argument("--hours", type=float, metavar="H", help="the same, this long from now")
    parser.add_argument(
        "--results", type=Path, default=Path("results/evidence"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--storage", type=Path, metavar="FILE", help="Optuna's, shared; default: RESULTS/.search")
    parser.add_argument("--any_code", action="store_true", help="go on with trials that other code began")
    parser.add_argument("--dry_run", action="store_true", help="print space, number of trials and cost")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def _search(given: argparse.Namespace) -> int:
    from hf_soo.search.queue import read_queue
    from hf_soo.search.worker import Place, Worker

    if (given.space is None) == (given.queue is None):
        raise ValueError("Give a SPACE.yaml with --workload, or --queue FILE.")
    stages = read_queue(given.queue) if given.queue else [_stage_of(given)]
    for stage in stages:
        _ = stage.recipe  # refuses a workload that cannot be read
    place = Place.of(folder_to_write("--results", given.results), given.storage)
    if given.dry_run or given.space is not None:
        for stage in stages:
            _check(stage)
    if given.dry_run:
        print(_plan(stages, place))
        return 0
    return Worker(stages, place, until=_deadline(given), any_code=given.any_code).run()


def _stage_of(given: argparse.Namespace) -> Stage:
    from hf_soo.search.queue import make_stage

    if given.workload is None:
        raise ValueError("No --workload; give the recipe of what is trained, byte_gpt for example.")
    return make_stage(given.workload, given.space, given.stage, given.trials, given.seed, given.whole)


def _deadline(given: argparse.Namespace) -> float | None:
    """When to end, in seconds since the epoch."""
    if given.until is not None and given.hours is not None:
        raise ValueError("--until and --hours; give one.")
    if given.hours is not None:
        require("hours", given.hours, Positive)
        return time.time() + 3600 * float(given.hours)
    if given.until is None:
        return None
    try:
        at = datetime.strptime(given.until, "%H:%M").time()
    except ValueError as error:
        raise ValueError(f"--until {given.until} is no time of a day; give HH:MM.") from error
    now = datetime.now()
    then = datetime.combine(now.date(), at)
    return (then if then > now else then + timedelta(days=1)).timestamp()


def _check(stage: Stage) -> None:
    """Refuse flags that no run would take, before the first one is started."""
    try:
        params = {key: (each.grid or each.values)[0] for key, each in stage.space.ranges.items()}
        flags = ["--config", str(stage.workload), *stage.space.as_flags(params), "--output_dir", "out"]
        domain_of(flags).parse(flags)
    except ValueError as error:
        raise ValueError(f"{stage.space.file} on {stage.workload}: {error}") from error


def _plan(stages: Sequence[Stage], place: Place) -> str:
    """Space, number of trials and cost of every stage."""
    from hf_soo.search.worker import duration

    lines, total = [], 0.0
    for stage in stages:
        evidence = Evidence(place.results / stage.study)
        trials, left = stage.settings * len(stage.seeds), stage.open_trials(evidence)
        lines.append(f"{stage.title}: {trials} trials, {left} left")
        if stage.name != "confirm":
            lines += [f"  {key}: {each.text}" for key, each in stage.space.ranges.items()]
        seconds = stage.seconds(evidence)
        if seconds is None:
            lines.append("  cost unknown: no run of this workload has ended yet, and its recipe does not say")
        else:
            total += left * seconds
            lines.append(f"  {seconds:.0f} s a run, {duration(left * seconds)} at most")
    return "\n".join([*lines, f"{duration(total)} in all on one core, and less where trials are stopped"])

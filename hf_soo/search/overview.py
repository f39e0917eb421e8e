"""Workloads beside each other: each method's best setting against the plain ones, and what a step of it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hf_soo.runs.markdown import plain
from hf_soo.runs.record import RunRecord
from hf_soo.search.claims import LEVEL, PLAIN, Claim, Claims, claims
from hf_soo.search.cost import Benchmarks, step_time
from hf_soo.search.groups import CLAIM, Group, groups

NOT_RUN = "not run"
Compared = list[tuple[Group, Claims]]
_STEPS = (
    f"- Steps of each method's best setting beside the strongest of {', '.join(PLAIN)}: mean ± standard error. "
    f"Bold: fewer, p (Holm) < {LEVEL:g}. Plain: more, p (Holm) of the other side < {LEVEL:g}."
)
_SECONDS = (
    "- Whole training steps as a ratio, timed in alternation by `hf-soo bench` on the model and the batch in "
    "brackets, which are not the workload's."
)


def compared(trials: Sequence[RunRecord]) -> Compared:
    """All groups of trials that claims are made on, with the claims."""
    return [(group, claims(group, trials)) for group in groups(trials, (CLAIM,))]


def bests(rows: Iterable[Claim]) -> dict[str, Claim]:
    """The best setting of each method out of rows, best first: of those that are ranked, else of all."""
    found: dict[str, Claim] = {}
    for claim in rows:
        found.setdefault(claim.setting.method, claim)
    return found


def cell(claim: Claim) -> str:
    """What a table says of a comparison: "**-12.1 % ± 0.8**" of the steps."""
    verdict, said = claim.verdict, str(claim.steps or "")
    if verdict in ("baseline", "not ranked"):
        return verdict
    return {"fewer": f"**{said}**", "more": said}.get(verdict, f"{said} ({verdict})")


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A row for each method, in the order of the first column that has it; what a column has not was not run."""
    methods = dict.fromkeys(method for cells in columns.values() for method in cells)
    lines = [f"| {' | '.join(('method', *columns))} |", "|---" * (len(columns) + 1) + "|"]
    rows = ([plain(method), *(cells.get(method, NOT_RUN) for cells in columns.values())] for method in methods)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def text_of(found: Compared, trials: Sequence[RunRecord]) -> str:
    """A column a workload: each method's steps beside those of the strongest plain method there."""
    columns: dict[str, dict[str, str]] = {}
    tuned: dict[str, dict[str, str]] = {}
    for run in trials:
        tuned.setdefault(run.search["study"], {})[run.search["space"]] = "tuned, not confirmed"
    for group, own in found:
        cells = {method: cell(claim) for method, claim in bests(own.rows).items()}
        columns[plain(group.short)] = cells | {
            method: said for method, said in tuned[group.study].items() if method not in cells
        }
    columns |= {plain(study): tuned[study] for study in sorted(tuned.keys() - {group.study for group, _ in found})}
    return f"## All workloads\n\n{table(columns)}\n{_STEPS}\n"


def costs(found: Compared, documents: Benchmarks) -> str:
    """The table of what a step of each method takes beside each plain method's, out of benchmarks."""
    columns: dict[str, dict[str, str]] = {}
    for _, own in found if documents else ():
        for name, rows in own.beside.items():
            for method, claim in bests(rows).items():
                time = claim.baseline and step_time(documents, claim.setting.runs[0], claim.baseline.runs[0])
                columns.setdefault(f"over {plain(name)}", {})[method] = f"{time[0]:.2f} ({time[1]})" if time else "-"
    return f"## What a step costs\n\n{table(columns)}\n{_SECONDS}\n" if columns else ""

"""What the runs under results/evidence say, in sentences that follow from the statistics by rule.

``python docs/hooks.py`` writes them as "Which optimizer should I use?".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hf_soo.runs.record import RunRecord, folders_of, read_runs
from hf_soo.search.claims import LEVEL, PLAIN, SEEDS, Claim, Claims
from hf_soo.search.comparison import departures
from hf_soo.search.cost import Benchmarks, benchmarks, step_time
from hf_soo.search.groups import Group, Setting, number, trials_of
from hf_soo.search.overview import Compared, bests, cell, compared, costs, table
from hf_soo.search.statistics import paired

NOT_YET = "not run yet"
NAMES = {"muon": "Muon", "adamw": "AdamW", "lamb": "LAMB"}  # the plain methods, in the order of the page
TUNED = "tuned, but not confirmed yet"
_PAGE = """\
<!-- Written by python docs/hooks.py out of results/evidence and results/bench: change the runs, not the page. -->

# Which optimizer should I use?

What {runs} runs under `results/evidence` show by [the protocol](evidence.md), and no more. Each sentence follows from
the statistics by rule:

- **needs fewer steps**: equal tuning, the same {seeds} seeds or more, p (Holm) of the lower loss below {level};
- **needs more steps**: the same of the higher loss;
- **no difference shown**: neither. A small difference is easily missed with {seeds} seeds; its size and its standard
  error say how much there could be;
- **not run yet**, or why it cannot be compared yet.

A percentage is of steps: those to the higher of the two final losses, which both come down to, over the baseline's; the
mean over seeds ± its standard error. Seconds are those of a step in [`hf-soo bench`](bench.md) times the steps, on the
model and batch in brackets, never those of runs that shared cores. The [workloads](workloads.md) are small: what holds
there need not hold at your size. Methods go by the names of [`configs/search`](search.md); what is called
`mkor_muon_momentum_noqk` there is `--optim muon_mkor`.

## In short

{short}

[![loss by rate, loss over steps and over time, steps to the target]({picture})]({picture})

What was tried in vain stands in [When it does not help](when_it_does_not_help.md). All tables, and this picture:
`hf-soo report results/evidence`.

## Workload by workload

{workloads}

## At which batch

{batches}

{costs}

## Published claims, and these runs

The best setting of each method here, beside the plain method that its paper names. *Holds*: significant, and at most
the published share. What was seen outside of this protocol stands in [Results](../results.md).

{published}
"""


class Published(NamedTuple):
    """What a paper says of a method, as a share of its baseline's seconds or steps; the other names are ours."""

    method: str
    said: str
    optimizer: str
    base: str | None  # None: any
    over: str
    share: float
    of: str  # "seconds" or "steps"


PUBLISHED = (
    Published("MKOR", "2.57 times as fast as LAMB (BERT-Large, phase 2)", "mkor", "lamb", "lamb", 1 / 2.57, "seconds"),
    Published("Eva", "2.05 times as fast as SGD", "eva", "sgd", "sgd", 1 / 2.05, "seconds"),
    Published(
        "K-FAC reduce", "50 to 75 % of a first-order method's steps", "kfac_reduce", None, "adamw", 0.75, "steps"
    ),
    Published("Newton-Muon", "6 % fewer steps than Muon", "newton_muon", "muon", "muon", 0.94, "steps"),
)


class Evidence(NamedTuple):
    """All that the pages are made of."""

    trials: list[RunRecord]
    found: Compared
    documents: Benchmarks
    workloads: list[str]  # those that have a recipe, and those that were run

    @classmethod
    def read(cls, folder: Path, recipes: Path) -> Evidence:
        """The runs of a folder, the benchmarks beside it, and the workloads that there are."""
        trials = [run for each in folders_of(folder) for run in read_runs(each) if run.search]
        known = [file.stem for file in recipes.glob("*.yaml") if not file.stem.endswith("_embedded")]
        ran = [run.search["study"] for run in trials]
        return cls(trials, compared(trials), benchmarks(folder), sorted({*known, *ran}))

    def of(self, workload: str) -> Compared:
        """What was confirmed of a workload."""
        return [(group, claims) for group, claims in self.found if group.study == workload]

    def methods(self, workload: str, *stages: str) -> set[str]:
        """The methods of which a workload has runs, of some stages or of any."""
        of = [run.search for run in self.trials if run.search["study"] == workload]
        return {search["space"] for search in of if not stages or search["stage"] in stages}


def setting(each: Setting) -> str:
    """A method and its setting: "`muon` at 0.02 (ns_steps 6)"."""
    return f"`{each.method}` at {number(each.rate)}" + (f" ({each.others})" if each.others else "")


def sentence(claim: Claim, documents: Benchmarks) -> str:
    """What may be said of a comparison, by its verdict, and what a step costs beside the baseline's."""
    ours, base, verdict, found = setting(claim.setting), claim.baseline, claim.verdict, claim.difference
    if base is None or verdict == "not ranked":
        return f"{ours} was run, but cannot be compared yet: {'; '.join(claim.reasons)}."
    said = f"loss {claim.setting.loss:.3f} against {base.loss:.3f}"
    said += f", {difference(claim)} over {found.count} seeds" if found else ""
    sides = [p for p in (claim.adjusted, claim.higher) if p is not None]
    p = {"fewer": claim.adjusted, "more": claim.higher, "not shown": min(sides, default=None)}.get(verdict)
    said += "" if p is None else f", p (Holm) {'< 0.0001' if p < 1e-4 else f'= {p:.4f}'}"
    if claim.steps and verdict in ("fewer", "more"):
        share = f"{100 * abs(claim.steps.mean - 1):.1f} % ± {100 * claim.steps.error:.1f}"
        text = f"{ours} **needs {share} {verdict} steps** than {setting(base)} ({said})."
    elif verdict == "not tested":
        text = f"{ours} beside {setting(base)}: {said}; not tested."
    else:
        few = f"; a claim needs {SEEDS} seeds" if found and found.count < SEEDS else ""
        text = f"{ours}: **no difference shown** to {setting(base)} ({said}{few})."
    return f"{text} {_other_base(claim)}{_seconds(claim, documents)}"


def _other_base(claim: Claim) -> str:
    """Where a method's base is not the plain method as that was run, what is another: the gain may be the base's."""
    ours, theirs = (each.runs[0] for each in (claim.setting, claim.baseline or claim.setting))
    given, plain = ours.method.get("base_optim_args") or {}, theirs.method.get("optim_args") or {}
    keys = sorted(key for key in {*given, *plain} if not isinstance(given.get(key, plain.get(key)), float | list))
    other = [f"{key} {given.get(key, 'as it comes')}" for key in keys if given.get(key) != plain.get(key)]
    if ours.base != theirs.optimizer or ours.optimizer == theirs.optimizer or not other:
        return ""
    return f"Its base has other settings ({', '.join(other)}): part of the difference may be theirs. "


def difference(claim: Claim) -> str:
    """The mean difference of the losses, and its standard error."""
    found = claim.difference
    return "" if found is None else f"{found.mean:+.4f}" + ("" if found.error is None else f" ± {found.error:.4f}")


def _seconds(claim: Claim, documents: Benchmarks) -> str:
    time = claim.baseline and step_time(documents, claim.setting.runs[0], claim.baseline.runs[0])
    if not time:
        return "What a step of it costs beside that was not measured."
    text = f"A step takes {time[0]:.2f} of its seconds ({time[1]})"
    if not claim.steps or claim.verdict not in ("fewer", "more"):
        return f"{text}."
    return f"{text}: {time[0] * claim.steps.mean:.2f} of its seconds to the same loss."


def _is_mkor(claim: Claim) -> bool:
    return claim.setting.runs[0].optimizer in ("mkor", "muon_mkor", "mkor_h")


def _forms(claims: Iterable[Claim]) -> list[Claim]:
    """Each form of MKOR at its best setting, best first; those that cannot be ranked last."""
    return [claim for claim in bests(claims).values() if _is_mkor(claim)]


def _ranked(claims: Claims) -> list[Claim]:
    return [claim for claim in _forms(claims.rows) if not claim.reasons]


def _over(claims: Claims, name: str) -> list[Claim]:
    """The forms of MKOR over a plain method, beside it."""
    return [claim for claim in _forms(claims.beside.get(name, ())) if claim.setting.runs[0].base == name]


def _plain(name: str, claims: Claims, documents: Benchmarks, tuned: set[str]) -> list[str]:
    """What MKOR adds to a plain method, and what any form of it does beside that; or why it cannot be said."""
    head, own = f"- **MKOR over {NAMES[name]}, beside {NAMES[name]}**:", _over(claims, name)
    if name not in claims.beside:
        confirmed = any(claim.setting.method == name for claim in claims.rows)
        state = "run, but not whole" if confirmed else TUNED if name in tuned else NOT_YET
        return [f"{head} `{name}` is {state}."]
    known = any(method.startswith(f"mkor_{name}") for method in tuned)
    lines = [f"{head} {sentence(own[0], documents) if own else f'{TUNED if known else NOT_YET}.'}"]
    others = [claim for claim in _forms(claims.beside[name]) if not claim.reasons]
    if others and others[0] not in own:
        lines.append(f"- **Any form of MKOR, beside {NAMES[name]}**: {sentence(others[0], documents)}")
    return lines


def _best_form(claims: Claims) -> str:
    """Which form of MKOR has the lowest loss, and by how much, which is not tested."""
    if not (ranked := [claim.setting for claim in _ranked(claims)]):
        return "none can be ranked yet."
    first, *others = ranked
    lowest = f"{setting(first)} has the lowest loss, {first.loss:.3f}"
    said = []
    for other in others:
        both = sorted(first.losses.keys() & other.losses.keys())
        found = paired([other.losses[seed] - first.losses[seed] for seed in both])
        said.append(f"{setting(other)} {found.mean:+.4f}" + ("" if found.error is None else f" ± {found.error:.4f}"))
    return f"{lowest}; beside it {', '.join(said)} (not tested)." if said else f"{lowest}, and is the only one ranked."


def _gains(claims: Claims) -> list[Claim]:
    """The best setting of each method that needs fewer steps than the strongest plain one."""
    return [claim for claim in bests(claims.rows).values() if claim.verdict == "fewer"]


def _take(claims: Claims) -> str:
    if claims.baseline is None:
        return "No plain method is whole, so nothing can be said yet."
    plain = setting(claims.baseline)
    if gains := _gains(claims):
        return f"Take {setting(gains[0].setting)}: it needs fewer steps than {plain}, the strongest plain method."
    tested = sum(claim.verdict in ("more", "not shown") for claim in bests(claims.rows).values())
    none = f"of the {tested} that could be tested beside it none is shown to need fewer steps"
    return f"Take {plain}, the strongest plain method: {none if tested else 'no other could be tested beside it yet'}."


def _workload(evidence: Evidence, name: str) -> list[str]:
    """The part of the page that a workload has."""
    tuned, parts = evidence.methods(name), []
    if tuned and not evidence.of(name):
        return [f"### {name}", f"{TUNED.capitalize()}: {_listed(tuned)}."]
    for group, claims in evidence.of(name):
        lines = [line for plain in NAMES for line in _plain(plain, claims, evidence.documents, tuned)]
        lines.append(f"- **The best form of MKOR**: {_best_form(claims)}")
        for claim in bests(claims.rows).values():
            if claim.setting.method not in PLAIN and not _is_mkor(claim):
                lines.append(f"- **Another method**: {sentence(claim, evidence.documents)}")
        if waiting := tuned - {claim.setting.method for claim in claims.rows}:
            lines.append(f"- {TUNED.capitalize()}: {_listed(waiting)}.")
        lines += [
            f"- Beside the protocol: {each}" for each in departures(group, claims, trials_of(group, evidence.trials))
        ]
        size = f", {group.batch} examples a step" if group.batch else ""
        parts += [f"### {group.short}{size}", _take(claims), "\n".join(lines)]
    return parts


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _short(evidence: Evidence) -> str:
    """On how many workloads MKOR gains, and the table that the page begins with."""
    can = [(group, own) for group, claims in evidence.found if (own := _ranked(claims))]
    gained = [group.short for group, own in can if any(claim.verdict == "fewer" for claim in own)]
    which = f" ({'; '.join(gained)})" if gained else ""
    seeds = sorted({run.seed for group, _ in evidence.found for each in group.settings for run in each.runs})
    columns = " | ".join(f"MKOR over {each}, beside it" for each in NAMES.values())
    lines = [
        f"Workloads on which MKOR needs fewer steps than the strongest plain method: {len(gained)} of the {len(can)}",
        f"where both can be ranked{which}. Seeds of the claims: {', '.join(map(str, seeds)) or 'still to run'}.",
        "",
        f"| workload | strongest plain method | {columns} | needs fewer steps than the strongest plain method |",
        "|---|---|---|---|---|---|",
    ]
    for name in evidence.workloads:
        if not (found := evidence.of(name)):
            state = TUNED if evidence.methods(name) else NOT_YET
            lines.append(f"| {name} | {' | '.join([state] * 5)} |")
        for group, claims in found:
            base = f"{setting(claims.baseline)}: {claims.baseline.loss:.3f}" if claims.baseline else "none is whole"
            forms = (_over(claims, plain) for plain in NAMES)
            cells = [f"`{each[0].setting.method}` {cell(each[0])}" if each else NOT_YET for each in forms]
            best = _listed(claim.setting.method for claim in _gains(claims)) or "nothing shown"
            lines.append(f"| {group.short} | {base} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def _batches(evidence: Evidence) -> str:
    """A table for each workload that was run at several batches."""
    families: dict[str, Compared] = {}
    for group, claims in sorted(evidence.found, key=lambda each: each[0].batch or 0):
        families.setdefault(group.family, []).append((group, claims))
    tables = []
    for family in families.values():
        columns = {f"{group.batch} ({group.study})": bests(claims.rows) for group, claims in family}
        if len({group.batch for group, _ in family}) > 1:
            tables.append(table({head: {name: cell(own[name]) for name in own} for head, own in columns.items()}))
    return "\n".join(tables).strip() or f"No workload was run at several batches: {NOT_YET}."


def _published(evidence: Evidence) -> str:
    """What papers say, and what was run here of it."""
    lines = ["| | published | here |", "|---|---|---|"]
    for each in PUBLISHED:
        said = [_held(each, group, claims, evidence.documents) for group, claims in evidence.found]
        lines.append(f"| {each.method} | {each.said} | {' '.join(filter(None, said)) or NOT_YET} |")
    return "\n".join(lines)


def _held(each: Published, group: Group, claims: Claims, documents: Benchmarks) -> str:
    """Whether a published gain was found on a workload; nothing where it was not run."""
    ours = [claim for claim in claims.beside.get(each.over, ()) if claim.setting.runs[0].optimizer == each.optimizer]
    ours = [claim for claim in ours if each.base in (None, claim.setting.runs[0].base)]
    if not ours:
        return ""
    claim = ours[0]
    time = claim.baseline and step_time(documents, claim.setting.runs[0], claim.baseline.runs[0])
    if claim.verdict != "fewer" or claim.steps is None:
        verdict = {"more": "does not hold", "not shown": "not shown"}.get(claim.verdict, "cannot be said yet")
    elif each.of == "seconds" and not time:
        verdict = "fewer steps, and seconds that were not measured"
    else:
        share = claim.steps.mean * (time[0] if time and each.of == "seconds" else 1.0)
        found = "holds" if share <= each.share else "a smaller gain" if share < 1 else "does not hold"
        verdict = f"{found}, {share:.2f} of the {each.of}"
    took = "" if claim.steps is None else f"{claim.steps} steps, "
    return f"{group.short}: **{verdict}** ({setting(claim.setting)}: {took}{len(claim.setting.losses)} seeds)."


def page(evidence: Evidence) -> str:
    """The page "Which optimizer should I use?"."""
    waiting = [name for name in evidence.workloads if not evidence.methods(name)]
    rest = [f"### {NOT_YET.capitalize()}", f"{_listed(waiting)}."] if waiting else []
    return _PAGE.format(
        runs=len(evidence.trials),
        seeds=SEEDS,
        level=f"{LEVEL:g}",
        short=_short(evidence),
        picture="../../results/evidence/curves.png",
        workloads="\n\n".join([*(part for name in evidence.workloads for part in _workload(evidence, name)), *rest]),
        batches=_batches(evidence),
        costs=costs(evidence.found, evidence.documents).strip() or f"## What a step costs\n\n{NOT_YET.capitalize()}.",
        published=_published(evidence),
    )


def digest(evidence: Evidence) -> str:
    """What the picture is drawn of."""
    runs = [f"{run.search['study']} {run.name} {run.status} {run.final.get('eval_loss')}" for run in evidence.trials]
    rows = [row for each in evidence.documents for row in each["rows"]]
    timed = [f"{row['optimizer']} {row['base']} {row['train_step_ratio']}" for row in rows]
    return hashlib.sha256("\n".join([*sorted(runs), *sorted(timed)]).encode()).hexdigest()[:16]


def digest_in(picture: Path) -> str:
    """The digest that a picture carries; nothing where it carries none."""
    found = re.search(rb"Source\0([0-9a-f]{16})", picture.read_bytes()) if picture.exists() else None
    return found[1].decode() if found else ""

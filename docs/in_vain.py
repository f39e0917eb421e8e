"""The table of "When it does not help": what was tried under results/evidence and is not shown to be better."""

from __future__ import annotations

from answers import NOT_YET, TUNED, Evidence, difference, setting

from hf_soo.search.claims import PLAIN, Claim
from hf_soo.search.groups import CHOOSING, CLAIM, Group, best_of, by_method, groups


def not_better(evidence: Evidence) -> str:
    """The table of confirmed settings that are not shown to be better than a baseline, and of what was only tuned."""
    head = "workload | setting | beside | steps | difference of the loss | seeds | p (Holm) of fewer | what it says"
    rows = []
    for group, claims in evidence.found:
        pairs = {(id(claim.setting), id(claim.baseline)): claim for claim in (*claims.rows, *claims.over_own_base)}
        tried = [each for each in pairs.values() if each.setting.method not in PLAIN]
        rows += [_row(group.short, each) for each in tried if each.verdict != "fewer"]
    for group in groups(evidence.trials, CHOOSING):
        rows += _tuned(group, evidence.methods(group.study, CLAIM))
    lines = [f"| {head} |", "|---|---|---|---:|---:|---:|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) if rows else f"Nothing: {NOT_YET}."


def _row(where: str, claim: Claim) -> list[str]:
    said = {"more": "needs more steps", "not shown": "no difference shown"}.get(claim.verdict)
    return [
        where,
        setting(claim.setting),
        setting(claim.baseline) if claim.baseline else "",
        str(claim.steps or ""),
        difference(claim),
        str(len(claim.setting.losses)),
        "" if claim.adjusted is None else f"{claim.adjusted:.4f}",
        said or "; ".join(claim.reasons) or "not tested",
    ]


def _tuned(group: Group, confirmed: set[str]) -> list[list[str]]:
    """Methods that were tuned only, and did not come below the best plain method then."""
    best = {method: found for method, settings in by_method(group).items() if (found := best_of(settings))}
    plain = min((best[name] for name in PLAIN if name in best), key=lambda each: each.loss or 0.0, default=None)
    rows = []
    for method, own in best.items():
        if plain and plain.loss and own.loss and method not in (*PLAIN, *confirmed) and own.loss >= plain.loss:
            worse, seeds = f"{own.loss - plain.loss:+.4f}", str(len(own.losses))
            rows.append([group.short, setting(own), setting(plain), "", worse, seeds, "", TUNED])
    return rows

"""A plan as text: a column for each method, rows by kind; and what a dry run counted beside what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_soo.plan.plan import CONVENTION, TOLERANCE

GB, TERA = 1e9, 1e12
MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "ddp_buckets": "DDP's buckets",
    "master_weights": "fp32 master weights",
    "base_state": "base optimizer state",
    "factors": "factors",
    "capture": "capture buffers",
    "capture_transient": "capture buffers, update steps",
    "gradient_copies": "copies of gradients, in the step",
    "gathered_parameters": "gathered parameters, in passes",
    "activations": "activations, an estimate",
}
BYTES = {
    "gradients": "gradients",
    "parameters": "parameters",
    "statistics": "statistics",
    "inverses": "inverses",
    "directions": "directions",
    "shards": "of sharded gradients",
    "base": "base (LAMB's norms)",
    "loss": "loss",
}
FLOPS = {
    "passes": "forward and backward",
    "precondition": "preconditioning",
    "statistics": "statistics, by hooks",
    "update": "factor updates",
    "inverse": "inverses",
    "base": "base optimizer",
}
SECONDS = {
    "passes": "forward and backward",
    "precondition": "precondition, statistics, update",
    "inverse": "inverses",
    "base": "base, and memory traffic",
    "communication": "communication",
    "step": "step",
}


def text(plan: Mapping[str, Any]) -> str:
    """The table.

    Args:
        plan: what ``plan.run`` returned.
    """
    methods, config, layout = plan["methods"], plan["config"], plan["layout"]
    profile = plan["profile"]
    lines = [
        f"{config['model']}: {plan['parameters'] / 1e6:.1f} M parameters, {config['gpus']} ranks, "
        f"{config['strategy']}, {config['precision']}",
        f"{config['batch']} sequences of {config['seq']} tokens a step = {config['gpus']} ranks x micro-batch "
        f"{layout['micro_batch']} x {layout['accumulation']} accumulated"
        + (", gradient checkpointing" if layout["checkpointing"] else ""),
        "",
    ]
    memory = _rows(methods, "memory", MEMORY, GB)
    memory += [
        ("held throughout", [method["memory_held"] / GB for method in methods]),
        ("at the peak", [method["memory_peak"] / GB for method in methods]),
    ]
    sections = [
        ("memory of a rank, GB", memory),
        ("sent by a rank in a step, GB", _rows(methods, "bytes_per_step", BYTES, GB)),
        ("FLOPs of a rank in a step, 10^12", _rows(methods, "flops_per_step", FLOPS, TERA)),
        ("PREDICTED seconds of a step", _rows(methods, "predicted_seconds", SECONDS, 1.0)),
    ]
    lines += _table([method["method"] for method in methods], sections)
    lines += [
        "",
        f"Each number is of the rank with the most. Sent: {CONVENTION}; averaged over update and refresh steps.",
        f"The seconds are a prediction, not a measurement: profile {profile['name']} ({profile['source']}); nothing "
        "overlaps.",
    ]
    if plan["dry_run"]:
        lines += ["", *_counted(methods[0]["method"], plan["dry_run"])]
    return "\n".join(lines) + "\n"


def _rows(
    methods: Sequence[Mapping[str, Any]], part: str, names: Mapping[str, str], unit: float
) -> list[tuple[str, list[float]]]:
    """The rows that are not zero throughout."""
    rows = [(name, [method[part][key] / unit for method in methods]) for key, name in names.items()]
    return [(name, values) for name, values in rows if any(values)]


def _table(heads: Sequence[str], sections: Sequence[tuple[str, list[tuple[str, list[float]]]]]) -> Iterable[str]:
    widths = [max(len(head), 9) for head in heads]
    first = max(len(name) for title, rows in sections for name in [title, *(f"  {row}" for row, _ in rows)])
    for title, rows in sections:
        if not rows:
            continue
        yield _line(title, heads, first, widths)
        for name, values in rows:
            yield _line(f"  {name}", [_number(value) for value in values], first, widths)


def _line(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    return "  ".join([f"{name:{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])


def _number(value: float) -> str:
    """Four digits; small ones in powers of ten, so that nothing that is there looks like nothing."""
    if value == 0:
        return "0"
    return f"{value:.4g}" if value >= 1e-3 else f"{value:.1e}"


def _counted(method: str, dry: Mapping[str, Any]) -> Iterable[str]:
    yield f"Dry run of {method}, rank {dry['rank']}, one micro-batch: bytes planned and counted"
    groups = [("memory", dry["memory"])]
    for step in dry["steps"]:
        doing = [word for word, does in (("update", step["updates"]), ("refresh", step["refreshes"])) if does]
        groups.append((f"{' and '.join(doing) or 'plain'} step", step["bytes"]))
    width = max(len(f"  {group}: {row['kind']}") for group, rows in groups for row in rows)
    for group, rows in groups:
        for row in rows:
            name = f"  {group}: {row['kind']}"
            yield f"{name:{width}}  {row['planned']:>15,}  {row['counted']:>15,}  {row['difference']:7.2%}"
    worst = dry["largest_difference"]
    verdict = "agree" if worst <= TOLERANCE else "DISAGREE"
    yield f"Plan and count {verdict}: the largest difference is {worst:.2%} ({TOLERANCE:.0%} allowed)."

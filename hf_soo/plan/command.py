"""What a run would cost on a machine that is not at hand: memory, communication, arithmetic and a predicted step time.

``memory``, ``messages`` and ``cost`` are the model; ``_dry_run`` counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_soo.files import write_atomically
from hf_soo.machine import commit, versions
from hf_soo.outputs import file_to_write
from hf_soo.plan.cost import Profile, frequency, load_profile, predict, work
from hf_soo.plan.dry_run import count
from hf_soo.plan.memory import TRANSIENT, factors, memory, peak
from hf_soo.plan.messages import KINDS, messages, sent
from hf_soo.plan.method_on_model import MethodOnModel, asked_methods
from hf_soo.plan.model_shape import ModelShape, build_model
from hf_soo.plan.request import Layout, PlanConfig

_TOLERANCE = 0.05
"""How far the plan may be from what a dry run counts."""

_CONVENTION = (
    "bytes of the message handed to a collective: the tensor of an all-reduce, reduce or broadcast, the whole result "
    "of an all-gather, the whole input of a reduce-scatter or all-to-all"
)

_GB, _TERA = 1e9, 1e12
_MEMORY = {
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
_BYTES = {
    **dict(zip(KINDS, KINDS, strict=True)),
    "shards": "of sharded gradients",
    "base": "base (LAMB's norms, Muon's matrices)",
}
_FLOPS = {
    "passes": "forward and backward",
    "precondition": "preconditioning",
    "statistics": "statistics, by hooks",
    "update": "factor updates",
    "inverse": "inverses",
    "base": "base optimizer",
}
_SECONDS = {
    "passes": "forward and backward",
    "precondition": "precondition, statistics, update",
    "inverse": "inverses",
    "base": "base, and memory traffic",
    "communication": "communication",
    "step": "step",
}


def run(config: PlanConfig) -> dict[str, Any]:
    """Plan, and count if that is asked for.

    Returns:
        The numbers, as the JSON file has them.

    Raises:
        ValueError: the model, a method, a setting or the profile is refused.
    """
    file = file_to_write("--json", config.json) if config.json else None
    profile, layout = load_profile(config.profile), Layout.of(config)
    with torch.device("meta"):
        model = build_model(config.model, config.seq)
    shape, methods = ModelShape.of(model), asked_methods(config, model)
    if config.dry_run and shape.used < 1:
        raise ValueError(
            f"dry_run of {config.model!r}: which expert a token goes to follows from values, and a dry run has none; "
            "leave --dry-run out."
        )
    plan: dict[str, Any] = {
        "kind": "plan",
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "commit": commit(),
        "parameters": shape.count,
        "layout": dataclasses.asdict(layout),
        "profile": dataclasses.asdict(profile),
        "convention": _CONVENTION,
        "methods": [_method_plan(method, shape, layout, profile) for method in methods],
        "dry_run": _dry_run(methods[0], shape, layout, config.model) if config.dry_run else None,
    }
    if file:
        write_atomically(file, json.dumps(plan, indent=1) + "\n")
    return plan


def _method_plan(method: MethodOnModel, shape: ModelShape, layout: Layout, profile: Profile) -> dict[str, Any]:
    """One column."""
    found, amount = messages(method, shape, layout), work(method, shape, layout)
    held = memory(method, shape, layout)
    mean = dict.fromkeys(KINDS, 0.0)
    for message in found:
        mean[message.kind] += message.bytes * frequency(message, method, layout)
    return {
        "method": method.label,
        "optimizer": method.pair.name,
        "base": method.base,
        "settings": dict(method.pair.settings),
        "layers": len(method.layers),
        "cycle": method.step_kinds.counts if method.step_kinds else None,
        "memory": held,
        "memory_held": sum(b for kind, b in held.items() if kind not in TRANSIENT),
        "memory_peak": peak(held),
        "messages": [
            {**dataclasses.asdict(message), "per_step": frequency(message, method, layout)} for message in found
        ],
        "bytes_per_step": mean,
        "flops_per_step": {f.name: getattr(amount, f.name) for f in dataclasses.fields(amount) if f.name != "traffic"},
        "optimizer_traffic_bytes": amount.traffic,
        "predicted_seconds": predict(method, amount, found, layout, profile),
    }


def _dry_run(method: MethodOnModel, shape: ModelShape, layout: Layout, name: str) -> dict[str, Any]:
    """Count the bytes of the rank that keeps the most factors, with one micro-batch, and hold the plan against them."""
    layout = dataclasses.replace(layout, accumulation=1)
    rank, _ = factors(method, layout)
    counted = count(method, name, layout, rank)
    found = messages(method, shape, layout, rank)
    held = memory(method, shape, layout, rank)
    steps = [{**kind._asdict(), "bytes": _compared(counted.sent(kind), sent(found, kind))} for kind in counted.steps]
    parts = _compared(counted.memory, {kind: held[kind] for kind in counted.memory})
    return {
        "rank": rank,
        "steps": steps,
        "memory": parts,
        "largest_difference": max(row["difference"] for rows in [parts, *(s["bytes"] for s in steps)] for row in rows),
    }


def _compared(counted: Mapping[str, int], planned: Mapping[str, int]) -> list[dict[str, Any]]:
    """What either has, side by side, and the difference relative to the larger one."""
    rows = []
    for kind in [*planned, *(kind for kind in counted if kind not in planned)]:
        ours, real = planned.get(kind, 0), counted.get(kind, 0)
        if ours or real:
            difference = abs(ours - real) / max(ours, real)
            rows.append({"kind": kind, "planned": ours, "counted": real, "difference": difference})
    return rows


def text(plan: Mapping[str, Any]) -> str:
    """What ``run`` returned as a table: a column for each method, rows by kind; then what a dry run counted."""
    methods, config, layout, profile = (plan[key] for key in ("methods", "config", "layout", "profile"))
    lines = [
        f"{config['model']}: {plan['parameters'] / 1e6:.1f} M parameters, {config['gpus']} ranks, "
        f"{config['strategy']}, {config['precision']}",
        f"{config['batch']} sequences of {config['seq']} tokens a step = {config['gpus']} ranks x micro-batch "
        f"{layout['micro_batch']} x {layout['accumulation']} accumulated"
        + (", gradient checkpointing" if layout["checkpointing"] else ""),
        "",
    ]
    memory = _rows(methods, "memory", _MEMORY, _GB)
    memory += [
        ("held throughout", [method["memory_held"] / _GB for method in methods]),
        ("at the peak", [method["memory_peak"] / _GB for method in methods]),
    ]
    sections = [
        ("memory of a rank, GB", memory),
        ("sent by a rank in a step, GB", _rows(methods, "bytes_per_step", _BYTES, _GB)),
        ("FLOPs of a rank in a step, 10^12", _rows(methods, "flops_per_step", _FLOPS, _TERA)),
        ("PREDICTED seconds of a step", _rows(methods, "predicted_seconds", _SECONDS, 1.0)),
    ]
    lines += _table([method["method"] for method in methods], sections)
    lines += [
        "",
        f"Each number is of the rank with the most. Sent: {_CONVENTION}; averaged over update and refresh steps.",
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
    verdict = "agree" if worst <= _TOLERANCE else "DISAGREE"
    yield f"Plan and count {verdict}: the largest difference is {worst:.2%} ({_TOLERANCE:.0%} allowed)."

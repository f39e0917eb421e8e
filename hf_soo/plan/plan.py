"""What a run would cost on a machine that is not at hand: memory, communication, arithmetic and a predicted step time.

``plan_memory``, ``plan_messages``, ``plan_work`` and ``plan_time`` are the model; ``plan_dry_run`` counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_soo.bench.step_kinds import Kind
from hf_soo.files import write_atomically
from hf_soo.plan import dry_run as plan_dry_run
from hf_soo.plan import memory as plan_memory
from hf_soo.plan import messages as plan_messages
from hf_soo.plan.messages import Message, messages, sent
from hf_soo.plan.method_on_model import Subject, subjects
from hf_soo.plan.model_shape import ModelFacts, build_model
from hf_soo.plan.request import Layout, PlanConfig
from hf_soo.plan.time import Profile, frequency, load_profile, predict
from hf_soo.plan.work import work
from hf_soo.runs.machine import commit, versions

TOLERANCE = 0.05
"""How far the plan may be from what a dry run counts."""

CONVENTION = (
    "bytes of the message handed to a collective: the tensor of an all-reduce, reduce or broadcast, the whole result "
    "of an all-gather, the whole input of a reduce-scatter"
)


def run(config: PlanConfig) -> dict[str, Any]:
    """Plan, and count if that is asked for.

    Args:
        config: the flags.

    Returns:
        The numbers, as the JSON file has them.

    Raises:
        ValueError: the model, a method, a setting or the profile is refused.
    """
    profile, layout = load_profile(config.profile), Layout.of(config)
    with torch.device("meta"):
        model = build_model(config.model, config.seq)
    facts, methods = ModelFacts.of(model), subjects(config, model)
    plan: dict[str, Any] = {
        "kind": "plan",
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "commit": commit(),
        "parameters": facts.count,
        "layout": dataclasses.asdict(layout),
        "profile": dataclasses.asdict(profile),
        "convention": CONVENTION,
        "methods": [method_plan(subject, facts, layout, profile) for subject in methods],
        "dry_run": dry_run(methods[0], facts, layout, config.model) if config.dry_run else None,
    }
    if config.json:
        write_atomically(config.json, json.dumps(plan, indent=1) + "\n")
    return plan


def method_plan(subject: Subject, facts: ModelFacts, layout: Layout, profile: Profile) -> dict[str, Any]:
    """One column."""
    found, amount = messages(subject, facts, layout), work(subject, facts, layout)
    held = plan_memory.memory(subject, facts, layout)
    mean = dict.fromkeys(plan_messages.KINDS, 0.0)
    for message in found:
        mean[message.kind] += message.bytes * frequency(message, subject, layout)
    return {
        "method": subject.label,
        "optimizer": subject.pair.name,
        "base": subject.base,
        "settings": dict(subject.pair.settings),
        "layers": len(subject.layers),
        "cycle": subject.cycle.counts if subject.cycle else None,
        "memory": held,
        "memory_held": sum(b for kind, b in held.items() if kind not in plan_memory.TRANSIENT),
        "memory_peak": plan_memory.peak(held),
        "messages": [
            {**dataclasses.asdict(message), "per_step": frequency(message, subject, layout)} for message in found
        ],
        "bytes_per_step": mean,
        "flops_per_step": {f.name: getattr(amount, f.name) for f in dataclasses.fields(amount) if f.name != "traffic"},
        "optimizer_traffic_bytes": amount.traffic,
        "predicted_seconds": predict(subject, amount, found, layout, profile),
    }


def dry_run(subject: Subject, facts: ModelFacts, layout: Layout, name: str) -> dict[str, Any]:
    """Count the bytes of the rank that keeps the most factors, with one micro-batch, and hold the plan against them."""
    layout = dataclasses.replace(layout, accumulation=1)
    rank, _ = plan_memory.factors(subject, layout)
    counted = plan_dry_run.count(subject, name, layout, rank)
    found = messages(subject, facts, layout, rank)
    held = plan_memory.memory(subject, facts, layout, rank)
    steps = [step_compared(kind, counted.sent(kind), found) for kind in counted.steps]
    memory = compared(counted.memory, {kind: held[kind] for kind in counted.memory})
    return {
        "rank": rank,
        "steps": steps,
        "memory": memory,
        "largest_difference": max(row["difference"] for rows in [memory, *(s["bytes"] for s in steps)] for row in rows),
    }


def step_compared(kind: Kind, counted: Mapping[str, int], found: Sequence[Message]) -> dict[str, Any]:
    """Messages of one kind of step."""
    return {**kind._asdict(), "bytes": compared(counted, sent(list(found), kind))}


def compared(counted: Mapping[str, int], planned: Mapping[str, int]) -> list[dict[str, Any]]:
    """What either has, side by side, and the difference relative to the larger one."""
    rows = []
    for kind in [*planned, *(kind for kind in counted if kind not in planned)]:
        ours, real = planned.get(kind, 0), counted.get(kind, 0)
        if ours or real:
            difference = abs(ours - real) / max(ours, real)
            rows.append({"kind": kind, "planned": ours, "counted": real, "difference": difference})
    return rows

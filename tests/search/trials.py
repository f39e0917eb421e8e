"""Trials of a search that was never run: records with made-up curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_soo.runs.record import CurvePoint, RunRecord

BUDGET = 300
START = 5.5


def curve(final: float, steps: int = BUDGET, budget: int = BUDGET) -> list[CurvePoint]:
    """From `START` down to `final` at the budget, evaluated every 25 steps, half a second a step."""
    return [
        {"step": step, "seconds": step / 2, "train_loss": None,
         "eval_loss": final + (START - final) * (math.exp(-step / 40) - math.exp(-budget / 40))}
        for step in range(25, steps + 1, 25)
    ]  # fmt: skip


def trial(method: str, stage: str, seed: int, loss: float, rate: float = 0.02, **changed: Any) -> RunRecord:
    """A trial of `method`, which is named as its optimizer or as OPTIMIZER_BASE; `changed` are fields of its record.

    Args:
        method: the space's name.
        stage: of the search.
        seed: of the run.
        loss: the final one.
        rate: the learning rate.
        changed: "status", "code", "search" and "config", which are joined with those here, and others.
    """
    optimizer, _, base = method.partition("_")
    status = changed.pop("status", "completed")
    search = {
        "study": "byte_gpt", "space": method, "stage": stage, "number": 0, "trials": 0,
        "params": {"learning_rate": rate}, "stopped_at": 100 if status == "stopped" else None,
    }  # fmt: skip
    config = {
        "model": {"hidden_size": 128}, "data": {"held_out": "claim" if stage == "confirm" else "choose"},
        "max_steps": BUDGET, "learning_rate": rate, "initial_weights": f"weights{seed}",
    }  # fmt: skip
    config |= changed.pop("config", {})
    search |= changed.pop("search", {})
    points = curve(loss, 100 if status == "stopped" else BUDGET)
    if status == "diverged":
        points = [*points[:3], {"step": 100, "seconds": 50.0, "train_loss": None, "eval_loss": None}]
    return RunRecord(
        **{
            "name": f"{method}-{stage}-{rate:g}-{seed}", "optimizer": optimizer, "base": base or optimizer,
            "config": config, "seed": seed, "status": status, "device": "a machine", "code": "c0de",
            "steps": points[-1]["step"], "seconds": points[-1]["seconds"], "curve": points,
            "final": {"eval_loss": points[-1]["eval_loss"]}, "search": search,
        } | changed
    )  # fmt: skip


def confirmed(method: str, losses: Sequence[float], first: int = 2, **changed: Any) -> list[RunRecord]:
    """Runs that confirm, one a seed from `first` on."""
    return [trial(method, "confirm", first + n, loss, **changed) for n, loss in enumerate(losses)]


def chosen(method: str, losses: dict[float, float | str], stage: str = "wide", **changed: Any) -> list[RunRecord]:
    """Runs that choose, one a rate: its loss, or the status that it ended with."""
    runs = []
    for n, (rate, loss) in enumerate(losses.items()):
        ended = {"loss": 3.0, "status": loss} if isinstance(loss, str) else {"loss": loss}
        search = {"number": n, "trials": len(losses)} | changed.get("search", {})
        runs.append(trial(method, stage, 0, rate=rate, **ended, **changed | {"search": search}))
    return runs


def laboratory() -> list[RunRecord]:
    """Nine methods at six rates, and the best two of each with four other seeds: as the first table will be."""
    draw = np.random.default_rng(0)
    best = {"adamw": (0.004, 2.62), "lamb": (0.02, 2.71), "muon": (0.04, 1.822), "mkor_adamw": (0.008, 2.41),
            "mkor_lamb": (0.04, 2.38), "mkor_muon": (0.02, 1.885), "mkor-momentum_adamw": (0.008, 2.36),
            "mkor-momentum_lamb": (0.02, 2.45), "mkor-momentum_muon": (0.04, 1.785)}  # fmt: skip
    seeds = {seed: draw.normal(0, 0.015) for seed in range(6)}
    runs: list[RunRecord] = []
    for place, (method, (center, low)) in enumerate(best.items()):
        losses: dict[float, float | str] = {}
        for k in range(-3, 3) if place != 1 else range(-5, 1):  # lamb's best is at the edge
            losses[center * 2.0**k] = low + 0.06 * k * k + seeds[0]
        if place % 3 == 2:
            losses[max(losses)] = "diverged"
        if place % 3 == 1:
            losses[min(losses)] = "stopped"
        runs += chosen(method, losses)
        for rate, more in ((center, 0.0), (center / 2, 0.05)):
            runs += confirmed(method, [low + more + seeds[seed] + draw.normal(0, 0.005) for seed in range(2, 6)],
                              rate=rate, search={"trials": 8})  # fmt: skip
    for number, run in enumerate(run for run in runs if run.search["stage"] == "confirm"):
        run.search["number"] = number
    return runs


def write(runs: Sequence[RunRecord], folder: Path) -> Path:
    for number, run in enumerate(runs):
        run.name = f"{number:03}-{run.name}"
        run.write(folder)
    return folder

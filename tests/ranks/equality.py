"""The same training run, by Trainer, under each way to spread it over processes: which weights does it end with?

``python -m tests.ranks.equality --write results/equality/equality.json`` runs everything and writes the table, as JSON
with versions and as Markdown beside it. A row is a `Strategy`, a column a `Method`, an entry the largest difference of
any weight to the single process after six optimizer steps, or the words of the refusal.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_soo.machine import commit, device_name
from hf_soo.runs.report import update_readme
from tests.ranks.cells import (
    ACCUMULATION,
    EPSILON,
    METHODS,
    OTHER_WAYS,
    PLAIN,
    SINGLE,
    STEPS,
    STRATEGIES,
    TOLERANCE,
    Cell,
    Result,
    cells_of,
    run,
)

Row = dict[Cell, float | str]


def differences(single: dict[Cell, Result], results: dict[Cell, Result]) -> Row:
    """Cell -> the largest difference of a weight to the single process, or the refusal's words."""
    return {
        cell: result if isinstance(result, str) else distance(result, single[cell]) for cell, result in results.items()
    }


def distance(one: Result, other: Result) -> float:
    """The largest difference between two runs' weights."""
    assert isinstance(one, Tensor) and isinstance(other, Tensor), f"refused: {one} or {other}"
    return float((one - other).abs().max())


def markdown(table: dict[str, Row]) -> str:
    """A table for each way: rows are strategies, columns methods; refusals are numbered below."""
    ways = dict.fromkeys(way for by_cell in table.values() for _, way in by_cell)
    return "\n\n".join(_one_way(table, way) for way in ways) + "\n"


def _one_way(table: dict[str, Row], way: str) -> str:
    methods = list(dict.fromkeys(m for by_cell in table.values() for m, w in by_cell if w == way))
    notes: list[str] = []

    def entry(value: float | str | None) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.0e}"
        if value not in notes:
            notes.append(value)
        return f"refused [{notes.index(value) + 1}]"

    lines = [f"| {way} | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for name, by_cell in table.items():
        if any(w == way for _, w in by_cell):
            lines.append(f"| {name} | {' | '.join(entry(by_cell.get((m, way))) for m in methods)} |")
    return "\n".join([*lines, *(f"\n[{i}] {note}" for i, note in enumerate(notes, 1))])


def report(table: dict[str, Row]) -> dict[str, Any]:
    """The table as plain JSON, with versions and what an entry means."""
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    return {
        "name": "equality",
        "entry": f"max |dW| to a single process after {STEPS} optimizer steps, accumulation {ACCUMULATION}, fp32, CPU",
        "tolerance": TOLERANCE,
        "base": f"adamw ({EPSILON}) unless named",
        "device": device_name(torch.device("cpu")),
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "methods": {name: method.settings for name, method in METHODS.items()},
        "rows": [
            {
                "strategy": name,
                "method": method,
                "way": way,
                "difference" if isinstance(value, float) else "refused": value,
            }
            for name, by_cell in table.items()
            for (method, way), value in by_cell.items()
        ],
    }


def table_of(written: dict[str, Any]) -> dict[str, Row]:
    """The table that ``report`` wrote."""
    table: dict[str, Row] = {}
    for entry in written["rows"]:
        value = entry["difference"] if "difference" in entry else entry["refused"]
        table.setdefault(entry["strategy"], {})[entry["method"], entry["way"]] = value
    return table


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--readme", type=Path, metavar="PAGE.md", help="put the table between its markers there")
    options = parser.parse_args()
    path: Path = options.write
    single = run(SINGLE, PLAIN + OTHER_WAYS)
    table = {strategy.name: differences(single, run(strategy, cells_of(strategy))) for strategy in STRATEGIES}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(table), indent=1) + "\n")
    text = markdown(table_of(json.loads(path.read_text())))
    path.with_suffix(".md").write_text(text)
    if options.readme is not None:
        update_readme(options.readme, "equality", text)
    print(text)


if __name__ == "__main__":
    main()

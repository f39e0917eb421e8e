"""Which rule moves each parameter, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hf_soo.engine.layers import Layer


def routing(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    layers: Sequence[Layer],
    left: Mapping[str, str],
    idle: Collection[str],
    *,
    method: str,
    base: str,
) -> dict[str, str]:
    """Per parameter: which rule moves it, and why it is left to the base.

    Args:
        groups: the base's parameter groups.
        names: id of a parameter -> its name.
        layers: what the method moves.
        left: module or parameter -> why it is not moved.
        idle: layers without statistics at the last update.
        method: the method's name.
        base: the base's name.
    """
    rules: dict[int, str] = {}
    for layer in layers:
        note = " (no statistics: it got no input at the last update)" if layer.name in idle else ""
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                rules[id(parameter)] = f"{method} -> {base}{note}"
    table = {}
    for group in groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), "(unnamed)")
            reason = left.get(name) or left.get(name.rpartition(".")[0])
            rule = f"{base} ({group['algorithm']})" if "algorithm" in group else base
            table[name] = rules.get(id(parameter), rule if reason is None else f"{rule}: {reason}")
    return table


def summary(table: Mapping[str, str], shown: int = 2) -> str:
    """``routing()`` in a few lines: a rule, how many parameters it moves, and the first of them.

    Args:
        table: what ``routing`` gave.
        shown: how many names are written out for each rule.
    """
    by_rule: dict[str, list[str]] = defaultdict(list)
    for name, rule in table.items():
        by_rule[rule].append(name)
    lines = []
    for rule, names in by_rule.items():
        more = f", and {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"  {rule}: {', '.join(names[:shown])}{more}")
    return "\n".join(lines)

"""Which rule moves each parameter, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_soo.engine.layers import Layer

UNNAMED = "(unnamed)"


@dataclass(frozen=True)
class ParameterIndex:
    """What belongs together when the optimizer is built: some strategies replace the parameters later.

    Args:
        parameters: the names of the parameters of each group of the base.
        layer: parameter name -> the layer that holds it.
        group: layer name -> the index of its weight's group.
        name_of: id of a parameter -> its name, for groups that are added later.
    """

    parameters: list[list[str]]
    layer: dict[str, str]
    group: dict[str, int]
    name_of: dict[int, str]

    @classmethod
    def of(
        cls, groups: Sequence[Mapping[str, Any]], names: Mapping[str, nn.Parameter], layers: Sequence[Layer]
    ) -> ParameterIndex:
        """Take it down.

        Args:
            groups: the base's parameter groups.
            names: parameter name -> the parameter.
            layers: what the method moves.
        """
        name_of = {id(parameter): name for name, parameter in names.items()}
        group_of = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
        return cls(
            parameters=[[name_of.get(id(p), UNNAMED) for p in group["params"]] for group in groups],
            layer={
                name_of[id(p)]: layer.name
                for layer in layers
                for p in (layer.weight, layer.bias)
                if p is not None and id(p) in name_of
            },
            group={layer.name: group_of[id(layer.weight)] for layer in layers if id(layer.weight) in group_of},
            name_of=name_of,
        )

    def extend(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take down groups that were added to the base."""
        self.parameters.extend([self.name_of.get(id(p), UNNAMED) for p in group["params"]] for group in groups)

    def check(self, groups: Sequence[Mapping[str, Any]], layers: Sequence[Layer], method: str) -> None:
        """Refuse to go on without the model's parameters.

        Args:
            groups: the base's parameter groups.
            layers: what the method moves.
            method: its name.

        Raises:
            RuntimeError: somebody has replaced them.
        """
        held = {id(parameter) for group in groups for parameter in group["params"]}
        lost = bool(layers) and not any(id(layer.weight) in held for layer in layers)
        if lost or [len(group["params"]) for group in groups] != [len(names) for names in self.parameters]:
            raise RuntimeError(
                f"{method}: the parameters in its groups are no longer those of the model: they were replaced after "
                "construction. Under DeepSpeed call hf_soo.integrations.deepspeed.attach(engine, optimizer) after "
                "deepspeed.initialize; under FSDP2 build the optimizer after fully_shard, or let accelerate prepare "
                "model and optimizer together."
            )


def routing(
    groups: Sequence[Mapping[str, Any]],
    parameter_index: ParameterIndex,
    skipped: Mapping[str, str],
    no_statistics: Collection[str],
    *,
    method: str,
    base: str,
) -> dict[str, str]:
    """Per parameter: which rule moves it, and why it is left to the base.

    Args:
        groups: the base's parameter groups.
        parameter_index: the parameters in them.
        skipped: module or parameter -> why it is not moved.
        no_statistics: layers without statistics at the last update.
        method: the method's name.
        base: the base's name.
    """
    table = {}
    for group, names in zip(groups, parameter_index.parameters, strict=True):
        rule = f"{base} ({group['algorithm']})" if "algorithm" in group else base
        for name in names:
            layer, reason = parameter_index.layer.get(name), skipped.get(name) or skipped.get(name.rpartition(".")[0])
            note = " (no statistics: it got no input at the last update)" if layer in no_statistics else ""
            if layer is not None and layer not in skipped:
                table[name] = f"{method} -> {base}{note}"
            else:
                table[name] = rule if reason is None else f"{rule}: {reason}"
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

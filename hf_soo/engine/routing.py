"""Which rule moves each parameter, in words."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.engine.dtensors import full_shape
from hf_soo.engine.layers import Layer
from hf_soo.engine.selection import Selection

logger = logging.getLogger(__name__)

UNNAMED = "(unnamed)"
TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)
ADDED = "added to the groups after construction"
NOTHING = "nothing: frozen when the optimizer was built, thawed later and in none of its groups"
MOST = 0.5
"""A larger share of the matrices' entries left to the base is warned of."""


@dataclass(frozen=True)
class ParameterIndex:
    """What belongs together when the optimizer is built: some strategies replace the parameters later.

    Args:
        parameters: the names of the parameters of each group of the base.
        layers: parameter name -> the layers that hold it, or parts of it.
        group: layer name -> the index of its weight's group.
        slots: parameter name -> the module that holds it and its name there.
        frozen: the parameters that were not trained.
        added: those that came into the groups later.
        warned: the thawed ones and the newcomers that were warned of.
    """

    parameters: list[list[str]]
    layers: dict[str, list[str]]
    group: dict[str, int]
    slots: dict[str, tuple[nn.Module, str]]
    frozen: frozenset[str]
    added: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]], model: nn.Module, layers: Sequence[Layer]) -> ParameterIndex:
        """Take it down.

        Args:
            groups: the base's parameter groups.
            model: the model.
            layers: what the method moves.
        """
        slots = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in model.named_modules()
            for name in module._parameters
        }
        named = dict(model.named_parameters())
        name_of = {id(parameter): name for name, parameter in named.items()}
        held: dict[str, list[str]] = defaultdict(list)
        for layer in layers:
            for p in (layer.weight, layer.bias):
                if p is not None and id(p) in name_of:
                    held[name_of[id(p)]].append(layer.name)
        index = cls([], dict(held), {}, slots, frozenset(n for n, p in named.items() if not p.requires_grad))
        index.number(groups, layers)
        return index

    def parameter(self, name: str) -> Tensor:
        """The parameter as the model holds it now."""
        module, attribute = self.slots[name]
        return getattr(module, attribute)  # type: ignore[no-any-return]

    def moved(self, layers: Sequence[Layer]) -> set[str]:
        """The parameters all of whose layers are among these."""
        names = {layer.name for layer in layers}
        return {parameter for parameter, own in self.layers.items() if names.issuperset(own)}

    def number(self, groups: Sequence[Mapping[str, Any]], layers: Sequence[Layer]) -> None:
        """Take down which parameter is in which group, anew."""
        name_of = {id(getattr(*slot)): name for name, slot in reversed(self.slots.items())}  # a tied one's first name
        group_of = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
        self.parameters[:] = [[name_of.get(id(p), UNNAMED) for p in group["params"]] for group in groups]
        self.group.update({la.name: group_of[id(la.weight)] for la in layers if id(la.weight) in group_of})

    def extend(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take down groups that were added to the base."""
        name_of = {id(getattr(*slot)): name for name, slot in reversed(self.slots.items())}
        self.parameters.extend([name_of.get(id(p), UNNAMED) for p in group["params"]] for group in groups)
        self.added.update(name for names in self.parameters[-len(groups) :] for name in names)

    @property
    def thawed(self) -> set[str]:
        """The parameters that were frozen at construction and are trained now, but are in no group: none moves."""
        return {name for name in self.frozen - self.added if self.parameter(name).requires_grad}

    def warn_of_thawed(self, method: str) -> None:
        """Warn, of each once, of ``thawed`` parameters.

        Args:
            method: its name.
        """
        new = sorted(self.thawed - self.warned)
        if new:
            self.warned.update(new)
            logger.warning(
                "%s: %s (%d parameters) were frozen when the optimizer was built and are trained now, but they are in "
                "none of its groups, so they never move. Call optimizer.add_param_group({'params': [...]}), and the "
                "base alone moves them; or build the optimizer while all that will ever be trained is unfrozen, and "
                "freeze it then.",
                method, new[:3], len(new),
            )  # fmt: skip

    def warn_of_newcomers(self, model: nn.Module, groups: Sequence[Mapping[str, Any]], method: str) -> None:
        """Warn, of each once, of trained parameters that came into the model since: adapters, a new head.

        Args:
            model: the model.
            groups: the base's parameter groups.
            method: its name.
        """
        known = {id(getattr(*slot, None)) for slot in self.slots.values()}
        known.update(id(parameter) for group in groups for parameter in group["params"])
        new = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        if new := [name for name in new if name not in self.warned]:
            self.warned.update(new)
            logger.warning(
                "%s: %s (%d parameters) came into the model after the optimizer was built and are in none of its "
                "groups, so it never moves them. Put adapters and heads into the model first, and build it then.",
                method, new[:3], len(new),
            )  # fmt: skip

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

    def refuse_sparse(self, base: Optimizer, layers: Sequence[Layer], method: str) -> None:
        """Name a parameter whose gradient nobody can take.

        Args:
            base: the base.
            layers: what the method moves.
            method: its name.

        Raises:
            ValueError: it is sparse, and the method moves it, or the base takes dense gradients alone.
        """
        moved = {id(layer.weight) for layer in layers}
        for group, names in zip(base.param_groups, self.parameters, strict=True):
            for parameter, name in zip(group["params"], names, strict=True):
                if parameter.grad is None or not parameter.grad.is_sparse:
                    continue
                if id(parameter) in moved or not isinstance(base, TAKE_SPARSE):
                    who = method if id(parameter) in moved else f"base {type(base).__name__}"
                    raise ValueError(
                        f"the gradient of {name!r} is sparse, and {who} takes dense ones alone; build the embedding "
                        "with sparse=False, or leave it to base='sgd' or 'torch.optim:Adagrad'."
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
            moved = [layer for layer in parameter_index.layers.get(name, ()) if layer not in skipped]
            if moved:
                table[name] = f"{method} -> {base}{_without(moved, no_statistics)}"
            else:
                reason = ADDED if name in parameter_index.added else _reason(name, parameter_index, skipped)
                table[name] = rule if reason is None else f"{rule}: {reason}"
    return table | dict.fromkeys(sorted(parameter_index.thawed), NOTHING)


def _reason(name: str, index: ParameterIndex, skipped: Mapping[str, str]) -> str | None:
    """Why a parameter is left to the base: its own reason, its layers', or its module's."""
    places = [name, *index.layers.get(name, ()), name.rpartition(".")[0]]
    return next((skipped[place] for place in places if place in skipped), None)


def _without(layers: Sequence[str], no_statistics: Collection[str]) -> str:
    """A note on the layers of a parameter that saw nothing at the last update."""
    empty = sum(layer in no_statistics for layer in layers)
    if not empty:
        return ""
    which = "it" if len(layers) == 1 else f"{empty} of its {len(layers)} matrices"
    return f" (no statistics: {which} got no input at the last update)"


def warn_of_what_is_left(index: ParameterIndex, selection: Selection, method: str, base: str) -> None:
    """Warn where most entries of the matrices, embeddings and decoders apart, are the base's alone.

    Args:
        index: the parameters in the groups.
        selection: what the method moves, and why not the rest.
        method: its name.
        base: the base's.
    """
    sizes = {
        name: math.prod(full_shape(index.parameter(name)))
        for names in index.parameters
        for name in names
        if name in index.slots and len(full_shape(index.parameter(name))) > 1
    }
    left: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        reason = None if name in index.layers else _reason(name, index, selection.skipped)
        if reason is not None and reason not in selection.meant:
            left[reason].append(name)
    moved = sum(size for name, size in sizes.items() if name in index.layers)
    lost = sum(sizes[name] for names in left.values() for name in names)
    if lost > MOST * (lost + moved):
        logger.warning(
            "%s leaves %.0f %% of the matrices' entries (embeddings and decoders apart) to %s alone: %s.",
            method, 100 * lost / (lost + moved), base,
            "; ".join(f"{names[0]}, {len(names)} such: {reason}" for reason, names in left.items()),
        )  # fmt: skip


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

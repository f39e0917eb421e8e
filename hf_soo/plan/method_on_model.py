"""What a plan is about: a method with its settings on a model's layers, and which rank keeps which factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from hf_soo.bench.measure import Pair, parse_pairs
from hf_soo.bench.step_kinds import StepKinds, step_kinds_of
from hf_soo.engine.capture import Buffers
from hf_soo.engine.checks import unknown_key
from hf_soo.engine.layers import Layer, RowLayer
from hf_soo.engine.placement import Plan, make_plan
from hf_soo.engine.preconditioner import LayerState, Preconditioner, local_state
from hf_soo.integrations.arguments import parse_settings
from hf_soo.optimizers.bases import BASES, base_arguments, check_flat
from hf_soo.optimizers.wrappers import WRAPPERS, split_arguments
from hf_soo.plan.request import PlanConfig
from hf_soo.preconditioners.config import make_config
from hf_soo.registry import METHODS, takes_batch_size


@dataclass(frozen=True)
class MethodOnModel:
    """A method on a model.

    Args:
        pair: its name, its base's (None: its own) and its settings.
        preconditioner: the transform; None: a base alone.
        layers: what it moves.
        base: the name of its base.
        around: the settings of what is put around its base.
    """

    pair: Pair
    preconditioner: Preconditioner | None
    layers: list[Layer]
    base: str
    around: Mapping[str, Any]

    @classmethod
    def of(cls, pair: Pair, model: nn.Module, batch: int) -> MethodOnModel:
        """Check the settings and choose the layers; ``batch`` sequences in a step, where a method wants the number.

        Raises:
            ValueError: a setting is refused, or the base is none of ours.
        """
        method = METHODS[pair.name]
        base = pair.name if method.config is None else pair.base or method.base
        if base not in BASES:
            raise ValueError(f"base={base!r} of {pair.name!r} is not known to the plan; use one of {', '.join(BASES)}.")
        valid = base_arguments(BASES[base].cls)
        settings, around = split_arguments(dict(pair.settings), () if method.config else valid)
        if method.config is None:
            for key in settings:
                if key not in valid:
                    raise ValueError(unknown_key(f"argument of {pair.name!r}", key, [*valid, *WRAPPERS]))
            return cls(pair, None, [], pair.name, around)
        if takes_batch_size(pair.name):
            settings.setdefault("batch_size", batch)
        pair = Pair(pair.name, base, (*settings.items(), *around.items()))
        preconditioner = method.make(make_config(pair.name, method.config, settings))
        selection = method.select(model, None, None, preconditioner.skip_reason)
        return cls(pair, preconditioner, selection.layers, base, around)

    @property
    def label(self) -> str:
        """Name, settings and base, as a column's head."""
        name = ":".join([self.pair.name, *(f"{key}={value}" for key, value in self.pair.settings)])
        return name if self.preconditioner is None else f"{name}+{self.base}"

    @cached_property
    def step_kinds(self) -> StepKinds | None:
        """The kinds of its steps; None for a base alone."""
        return None if self.preconditioner is None else step_kinds_of(self.preconditioner)

    @property
    def buffers(self) -> list[Buffers]:
        """What hooks sum a window in, for each layer that they are on."""
        recorder = None if self.preconditioner is None else self.preconditioner.recorder
        if recorder is None or not recorder.hooks:
            return []
        return [recorder.allocate(layer) for layer in self.layers if isinstance(layer, RowLayer)]

    def grid(self, ranks: int) -> Plan | None:
        """Who keeps and who applies which layer's factors; None where every rank keeps all.

        Raises:
            ValueError: the method's workers do not divide the ranks.
        """
        workers = None if self.preconditioner is None else self.preconditioner.workers(ranks)
        if self.preconditioner is None or workers is None or ranks == workers == 1:
            return None
        return make_plan({layer.name: self.preconditioner.cost(layer) for layer in self.layers}, ranks, workers)

    def states(self, ranks: int) -> Iterator[tuple[int, list[LayerState]]]:
        """Rank -> the factors it keeps; one rank stands for all where they keep the same."""
        transform, grid = self.preconditioner, self.grid(ranks)
        whole = {} if transform is None else {layer.name: transform.init(layer) for layer in self.layers}
        if transform is None or grid is None:
            yield 0, list(whole.values())
            return
        for rank in range(ranks):
            kept = (
                local_state(state, transform.shared, grid.owner[name] == rank, grid.is_gradient_worker(rank, name))
                for name, state in whole.items()
            )
            yield rank, list(kept)


def bytes_of(state: LayerState, names: frozenset[str] | None = None) -> int:
    """Of a layer's factors, or of those with one of the names."""
    return sum(t.nbytes for factor in state.values() for key, t in factor.items() if names is None or key in names)


def asked_methods(config: PlanConfig, model: nn.Module) -> list[MethodOnModel]:
    """The method that is asked for, and those beside it.

    Raises:
        ValueError: a method or a setting is unknown, or refused.
        NotImplementedError: a base cannot step under the strategy.
    """
    asked = Pair(config.optim, config.base, tuple(parse_settings("optim_args", config.optim_args).items()))
    beside = parse_pairs(config.beside, config.base) if config.beside else []
    found = [MethodOnModel.of(pair, model, config.batch) for pair in [asked, *beside]]
    for method in found:
        method.grid(config.gpus)  # refuses a number of workers that does not fit
        base = BASES[method.base].cls
        if config.strategy in ("zero1", "zero2", "zero3"):
            check_flat(base, config.strategy)
    return list({method.label: method for method in found}.values())  # the asked method may stand beside itself

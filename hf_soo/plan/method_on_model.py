"""What a plan is about: a method with its settings on a model's layers, and which rank keeps which factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_soo.bench.bench import Pair, parse_pairs
from hf_soo.bench.step_kinds import Cycle, cycle_of
from hf_soo.engine.capture import GradientRecorder
from hf_soo.engine.checks import unknown_key
from hf_soo.engine.layers import Layer
from hf_soo.engine.placement import Plan, make_plan
from hf_soo.engine.preconditioner import LayerState, Preconditioner, local_state
from hf_soo.integrations.arguments import parse_settings
from hf_soo.optimizers.bases import BASES, base_arguments, check_flat, check_row_shards
from hf_soo.plan.request import PlanConfig
from hf_soo.preconditioners.config import make_config
from hf_soo.preconditioners.eva import Eva, EvaF
from hf_soo.preconditioners.kfac import FOOF
from hf_soo.preconditioners.mkor import MKOR, LowRank
from hf_soo.registry import METHODS, takes_batch_size


@dataclass(frozen=True)
class Subject:
    """A method on a model.

    Args:
        pair: its name, its base's (None: its own) and its settings.
        preconditioner: the transform; None: a base alone.
        layers: what it moves.
        base: the name of its base.
    """

    pair: Pair
    preconditioner: Preconditioner | None
    layers: list[Layer]
    base: str

    @classmethod
    def of(cls, pair: Pair, model: nn.Module, batch: int) -> Subject:
        """Check the settings and choose the layers.

        Args:
            pair: the method.
            model: on any device.
            batch: sequences in a step, for methods that want the number of loss terms.

        Raises:
            ValueError: a setting is refused, or the base is none of ours.
        """
        method = METHODS[pair.name]
        if method.config is None:
            valid = base_arguments(BASES[pair.name].cls)
            for key, _ in pair.settings:
                if key not in valid:
                    raise ValueError(unknown_key(f"argument of {pair.name!r}", key, valid))
            return cls(pair, None, [], pair.name)
        base = pair.base or method.base
        if base not in BASES:
            raise ValueError(f"base={base!r} of {pair.name!r} is not known to the plan; use one of {', '.join(BASES)}.")
        settings = dict(pair.settings)
        if takes_batch_size(pair.name):
            settings.setdefault("batch_size", batch)
        pair = Pair(pair.name, base, tuple(settings.items()))
        preconditioner = method.make(make_config(pair.name, method.config, settings))
        selection = method.select(model, None, None, preconditioner.skip_reason)
        return cls(pair, preconditioner, selection.layers, base)

    @property
    def label(self) -> str:
        """Name, settings and base, as a column's head."""
        name = ":".join([self.pair.name, *(f"{key}={value}" for key, value in self.pair.settings)])
        return name if self.preconditioner is None else f"{name}+{self.base}"

    @cached_property
    def cycle(self) -> Cycle | None:
        """The kinds of its steps; None for a base alone."""
        return None if self.preconditioner is None else cycle_of(self.preconditioner)

    @property
    def learns_from_gradients(self) -> bool:
        """Whether it needs no statistics."""
        return self.preconditioner is not None and isinstance(self.preconditioner.recorder, GradientRecorder)

    @property
    def history(self) -> int | None:
        """K of low-rank MKOR; None for every other method."""
        if isinstance(self.preconditioner, MKOR) and isinstance(self.preconditioner.form, LowRank):
            return self.preconditioner.config.history
        return None

    @property
    def rank_one(self) -> bool:
        """Whether the direction follows from a few scalars of each layer (Eva, Eva-f)."""
        return isinstance(self.preconditioner, (Eva, EvaF))

    @property
    def input_side_alone(self) -> bool:
        """Whether rows of the gradient are moved independently (FOOF)."""
        return isinstance(self.preconditioner, FOOF)

    def grid(self, ranks: int) -> Plan | None:
        """Who keeps and who applies which layer's factors; None where every rank keeps all.

        Raises:
            ValueError: the method's workers do not divide the ranks.
        """
        if self.preconditioner is None:
            return None
        workers = self.preconditioner.workers(ranks)
        if workers is None or ranks == workers == 1:
            return None
        costs = {layer.name: self.preconditioner.cost(layer) for layer in self.layers}
        return make_plan(costs, ranks, workers)

    def states(self, ranks: int) -> Iterator[tuple[int, list[LayerState]]]:
        """Rank -> the factors it keeps; one rank stands for all where they keep the same."""
        if self.preconditioner is None:
            yield 0, []
            return
        whole = {layer.name: self.preconditioner.init(layer) for layer in self.layers}
        grid = self.grid(ranks)
        if grid is None:
            yield 0, list(whole.values())
            return
        for rank in range(ranks):
            place, shared = Place(grid, rank), self.preconditioner.shared
            yield (
                rank,
                [
                    local_state(state, shared, place.is_inverse_worker(name), place.is_gradient_worker(name))
                    for name, state in whole.items()
                ],
            )


@dataclass(frozen=True)
class Place:
    """One rank's view of a grid, without its process groups."""

    plan: Plan
    rank: int

    def is_inverse_worker(self, name: str) -> bool:
        """Whether the rank keeps and inverts the layer's factors."""
        return self.plan.owner[name] == self.rank

    def is_gradient_worker(self, name: str) -> bool:
        """Whether the rank preconditions the layer."""
        return self.plan.is_gradient_worker(self.rank, name)


def matrix_of(layer: Layer) -> tuple[int, int]:
    """(n, m) of a layer's gradient [G | bias]; a single parameter is [d_0, the rest]."""
    n, rest = layer.shape[0], torch.Size(layer.shape[1:]).numel()
    return n, rest + (layer.bias is not None)


def bytes_of(state: LayerState, names: frozenset[str] | None = None) -> int:
    """Of a layer's factors, or of those with one of the names."""
    tensors: list[Tensor] = [t for factor in state.values() for k, t in factor.items() if names is None or k in names]
    return sum(tensor.nbytes for tensor in tensors)


def subjects(config: PlanConfig, model: nn.Module) -> list[Subject]:
    """The method that is asked for, and those beside it.

    Raises:
        ValueError: a method or a setting is unknown, or refused.
        NotImplementedError: a base cannot step under the strategy.
    """
    asked = Pair(config.optim, config.base, tuple(parse_settings("optim_args", config.optim_args).items()))
    beside = parse_pairs(config.beside, config.base) if config.beside else []
    found = [Subject.of(pair, model, config.batch) for pair in [asked, *beside]]
    for subject in found:
        subject.grid(config.gpus)  # refuses a number of workers that does not fit
        base = BASES[subject.base].cls
        if config.strategy in ("zero1", "zero2", "zero3"):
            check_flat(base, config.strategy)
        elif config.strategy == "fsdp2":
            check_row_shards(base)
    return list({subject.label: subject for subject in found}.values())  # the asked method may stand beside itself

"""What a second-order method is to the step loop: what it needs, and how it turns G into P."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from hf_soo.engine.capture import GradientRecorder, Recorder, Statistics
from hf_soo.engine.checks import Checked, Count, Whole
from hf_soo.engine.flops import ELEMENTWISE, MinimalWork, RowSumSizes
from hf_soo.engine.gradients import Joint, RowSums, TransformNorms, run_whole
from hf_soo.engine.layers import Layer
from hf_soo.engine.rescale import NoRescale, Rescale
from hf_soo.engine.selection import Selection, select_layers

Factor = dict[str, Tensor]
"""The tensors of one side (or axis) of one layer, by name."""

LayerState = dict[str, Factor]
"""Side -> its tensors. The step loop stacks the states of layers of one shape: every tensor gains a dimension [L]."""


class Side(IntEnum):
    """The two sides of a gradient matrix, as they are indexed in ``Updated``."""

    INPUT = 0
    OUTPUT = 1


BOTH_SIDES = ("input", "output")
ONE_SIDE = ("gradient",)


class Outcome(IntEnum):
    """What became of one side's statistics in an update, or of its inverse in a refresh."""

    UPDATED = 0
    NO_ROWS = 1
    NOT_FINITE = 2
    NOISE = 3
    FAILED = 4

    @property
    def text(self) -> str:
        """In words, for a warning."""
        return (
            "updated",
            "no rows",
            "non-finite statistics",
            "zero or rounding noise",
            "factor did not decompose",
        )[self.value]


@dataclass(slots=True)
class Updated:
    """What an update saw, for the diagnostics.

    Args:
        outcomes: an ``Outcome`` for each layer and side, int64 [L, sides].
        norms: |a|² and |b|² (or |g|²) of the statistics as they came, [L, sides].
    """

    outcomes: Tensor
    norms: Tensor

    @classmethod
    def of_gradient(cls, size: Tensor, valid: Tensor) -> Updated:
        """The report on the gradient as the one side: |g|² [L], and whether it could be used [L]."""
        return cls((~valid * Outcome.NOT_FINITE.value)[:, None], size[:, None])  # Outcome.UPDATED is 0


class Preconditioner(ABC):
    """A gradient transform G -> P with state for each layer.

    The class attributes are fixed at construction. All tensors of ``update``, ``refresh`` and ``transform`` have a
    leading dimension L over layers of one shape; state that they change in place is kept.

    Attributes:
        config: its settings; ``Periodic`` ones, unless it overrides ``updates_at``.
        recorder: what it learns from.
        rescale: how long P may be.
        side_names: what diagnostics tell apart.
        shared: names of the tensors that ``transform`` needs; None: all. The others stay at a layer's owner.
        gradient_passes: how often ``transform`` reads or writes the gradient, about.
        least_passes: how often it must read the gradient before the base can, which may make each P as it reads G.
        stacks: whether layers of one shape are worked on together on a GPU: few launches, but a copy of each factor.
        cpu_stack: elements of the layers of one shape that a CPU works on together: small ones cost calls, and a stack
            copies, out of cache.
        row_wise: whether it can work on some rows of G, with small sums over the others (``RowWise``).
        row_state: names of the tensors of its state that have the gradient's rows, and are kept where those are.
        refreshes_first: whether inverses are of the factors before this step's update, not after it.
        watches_loss: whether it wants ``observe`` to be called.
        measures: whether ``transform`` needs |G| and its unit (``Joint.measure_``).
    """

    config: Any
    recorder: Recorder = GradientRecorder()
    rescale: Rescale = NoRescale()
    side_names: tuple[str, ...] = BOTH_SIDES
    shared: frozenset[str] | None = None
    gradient_passes: int = 4
    least_passes: int = 1
    stacks: bool = True
    cpu_stack: int = 1 << 20
    row_wise: bool = False
    row_state: frozenset[str] = frozenset()
    refreshes_first: bool = False
    watches_loss: bool = False
    measures: bool = True

    def __init__(self, config: Any) -> None:
        """Take the settings."""
        self.config = config

    def updates_at(self, step: int) -> bool:
        """Whether the factors are updated in optimizer step ``step``, counted from 0; as the settings say."""
        return bool(self.config.updates_at(step))

    def refreshes_at(self, step: int) -> bool:
        """Whether the inverses are computed anew in step ``step``, after the update."""
        return False

    def skip_reason(self, layer: Layer) -> str | None:
        """Why it cannot move a layer, or None."""
        return None

    def workers(self, world: int) -> int | None:
        """How many of ``world`` ranks precondition a layer; None: all, and all keep its factors."""
        return None

    def cost(self, layer: Layer) -> float:
        """What inverting a layer's factors costs, in any unit; for the placement."""
        return float(sum(d**3 for d in layer.shape))

    def minimal_products(self, layer: Layer) -> MinimalWork | None:
        """What the steps of a layer must multiply and factorise, for the benchmark; None: nothing worth counting.

        By shape alone, a trained bias being one more column of the gradient. Only what ``step`` does: no product of
        the backward pass (K-FAC's second moments), nothing that is O(d²).
        """
        return None

    def flops(self, layer: Layer) -> tuple[float, float, float]:
        """Of G -> P, of an update and of a refresh of a layer, about: by default the minimal products' if any."""
        minimal, (n, m) = self.minimal_products(layer), layer.matrix
        if minimal is None:
            return ELEMENTWISE * n * m, ELEMENTWISE * (n + m), 0
        return minimal.flops

    def row_sums(self, layer: Layer) -> RowSumSizes | None:
        """What it sums over ranks where each rank has some rows of the gradients; None: it gathers whole gradients."""
        return None

    @abstractmethod
    def init(self, layer: Layer) -> LayerState:
        """The state of a layer before the first step."""

    @abstractmethod
    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """The state after a window's statistics; a side whose statistics cannot be used stays as it was."""

    def refresh(self, state: LayerState) -> tuple[LayerState, Tensor]:
        """The state with new inverses, and an ``Outcome`` for each layer and side, [L, sides]."""
        raise NotImplementedError(f"{type(self).__name__} refreshes nothing.")

    @abstractmethod
    def transform(self, state: LayerState, grad: Joint) -> TransformNorms:
        """Replace G by P in place. Where P is not finite G stays, and ``TransformNorms.after`` is not finite."""

    def update_rows(self, state: LayerState, statistics: Statistics) -> RowSums[tuple[LayerState, Updated]]:
        """``update`` where ``statistics.grad`` may be rows; methods that learn from the gradient override it."""
        yield from ()  # the statistics of other methods are whole
        return self.update(state, statistics)

    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """``transform`` where ``grad`` may be rows; as it is for a method that needs them all."""
        yield from ()
        return self.transform(state, grad)

    @abstractmethod
    def distances(self, state: LayerState) -> Tensor:
        """|F - I|_F of each side's inverse factor, [L, sides]; 0 where a side is not used."""

    def observe(self, loss: Tensor, step: int) -> bool:
        """Take the training loss of a step, the mean over the global batch.

        Args:
            loss: a 0-d tensor, the same on every rank.
            step: the step that it belongs to.

        Returns:
            Whether the method is done: from the next step on the base goes on alone.
        """
        return False

    def global_state(self) -> dict[str, Tensor]:
        """State that belongs to no layer, by name."""
        return {}

    def load_global_state(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from ``global_state()``, whose tensors are filled in place; the argument is left as it is."""
        for name, tensor in self.global_state().items():
            tensor.copy_(saved[name])


class RowWise(Preconditioner):
    """A method whose ``transform_rows`` works on any rows."""

    row_wise = True

    @abstractmethod
    def transform_rows(self, state: LayerState, grad: Joint) -> RowSums[TransformNorms]:
        """Replace the rows of G that ``grad`` holds by those of P in place; the state is whole, but for ``row_state``.

        Yields:
            What it summed over its rows, to be summed over all.
        """

    def transform(self, state: LayerState, grad: Joint) -> TransformNorms:
        """``transform_rows`` on all rows."""
        return run_whole(self.transform_rows(state, grad))


class Identity(Preconditioner):
    """No preconditioner: the base optimizer alone, under the same interface."""

    def updates_at(self, step: int) -> bool:
        """Never."""
        return False

    def init(self, layer: Layer) -> LayerState:
        """Nothing."""
        return {}

    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """Not called: it never updates."""
        raise RuntimeError("an optimizer without a preconditioner has nothing to update.")

    def transform(self, state: LayerState, grad: Joint) -> TransformNorms:
        """Not called: it has no layers."""
        raise RuntimeError("an optimizer without a preconditioner has nothing to transform.")

    def distances(self, state: LayerState) -> Tensor:
        """Not called: it has no layers."""
        raise RuntimeError("an optimizer without a preconditioner has no factors.")


@dataclass(frozen=True)
class Periodic(Checked):
    """When factors are updated: in step t, from 0, if ``t < warmup_updates or t % update_period == 0``.

    Args:
        update_period: optimizer steps between updates.
        warmup_updates: so many first steps each update.
    """

    update_period: Count = 10
    warmup_updates: Whole = 10

    def updates_at(self, step: int) -> bool:
        """Whether step ``step`` updates the factors."""
        return step < self.warmup_updates or step % self.update_period == 0


@dataclass(frozen=True)
class Method:
    """One row of the table of optimizers; a method's file ends with its own.

    Args:
        name: what ``build_optimizer`` knows it by.
        title: name and paper.
        base: the default base optimizer.
        config: the preconditioner's settings, or None for a base optimizer alone.
        make: config -> preconditioner.
        select: which layers, or parameters, of a model it moves.
        base_args: arguments of the default base that are not its own defaults.
        apply_to: what of the base it acts on, if nothing else is said.
        rates: the range of learning rates to start from over its default base, where that is not the base's own.
    """

    name: str
    title: str
    base: str
    config: type[Any] | None = None
    make: Callable[[Any], Preconditioner] = Identity
    select: Callable[..., Selection] = select_layers
    base_args: Mapping[str, Any] = field(default_factory=dict)
    apply_to: str = "gradient"
    rates: tuple[float, float] | None = None


def stacked(states: Sequence[LayerState], device: torch.device, names: Collection[str] | None = None) -> LayerState:
    """The states of a group, every tensor with a leading dimension [L]; views if the group is one layer.

    Args:
        states: of the layers of the group.
        device: where the layers are.
        names: of the tensors to take; None: all.
    """
    for state in states:
        for factor in state.values():
            for key, tensor in factor.items():
                if tensor.device != device:  # the model moved after construction
                    factor[key] = tensor.to(device)
    first, *others = states
    return {
        side: {
            key: torch.stack([tensor, *(state[side][key] for state in others)]) if others else tensor[None]
            for key, tensor in factor.items()
            if names is None or key in names
        }
        for side, factor in first.items()
    }


def unstack_(states: Sequence[LayerState], new: LayerState) -> None:
    """Copy a stacked state back into the layers' own, but for what was changed in place."""
    for i, state in enumerate(states):
        for side, factor in new.items():
            for key, tensor in factor.items():
                target = state[side][key]
                if target.data_ptr() != tensor[i].data_ptr():
                    target.copy_(tensor[i])


def local_state(state: LayerState, shared: Collection[str] | None, keeps: bool, works: bool) -> LayerState:
    """What a rank holds of a layer's state: all if it ``keeps`` it, else, if it ``works``, what is ``shared``."""
    if shared is None or keeps:
        return state
    return {side: {k: t for k, t in factor.items() if works and k in shared} for side, factor in state.items()}

"""What a second-order method is to the step loop: what it needs, and how it turns G into P."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from hf_soo.engine.capture import Needs
from hf_soo.engine.gradients import Grad
from hf_soo.engine.layers import Layer
from hf_soo.engine.linalg import Moved
from hf_soo.engine.rescale import NoRescale, Rescale
from hf_soo.engine.statistics import Statistics

Factor = dict[str, Tensor]
"""The tensors of one side (or axis) of one layer, by name."""

LayerState = dict[str, Factor]
"""Side -> its tensors. The step loop stacks the states of layers of one shape: every tensor gains a dimension [L]."""


class Side(IntEnum):
    """The two sides of a gradient matrix, as they are indexed in ``Updated``."""

    INPUT = 0
    OUTPUT = 1


class Outcome(IntEnum):
    """What became of one side's statistics in an update."""

    UPDATED = 0
    NO_ROWS = 1
    NOT_FINITE = 2
    NOISE = 3

    @property
    def text(self) -> str:
        """In words, for a warning."""
        return {0: "updated", 1: "no rows", 2: "non-finite statistics", 3: "zero or rounding noise"}[self.value]


@dataclass(slots=True)
class Updated:
    """What an update saw, for the diagnostics.

    Args:
        outcomes: an ``Outcome`` for each layer and ``Side``, int64 [L, 2].
        norms: |a|² and |b|² of the statistics as they came, [L, 2].
    """

    outcomes: Tensor
    norms: Tensor


class Preconditioner(ABC):
    """A gradient transform G -> P with state for each layer.

    ``needs`` and ``rescale`` are fixed at construction. All tensors of ``update`` and ``transform`` have a leading
    dimension L over layers of one shape.
    """

    needs: Needs = Needs()
    rescale: Rescale = NoRescale()

    @abstractmethod
    def updates_at(self, step: int) -> bool:
        """Whether the factors are updated in optimizer step ``step``, counted from 0."""

    @abstractmethod
    def init(self, layer: Layer) -> LayerState:
        """The state of a layer before the first step."""

    @abstractmethod
    def update(self, state: LayerState, statistics: Statistics) -> tuple[LayerState, Updated]:
        """The state after a window's statistics; a side whose statistics cannot be used stays as it was."""

    @abstractmethod
    def transform(self, state: LayerState, grad: Grad) -> Moved:
        """Replace G by P in place. Where P is not finite G stays, and ``Moved.after`` is not finite."""

    @abstractmethod
    def distances(self, state: LayerState) -> Tensor:
        """|F - I|_F of the input and the output side's inverse factor, [L, 2]; 0 where a side is not used."""


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

    def transform(self, state: LayerState, grad: Grad) -> Moved:
        """Not called: it has no layers."""
        raise RuntimeError("an optimizer without a preconditioner has nothing to transform.")

    def distances(self, state: LayerState) -> Tensor:
        """Not called: it has no layers."""
        raise RuntimeError("an optimizer without a preconditioner has no factors.")

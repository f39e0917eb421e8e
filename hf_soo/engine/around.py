"""What the step goes through around a base: its step cut in two, what is put around it, and its two sets of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from hf_soo.engine.state import OverBase
from hf_soo.engine.strategy import LocalGradient, Names, Strategy


class Halves(Protocol):
    """A base's step in two, for a method that acts on what lies between (``optimizers.halves``)."""

    def take(self, gradients: Iterable[LocalGradient]) -> None:
        """The base takes the gradients in, and its directions take their place."""

    def move(self) -> None:
        """The weights move by what the gradients hold."""


class Wrappers(Protocol):
    """What is put around a base's step (``optimizers.wrappers``). Every rank must make each of these calls."""

    @property
    def shows(self) -> bool:
        """Whether the model has other weights in evaluation than in training."""

    def mix(self, base: Optimizer, strategy: Strategy, names: Names) -> None:
        """Change the gradients before the base takes them in."""

    def show(self, strategy: Strategy, names: Names, model: nn.Module) -> None:
        """Give the model the weights that it is evaluated with."""

    def hide(self) -> None:
        """Give it back those that it is trained with."""


class TwoWeights(OverBase):
    """An optimizer whose model may be evaluated with other weights than it is trained with."""

    wrappers: Wrappers | None

    def train(self) -> None:
        """Training goes on: with the weights for it, where there are two sets (averages, schedule-free bases)."""
        getattr(self.base, "train", lambda: None)()
        if self.wrappers is not None:
            self.wrappers.hide()

    def eval(self) -> None:
        """The model is evaluated or saved now, with the weights for that; every rank must call it."""
        getattr(self.base, "eval", lambda: None)()
        if self.wrappers is not None:
            self._linked_base()
            self.wrappers.show(self.stages.strategy, self.parameter_index.parameters, self.stages.model)

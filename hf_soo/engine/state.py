"""What a PreconditionedOptimizer saves, and continues from: the factors, and the base's state."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from hf_soo.engine.base_state import ByParameter, Keeper, load_base_state, whole_base_state
from hf_soo.engine.capture import Capture
from hf_soo.engine.checkpoint import check_layers, check_saved, layer_tensors
from hf_soo.engine.stages import Stages

STATE_KEY = "second_order"


class Saving(Stages):
    """The states of a PreconditionedOptimizer; it sets the attributes."""

    base: Optimizer
    name: str
    config: dict[str, Any]
    steps: int
    switched: bool
    ranks_checked: bool
    carries_state: bool
    keeper: Keeper | None
    capture: Capture

    def _linked_base(self) -> Optimizer:
        raise NotImplementedError

    def _share_with_base(self) -> None:
        raise NotImplementedError

    def _switch_off(self) -> None:
        raise NotImplementedError

    def _follow_layout(self) -> None:
        raise NotImplementedError

    def _schedule(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and the factors under "second_order" unless somebody else saves them."""
        saved = dict(self._linked_base().state_dict())
        if self.carries_state:
            saved[STATE_KEY] = self.second_order_state()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; the argument is left as it is.

        Args:
            state_dict: what ``state_dict`` of the same optimizer over the same model returned.

        Raises:
            ValueError: it is another optimizer's, or the layers differ.
        """
        rest = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        # What is not ours is refused before anything changes.
        saved = self._checked(state_dict.get(STATE_KEY)) if self.carries_state else None
        self._linked_base().load_state_dict(rest)
        self._share_with_base()
        if saved is not None:
            self._restore(saved)

    def second_order_state(self) -> dict[str, Any]:
        """Name, settings, step count and factors, keyed by layer name; loadable with ``weights_only=True``.

        Where ranks share the work or the state (K-FAC under several processes, root-free RMSProp under FSDP2) every
        rank must call it: they exchange factors.
        """
        return {
            "optimizer": self.name,
            "base": type(self.base).__name__,
            "config": dict(self.config),
            "steps": self.steps,
            "switched": self.switched,
            "own": self.preconditioner.global_state(),
            "layers": layer_tensors({layer.name: self._whole_state(layer) for layer in self.layers}),
        }

    def load_second_order_state(self, saved: dict[str, Any] | None) -> None:
        """Continue from ``second_order_state()``.

        Args:
            saved: what it returned, or None if a checkpoint has none.

        Raises:
            ValueError: it is another optimizer's, or the layers differ.
        """
        self._restore(self._checked(saved))

    def check_second_order_state(self, saved: dict[str, Any] | None) -> None:
        """Refuse what ``load_second_order_state`` would, and change nothing.

        Args:
            saved: what ``second_order_state`` returned, or None if a checkpoint has none.

        Raises:
            ValueError: it is another optimizer's, or the layers differ.
        """
        self._checked(saved)

    def base_state(self, keep: bool = True) -> dict[str, Any]:
        """The base's state in whole tensors, the same for every strategy; every rank must call it.

        Args:
            keep: whether this rank keeps what it gets.
        """
        return whole_base_state(self._linked_base(), self.parameter_index.parameters, self._keeper(), keep)

    def load_base_state(self, saved: dict[str, Any]) -> None:
        """Continue from ``base_state()`` of a run under this or another strategy.

        Args:
            saved: what it returned.

        Raises:
            ValueError: it is another optimizer's or another model's.
        """
        load_base_state(self._linked_base(), self.parameter_index.parameters, self._keeper(), saved)

    def _keeper(self) -> Keeper:
        return self.keeper if self.keeper is not None else ByParameter(self.base, self.parameter_index.parameters)

    def _checked(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        saved = check_saved(saved, self.name, type(self.base).__name__, self.config)
        if self.switched and not saved.get("switched", False):
            raise ValueError(
                f"this {self.name} has switched to its base, the checkpoint's has not; build a new optimizer to resume."
            )
        if not saved.get("switched", False):
            check_layers(((layer.name, self.preconditioner.init(layer)) for layer in self.layers), saved["layers"])
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved.get("switched", False):
            self._switch_off()
        self._follow_layout()
        self._restore_states(saved["layers"])
        self.preconditioner.load_global_state(saved.get("own", {}))
        self.steps = int(saved["steps"])
        self.ranks_checked = False
        self._schedule()
        self.capture.clear()

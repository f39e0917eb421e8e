"""What a PreconditionedOptimizer saves, and how it is checked before anything changes.

The factors are plain tensors keyed by module name, the same for every world size:

    {"optimizer": name, "base": class, "config": {...}, "steps": t, "switched": bool, "own": {name: tensor},
     "layers": {module name: {"side.tensor": tensor}}}
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_soo.engine.comm import Communicator
from hf_soo.engine.layers import Layer
from hf_soo.engine.preconditioner import LayerState

logger = logging.getLogger(__name__)


def _layer_tensors(states: Mapping[str, LayerState]) -> LayerState:
    """Module name -> {"side.tensor": tensor}."""
    return {
        name: {f"{side}.{key}": tensor for side, factor in state.items() for key, tensor in factor.items()}
        for name, state in states.items()
    }


@dataclass(frozen=True)
class Identity:
    """What must be the same to go on from a checkpoint, and on every rank.

    Args:
        name: the method.
        base: the base's class.
        config: the method's settings; a difference to a checkpoint's is allowed and logged.
    """

    name: str
    base: str
    config: dict[str, Any]

    def agree(self, comm: Communicator, base_defaults: Mapping[str, Any], layers: Sequence[Layer], steps: int) -> None:
        """Compare what the ranks were built with.

        Args:
            comm: between them.
            base_defaults: the base's settings.
            layers: what the method moves.
            steps: steps done.

        Raises:
            ValueError: they were built differently, or resumed at different steps.
        """
        plain = {k: v for k, v in base_defaults.items() if isinstance(v, (bool, int, float, str, tuple))}
        comm.agree(
            {
                "method": f"{self.name} over {self.base}",
                "settings": str(self.config),
                "base settings": str(plain),
                "layers": str([(layer.name, layer.shape) for layer in layers]),
                "steps done": str(steps),
            }
        )

    def saved(
        self, steps: int, switched: bool, own: Mapping[str, Tensor], layers: Mapping[str, LayerState]
    ) -> dict[str, Any]:
        """The factors' checkpoint: ``own`` belongs to no layer, ``layers`` are whole states by name."""
        header = {"optimizer": self.name, "base": self.base, "config": dict(self.config)}
        return header | {"steps": steps, "switched": switched, "own": own, "layers": _layer_tensors(layers)}

    def check(
        self, saved: dict[str, Any] | None, fresh: Iterable[tuple[str, LayerState]], switched: bool
    ) -> dict[str, Any]:
        """The saved state, if it belongs to this optimizer.

        Args:
            saved: ``PreconditionedOptimizer.second_order_state()`` of an earlier run, or None.
            fresh: (layer name, a whole state) of this run; looked at one by one.
            switched: whether this run has handed over to its base.

        Returns:
            The saved state.

        Raises:
            ValueError: there is none, it is another method's or another base's, or the layers differ.
        """
        if saved is None:
            raise ValueError(
                f"this checkpoint has no state of {self.name!r}: another optimizer wrote it, or a tool that keeps the "
                "base's state alone (torch.distributed.checkpoint, accelerate's save_state under FSDP2; see "
                "docs/quickstart.md, 'FSDP2'); resume with that optimizer, or start a new run from the model's weights "
                "alone."
            )
        for what, key, mine in (("optimizer", "optimizer", self.name), ("base optimizer", "base", self.base)):
            if saved[key] != mine:
                raise ValueError(
                    f"this checkpoint was written with {what} {saved[key]!r}, this run has {mine!r}; resume with "
                    f"{saved[key]!r}, or start a new run from the model's weights alone."
                )
        before = {"apply_to": "gradient", **saved["config"]}  # saved before there was another place
        changed = {k: (before.get(k), v) for k, v in self.config.items() if before.get(k) != v}
        if changed:
            logger.warning("%s resumes with changed settings (saved, now): %s", self.name, changed)
        if not saved.get("switched", False):
            if switched:
                raise ValueError(
                    f"this {self.name} has switched to its base, the checkpoint's has not; build a new optimizer to "
                    "resume."
                )
            _check_layers(fresh, saved["layers"])
        return saved


def _check_layers(fresh: Iterable[tuple[str, LayerState]], saved: LayerState) -> None:
    """Check that saved tensors fit the states of this run.

    Args:
        fresh: (layer name, a whole state) of this run; looked at one by one.
        saved: what ``_layer_tensors`` gave.

    Raises:
        ValueError: a layer is missing or unknown, or a tensor has another name, shape or dtype.
    """
    own = {name: _signature(_layer_tensors({name: state})[name]) for name, state in fresh}
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"the checkpoint's layers differ from the model's: missing {missing[:3]} ({len(missing)}), unknown "
            f"{unknown[:3]} ({len(unknown)}); use the same model, include and exclude patterns."
        )
    for name, wanted in own.items():
        if wanted != _signature(saved[name]):
            raise ValueError(
                f"the checkpoint's state of layer {name!r} is {_signature(saved[name])}, this run needs {wanted}; "
                "resume with the settings the checkpoint was written with."
            )


def _signature(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {key: f"{tensor.dtype}{list(tensor.shape)}" for key, tensor in sorted(tensors.items())}

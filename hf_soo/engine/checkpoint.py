"""The format of the factors in a checkpoint: plain tensors keyed by module name, the same for every world size."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_soo.engine.preconditioner import LayerState

logger = logging.getLogger(__name__)


def layer_tensors(states: dict[str, LayerState]) -> LayerState:
    """Module name -> {"side.tensor": tensor}."""
    return {
        name: {f"{side}.{key}": tensor for side, factor in state.items() for key, tensor in factor.items()}
        for name, state in states.items()
    }


def check_saved(saved: dict[str, Any] | None, name: str, base: str, config: dict[str, Any]) -> dict[str, Any]:
    """The saved state, if it belongs to this optimizer.

    Args:
        saved: ``PreconditionedOptimizer.second_order_state()`` of an earlier run, or None.
        name: this optimizer's method.
        base: this optimizer's base class.
        config: this optimizer's settings; a difference is allowed and logged.

    Returns:
        The saved state.

    Raises:
        ValueError: there is none, or it is another method's or another base's.
    """
    if saved is None:
        raise ValueError(
            f"this checkpoint has no state of {name!r}: another optimizer wrote it, or a tool that keeps the base's "
            "state alone (torch.distributed.checkpoint, accelerate's save_state under FSDP2; see README, 'A plain "
            "loop'); resume with that optimizer, or start a new run from the model's weights alone."
        )
    for what, got, wanted in (("optimizer", saved["optimizer"], name), ("base optimizer", saved["base"], base)):
        if got != wanted:
            raise ValueError(
                f"this checkpoint was written with {what} {got!r}, this run has {wanted!r}; resume with {got!r}, or "
                "start a new run from the model's weights alone."
            )
    changed = {k: (saved["config"].get(k), v) for k, v in config.items() if saved["config"].get(k) != v}
    if changed:
        logger.warning("%s resumes with changed settings (saved, now): %s", name, changed)
    return saved


def check_layers(fresh: Iterable[tuple[str, LayerState]], saved: LayerState) -> None:
    """Check that saved tensors fit the states of this run.

    Args:
        fresh: (layer name, a whole state) of this run; looked at one by one.
        saved: what ``layer_tensors`` gave.

    Raises:
        ValueError: a layer is missing or unknown, or a tensor has another name, shape or dtype.
    """
    own = {name: _signature(layer_tensors({name: state})[name]) for name, state in fresh}
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

"""The base optimizer's state in whole tensors by parameter name, whatever it was sharded over.

    {"groups": [{"lr": ..., "betas": ...}, ...], "state": {parameter name: {"exp_avg": tensor, "step": tensor, ...}}}

One process and DistributedDataParallel have whole tensors, FSDP2 has DTensors, ZeRO has flat tensors that hold pieces
of many parameters. What one of them saves another can load: that is how a run goes on with other ranks than it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

Entry = dict[str, Any]


class Keeper(Protocol):
    """How a strategy keeps the state of each parameter."""

    def whole(self, name: str) -> Entry:
        """A parameter's state in whole tensors on the CPU; every rank must call it."""

    def restore(self, name: str, entry: Mapping[str, Any]) -> None:
        """Keep this rank's part of a parameter's whole state."""


class ByParameter:
    """A state for each parameter: a tensor, or a DTensor."""

    def __init__(self, base: Optimizer, names: Sequence[Sequence[str]]) -> None:
        """Take down which parameter has which name.

        Args:
            base: the optimizer.
            names: of the parameters of each group.
        """
        self.base = base
        groups = zip(base.param_groups, names, strict=True)
        self.parameters = {name: p for group, mine in groups for name, p in zip(mine, group["params"], strict=True)}

    def whole(self, name: str) -> Entry:
        """See ``Keeper``."""
        state = self.base.state.get(self.parameters[name], {})
        return {
            key: _on_cpu(value.full_tensor() if isinstance(value, DTensor) else value) for key, value in state.items()
        }

    def restore(self, name: str, entry: Mapping[str, Any]) -> None:
        """See ``Keeper``."""
        parameter = self.parameters[name]
        self.base.state[parameter] = {key: _like(value, parameter) for key, value in entry.items()}


def whole_base_state(base: Optimizer, names: Sequence[Sequence[str]], keeper: Keeper, keep: bool) -> dict[str, Any]:
    """The state for a checkpoint; every rank must call it.

    Args:
        base: the optimizer.
        names: of the parameters of each group.
        keeper: how the state is kept.
        keep: whether this rank keeps what it gets; the others hold one parameter's state at a time.

    Returns:
        See the module's docstring; loadable with ``weights_only=True``. Without states where they are not kept.
    """
    state = {}
    for name in (name for mine in names for name in mine):
        entry = keeper.whole(name)
        if keep:
            state[name] = entry
    return {"groups": [_settings(group) for group in base.param_groups], "state": state}


def from_state_dict(saved: Mapping[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Torch's ``Optimizer.state_dict()`` of one process or DDP in this form.

    Args:
        saved: the state dict; parameters are known by their number.
        names: of the parameters of each group.

    Raises:
        ValueError: the groups have other sizes.
    """
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(mine) for mine in names]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes} parameters, this one of {[len(m) for m in names]}; use "
            "the same model and optimizer."
        )
    numbers = (number for group in saved["param_groups"] for number in group["params"])
    flat = [name for mine in names for name in mine]
    return {
        "groups": [_settings(group) for group in saved["param_groups"]],
        "state": {name: saved["state"].get(number, {}) for number, name in zip(numbers, flat, strict=True)},
    }


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def load_base_state(base: Optimizer, names: Sequence[Sequence[str]], keeper: Keeper, saved: Mapping[str, Any]) -> None:
    """Continue from ``whole_base_state``.

    Args:
        base: the optimizer.
        names: of the parameters of each group.
        keeper: how the state is kept here.
        saved: what was saved, under any strategy.

    Raises:
        ValueError: the groups or the parameters differ.
    """
    mine = [name for group in names for name in group]
    missing, unknown = sorted(set(mine) - set(saved["state"])), sorted(set(saved["state"]) - set(mine))
    if missing or unknown or len(saved["groups"]) != len(base.param_groups):
        raise ValueError(
            f"the checkpoint's optimizer has {len(saved['groups'])} groups, this one {len(base.param_groups)}; missing "
            f"{missing[:3]} ({len(missing)}), unknown {unknown[:3]} ({len(unknown)}); use the same model and optimizer."
        )
    for group, values in zip(base.param_groups, saved["groups"], strict=True):
        group.update(values)
    for name in mine:
        keeper.restore(name, saved["state"][name])


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """A saved value where the parameter is, and sharded as it is if it has its shape."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)

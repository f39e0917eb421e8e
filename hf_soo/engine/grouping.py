"""Layers of one shape worked on together: their states stacked, and put back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from hf_soo.engine.gradients import stack
from hf_soo.engine.layers import Layer
from hf_soo.engine.preconditioner import LayerState


def groups_of(layers: Sequence[Layer], batched: bool | None) -> Iterator[list[Layer]]:
    """Layers to work on together.

    Args:
        layers: any layers.
        batched: all layers of one shape, or one by one, in place and in cache; None: the latter on a CPU.

    Yields:
        Lists of layers that share a shape, a dtype and a device.
    """
    on_cpu = all(layer.weight.device.type == "cpu" for layer in layers)
    if batched is False or (batched is None and on_cpu):
        yield from ([layer] for layer in layers)
        return
    by_shape: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_shape[(layer.shape, layer.bias is None, layer.weight.dtype, layer.weight.device)].append(layer)
    yield from by_shape.values()


def stacked(states: Sequence[LayerState], group: Sequence[Layer], names: Collection[str] | None = None) -> LayerState:
    """The states of a group, every tensor with a leading dimension [L]; views if the group is one layer.

    Args:
        states: of the layers of the group.
        group: the layers.
        names: of the tensors to take; None: all.
    """
    device = group[0].weight.device
    for state in states:
        for factor in state.values():
            for key, tensor in factor.items():
                if tensor.device != device:  # the model moved after construction
                    factor[key] = tensor.to(device)
    return {
        side: {key: stack([state[side][key] for state in states]) for key in factor if names is None or key in names}
        for side, factor in states[0].items()
    }


def unstack_(states: Sequence[LayerState], new: LayerState) -> None:
    """Copy a stacked state back into the layers' own, but for what was changed in place."""
    for i, state in enumerate(states):
        for side, factor in new.items():
            for key, tensor in factor.items():
                target = state[side][key]
                if target.data_ptr() != tensor[i].data_ptr():
                    target.copy_(tensor[i])

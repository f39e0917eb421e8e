"""Whether a backward pass trains a layer: the weight's gradient is accumulated, not only an input's computed.

Without a graph compiler autograd's engine is asked for the node that accumulates. A compiled backward pass computes all
gradients, asked for or not, so it asks by an operator of its own, when it runs.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node, get_gradient_edge

from hf_soo.engine.layers import Layer

Target = Node | int
"""What accumulates the gradient of the weight that a forward pass used; in a compiled graph the layer's number."""

_numbers, _numbered = count(), WeakValueDictionary[int, Layer]()


def number_of(layer: Layer) -> int:
    """A new number, by which a compiled graph finds the layer while it lives."""
    number = next(_numbers)
    _numbered[number] = layer
    return number


def accumulates(target: Target, grad: Tensor) -> bool | Tensor:
    """Whether the backward pass that is running accumulates a weight's gradient: 0-d and boolean in a compiled graph.

    False for an input's gradient alone, and for ``torch.autograd.grad``, which returns gradients.

    Args:
        target: the weight's.
        grad: of the output: with it a compiled graph cannot ask before its backward pass runs.
    """
    if isinstance(target, int):
        return torch.ops.hf_soo.accumulates(grad, target)  # type: ignore[no-any-return]
    try:
        return torch._C._will_engine_execute_node(target)
    except RuntimeError:  # the engine's answer where the weight is one of torch.autograd.grad's inputs
        return False


def gate(keep: bool | Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or zeros where a compiled graph's ``keep`` is false; a Python bool has been asked already."""
    return tensors if isinstance(keep, bool) else tuple(torch.where(keep, tensor, 0) for tensor in tensors)


def _accumulates_now(grad: Tensor, number: int) -> Tensor:
    keep = accumulates(get_gradient_edge(_numbered[number].weight).node, grad)
    return torch.full((), keep, dtype=torch.bool, device=grad.device)  # type: ignore[arg-type]


torch.library.define(
    "hf_soo::accumulates", "(Tensor grad, SymInt number) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,)
)
torch.library.impl("hf_soo::accumulates", "CompositeExplicitAutograd", _accumulates_now)
torch.library.register_fake("hf_soo::accumulates", lambda grad, _: grad.new_empty((), dtype=torch.bool))


def is_transformed() -> bool:
    """Whether the model runs under a transform of torch.func, in forward mode, or for a trace or an export."""
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():  # torch 2.9's is_exporting() is true in each graph that it compiles
        return transformed or torch.compiler._is_exporting_flag
    return transformed or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None

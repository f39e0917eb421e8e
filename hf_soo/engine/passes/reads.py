"""Matrices that a module multiplies with itself: stacks of experts, routers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_soo.engine.dtensors import full_shape
from hf_soo.engine.layers import LinearLayer


@dataclass(eq=False)
class ReadLayer(LinearLayer):
    """One matrix of a parameter that holds ``count`` of one shape, one after the other.

    A parameter is a stack [E, d_out, d_in], or one matrix, or several in one matrix [3 d, d]; its biases go with it.

    Args:
        path: the module's name.
        attribute: the parameter's name in the module.
        bias_attribute: the bias's.
        index: which of the matrices.
        count: how many there are.
        transposed: whether they are stored as [d_in, d_out].
        reader: the module that multiplies with them; None: the one that holds them.
    """

    in_old_checkpoints = False

    path: str = ""
    attribute: str = "weight"
    bias_attribute: str = "bias"
    index: int = 0
    count: int = 1
    transposed: bool = False
    reader: nn.Module | None = None

    @property
    def _bias_attribute(self) -> str:
        return self.bias_attribute

    @property
    def known_as(self) -> list[str]:
        """Both parameters."""
        return [f"{self.path}.{name}" if self.path else name for name in (self.attribute, self.bias_attribute)]

    @property
    def stack(self) -> str | None:
        """The parameter."""
        return self.known_as[0] if self.count > 1 else None

    @property
    def rows_first(self) -> bool:
        """See ``Layer``."""
        return self.count == 1 and not self.transposed

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as the module holds it now, with all its matrices."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        *stack, n, m = full_shape(self.weight)
        n = n if stack else n // self.count
        return (m, n) if self.transposed else (n, m)

    def own(self, tensor: Tensor) -> Tensor:
        """The matrix, or its bias."""
        length = len(tensor) // self.count
        part = tensor[self.index * length : (self.index + 1) * length]
        return part[0] if self._stacked else part

    def part(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """See ``Layer``."""
        own = shape[1:] if self._stacked else (shape[0] // self.count, *shape[1:])
        return self.index * math.prod(own), own

    @property
    def _stacked(self) -> bool:
        return len(full_shape(self.weight)) == 3

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The transpose where that is stored."""
        return weight.mT if self.transposed else weight

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The transpose where that is stored."""
        return matrix.mT if self.transposed else matrix


def readers_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Linear layers that are known not to be called -> the module that reads their weight: Mamba's step sizes."""
    mixers = [module for module in model.modules() if hasattr(module, "A_log")]
    steps = [(getattr(mixer, "dt_proj", None), mixer) for mixer in mixers]
    return {layer: mixer for layer, mixer in steps if isinstance(layer, nn.Linear)}


def read_layers(path: str, module: nn.Module) -> Iterator[ReadLayer]:
    """The matrices that a module is known to multiply with itself.

    Args:
        path: its name.
        module: any module.

    Yields:
        Their layers.
    """
    experts = getattr(module, "num_experts", None)
    for attribute, parameter in module.named_parameters(recurse=False):
        shape = full_shape(parameter)
        if not isinstance(experts, int) or shape[:1] != (experts,):
            continue
        if len(shape) == 3 and (transposed := _stored_transposed(module, shape)) is not None:
            yield from _matrices(path, module, attribute, f"{attribute}_bias", experts, transposed)
        elif len(shape) == 2 and attribute == "weight":  # a router
            yield from _matrices(path, module, attribute, "bias", 1, False)


def _stored_transposed(module: Any, stack: tuple[int, ...]) -> bool | None:
    """Whether a stack's matrices are stored as [d_in, d_out], as far as its module says so; None: it does not.

    A wrong answer would show: the products that are then looked for do not come, and ``routing()`` says so.
    """
    if hasattr(module, "is_transposed"):  # transformers' decorator of experts
        return bool(module.is_transposed)
    if stack[1:] == (getattr(module, "output_size", None), getattr(module, "input_size", None)):  # JetMoE
        return False
    hidden, own = getattr(module, "hidden_size", None), getattr(module, "expert_dim", None)  # Llama 4
    return True if own and stack[1:] in ((hidden, 2 * own), (own, hidden)) else None


def _matrices(
    path: str, module: nn.Module, attribute: str, bias: str, count: int, transposed: bool
) -> Iterator[ReadLayer]:
    name = path if attribute == "weight" else f"{path}.{attribute}"
    for index in range(count):
        own = name if count == 1 else f"{name}.{index}"
        yield ReadLayer(own, module, path, attribute, bias, index, count, transposed)

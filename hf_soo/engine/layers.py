"""What a method moves: layers seen as matrices with rows that flow through them, or single parameters.

A layer is ``y = W x (+ c)`` applied to N rows (samples, tokens, or samples x positions). Its gradient is one matrix
``[dL/dW | dL/dc]`` of shape [d_out, d_in (+ 1)]: a trainable bias is the last column, and its input is the constant 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_soo.engine.dtensors import full_shape, local


@dataclass(eq=False)
class Layer(ABC):
    """Something with a gradient that a method moves, known by its name in the model.

    The module is held, never its parameters: FSDP and others replace parameter objects after construction.
    ``coarsest`` is the coarsest dtype in its model, which its gradients come through. ``scores``: it projects to
    attention's queries or keys; ``rotary``: by rotary positions, if any. ``select_layers`` sets both.
    """

    in_old_checkpoints: ClassVar[bool] = True  # whether those that do not say what was added hold it

    name: str
    module: nn.Module
    trains_bias: bool = field(init=False)
    coarsest: torch.dtype | None = field(init=False, default=None)
    scores: bool = field(init=False, default=False)
    rotary: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Look at the bias: the factors' sizes are settled now, whatever is frozen or unfrozen later."""
        bias = getattr(self.module, self._bias_attribute, None)
        self.trains_bias = isinstance(bias, nn.Parameter) and bias.requires_grad

    @property
    def _bias_attribute(self) -> str:
        """The bias's name in the module, if there is one."""
        return "bias"

    @property
    def known_as(self) -> list[str]:
        """The module, or the parameters, that the reason not to move the layer is a reason for."""
        return [self.name]

    @property
    def stack(self) -> str | None:
        """What tells the layers of one parameter, which lie side by side, from all others; None: it is one layer."""
        return None

    @property
    def rows_first(self) -> bool:
        """Whether the first dimension of the parameter is that of the matrix."""
        return True

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in) of a matrix, the bias not counted; the shape of a single parameter."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(n, m) of the gradient [G | bias]; a single parameter is [d_0, the rest]."""
        return self.shape[0], math.prod(self.shape[1:]) + (self.bias is not None)

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it now."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def prototype(self) -> Tensor:
        """A plain tensor with the weight's dtype and device, to make others from; its shape says nothing."""
        return local(self.weight.detach())

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias if it was trained at construction, else None: a frozen bias is no column of the gradient."""
        return getattr(self.module, self._bias_attribute) if self.trains_bias else None

    @property
    def has_gradients(self) -> bool:
        """Whether the weight has a gradient, and the bias if it is trained."""
        bias = self.bias
        return self.weight.grad is not None and (bias is None or bias.grad is not None)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """The weight's whole gradient as ``shape`` and the bias's, in the accumulation dtype, where ``has_gradients``.

        Views where dtype and strides allow.
        """
        weight = self.weight.grad
        assert weight is not None
        return self.as_matrix(self.own(weight)).to(accumulation_dtype(weight.dtype)), self.bias_gradient()

    def bias_gradient(self) -> Tensor | None:
        """The bias's whole gradient in the accumulation dtype, or None where no bias is trained or it has none."""
        bias = self.bias
        if bias is None or bias.grad is None:
            return None
        return self.own(bias.grad).to(accumulation_dtype(bias.dtype))

    def set_gradients(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write whole gradients in the form of ``gradients`` into ``.grad``; what is there already is left alone."""
        assert self.weight.grad is not None
        target = self.own(self.weight.grad)
        if self.as_matrix(target).data_ptr() != weight.data_ptr():  # else it was changed in place
            target.copy_(self.from_matrix(weight, target))
        if bias is not None:
            self.own(self.bias.grad).copy_(bias)  # type: ignore[union-attr, arg-type]

    def own(self, tensor: Tensor) -> Tensor:
        """What of a tensor like the parameter, or like the bias's, is the layer's, as a view: all of it."""
        return tensor

    def part(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The same of a flat one: its first element, and its shape in the ``shape`` of a parameter."""
        return 0, shape

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor as ``shape``; a view where strides allow."""
        return weight

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of ``as_matrix``: ``shape`` in the shape of ``weight``."""
        return matrix


@dataclass(eq=False)
class ParameterLayer(Layer):
    """One parameter of any shape, for methods that learn from the gradient alone; ``name`` is the parameter's."""

    attribute: str = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return full_shape(self.weight)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as the module holds it now."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    @property
    def bias(self) -> None:
        """None: a bias is a parameter of its own."""
        return None


class RowLayer(Layer):
    """A layer through which rows flow."""

    channel_dim = -1  # the dimension of the output that holds d_out

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """The input as rows [N, S, d_in], N examples with S positions each; a view where strides allow.

        Args:
            x: what the module got, with any leading dimensions; the first is the example.
        """

    def input_sums(self, x: Tensor, groups: int) -> tuple[Tensor, int]:
        """Sums of ``groups`` consecutive parts of the rows, [groups, d_in] (accumulation dtype); their number."""
        rows = self.input_rows(x).flatten(0, 1)
        return group_sums(rows, groups), rows.shape[0]


class LinearLayer(RowLayer):
    """nn.Linear and subclasses: weight [d_out, d_in]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def input_rows(self, x: Tensor) -> Tensor:
        """See ``RowLayer.input_rows``; x is [..., d_in], and [N, d_in] has one position an example."""
        examples = x.shape[0] if x.ndim > 1 else 1
        return x.reshape(examples, math.prod(x.shape[1:-1]), x.shape[-1])  # not -1: there may be no rows


class Conv1DLayer(LinearLayer):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [d_in, d_out]."""

    @property
    def rows_first(self) -> bool:
        """See ``Layer``."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """(nf, nx)."""
        return int(self.module.nf), int(self.module.nx)  # type: ignore[arg-type]

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The transpose."""
        return weight.mT

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The transpose."""
        return matrix.mT


class Conv2dLayer(RowLayer):
    """nn.Conv2d with groups=1: one row per output position, the im2col patch [d_in = channels x kh x kw]."""

    channel_dim = -3  # also of an image without a batch dimension
    module: nn.Conv2d | nn.Conv1d

    @property
    def shape(self) -> tuple[int, int]:
        """(out_channels, in_channels x kh x kw)."""
        return self.module.out_channels, self.module.in_channels * math.prod(self.module.kernel_size)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """[out_channels, in_channels x kh x kw]; a copy if the weight is channels_last."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """[out_channels, in_channels, kh, kw]."""
        return matrix.reshape(weight.shape)

    def _padding(self) -> tuple[int, ...]:
        """The padding in numbers (left, right, top, bottom); "same" pads more on the right, as nn.Conv2d does."""
        conv, sides = self.module, []
        for axis in reversed(range(len(conv.kernel_size))):
            if isinstance(conv.padding, str):
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv.padding == "same" else 0
                sides += [total // 2, total - total // 2]
            else:
                sides += [conv.padding[axis]] * 2
        return tuple(sides)

    def _images(self, x: Tensor) -> Tensor:
        """The input as a batch [batch, channels, height, width]."""
        return x if x.ndim == 4 else x.unsqueeze(0)

    def input_sums(self, x: Tensor, groups: int) -> tuple[Tensor, int]:
        """See ``RowLayer.input_sums``; x is [batch, channels, height, width], or one image."""
        if groups > 1:
            return super().input_sums(x, groups)
        images = self._images(x)
        # Unfold is linear: the sum of the patches of a batch is the patches of its sum, so one image is unfolded.
        patches = self._patches(images.sum(0, keepdim=True, dtype=accumulation_dtype(x.dtype)))
        return patches.sum(-1), images.shape[0] * patches.shape[-1]

    def input_rows(self, x: Tensor) -> Tensor:
        """See ``RowLayer.input_rows``: the im2col patches, one position for each place of the kernel."""
        return self._patches(self._images(x)).mT

    def _patches(self, images: Tensor) -> Tensor:
        conv = self.module
        lead = (1,) * (2 - len(conv.kernel_size))  # a sequence is an image of height 1
        padded = F.pad(images, self._padding())
        sizes = {"dilation": lead + conv.dilation, "stride": lead + conv.stride}
        return F.unfold(padded, lead + conv.kernel_size, **sizes)


class Conv1dLayer(Conv2dLayer):
    """nn.Conv1d with groups=1: an image of height 1."""

    in_old_checkpoints = False
    channel_dim = -2
    module: nn.Conv1d

    def _images(self, x: Tensor) -> Tensor:
        return (x if x.ndim == 3 else x.unsqueeze(0)).unsqueeze(-2)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and factors are kept in: fp32, or fp64 for fp64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_sums(rows: Tensor, groups: int) -> Tensor:
    """Sums of ``rows`` [N, d] in ``groups`` consecutive parts: [groups, d] in the accumulation dtype."""
    dtype = accumulation_dtype(rows.dtype)
    if groups == 1:
        return rows.sum(0, keepdim=True, dtype=dtype)
    return torch.stack([part.sum(0, dtype=dtype) for part in rows.tensor_split(groups)])


def groups_of(layers: Sequence[Layer], batched: bool | None, cpu_stack: int = 0) -> Iterator[list[Layer]]:
    """Layers to work on together.

    Args:
        layers: any layers.
        batched: all layers of one shape, or one by one, in place; None: the first, on a CPU within ``cpu_stack``.
        cpu_stack: elements of the layers that are worked on together.

    Yields:
        Lists of layers that share a shape, a dtype and a device; those of a stack are a list of their own.
    """
    by_shape: dict[Any, list[Layer]] = defaultdict(list)
    for i, layer in enumerate(layers):
        kind = (layer.shape, layer.bias is None, layer.weight.dtype, layer.weight.device, layer.stack)
        by_shape[i if batched is False else kind].append(layer)
    for alike in by_shape.values():
        few = batched is None and alike[0].weight.device.type == "cpu"
        size = max(1, cpu_stack // max(1, math.prod(alike[0].shape))) if few else len(alike)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape with a new leading dimension; a view if there is just one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def joined(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Weights [L, d_out, d_in] and biases [L, d_out] of layers of one shape, which all have a bias or none."""
    weights, biases = zip(*pairs, strict=True)
    return _side_by_side(weights), None if biases[0] is None else _side_by_side(biases)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """``stack``, as a view where the tensors are all of a larger one in a row: nothing as large as them is copied."""
    first, whole = tensors[0], tensors[0]._base
    if whole is None or len(tensors) == 1 or len(whole) != len(tensors) or whole.dtype != first.dtype:
        return stack(tensors)
    step, start = whole.stride(0), first.storage_offset()
    alike = all(
        each._base is whole and each.stride() == first.stride() and each.storage_offset() == start + i * step
        for i, each in enumerate(tensors)
    )
    return whole.as_strided((len(tensors), *first.shape), (step, *first.stride()), start) if alike else stack(tensors)

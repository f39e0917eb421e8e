"""Layers seen as matrices: which modules a second-order method moves, and how their rows are counted.

A layer is ``y = W x (+ c)`` applied to N rows (samples, tokens, or samples x positions). Its gradient is one matrix
``[dL/dW | dL/dc]`` of shape [d_out, d_in (+ 1)]: a trainable bias is the last column, and its input is the constant 1.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(eq=False)
class Layer(ABC):
    """One module whose weight is a matrix, known by its name in the model.

    The module is held, never its parameters: FSDP and others replace parameter objects after construction.
    """

    name: str
    module: nn.Module

    channel_dim = -1  # the dimension of the output that holds d_out

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the bias not counted."""

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it now."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias if it is trained, else None: a frozen bias is no column of the gradient."""
        bias = self.module.bias
        return bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor as [d_out, d_in]; a view where strides allow."""
        return weight

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of ``as_matrix``: [d_out, d_in] in the shape of ``weight``."""
        return matrix

    @abstractmethod
    def input_sums(self, x: Tensor, groups: int) -> tuple[Tensor, int]:
        """Sums of input rows in ``groups`` consecutive parts, and the number of rows.

        Args:
            x: what the module got, with any leading dimensions.
            groups: the number of parts.

        Returns:
            [groups, d_in] in the accumulation dtype, and N.
        """


class LinearLayer(Layer):
    """nn.Linear and subclasses: weight [d_out, d_in]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def input_sums(self, x: Tensor, groups: int) -> tuple[Tensor, int]:
        """See ``Layer.input_sums``; x is [..., d_in]."""
        rows = x.reshape(-1, x.shape[-1])
        return group_sums(rows, groups), rows.shape[0]


class Conv1DLayer(LinearLayer):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [d_in, d_out]."""

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


class Conv2dLayer(Layer):
    """nn.Conv2d with groups=1: one row per output position, the im2col patch [d_in = channels x kh x kw]."""

    channel_dim = -3  # also of an image without a batch dimension
    module: nn.Conv2d

    @property
    def shape(self) -> tuple[int, int]:
        """(out_channels, in_channels x kh x kw)."""
        conv = self.module
        return conv.out_channels, conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]

    def as_matrix(self, weight: Tensor) -> Tensor:
        """[out_channels, in_channels x kh x kw]; a copy if the weight is channels_last."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """[out_channels, in_channels, kh, kw]."""
        return matrix.reshape(weight.shape)

    def _padding(self) -> tuple[int, ...]:
        """The padding in numbers (left, right, top, bottom); "same" pads more on the right, as nn.Conv2d does."""
        conv, sides = self.module, []
        for axis in (1, 0):
            if isinstance(conv.padding, str):
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv.padding == "same" else 0
                sides += [total // 2, total - total // 2]
            else:
                sides += [conv.padding[axis]] * 2
        return tuple(sides)

    def input_sums(self, x: Tensor, groups: int) -> tuple[Tensor, int]:
        """See ``Layer.input_sums``; x is [batch, channels, height, width], or one image."""
        images = x if x.ndim == 4 else x.unsqueeze(0)
        if groups > 1:
            rows = self._patches(images).mT.flatten(0, 1)
            return group_sums(rows, groups), rows.shape[0]
        # Unfold is linear: the sum of the patches of a batch is the patches of its sum, so one image is unfolded.
        patches = self._patches(images.sum(0, keepdim=True, dtype=accumulation_dtype(x.dtype)))
        return patches.sum(-1), images.shape[0] * patches.shape[-1]

    def _patches(self, images: Tensor) -> Tensor:
        conv = self.module
        padded = F.pad(images, self._padding())
        return F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and factors are kept in: fp32, or fp64 for fp64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_sums(rows: Tensor, groups: int) -> Tensor:
    """Sums of ``rows`` [N, d] in ``groups`` consecutive parts: [groups, d] in the accumulation dtype."""
    dtype = accumulation_dtype(rows.dtype)
    if groups == 1:
        return rows.sum(0, keepdim=True, dtype=dtype)
    return torch.stack([part.sum(0, dtype=dtype) for part in rows.tensor_split(groups)])


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, found by name so that transformers need not be installed."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def as_layer(name: str, module: nn.Module) -> Layer | None:
    """The module as a Layer, or None if its weight is no matrix that a Kronecker factor describes."""
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module)
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer(name, module)
    if _is_transformers_conv1d(module):
        return Conv1DLayer(name, module)
    return None


@dataclass(frozen=True)
class Selection:
    """Which layers a method moves, and why each other matrix-like layer is left to the base.

    Args:
        layers: the layers to precondition, in the model's order.
        left: module name -> the reason why it is left to the base optimizer.
    """

    layers: list[Layer]
    left: dict[str, str]


def select_layers(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> Selection:
    """Choose the layers of a model that a method with Kronecker statistics moves.

    Args:
        model: the bare model (not wrapped in DistributedDataParallel).
        include: regular expressions; if given, only modules whose name matches one (``re.search``) are taken.
        exclude: regular expressions; modules whose name matches one are left to the base.

    Returns:
        The chosen layers and the reasons for the others.

    Raises:
        ValueError: a pattern is no regular expression, or no layer is left.
    """
    included, excluded = compile_patterns("include", include), compile_patterns("exclude", exclude)
    owners = _weight_owners(model)
    decoders = _decoders(model)
    layers: list[Layer] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        layer = as_layer(name, module)
        if isinstance(module, nn.Embedding):
            left[name] = "embedding"
        if layer is None:
            continue
        reason = _reason_to_leave(layer, owners, decoders)
        if reason is None and include is not None and not any(p.search(name) for p in included):
            reason = "no include pattern matches"
        if reason is None:
            reason = next((f"exclude={p.pattern!r}" for p in excluded if p.search(name)), None)
        if reason is None:
            layers.append(layer)
        else:
            left[name] = reason
    if not layers:
        raise ValueError(
            f"no layer selected: include={include!r}, exclude={exclude!r} leave none of {len(left)} Linear, Conv1D or "
            f"Conv2d layers ({dict(list(left.items())[:3])}); widen the patterns or use --optim adamw."
        )
    return Selection(layers, left)


def compile_patterns(what: str, patterns: Sequence[str] | None) -> list[re.Pattern[str]]:
    """The patterns compiled.

    Raises:
        ValueError: one of them is no regular expression, or a lone string was given instead of a list.
    """
    if isinstance(patterns, str):
        raise ValueError(f"{what}={patterns!r} is a string; give a list of regular expressions: [{patterns!r}].")
    compiled = []
    for pattern in patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{what}={pattern!r} is no regular expression ({error}); escape dots as \\.") from error
    return compiled


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter id -> names of the modules that hold it: more than one means that it is tied."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _decoders(model: nn.Module) -> set[nn.Module]:
    """The vocabulary decoders of the model and of models inside it, with what wraps them (PEFT) and is inside."""
    found = (getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules())
    return {part for decoder in found if isinstance(decoder, nn.Module) for part in decoder.modules()}


def _reason_to_leave(layer: Layer, owners: dict[int, list[str]], decoders: set[nn.Module]) -> str | None:
    """Why no Kronecker factor can describe this layer's gradient, or None."""
    module, weight = layer.module, layer.weight
    others = [name for name in owners.get(id(weight), []) if name != layer.name]
    if others:
        return f"weight tied to {others[0]}"
    if module in decoders:
        return "vocabulary decoder"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return f"quantised weight ({getattr(weight, 'dtype', type(weight).__name__)})"
    if not weight.requires_grad:
        return "frozen weight"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"grouped convolution (groups={module.groups})"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return None

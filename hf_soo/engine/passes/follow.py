"""From the matrices that a module multiplies with itself to the rows that it multiplies them with.

There is no layer whose input and output a hook could see. While the module runs, its parameters are followed through
views and selections to the product with their rows, whatever calls it: a loop over experts, a batched or a grouped
product. The product's rows go to the layers of their matrices as if each were an nn.Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_soo.engine.layers import RowLayer
from hf_soo.engine.passes.reads import ReadLayer


class _Committer(Protocol):
    """What takes the rows of the products."""

    def active(self, module: nn.Module) -> bool:
        """Whether a forward pass of the module collects."""

    def rows(self, layer: RowLayer, x: Tensor, output: Tensor) -> Tensor | None:
        """The output of a layer's rows x, with a node that commits both; None: this pass does not train the layer."""

    def tokens(self, layer: RowLayer, x: Tensor) -> Tensor | None:
        """Which rows of a module's input are no padding, [rows], as far as anybody has said."""

    def declare(self, layer: RowLayer, tokens: Tensor | None) -> None:
        """Say which of the rows are no padding that come next, [rows]; None: it is not known."""


@dataclass(frozen=True, slots=True)
class _Matrices:
    """A tensor that stands for matrices of a parameter while its module runs.

    Args:
        tensor: it; held so that its id is not given away.
        layers: of all the parameter's matrices.
        which: the numbers of those in the tensor [S, ., .]; a number where it is the one matrix [., .]; None: all.
        flipped: whether its last two dimensions are those of the stored matrices in the other order.
    """

    tensor: Tensor
    layers: Sequence[ReadLayer]
    which: Tensor | int | None
    flipped: bool = False

    @property
    def one(self) -> ReadLayer | None:
        """The layer of the one matrix that it is."""
        return self.layers[self.which] if isinstance(self.which, int) else None

    @property
    def out_in(self) -> bool:
        """Whether the matrices are [d_out, d_in], else [d_in, d_out]."""
        return self.layers[0].transposed == self.flipped


class _Follow(TorchFunctionMode):
    """Active while one module runs: finds the products with its matrices and commits their rows."""

    def __init__(self, layers: Sequence[ReadLayer], committer: _Committer, x: object) -> None:
        """Start with the parameters themselves.

        Args:
            layers: those of one module.
            committer: takes their rows.
            x: the module's input: experts choose rows of it.
        """
        super().__init__()
        self.committer = committer
        self.input = {id(x): x} if isinstance(x, Tensor) and layers[0].stack else {}
        self.tokens = committer.tokens(layers[0], x) if isinstance(x, Tensor) and self.input else None
        self.chosen: Tensor | None = None  # those of the rows that were chosen last
        self.known: dict[int, _Matrices] = {}
        by_parameter: dict[int, list[ReadLayer]] = {}
        for layer in layers:
            by_parameter.setdefault(id(layer.weight), []).append(layer)
        for mine in by_parameter.values():
            self._learn(_Matrices(mine[0].weight, mine, 0 if mine[0].count == 1 else None))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``; where it works on a matrix, remember or commit its result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        operands = [*args, *kwargs.values()][:2]
        if self.tokens is not None and operands and id(operands[0]) in self.input:
            self._choose(_name_of(func), operands, result)
        found = [self.known.get(id(value)) for value in operands]
        name = _name_of(func)
        if found and found[0] is not None:
            if name in _VIEWS:
                self._learn(replace(found[0], tensor=result, flipped=found[0].flipped != _VIEWS[name](args)))
                return result
            if name == "__getitem__":
                self._select(found[0], args[1], result)
                return result
        if len(found) == 2 and name in _PRODUCTS and torch.is_grad_enabled() and result.requires_grad:
            offsets = kwargs.get("offs", args[2] if len(args) > 2 else None) if "grouped" in name else None
            return self._product(name, operands, offsets, result)
        return result

    def _choose(self, name: str, operands: Sequence[Any], result: Tensor) -> None:
        """Follow the module's input: under another shape or dtype, and to the rows that are chosen of it."""
        assert self.tokens is not None
        if name in ("view", "reshape", *_SAME) and result.shape[:1] == self.tokens.shape:
            self.input[id(result)] = result
        elif name == "repeat_interleave" and isinstance(operands[1], int):
            self.chosen = self.tokens.repeat_interleave(operands[1])
        elif name == "__getitem__" and isinstance(operands[1], Tensor) and operands[1].ndim == 1:
            self.chosen = self.tokens[operands[1]]

    def commit(self, layer: ReadLayer, x: Tensor, output: Tensor, chosen: Tensor | None) -> Tensor:
        """The output with its rows committed, or as it is."""
        if layer.stack:
            self.committer.declare(layer, chosen if chosen is not None and len(chosen) == len(x) else None)
        committed = self.committer.rows(layer, x, output)
        return output if committed is None else committed

    def _learn(self, matrices: _Matrices) -> None:
        self.known[id(matrices.tensor)] = matrices

    def _select(self, source: _Matrices, index: Any, result: Tensor) -> None:
        """Matrices of a stack: one of them, or those of a list of numbers."""
        if source.which is not None:
            return
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool):
            self._learn(replace(source, tensor=result, which=int(index) % len(source.layers)))
        elif isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
            self._learn(replace(source, tensor=result, which=index))

    def _product(self, name: str, operands: Sequence[Any], offsets: Tensor | None, result: Tensor) -> Tensor:
        """The result of a product of rows and a tensor of matrices, with its rows committed."""
        left, right = (self.known.get(id(value)) for value in operands)
        matrices = left or right
        if matrices is None or (left is not None and right is not None):
            return result
        on_right = left is None
        x = operands[0 if on_right else 1]
        # rows on the left of W: x Wᵀ, which only ``linear`` writes as W; on its right: W X with rows as columns
        if matrices.out_in != (name == "linear" or not on_right):
            return result
        if "grouped" in name:
            if offsets is None or matrices.which is not None:
                return result
            return self._grouped(matrices, x, result, offsets)
        if not on_right:
            x, result = x.mT, result.mT
        if matrices.one is not None:
            committed = self.commit(matrices.one, x, result, self.chosen)
        elif x.ndim == 3:
            committed = self._batched(matrices, x, result)
        else:
            committed = result
        return committed if on_right else committed.mT

    def _grouped(self, matrices: _Matrices, x: Tensor, result: Tensor, offsets: Tensor) -> Tensor:
        """Rows [n, d_in] sorted by matrix; those of matrix i end before ``offsets[i]``, others belong to none."""
        ends = offsets.tolist()
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return self._sorted(matrices.layers, counts, x, result, self.chosen)

    def _batched(self, matrices: _Matrices, x: Tensor, result: Tensor) -> Tensor:
        """Some rows for each of a list of matrices, [S, k, d_in]; one matrix may stand there several times."""
        every = len(matrices.layers)
        if not isinstance(matrices.which, Tensor):
            return self._sorted(matrices.layers, [1] * every, x, result, None)
        order = matrices.which.argsort(stable=True)
        counts = matrices.which.bincount(minlength=every).tolist()
        chosen = self.chosen[order] if self.chosen is not None and len(self.chosen) == len(x) else None
        return self._sorted(matrices.layers, counts, x[order], result[order], chosen)[order.argsort()]

    def _sorted(
        self, layers: Sequence[ReadLayer], counts: list[int], x: Tensor, result: Tensor, chosen: Tensor | None
    ) -> Tensor:
        """Commit parts of x and of the result to the layers that they belong to."""
        parts, start = [], 0
        for layer, count in zip(layers, counts, strict=True):
            part = slice(start, start + count)
            rows, made = x[part], result[part]
            if count:
                tokens = None if chosen is None else chosen[part]
                made = self.commit(layer, rows.flatten(0, -2), made.flatten(0, -2), tokens).view(made.shape)
            parts.append(made)
            start += count
        return torch.cat([*parts, result[start:]])


def _name_of(func: Any) -> str:
    """A function's name; a property's for its getter."""
    name: str = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name


def _swaps_last(args: Sequence[Any]) -> bool:
    """Whether ``transpose(x, i, j)`` swaps the last two dimensions."""
    x, *dims = args
    return sorted(dim % x.ndim for dim in dims) == [x.ndim - 2, x.ndim - 1]


def _same(args: Sequence[Any]) -> bool:
    return False


_SAME = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone")
_VIEWS: dict[str, Callable[[Sequence[Any]], bool]] = {
    "transpose": _swaps_last,
    "mT": lambda args: True,
    "T": lambda args: True,
    "t": lambda args: True,
    **dict.fromkeys(_SAME, _same),
}
"""What makes the same matrices of matrices -> whether it swaps their two dimensions."""

_PRODUCTS = frozenset(
    ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback")
)


def follow(layers: Sequence[RowLayer], committer_of: Callable[[list[ReadLayer]], _Committer]) -> list[Any]:
    """Watch the modules of those layers that are matrices of their modules; the handles of the hooks.

    Args:
        layers: any layers.
        committer_of: makes what takes the rows of one module's.
    """
    by_module: dict[nn.Module, list[ReadLayer]] = {}
    for layer in layers:
        if isinstance(layer, ReadLayer):
            by_module.setdefault(layer.reader or layer.module, []).append(layer)
    handles: list[Any] = []
    for module, own in by_module.items():
        hook = _FollowHook(own, committer_of(own))
        handles += [
            module.register_forward_pre_hook(hook.start, with_kwargs=True),
            module.register_forward_hook(hook.end, always_call=True),  # also where the module fails
        ]
    return handles


class _FollowHook:
    """Starts and ends following in a module's forward pass. A copied or unpickled model takes one that does nothing."""

    def __init__(self, layers: Sequence[ReadLayer] = (), committer: _Committer | None = None) -> None:
        """Watch one module.

        Args:
            layers: its matrices.
            committer: takes their rows.
        """
        self.layers, self.committer = layers, committer
        self._running: list[_Follow] = []

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the module."""
        if self.committer is not None and self.committer.active(module):
            self._running.append(_Follow(self.layers, self.committer, next(iter((*args, *kwargs.values())), None)))
            self._running[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it, also where it failed."""
        if self._running:
            self._running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[type[_FollowHook], tuple[()]]:
        return _FollowHook, ()

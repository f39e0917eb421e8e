"""A method's and its base's minimal products on random matrices: what their step cannot be faster than."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_soo.bench.step_kinds import Kind
from hf_soo.engine.flops import Factorisation, Product, work_of_base
from hf_soo.engine.layers import Layer, accumulation_dtype
from hf_soo.engine.preconditioner import Preconditioner

Part = Literal["every", "update", "refresh"]
PARTS: tuple[Part, ...] = ("every", "update", "refresh")


class MinimalProducts:
    """The minimal products of all layers, ready to run.

    Operations of one shape share their operands, so that the memory stays small: at the sizes that matter a product is
    bound by arithmetic. Products are in the weight's dtype, factorisations in that of the factors.
    """

    def __init__(self, layers: Sequence[Layer], preconditioner: Preconditioner, base: Optimizer | None = None) -> None:
        """Allocate for the layers that a method moves, and for what its base multiplies, in the dtype that it says."""
        self._ready: dict[object, Callable[[], object]] = {}
        self._calls: dict[Part, list[Callable[[], object]]] = {part: [] for part in PARTS}
        for layer in layers:
            minimal = preconditioner.minimal_products(layer)
            for part in PARTS if minimal is not None else ():
                self._calls[part] += [self._prepared(each, layer.weight) for each in getattr(minimal, part)]
        if base is not None:
            for work, param in (
                (work_of_base(base, p, group), p) for group in base.param_groups for p in group["params"]
            ):
                like = param.detach()[:0].to(work.dtype or param.dtype)
                self._calls["every"] += [self._prepared(each, like) for each in work.products]

    def parts(self, kinds: Sequence[Kind]) -> list[Part]:
        """The parts that have something to do in steps of these kinds."""
        occurs = {"every": True, "update": any(k.updates for k in kinds), "refresh": any(k.refreshes for k in kinds)}
        return [part for part in PARTS if occurs[part] and self._calls[part]]

    def run(self, part: Part) -> None:
        """Do the work of a part once."""
        for call in self._calls[part]:
            call()

    def _prepared(self, operation: Product | Factorisation, prototype: Tensor) -> Callable[[], object]:
        key = (operation, prototype.dtype, prototype.device)
        if key not in self._ready:
            self._ready[key] = _prepared(operation, prototype)
        return self._ready[key]


def _prepared(operation: Product | Factorisation, prototype: Tensor) -> Callable[[], object]:
    """An operation on operands of its own, in the dtype and on the device of ``prototype``."""
    return _product(operation, prototype) if isinstance(operation, Product) else factorised(operation, prototype)


def _product(shape: Product, prototype: Tensor) -> Callable[[], object]:
    """A product of random matrices into a third one."""
    left, right = prototype.new_empty(shape.m, shape.k).normal_(), prototype.new_empty(shape.k, shape.n).normal_()
    return partial(torch.mm, left, right, out=prototype.new_empty(shape.m, shape.n))


def factorised(of: Factorisation, prototype: Tensor) -> Callable[[], object]:
    """A factorisation of a random positive definite matrix."""
    rows = torch.randn(of.d, of.d, dtype=accumulation_dtype(prototype.dtype), device=prototype.device)
    A = (rows @ rows.mT / of.d).add_(torch.eye(of.d, dtype=rows.dtype, device=rows.device))
    if of.kind != "cholesky_inverse":
        return partial(getattr(torch.linalg, of.kind), A)
    return lambda: torch.cholesky_inverse(torch.linalg.cholesky(A))


def seconds_of(kind: Kind, parts: dict[Part, float]) -> float:
    """Of the minimal products of a step of a kind."""
    update = parts.get("update", 0.0) if kind.updates else 0.0
    return parts.get("every", 0.0) + update + (parts.get("refresh", 0.0) if kind.refreshes else 0.0)

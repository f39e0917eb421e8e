"""Minimal products: the arithmetic that a method says it cannot do without, and what the benchmark runs of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_soo import build_optimizer
from hf_soo.bench.minimal_work import MinimalProducts, _product, factorised, seconds_of
from hf_soo.bench.step_kinds import Kind
from hf_soo.engine.flops import Factorisation, MinimalWork, Product
from hf_soo.engine.optimizer import PreconditionedOptimizer


def over(*layers: nn.Module, **config: Any) -> PreconditionedOptimizer:
    return build_optimizer("mkor", nn.Sequential(*layers), lr=0.1, **config)


@pytest.mark.parametrize(("bias", "columns"), [(False, 5), (True, 6)])
@pytest.mark.parametrize(
    ("sides", "left", "right"), [("both", 1, 1), ("output", 1, 0), ("input", 0, 1), ("none", 0, 0)]
)
def test_dense_mkor_multiplies_twice_a_step(bias: bool, columns: int, sides: str, left: int, right: int) -> None:
    """F_b [3, 3] times G [3, m] times F_a [m, m]."""
    optimizer = over(nn.Linear(5, 3, bias=bias), representation="dense", sides=sides)
    minimal = optimizer.preconditioner.minimal_products(optimizer.layers[0])
    assert minimal is not None
    assert minimal.flops == (left * 2 * 3 * 3 * columns + right * 2 * 3 * columns * columns, 0, 0)
    lowrank = over(nn.Linear(5, 3, bias=bias), sides=sides)
    assert lowrank.preconditioner.minimal_products(lowrank.layers[0]) is None


def test_flops_of_the_three_lists() -> None:
    minimal = MinimalWork(
        every=[Product(2, 3, 5), Product(2, 3, 5)],
        update=[Factorisation("cholesky_inverse", 4)],
        refresh=[Factorisation("eigh", 2), Product(1, 1, 1)],
    )
    assert minimal.flops == (120, 64, 74)
    assert MinimalWork().flops == (0, 0, 0)


def test_products_are_in_the_weights_dtype_and_factorisations_in_the_factors() -> None:
    weight = torch.zeros(1, dtype=torch.bfloat16)
    out = _product(Product(2, 3, 4), weight)()
    assert isinstance(out, torch.Tensor) and (out.shape, out.dtype) == ((2, 4), torch.bfloat16)
    assert out.count_nonzero() > 0
    inverse = factorised(Factorisation("cholesky_inverse", 3), weight)()
    assert isinstance(inverse, torch.Tensor) and (inverse.shape, inverse.dtype) == ((3, 3), torch.float32)
    values, vectors = factorised(Factorisation("eigh", 3), weight)()  # type: ignore[misc]
    assert values.min() > 0.9 and vectors.dtype == torch.float32


def test_every_layer_is_multiplied_and_one_shape_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    outputs: set[int] = set()

    def mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        shapes.append((tuple(left.shape), tuple(right.shape)))
        outputs.add(out.data_ptr())

    monkeypatch.setattr(torch, "mm", mm)
    layers = [nn.Linear(5, 3, bias=False), nn.Linear(3, 5), nn.Linear(5, 3, bias=False)]
    optimizer = over(*layers, representation="dense")
    work = MinimalProducts(optimizer.layers, optimizer.preconditioner)
    assert work.parts([Kind(False, False)]) == ["every"] == work.parts([Kind(True, True)])
    work.run("every")
    small, wide = [((3, 3), (3, 5)), ((3, 5), (5, 5))], [((5, 5), (5, 4)), ((5, 4), (4, 4))]
    assert shapes == [*small, *wide, *small] and len(outputs) == 4
    lowrank = over(nn.Linear(5, 3))
    assert MinimalProducts(lowrank.layers, lowrank.preconditioner).parts([Kind(True, True)]) == []


def test_a_steps_seconds_are_those_of_its_parts() -> None:
    kinds = [Kind(False, False), Kind(True, False), Kind(False, True), Kind(True, True)]
    assert [seconds_of(kind, {"every": 1.0, "update": 2.0, "refresh": 4.0}) for kind in kinds] == [1, 3, 5, 7]
    assert [seconds_of(kind, {"refresh": 4.0}) for kind in kinds] == [0, 0, 4, 4]

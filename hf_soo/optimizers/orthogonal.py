"""O of whole matrices, at the rank that owns them: the polar factor, its rows made even (NorMuon), its scale.

V ← β₂V + (1-β₂) mean(O², by rows)      O ← O / √V · (‖O‖ / ‖O / √V‖)                    Li et al. 2025
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_soo.engine.flops import BaseWork
from hf_soo.optimizers.polar import DTYPES, Coefficients, iterated, normalised, polar_cost, polar_products, schedule

_LEAST = 1e-12
"""The least root mean square of a row of a polar factor that is divided by."""


def scale_of(rule: str, shape: tuple[int, ...]) -> float:
    """The factor on the step of a matrix, or of each of a stack: ``Muon``'s ``adjust_lr_fn``."""
    rows, columns = shape[-2:]
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns)) if rule == "original" else 1.0


@dataclass(frozen=True)
class Orthogonaliser:
    """Whole matrices -> O of each, at their owner.

    Args:
        coefficients: of each iteration.
        dtype: that they run in.
        row_beta: β₂ of the rows' mean squares, which are then each matrix's last column, in and out.
        prototype: has the dtype and the device of what comes out.
        nonfinite: [], counts the matrices that were not finite, and whose O is zero.
    """

    coefficients: list[Coefficients]
    dtype: torch.dtype
    row_beta: float | None
    prototype: Tensor
    nonfinite: Tensor

    @classmethod
    def of(cls, group: dict[str, Any], param: Tensor, nonfinite: Tensor) -> Orthogonaliser:
        """For a group's parameters like this one."""
        dtype = DTYPES[group["ns_dtype"]]
        if dtype == torch.float32:
            dtype = torch.promote_types(dtype, param.dtype)
        coefficients = schedule(group["ns_coefficients"], group["ns_steps"], dtype)
        result = dtype if group["row_beta"] is None else torch.promote_types(dtype, torch.float32)
        return cls(coefficients, dtype, group["row_beta"], torch.empty(0, dtype=result, device=param.device), nonfinite)

    def cost(self, shape: tuple[int, ...]) -> float:
        """Multiplications and additions of O of a matrix [n, m] or a stack [E, n, m]."""
        *stack, n, m = shape
        return math.prod(stack) * polar_cost(n, m, self.coefficients, self.dtype)

    def work(self, shape: tuple[int, ...]) -> BaseWork:
        """The products of O, whose argument and itself are written, and read again."""
        *stack, n, m = shape
        products = polar_products(n, m, self.coefficients, self.dtype) * math.prod(stack)
        return BaseWork(again=4, products=products, dtype=self.dtype)

    def __call__(self, matrices: list[Tensor]) -> list[Tensor]:
        """O of each: those of one shape in one batch where that pays, on a GPU."""
        if matrices and matrices[0].is_cuda:
            return self._batched(matrices)
        return [self._of(matrix) for matrix in matrices]

    def _batched(self, matrices: list[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(matrix.shape for matrix in matrices):
            numbers = [i for i, matrix in enumerate(matrices) if matrix.shape == shape]
            found |= dict(zip(numbers, self._of(torch.stack([matrices[i] for i in numbers])).unbind(), strict=True))
        return [found[i] for i in range(len(matrices))]

    def _of(self, matrix: Tensor) -> Tensor:
        columns = matrix.shape[-1] - (self.row_beta is not None)
        unit, lengths = normalised(matrix[..., :columns], self.dtype)
        self.nonfinite.add_((~lengths.isfinite()).sum())
        factor = iterated(unit, self.coefficients)
        return factor if self.row_beta is None else self._even(factor, matrix[..., columns:], self.row_beta)

    def _even(self, factor: Tensor, squares: Tensor, beta: float) -> Tensor:
        """O with even rows, and V beside it."""
        factor = factor.to(self.prototype.dtype)
        squares = squares.to(factor.dtype).lerp(factor.square().mean(-1, keepdim=True), 1 - beta)
        even = factor / squares.sqrt().clamp(min=_LEAST)
        length = torch.linalg.vector_norm(factor, dim=(-2, -1), keepdim=True)
        even *= length / torch.linalg.vector_norm(even, dim=(-2, -1), keepdim=True).clamp(min=_LEAST)
        return torch.cat([even, squares], -1)

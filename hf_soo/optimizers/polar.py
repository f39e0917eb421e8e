"""The polar factor UVᵀ of a matrix USVᵀ by odd polynomials of degree five, in products alone.

    X ← M / ‖M‖_F        X ← aX + (bA + cA²)X,  A = XXᵀ,  with coefficients (a, b, c) for each iteration

"jordan" (Jordan 2024) has the same three in every iteration, and leaves the singular values between about .7 and 1.2;
"polar_express" (Amsel et al. 2025, arXiv 2505.16932) has the best polynomial for each, from singular values of 1e-3
on, and after six iterations is nearer than twelve of the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from hf_soo.engine.flops import Product
from hf_soo.engine.gradients import norms

Coefficients = tuple[float, float, float]

Form = Literal["auto", "plain", "gram"]

COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.287212018145622, -23.59588651909882, 17.300387312530923),
        (4.107059111542197, -2.9478499167379084, 0.54484310829266),
        (3.9486908534822938, -2.9089021159629482, 0.5518191394370135),
        (3.3184196573706055, -2.488488024314878, 0.5100489401237208),
        (2.3006520199548186, -1.6689039845747518, 0.4188073119525678),
        (1.891301407787398, -1.2679958271945908, 0.37680408948524996),
        (1.8750014808534477, -1.250001645399949, 0.37500016454737346),
        (1.875, -1.25, 0.375),
    ),
}
"""Of each iteration; the last stand for all that follow."""

SAFETY = 1.01
"""In half precision rounding can carry a singular value over 1, where these polynomials grow: x is divided by this."""

_MOST_GROWTH = 50.0
"""Of a small singular value in a part of three iterations: three of Jordan's make 41."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WORTHWHILE = 1.3
"""How many times as fast a product in half precision must be on a CPU to be taken."""


def schedule(name: str | Sequence[Coefficients], steps: int, dtype: torch.dtype) -> list[Coefficients]:
    """The coefficients of ``steps`` iterations.

    Args:
        name: a key of ``COEFFICIENTS``, or three numbers for each iteration; or, in old checkpoints, for all of them.
        steps: iterations.
        dtype: that they run in; in half precision all but the last of "polar_express" are made safe (``SAFETY``).
    """
    table = COEFFICIENTS[name] if isinstance(name, str) else name
    if not isinstance(table[0], Sequence):
        table = [table]
    chosen = [table[min(i, len(table) - 1)] for i in range(steps)]
    if name == "polar_express" and dtype.itemsize < 4:
        chosen[:-1] = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in chosen[:-1]]
    return chosen


def polar_factor(M: Tensor, coefficients: list[Coefficients], dtype: torch.dtype, form: Form = "auto") -> Tensor:
    """About UVᵀ of M = USVᵀ, of each matrix of a stack; zero of zero, and of what is not finite.

    Args:
        M: [..., n, m]; left as it is.
        coefficients: of each iteration, ``schedule``.
        dtype: that the iterations run in.
        form: "plain", "gram", or "auto": that of fewer products.

    Returns:
        [..., n, m], in ``dtype``.
    """
    X, _ = normalised(M, dtype)
    return iterated(X, coefficients, form)


def normalised(M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M / ‖M‖_F of each matrix of a stack, zero where that is not finite; and ‖M‖_F.

    Args:
        M: [..., n, m].
        dtype: of the former.

    Returns:
        [..., n, m] and [number of matrices].
    """
    stack = M.reshape(-1, *M.shape[-2:]).to(torch.promote_types(M.dtype, torch.float32))  # fp16 holds no large norm
    lengths = norms(stack)
    divisor = torch.where(lengths > 0, lengths, 1)[:, None, None]
    unit = torch.where(lengths.isfinite()[:, None, None], stack / divisor, 0)
    return unit.to(dtype).view(M.shape), lengths


def iterated(X: Tensor, coefficients: list[Coefficients], form: Form = "auto") -> Tensor:
    """``polar_factor`` of matrices of norm 1, in their own dtype."""
    tall = X.shape[-2] > X.shape[-1]
    n, m = sorted(X.shape[-2:])
    stack = (X.mT if tall else X).reshape(-1, n, m)
    if form == "auto":
        products = _products(n, m, coefficients, X.dtype)
        form = min(products, key=lambda name: products[name])
    found = (_plain if form == "plain" else _gram)(stack[0] if len(stack) == 1 else stack, coefficients)
    wide = found.reshape(*X.shape[:-2], n, m)
    return wide.mT if tall else wide


def _plain(X: Tensor, coefficients: list[Coefficients]) -> Tensor:
    """X ← aX + (bA + cA²)X, A = XXᵀ."""
    for a, b, c in coefficients:
        A = X @ X.mT
        X = _sum(X, _sum(A, A, A, b, c), X, a)
    return X


def _gram(X: Tensor, coefficients: list[Coefficients]) -> Tensor:
    """R = XXᵀ; Z = aI + bR + cR², Q ← ZQ, R ← ZRZ; X ← QX at each restart and at the end."""
    rest = iter(coefficients)
    for length in _lengths(coefficients, X.dtype):
        part = list(islice(rest, length))
        R, Q = X @ X.mT, None
        for i, (a, b, c) in enumerate(part):
            Z = _sum(R, R, R, b, c)
            Z.diagonal(dim1=-2, dim2=-1).add_(a)
            Q = Z if Q is None else Z @ Q
            if i + 1 < len(part):
                R = Z @ R @ Z
        X = Q @ X if Q is not None else X
    return X


def _lengths(coefficients: list[Coefficients], dtype: torch.dtype) -> list[int]:
    """Iterations between restarts: two; of five, three and two if rounding allows it.

    Without a restart rounding grows without bound, with the growth of the smallest singular values: R's smallest
    eigenvalues lie below the rounding of its largest.
    """
    steps = len(coefficients)
    if steps == 5 and dtype.itemsize >= 4 and math.prod(a for a, _, _ in coefficients[:3]) < _MOST_GROWTH:
        return [3, 2]
    return [2] * (steps // 2) + [1] * (steps % 2)


def polar_cost(n: int, m: int, coefficients: list[Coefficients], dtype: torch.dtype) -> float:
    """Multiplications and additions of a polar factor of [n, m] in the form of fewer.

    T(2r + 1) or 2rs + 4T - 3s products of square matrices of the smaller side: T iterations, s parts, r = max / min.

    Args:
        n: rows.
        m: columns.
        coefficients: of each iteration.
        dtype: that they run in.
    """
    return 2.0 * min(n, m) ** 3 * min(_products(n, m, coefficients, dtype).values())


def polar_products(n: int, m: int, coefficients: list[Coefficients], dtype: torch.dtype) -> list[Product]:
    """The products of ``polar_cost`` one by one."""
    (n, m), count = sorted((n, m)), _products(n, m, coefficients, dtype)
    gram, square, back = Product(n, m, n), Product(n, n, n), Product(n, n, m)
    if count["plain"] <= count["gram"]:
        return [gram, square, back] * len(coefficients)
    lengths = _lengths(coefficients, dtype)
    return [each for length in lengths for each in (gram, *[square] * (4 * length - 3), back)]


def _products(n: int, m: int, coefficients: list[Coefficients], dtype: torch.dtype) -> dict[Form, float]:
    r, steps, parts = max(n, m) / max(min(n, m), 1), len(coefficients), len(_lengths(coefficients, dtype))
    return {"plain": steps * (2 * r + 1), "gram": 2 * r * parts + 4 * steps - 3 * parts}


def _sum(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """βC + αAB."""
    return (torch.addmm if C.ndim == 2 else torch.baddbmm)(C, A, B, beta=beta, alpha=alpha)


def exact(M: Tensor) -> Tensor:
    """UVᵀ of M = USVᵀ by a singular value decomposition: [..., n, m], for small matrices and for tests."""
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    factor: Tensor = U @ Vh
    return factor


def iteration_dtype(device: torch.device) -> str:
    """The dtype, by name, that iterations should run in on a device.

    fp16 on a GPU: eight times as accurate as bf16 at the same speed, and its range is enough, as ‖X‖_F <= 1. On a CPU
    what ``measured_dtype`` finds.
    """
    return measured_dtype() if device.type == "cpu" else "float16"


def product_seconds() -> dict[str, float]:
    """Of a product of two square matrices on the CPU, by the name of its dtype.

    A CPU without units for it takes 25 to 50 times as long in bf16 as in fp32.
    """
    return {name: _seconds(dtype) for name, dtype in DTYPES.items()}


@lru_cache(maxsize=1)
def measured_dtype() -> str:
    """What a CPU multiplies fastest, measured once in a process: half precision only if it is clearly faster."""
    seconds = product_seconds()
    for name in ("float16", "bfloat16"):  # the more accurate one first
        if seconds["float32"] > WORTHWHILE * seconds[name]:
            return name
    return "float32"


def _seconds(dtype: torch.dtype, size: int = 256, repeats: int = 3) -> float:
    """Of a product of two square matrices, the least of a few."""
    A = torch.ones(size, size, dtype=dtype)
    A @ A  # the first one prepares
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        A @ A
        found.append(time.perf_counter() - began)
    return min(found)

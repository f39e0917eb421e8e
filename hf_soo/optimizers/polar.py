"""The polar factor UVᵀ of a matrix USVᵀ by odd polynomials of degree five, in products alone.

    X ← M / ‖M‖_F        X ← aX + (bA + cA²)X,  A = XXᵀ,  with coefficients (a, b, c) for each iteration

"jordan" (Jordan 2024) has the same three in every iteration, and leaves the singular values between about .7 and 1.2;
"polar_express" (Amsel et al. 2025, arXiv 2505.16932) has the best polynomial for each, from singular values of 1e-3
on, and after six iterations is nearer than twelve of the other.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from hf_soo.engine.gradients import norms

Coefficients = tuple[float, float, float]

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WORTHWHILE = 1.3
"""How many times as fast a product in half precision must be on a CPU to be taken."""


def schedule(name: str | Coefficients, steps: int, dtype: torch.dtype) -> list[Coefficients]:
    """The coefficients of ``steps`` iterations.

    Args:
        name: a key of ``COEFFICIENTS``, or three numbers for every iteration.
        steps: iterations.
        dtype: that they run in; in half precision all but the last of "polar_express" are made safe (``SAFETY``).
    """
    table = COEFFICIENTS[name] if isinstance(name, str) else (name,)
    chosen = [table[min(i, len(table) - 1)] for i in range(steps)]
    if name == "polar_express" and dtype.itemsize < 4:
        chosen[:-1] = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in chosen[:-1]]
    return chosen


def polar_factor(M: Tensor, coefficients: list[Coefficients], dtype: torch.dtype, eps: float = 1e-7) -> Tensor:
    """About UVᵀ of M = USVᵀ.

    Args:
        M: [n, m]; left as it is.
        coefficients: of each iteration, ``schedule``.
        dtype: that the iterations run in.
        eps: the least norm that is divided by, so that zero gives zero.

    Returns:
        [n, m], in ``dtype``.
    """
    tall = M.shape[0] > M.shape[1]
    X = M.mT if tall else M
    X = (X / norms(X[None]).clamp(min=eps)).to(dtype)  # first divided: fp16 holds no large entries
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.addmm(A, A, A, beta=b, alpha=c)  # bA + cA²
        X = torch.addmm(X, B, X, beta=a)  # aX + BX
    return X.mT if tall else X


def iteration_dtype(device: torch.device) -> str:
    """The dtype, by name, that iterations should run in on a device.

    fp16 on a GPU: eight times as accurate as bf16 at the same speed, and its range is enough, as ‖X‖_F <= 1. On a CPU
    what ``measured_dtype`` finds.
    """
    return measured_dtype() if device.type == "cpu" else "float16"


@lru_cache(maxsize=1)
def measured_dtype() -> str:
    """What a CPU multiplies fastest, measured once in a process: half precision only if it is clearly faster.

    A CPU without units for it takes 25 to 50 times as long in bf16 as in fp32.
    """
    seconds = {name: _seconds(DTYPES[name]) for name in ("float32", "bfloat16", "float16")}
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

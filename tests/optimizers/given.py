"""Parameters and gradients that tests of single optimizers feed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """A matrix, one whose memory is transposed, a bias, a scalar."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((13, 11), (7, 9), (13,), ())]
    made[1] = made[1].t().contiguous().t()
    return [nn.Parameter(tensor.to(dtype)) for tensor in made]


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = scale * torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = grad.to(param.dtype)


def two_groups(params: list[nn.Parameter], decay: float = 0.01) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": decay}, {"params": params[2:], "weight_decay": 0.0}]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, scale: float = 1.0) -> None:
    for step in steps:
        set_grads(params, step, scale)
        optimizer.step()

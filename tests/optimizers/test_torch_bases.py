"""torch's own optimizers as bases: fused where that can run and is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_soo
from tests.oracles.core import assert_close_report


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_kernels_where_they_can_run(name: str) -> None:
    def fused(device: str, **args: object) -> object:
        return hf_soo.build_optimizer(name, nn.Linear(3, 2, device=device), lr=1e-2, **args).param_groups[0]["fused"]  # type: ignore[arg-type]

    assert fused("cpu") is True
    assert not fused("cpu", foreach=True) and not fused("cpu", fused=False) and not fused("meta")


def test_half_precision_sgd_is_right() -> None:
    """torch's fused SGD is not, for bf16 with momentum on a CPU: it must neither be chosen nor be accepted."""
    model, reference = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).bfloat16()
    reference.load_state_dict(model.state_dict())
    optimizers = (
        hf_soo.build_optimizer("sgd", model, lr=0.1, weight_decay=0.0),
        torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, fused=False, foreach=False),
    )
    for step in range(4):
        for net, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.full((4, 8), step + 1.0).bfloat16()).float().square().mean().backward()
            optimizer.step()
    # foreach and the loop may round once differently: 2^-8
    assert_close_report(model.weight.float(), reference.weight.float(), 1e-2, "weights")
    with pytest.raises(ValueError, match="fused=True is not right"):
        hf_soo.build_optimizer("sgd", model, lr=0.1, fused=True)

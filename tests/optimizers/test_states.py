"""What LAMB and Muon promise of their state: a resumed run is the run, a copy goes its own way."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_soo.optimizers import Lamb
from tests.optimizers.given import parameters, run, two_groups
from tests.optimizers.test_muon import make_muon

OPTIMIZERS = [lambda params: Lamb(two_groups(params), lr=0.05), make_muon]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_resume_is_bit_exact(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = make(params)
    run(optimizer, params, range(3))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    again = make(resumed)
    run(
        again, [nn.Parameter(p.detach().clone()) for p in resumed], range(1)
    )  # other parameters: a step without gradients
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for each, owner in ((params, optimizer), (resumed, again)):
        run(owner, each, range(3, 6))
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert again.state[b][name].dtype == value.dtype and torch.equal(again.state[b][name], value)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_deep_copy_goes_its_own_way(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    params = parameters(torch.float32)
    optimizer = make(params)
    run(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    twin = copy.deepcopy(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    run(twin, twins, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    run(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(2, 3))
    assert all(torch.equal(a, b) for g, h in zip(optimizer.param_groups, twin.param_groups, strict=True)
               for a, b in zip(g["params"], h["params"], strict=True))  # fmt: skip

"""Methods that learn from the gradient alone: what is theirs and not in the contract."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.preconditioners.config import prototype_updates_at
from hf_soo.preconditioners.shampoo import _merge_dims
from tests.oracles.core import assert_close_report


def step(model: nn.Module, optimizer: hf_soo.PreconditionedOptimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    optimizer.step()


class OneTensor(nn.Module):
    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("period", [1, 2, 3, 10])
def test_the_prototypes_schedule(period: int) -> None:
    expected, due = set(), 0
    for t in range(5000):
        if t == due:
            expected.add(t)
            due = t + min(max(math.floor(math.log(t + 1, 4) + 1e-9), 1), period)
    assert {t for t in range(5000) if prototype_updates_at(t, period)} == expected
    if period == 2:
        assert sorted(expected)[:19] == [*range(16), 17, 19, 21]


def test_merged_dims() -> None:
    table = [
        ((64, 3, 7, 7), 1024, 1, (64, 147)), ((512, 512, 3, 3), 1024, 1, (512, 512, 9)),
        ((512, 512, 3, 3), 8192, 1, (512, 4608)), ((6, 6), 1024, 2, (6, 6)), ((6, 6), 1024, 1, (36,)),
        ((32, 3, 64, 64), 10**6, 2, (32, 12288)), ((1, 2, 5, 1), 10, 1, (10,)), ((1, 1), 8, 1, (1,)),
    ]  # fmt: skip
    for shape, threshold, target, merged in table:
        assert _merge_dims(shape, threshold, target) == merged, shape


STATES: list[tuple[str, tuple[int, ...], dict[str, Any], dict[str, list[int]]]] = [
    ("if_shampoo", (5, 1, 3), {}, {"axis0": [5, 5], "axis1": [3, 3]}),
    ("if_shampoo", (4, 3, 2, 2), {}, {"axis0": [4, 4], "axis1": [12, 12]}),
    ("if_shampoo", (4, 3, 2, 2), {"merge_kernels": False}, {f"axis{i}": [d, d] for i, d in enumerate((4, 3, 2, 2))}),
    ("if_shampoo", (5,), {}, {"axis0": [5]}),
    ("if_shampoo", (5,), {"vector_axes": "dense"}, {"axis0": [5, 5]}),
    ("if_shampoo", (), {"vector_axes": "dense"}, {"axis0": [1]}),
    ("if_shampoo", (5, 3), {"max_dim": 4, "large_axes": "diagonal"}, {"axis0": [5], "axis1": [3, 3]}),
    ("if_shampoo", (5, 3), {"max_dim": 4, "large_axes": "identity"}, {"axis1": [3, 3]}),
    (
        "if_shampoo", (5, 3), {"max_dim": 4},
        {"block0.axis0": [4, 4], "block0.axis1": [3, 3], "block1.axis0": [1, 1], "block1.axis1": [3, 3]},
    ),
    ("shampoo", (4, 3, 2, 2), {"max_dim": 6}, {"axis0": [4, 4], "axis1": [3, 3], "axis2": [4, 4]}),
    (
        "shampoo", (7, 3), {"max_dim": 4},
        {"block0.axis0": [4, 4], "block0.axis1": [3, 3], "block1.axis0": [3, 3], "block1.axis1": [3, 3]},
    ),
    ("shampoo", (4, 3, 2, 2), {}, {"axis0": [4, 4], "axis1": [12, 12]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "settings", "roots"), STATES)
def test_axes_and_blocks(name: str, shape: tuple[int, ...], settings: dict[str, Any], roots: dict[str, Any]) -> None:
    model = OneTensor(*shape)
    batch = {"batch_size": 4} if name == "if_shampoo" else {}
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-2, **batch, **settings)
    step(model, optimizer)
    state = optimizer.stages.states["weight"]
    assert {side: list(factor["root"].shape) for side, factor in state.items()} == roots
    assert all(not torch.equal(f["root"], torch.ones_like(f["root"])) for f in state.values())
    assert optimizer.health()["fallback_layers"] == 0


def test_bfloat16_factors_that_could_not_grow_are_refused() -> None:
    """K_ii grows from 1 without a gradient iff β > √d/256, where half the spacing of bf16 at 1 is passed."""
    for d, rate in itertools.product((64, 192), (0.02, 0.04, 0.08)):
        model = OneTensor(d, 2)
        settings = {
            "lr": 1e-2,
            "batch_size": 1,
            "factor_lr": rate,
            "riemannian_momentum": 0.0,
            "state_dtype": "bfloat16",
        }
        if rate <= math.sqrt(d) / 256:
            with pytest.raises(ValueError, match=f"axis of length {d} \\('weight'\\)"):
                hf_soo.build_optimizer("if_shampoo", model, **settings)  # type: ignore[arg-type]
            continue
        optimizer = hf_soo.build_optimizer("if_shampoo", model, **settings)  # type: ignore[arg-type]
        model.weight.grad = torch.zeros(d, 2)
        for _ in range(4):
            optimizer.step()
        assert (optimizer.stages.states["weight"]["axis0"]["root"].diagonal() > 1).all(), (d, rate)


@pytest.mark.parametrize("fails", ["float32", "both"])
def test_a_failing_eigendecomposition(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again in float64; if that fails too, the old root stays, and is reported."""
    real, model = torch.linalg.eigh, OneTensor(3, 2)
    optimizer = hf_soo.build_optimizer("shampoo", model, lr=1e-2, inverse_period=1)

    def eigh(matrix: torch.Tensor) -> Any:
        if fails == "both" or matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", eigh)
        step(model, optimizer)
    roots = {side: factor["root"].clone() for side, factor in optimizer.stages.states["weight"].items()}
    kept = [torch.equal(root, torch.eye(len(root))) for root in roots.values()]
    assert all(kept) if fails == "both" else not any(kept)
    outcome = optimizer.diagnostics()["weight"]["gradient_side"]
    assert outcome == ("factor did not decompose" if fails == "both" else "updated")
    assert ("factor did not decompose): ['weight']" in caplog.text) == (fails == "both")
    step(model, optimizer, seed=1)
    assert optimizer.diagnostics()["weight"]["gradient_side"] == "updated"


@pytest.mark.parametrize("method", ["eva", "eva_s"])
def test_rescales_of_eva(method: str) -> None:
    """ "global": all P together are as long as all G; "norm": each is; neither without kl_clip's help."""
    for rescale in ("global", "norm", "none"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
        optimizer = hf_soo.build_optimizer(method, model, lr=0.0, rescale=rescale, damping=0.1)
        model(torch.randn(7, 4, dtype=torch.float64)).square().sum().backward()
        before = [p.grad.norm() for p in model.parameters()]
        optimizer.step()
        ratios = [(p.grad.norm() / b).item() for p, b in zip(model.parameters(), before, strict=True)]
        total = sum(p.grad.norm() ** 2 for p in model.parameters()) / sum(b**2 for b in before)
        if rescale == "norm":
            assert_close_report(torch.tensor(ratios), torch.ones(2), 1e-6, "ratios")
        elif rescale == "global":
            assert_close_report(total, torch.ones(()), 1e-12, "total")
            assert abs(ratios[0] - ratios[1]) > 1e-3
        else:
            assert min(ratios) > 2  # about 1/γ

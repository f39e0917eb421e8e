"""The pretraining schedule: the recipe's curve, its jump at the join, its state, its refusals."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.optimizers.schedules import poly_warmup
from tests.oracles import core as oracles
from tests.oracles import training as oracle_training
from tests.oracles.core import assert_close_report
from tests.oracles.twin_runs import batches, run_library, twins


def rates(total: int, warmup: int, **options: Any) -> list[float]:
    """The learning rates that the steps of a run see, and ten steps after it; a second group has a quarter of them."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-3}]
    optimizer = torch.optim.SGD(groups, lr=4e-3)
    schedule, seen = poly_warmup(optimizer, warmup, total, **options), []
    for _ in range(total + 10):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 4)
        seen.append(first)
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("total", "warmup", "degree"),
    [(1563, 200, 0.5), (100, 0, 0.5), (50, 50, 0.5), (7038, 2000, 0.5), (40, 10, 1.0), (4, 0, 2.0)],
)
def test_poly_warmup_is_the_recipe(total: int, warmup: int, degree: float) -> None:
    expected = [4e-3 * oracles.poly_warmup(step, total, warmup, degree=degree) for step in range(total)]
    assert_close_report(rates(total, warmup, degree=degree), [*expected, *[0.0] * 10], 1e-13, "learning rates")


def test_poly_warmup_jumps_at_the_join() -> None:
    """BERT-Large phase 2: 200 of 1,563 steps; the rate falls from 199/200 of the peak to √(1 - 200/1563) = 0.934."""
    seen = rates(1563, 200)
    assert seen[0] == pytest.approx(4e-3 / 200, rel=1e-12)
    assert seen[198] == pytest.approx(4e-3 * 199 / 200, rel=1e-12)
    assert seen[199] == pytest.approx(4e-3 * math.sqrt(1 - 200 / 1563), rel=1e-12)
    assert seen[199] / 4e-3 == pytest.approx(0.934, abs=5e-4)
    assert seen[1562:] == [0.0] * 11


def test_poly_warmup_state_is_numbers_and_pickles() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = poly_warmup(optimizer, 2, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    resumed = poly_warmup(other, 2, 10)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert resumed.get_last_lr() == scheduler.get_last_lr() == [pytest.approx(math.sqrt(0.4))]
    assert pickle.loads(pickle.dumps(scheduler.lr_lambdas[0]))(4) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 0), "num_training_steps=0"),
        ((11, 10), "num_warmup_steps=11"),
        ((-1, 10), "-1"),
        ((1, 10, 0.0), "degree=0.0"),
    ],
)
def test_poly_warmup_names_the_bad_value(arguments: tuple[Any, ...], match: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=match):
        poly_warmup(optimizer, *arguments)


def test_lamb_under_poly_warmup_trains_as_the_oracle() -> None:
    net, mlp = twins()
    data = batches(12)
    optimizer = hf_soo.build_optimizer("lamb", net, lr=0.05, weight_decay=0.01)
    schedule = poly_warmup(optimizer, 4, 12)
    base = oracle_training.Lamb(weight_decay=[0.01, 0.0, 0.01, 0.0])
    for step in range(12):
        lr = optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(0.05 * oracles.poly_warmup(step, 12, 4), rel=1e-13)
        run_library(net, optimizer, data[step : step + 1], [lr])
        oracle_training.simulate(mlp, data[step : step + 1], None, base, [lr])
        schedule.step()
    for p, q in zip(net.parameters(), mlp.parameters(), strict=True):
        assert_close_report(p, q, 1e-10, "parameter")  # as every ten-step run of these tests

"""Muon's rates, rows' variances, given coefficients, stacks and convolutions against textbook float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_soo.optimizers.muon import Muon
from tests.oracles import core as oracles
from tests.oracles.core import Array, assert_close_report

EXACT = {"ns_dtype": "float32"}  # of float64 parameters: float64


class Textbook:
    """One matrix under Muon with the options, step by step."""

    def __init__(self, W: Array, rule: str, row_beta: float | None, table: Any, decay: float) -> None:
        self.W, self.rule, self.row_beta, self.table, self.decay = W.copy(), rule, row_beta, table, decay
        self.B, self.v = np.zeros_like(W), np.zeros((len(W), 1))

    def step(self, G: Array, lr: float, momentum: float = 0.95) -> None:
        n, m = G.shape
        self.B = momentum * self.B + (1 - momentum) * G
        factor = oracles.newton_schulz((1 - momentum) * G + momentum * self.B, len(self.table), coefficients=self.table)
        if self.row_beta is not None:
            self.v = self.row_beta * self.v + (1 - self.row_beta) * (factor**2).mean(1, keepdims=True)
            even = factor / np.sqrt(self.v)
            factor = even * np.linalg.norm(factor) / np.linalg.norm(even)
        s = {"original": math.sqrt(max(1, n / m)), "match_rms_adamw": 0.2 * math.sqrt(max(n, m)), "none": 1.0}[
            self.rule
        ]
        self.W = (1 - lr * self.decay) * self.W - lr * s * factor


JORDAN = [np.array(oracles.JORDAN)] * 5
GIVEN = [(3.0, -4.0, 2.0), (2.0, -1.5, 0.5)]


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw", "none"])
@pytest.mark.parametrize("row_beta", [None, 0.95])
@pytest.mark.parametrize("coefficients", ["jordan", GIVEN], ids=["jordan", "given"])
def test_a_matrix_a_stack_and_a_convolution_are_the_textbook(
    rng: np.random.Generator, rule: str, row_beta: float | None, coefficients: Any
) -> None:
    table = JORDAN if coefficients == "jordan" else [np.array(GIVEN[min(i, 1)]) for i in range(5)]
    shapes = [(12, 8), (5, 9), (3, 4, 6), (6, 2, 3, 3)]
    values = [rng.normal(size=shape) for shape in shapes]
    params = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    optimizer = Muon(
        params, lr=0.02, matrices=params, weight_decay=0.1, ns_coefficients=coefficients, adjust_lr_fn=rule,
        row_beta=row_beta, **EXACT,
    )  # fmt: skip
    as_matrices = [lambda a: a[None], lambda a: a[None], lambda a: a, lambda a: a.reshape(1, len(a), -1)]
    books = [
        [Textbook(W, rule, row_beta, table, 0.1) for W in view(value)]
        for view, value in zip(as_matrices, values, strict=True)
    ]
    for _ in range(4):
        grads = [rng.normal(size=shape) for shape in shapes]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        for own, view, grad in zip(books, as_matrices, grads, strict=True):
            for book, G in zip(own, view(grad), strict=True):
                book.step(G, 0.02)
    for param, own, shape in zip(params, books, shapes, strict=True):
        assert_close_report(param, np.stack([book.W for book in own]).reshape(shape), 1e-10, str(shape))


def test_the_options_go_on_from_a_checkpoint_bit_for_bit(rng: np.random.Generator) -> None:
    def fresh() -> tuple[Muon, list[nn.Parameter]]:
        params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(2, 3, 5))]
        return Muon(params, matrices=params, row_beta=0.9, ns_coefficients=GIVEN, **EXACT), params

    def steps(optimizer: Muon, params: list[nn.Parameter], grads: list[list[Array]]) -> None:
        for each in grads:
            for param, grad in zip(params, each, strict=True):
                param.grad = torch.from_numpy(grad).float()
            optimizer.step()

    grads = [[rng.normal(size=(6, 4)), rng.normal(size=(2, 3, 5))] for _ in range(4)]
    through, straight = fresh()
    steps(through, straight, grads)
    before, params = fresh()
    steps(before, params, grads[:2])
    after, resumed = fresh()
    with torch.no_grad():
        for a, b in zip(resumed, params, strict=True):
            a.copy_(b)
    after.load_state_dict(before.state_dict())
    steps(after, resumed, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("rule", [None, "match_rms_adamw"])
def test_a_run_of_torchs_muon_goes_on(rng: np.random.Generator, rule: str | None) -> None:
    """With its momentum, coefficients and rate; the iterations stay in the dtype that is chosen here."""
    grads = [torch.from_numpy(rng.normal(size=(6, 4))).float() for _ in range(3)]
    one, other = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    torchs = torch.optim.Muon([one], lr=0.03, momentum=0.9, ns_steps=4, weight_decay=0.2, adjust_lr_fn=rule)
    for grad in grads[:2]:
        one.grad = grad.clone()
        torchs.step()
    ours = Muon([other], matrices=[other], ns_dtype="bfloat16")
    ours.load_state_dict(torchs.state_dict())
    with torch.no_grad():
        other.copy_(one)
    one.grad, other.grad = grads[2].clone(), grads[2].clone()
    torchs.step()
    ours.step()
    assert torch.equal(torchs.state[one]["momentum_buffer"], ours.state[other]["momentum_buffer"])
    torch.testing.assert_close(one, other, rtol=0, atol=0.03 * math.sqrt(6 / 4) * 0.1)  # of a step in bfloat16
    assert ours.param_groups[0]["ns_dtype"] == "bfloat16" and ours.param_groups[0]["ns_steps"] == 4


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms'"),
        ({"row_beta": 1.0}, "row_beta=1.0"),
        ({"ns_coefficients": [(1.0, 2.0)]}, "ns_coefficients"),
        ({"ns_coefficients": []}, r"ns_coefficients=\[\] is not allowed"),
    ],
)
def test_a_wrong_option_is_named(bad: dict[str, Any], match: str) -> None:
    param = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=match):
        Muon([param], matrices=[param], **bad)

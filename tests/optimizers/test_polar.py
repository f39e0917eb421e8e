"""The polar factor in both forms: against the textbook in float64, and how rounding grows in each dtype."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_soo.optimizers import polar
from hf_soo.optimizers.muon import Muon
from hf_soo.optimizers.polar import exact, polar_cost, polar_factor, schedule
from tests.oracles import core as oracles
from tests.oracles.core import assert_close_report

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = (5, 6, 7, 8, 9, 10, 11, 12)


@cache
def spread(n: int, m: int, decades: int) -> tuple[Tensor, Tensor]:
    """A matrix of norm 1 with log-spaced singular values, and its polar factor."""
    generator = torch.Generator().manual_seed(n + m)
    U, V = (torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64))[0] for k in (n, m))
    M = (U * torch.logspace(0, -decades, n, dtype=torch.float64)) @ V.mT
    return M / torch.linalg.norm(M), U @ V.mT


def distance(X: Tensor, to: Tensor) -> float:
    return float(torch.linalg.norm(X.double() - to) / torch.linalg.norm(to))


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8), (3, 6, 20), (2, 3, 9, 4)], ids=str)
@pytest.mark.parametrize("name", ["jordan", "polar_express"])
@pytest.mark.parametrize("steps", [1, 2, 5, 6, 9])
def test_both_forms_are_the_textbook_iteration(
    rng: np.random.Generator, form: Any, shape: tuple[int, ...], name: str, steps: int
) -> None:
    M = rng.normal(size=shape)
    table = [np.array(oracles.JORDAN)] * steps if name == "jordan" else oracles.polar_express(steps)
    found = polar_factor(torch.from_numpy(M), schedule(name, steps, torch.float64), torch.float64, form)
    assert found.shape == shape
    for own, G in zip(found.reshape(-1, *shape[-2:]), M.reshape(-1, *shape[-2:]), strict=True):
        # the seventh polynomial of the table holds nine digits: see its own test
        rtol = 1e-10 if steps < 7 or name == "jordan" else 1e-9
        assert_close_report(own, oracles.newton_schulz(G, steps, coefficients=table), rtol, "iterated")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["jordan", "polar_express"])
@pytest.mark.parametrize("shape", [(64, 256), (64, 128), (24, 384)], ids=str)
def test_the_gram_form_is_as_stable_as_the_plain_one(dtype: torch.dtype, name: str, shape: tuple[int, int]) -> None:
    """One to nine decades of singular values, five to twelve iterations.

    The distance to the polar factor is at most twice the plain form's. Rounding alone, against the same iterations in
    float64, is too where it matters; where the plain form's is a few units in the last place, up to eight times that:
    twelve of Jordan's iterations, which do not converge, amplify what the rows' own space has of it.
    """
    worst: dict[str, list[tuple[float, int, int]]] = {"distance": [], "rounding": []}
    for decades in range(1, 10):
        M, factor = spread(*shape, decades)
        for steps in STEPS:
            coefficients = schedule(name, steps, dtype)
            plain, gram = (polar_factor(M, coefficients, dtype, form) for form in ("plain", "gram"))
            assert gram.isfinite().all()
            same = polar_factor(M, coefficients, torch.float64, "plain")
            for kind, to in (("distance", factor), ("rounding", same)):
                worst[kind].append((distance(gram, to) / distance(plain, to), decades, steps))
    assert max(worst["distance"])[0] <= 2, max(worst["distance"])
    assert max(worst["rounding"])[0] <= 8, max(worst["rounding"])
    assert np.median([ratio for ratio, _, _ in worst["rounding"]]) <= 1.3


def test_without_restarts_the_gram_form_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the restarts are for."""
    monkeypatch.setattr(polar, "_lengths", lambda coefficients, dtype: [len(coefficients)])
    M, factor = spread(64, 256, 3)
    found = polar_factor(M, schedule("polar_express", 5, torch.bfloat16), torch.bfloat16, "gram")
    assert not distance(found, factor) < 10


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)], ids=str)
def test_the_cheaper_form_is_taken(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    """Products of n x n x n as the specification of the two forms counts them: a square matrix has the plain one."""
    taken = []
    for form in ("_plain", "_gram"):
        kept = getattr(polar, form)
        monkeypatch.setattr(polar, form, lambda X, c, form=form, kept=kept: (taken.append(form), kept(X, c))[1])
    polar_factor(torch.randn(shape), schedule("jordan", 5, torch.float32), torch.float32)
    assert taken == ["_plain" if shape == (8, 8) else "_gram"]
    n, r = 8, max(shape) / 8
    for name, dtype, parts in (
        ("jordan", torch.float32, 2),
        ("jordan", torch.float16, 3),
        ("polar_express", torch.float32, 3),
    ):
        cost = polar_cost(*shape, schedule(name, 5, dtype), dtype)
        assert cost == 2 * n**3 * min(5 * (2 * r + 1), 2 * r * parts + 20 - 3 * parts)


def test_the_exact_factor_is_that_of_the_decomposition(rng: np.random.Generator) -> None:
    M = rng.normal(size=(3, 7, 4))
    for G, own in zip(M, exact(torch.from_numpy(M)), strict=True):
        U, _, Vt = np.linalg.svd(G, full_matrices=False)
        assert_close_report(own, U @ Vt, 1e-12, "exact")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_any_length_has_the_same_factor(dtype: torch.dtype, form: Any, scale: float) -> None:
    M = torch.randn(6, 18, generator=torch.Generator().manual_seed(0))
    coefficients = schedule("jordan", 5, dtype)
    one, other = (polar_factor(M * s, coefficients, dtype, form) for s in (1.0, scale))
    assert_close_report(other.float(), one.float(), 16 * torch.finfo(dtype).eps, "of another length")


@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_zero_and_what_is_not_finite_have_the_factor_zero(bad: float) -> None:
    stack = torch.ones(3, 4, 6)
    stack[1] = 0.0 if bad == 0 else 1.0
    stack[1, 2, 3] = bad
    found = polar_factor(stack, schedule("jordan", 5, torch.float32), torch.float32)
    assert (found[1] == 0).all() and (found[0] == found[2]).all() and (found[0] != 0).all()


def test_a_momentum_that_is_not_finite_leaves_its_matrix_and_is_counted() -> None:
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = Muon(weights, lr=0.1, matrices=weights, weight_decay=0.5)
    for number, weight in enumerate(weights):
        weight.grad = torch.randn(4, 3)
        weight.grad[0, 0] = math.nan if number else 1.0
    optimizer.step()
    assert optimizer.health() == {"nonfinite_matrices": 1.0}
    assert (weights[1] == 0.95).all() and (weights[0] != 0.95).all()

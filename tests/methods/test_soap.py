"""SOAP in the library against Algorithm 3 in float64, alone and before Muon; what its bases do not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hf_soo
from tests.oracles import directions
from tests.oracles.core import Array, assert_close_report, relative_error
from tests.oracles.soap import Soap, SoapAndAdamW
from tests.oracles.twin_parameters import Bag, assert_resumes, feed, random_values
from tests.oracles.twin_runs import batches, run_library, twins

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"weight": (5, 4), "twin": (5, 4), "tall": (7, 3), "third": (3, 2, 4), "vector": (3,), "bias": (4,)}
STEPS = 25

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every step": {"inverse_period": 1},
    "period": {"inverse_period": 3},
    "decays": {"factor_decay": 0.8, "moment_decay": 0.99, "inverse_period": 4},
    "eps": {"eps": 1e-2},
    "ties": {"ties": 1e-2, "inverse_period": 4},
    "one side": {"max_dim": 4, "inverse_period": 4},
}
NAMES = {"factor_decay": "decay", "inverse_period": "period"}


def rules(config: dict[str, Any]) -> list[Soap | None]:
    settings = {NAMES.get(key, key): value for key, value in config.items()}
    return [Soap(**settings) if len(shape) > 1 else None for shape in SHAPES.values()]


def assert_trains_as(
    oracle: Any, steps: int = STEPS, batched: bool | None = None, rtol: float = 1e-9, **config: Any
) -> None:
    """All parameters after every step, the learning rate changing."""
    start, *grads = random_values(np.random.default_rng(0), SHAPES, steps + 1)
    model, W = Bag(start), [start[name].copy() for name in SHAPES]
    optimizer = hf_soo.build_optimizer("soap", model, lr=0.05, **config)
    optimizer.stages.batched = batched
    for t, values in enumerate(grads):
        rate = 0.05 * (1 - 0.5 * t / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        feed(optimizer, model, values)
        oracle.step(W, [values[name] for name in SHAPES], rate)
        for name, w, actual in zip(SHAPES, W, model.parameters(), strict=True):
            # 1e-16 in a factor turns the eigenvectors of its zeros by 1e-16 / 1e-7
            assert_close_report(actual, w, rtol, f"{name} after step {t}")


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_soap_is_algorithm_3(case: str, decay: float) -> None:
    decays = [0.0 if name == "bias" else decay for name in SHAPES]
    assert_trains_as(SoapAndAdamW(rules(CASES[case]), decay=decays), weight_decay=decay, **CASES[case])


def test_soap_of_tensors_of_one_shape_together() -> None:
    assert_trains_as(SoapAndAdamW(rules({}), decay=[0.0] * len(SHAPES)), batched=True, weight_decay=0.0)


class OnMatrices:
    """SOAP's rule on a base's directions, the gradients from the layers' rows."""

    def __init__(self) -> None:
        self.rules = [Soap(period=4), Soap(period=4)]

    def transform(self, layers: list[tuple[Array, Array]], lr: float, taken: list[Array]) -> list[Array]:
        return [rule.step(e.T @ a, D) for rule, (a, e), D in zip(self.rules, layers, taken, strict=True)]


@pytest.mark.parametrize("place", ["momentum", "numerator"])
def test_soap_before_muon_is_the_definition(place: str) -> None:
    """Muon's momentum, divided in the bases, and then its polar factor; over it the two places are one."""
    net, mlp = twins(bias=False)
    data, base = batches(12), directions.MuonAndRest("momentum", 0.02, directions.Adam("momentum"))
    optimizer = hf_soo.build_optimizer(
        "soap", net, lr=0.02, base="muon", base_args={"ns_dtype": "float32"}, weight_decay=0.0, inverse_period=4,
        apply_to=place,
    )  # fmt: skip
    run_library(net, optimizer, data, [0.02] * 12)
    directions.simulate(mlp, data, OnMatrices(), base, [0.02] * 12)
    for p, q in zip(net.parameters(), mlp.parameters(), strict=True):
        # Jordan's iteration does not converge: it makes 1e-12 of a rounding in each step
        assert_close_report(p, q, 1e-8, "weights")


def test_soap_is_soap_by_its_name() -> None:
    """AdamW with SOAP's betas, at the place where the method divides."""
    optimizer = hf_soo.build_optimizer("soap", Bag({"weight": np.ones((3, 2))}), lr=0.1)
    (group,) = [group for group in optimizer.param_groups if group["params"]]
    assert type(optimizer.base) is torch.optim.AdamW and group["betas"] == (0.95, 0.95)
    assert optimizer.config["apply_to"] == "numerator"
    other = hf_soo.build_optimizer("soap", Bag({"weight": np.ones((3, 2))}), lr=0.1, base_args={"betas": (0.9, 0.99)})
    assert other.param_groups[0]["betas"] == (0.9, 0.99)


def test_nothing_but_what_soap_does_not_move_moves_in_the_first_step() -> None:
    start, G = random_values(np.random.default_rng(0), SHAPES, 2)
    model = Bag(start)
    feed(hf_soo.build_optimizer("soap", model, lr=0.1, weight_decay=0.0), model, G)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), start[name]) == (len(SHAPES[name]) > 1), name


@pytest.mark.parametrize(("dtype", "ties", "most"), [(torch.float64, 1e-6, 1e-7), (torch.float32, 1e-2, 1e-3)])
def test_a_rounding_stays_a_rounding(dtype: torch.dtype, ties: float, most: float) -> None:
    """Gradients with fewer rows than columns leave most of a factor zero; ties alone decide on the bases there."""
    start, *grads = random_values(np.random.default_rng(0), {"wide": (4, 24)}, 13)
    ends = []
    for scale in (0.0, torch.finfo(dtype).eps):
        model, noise = Bag(start, dtype), np.random.default_rng(1)
        optimizer = hf_soo.build_optimizer("soap", model, lr=0.01, inverse_period=5, ties=ties)
        for values in grads:
            feed(optimizer, model, {"wide": values["wide"] * (1 + scale * noise.normal(size=(4, 24)))})
        ends.append(model.wide.detach().double().numpy() - start["wide"])
    assert relative_error(*ends) < most  # 3e-9 and 2e-4; without ties .3 and .2


def test_soap_resumes_to_the_bit() -> None:
    """Five steps: in the middle of a period."""
    assert_resumes(lambda model: hf_soo.build_optimizer("soap", model, lr=0.05, inverse_period=3), SHAPES)


def test_soap_leaves_vectors_and_embeddings_to_the_base() -> None:
    model = Bag({name: np.ones(shape) for name, shape in SHAPES.items()})
    optimizer = hf_soo.build_optimizer("soap", model, lr=0.1, max_dim=6)
    assert [layer.name for layer in optimizer.layers] == ["weight", "twin", "tall", "third"]
    assert set(optimizer.stages.states["tall"]) == {"axis1", "moment"}
    with pytest.raises(ValueError, match="every axis is longer than max_dim=2"):
        hf_soo.build_optimizer("soap", Bag({"weight": np.ones((5, 4))}), lr=0.1, max_dim=2)

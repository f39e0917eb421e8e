"""Muon and its AdamW against textbook float64.

Float64 parameters keep their precision through the iterations, so that all is compared at rounding. In half precision
five iterations amplify it: over 2,000 random matrices of these shapes torch's own result in bfloat16 is within 4.5e-2
of the float64 one in 99 of 100, at worst 7e-2 (a square matrix with a tiny singular value: 0.3); compared at 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_soo
from hf_soo.optimizers import polar
from hf_soo.optimizers.muon import Muon
from hf_soo.optimizers.polar import COEFFICIENTS, polar_factor, schedule
from tests.optimizers.given import parameters, run, set_grads, two_groups
from tests.oracles import core as oracles
from tests.oracles import training as oracle_training
from tests.oracles.core import Array, assert_close_report
from tests.oracles.twin_runs import batches, run_library, twins

BF16 = 0.1
EXACT = {"ns_dtype": "float32"}  # of float64 parameters: float64
SHAPES = [(12, 8), (8, 12), (10, 5), (5,), (9, 4)]  # the last is a matrix that is not among `matrices`: an embedding


def start(rng: np.random.Generator) -> list[Array]:
    return [rng.normal(size=shape) for shape in SHAPES]


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[Array]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g.copy())
    optimizer.step()


def make(values: list[Array], **options: Any) -> tuple[Muon, list[nn.Parameter]]:
    params = [nn.Parameter(torch.from_numpy(v.copy())) for v in values]
    return Muon(params, lr=0.02, matrices=params[:3], rest_lr=0.003, **EXACT | options), params


def singular_values(matrix: Tensor | Array) -> Array:
    return np.linalg.svd(np.asarray(matrix), compute_uv=False)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 5)])
def test_a_step_of_a_matrix_is_orthogonal_up_to_newton_schulz(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    W, G = rng.normal(size=shape), rng.normal(size=shape)
    param = nn.Parameter(torch.from_numpy(W.copy()))
    feed(Muon([param], lr=0.1, matrices=[param]), [param], [G])
    moved = (W - param.detach().numpy()) / (0.1 * math.sqrt(max(1, shape[0] / shape[1])))
    assert_close_report(moved, oracles.newton_schulz(G), BF16, "orthogonalised gradient")
    values = singular_values(moved)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize(
    "options",
    [
        {}, {"nesterov": False}, {"momentum": 0.8}, {"weight_decay": 0.1}, {"ns_steps": 3},
        {"ns_coefficients": "polar_express", "ns_steps": 6}, {"ns_coefficients": "polar_express", "ns_steps": 10},
    ],
    ids=str,
)  # fmt: skip
def test_muon_is_the_oracle(rng: np.random.Generator, options: dict[str, Any]) -> None:
    values = start(rng)
    optimizer, params = make(values, **options)
    decay = options.get("weight_decay", 0.0)
    muon = oracle_training.Muon(**{"weight_decay": decay, **options})
    rest = oracle_training.AdamW(weight_decay=decay)
    matrices, others = [v.copy() for v in values[:3]], [v.copy() for v in values[3:]]
    for step in range(1, 7):
        grads = [rng.normal(size=shape) for shape in SHAPES]
        feed(optimizer, params, grads)
        muon.step(matrices, grads[:3], 0.02)
        rest.step(others, grads[3:], 0.003)
        for p, q, buffer in zip(params[:3], matrices, muon.buffers, strict=True):
            assert_close_report(optimizer.state[p]["momentum_buffer"], buffer, 1e-14, "momentum")
            assert_close_report(p, q, 1e-11, f"matrix after step {step}")  # iterations that do not converge amplify
        for p, q in zip(params[3:], others, strict=True):
            assert_close_report(p, q, 1e-13, f"AdamW after step {step}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
def test_an_iteration_in_each_dtype_is_near_the_oracle(rng: np.random.Generator, dtype: str, coefficients: str) -> None:
    param = nn.Parameter(torch.zeros(12, 8))
    G = rng.normal(size=(12, 8)).astype(np.float32)
    optimizer = Muon([param], lr=1.0, matrices=[param], ns_dtype=dtype, ns_coefficients=coefficients)
    param.grad = torch.from_numpy(1e5 * G)  # fp16 ends at 65,504
    optimizer.step()
    table = [np.array(oracles.JORDAN)] if coefficients == "jordan" else oracles.polar_express(5)
    if coefficients == "polar_express" and dtype != "float32":  # Amsel et al., section 4.4: but for the last
        table[:-1] = [row / 1.01 ** np.array([1, 3, 5]) for row in table[:-1]]
    expected = oracles.newton_schulz(G.astype(float), 5, coefficients=table)
    tolerance = {"float32": 1e-5, "bfloat16": BF16, "float16": 0.02}[dtype]
    assert_close_report(-param.detach() / math.sqrt(12 / 8), expected, tolerance, f"polar factor in {dtype}")


def test_polar_express_is_the_papers_recursion() -> None:
    for step, (ours, theirs) in enumerate(zip(COEFFICIENTS["polar_express"], oracles.polar_express(8), strict=True)):
        # the seventh polynomial's interval is 1 ± 1e-6: its equations lose half the digits
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=f"iteration {step}")


def test_six_iterations_of_polar_express_are_the_polar_factor() -> None:
    """Two decades of singular values: muon's default leaves .19, these .001."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 16, generator=generator, dtype=torch.float64))[0] for n in (16, 64))
    M = (U * torch.logspace(0, -2, 16, dtype=torch.float64)) @ V.mT
    distances = {
        name: float(torch.linalg.norm(polar_factor(M, schedule(name, steps, M.dtype), M.dtype) - U @ V.mT)) / 4
        for name, steps in (("jordan", 5), ("polar_express", 6))
    }
    assert 0.1 < distances["jordan"] < 0.3 and distances["polar_express"] < 0.005, distances


def test_the_dtype_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision is taken where it is clearly faster, the more accurate one first; a checkpoint keeps its own."""
    seconds = {torch.float32: 1.3, torch.bfloat16: 0.5, torch.float16: 1.01}
    monkeypatch.setattr(polar, "_seconds", lambda dtype: seconds[dtype])
    seen = []
    for fp16 in (1.01, 0.9):
        seconds[torch.float16] = fp16
        polar.measured_dtype.cache_clear()
        seen.append(make_muon(parameters(torch.float32)).param_groups[0]["ns_dtype"])
    seconds[torch.bfloat16] = 9.0
    seen.append(make_muon(parameters(torch.float32)).param_groups[0]["ns_dtype"])  # not measured anew
    polar.measured_dtype.cache_clear()
    seconds[torch.float16] = 9.0
    slow = make_muon(parameters(torch.float32))
    seen.append(slow.param_groups[0]["ns_dtype"])
    polar.measured_dtype.cache_clear()
    assert seen == ["bfloat16", "float16", "float16", "float32"]
    kept = make_muon(parameters(torch.float32), ns_dtype="bfloat16").state_dict()
    slow.load_state_dict(kept)
    assert slow.param_groups[0]["ns_dtype"] == "bfloat16"
    for group in kept["param_groups"]:  # as it was saved before there was a choice, by torch's rule
        del group["ns_dtype"]
        group["ns_coefficients"] = (3.4445, -4.7750, 2.0315)
    fresh = parameters(torch.float32)
    old = make_muon(fresh, ns_dtype="float32")
    old.load_state_dict(kept)
    assert old.param_groups[0]["ns_dtype"] == "float32"
    run(old, fresh, range(1))


def muon_alone(net: nn.Module) -> torch.optim.Optimizer:
    return hf_soo.build_optimizer("muon", net, lr=0.02, rest_lr=0.005, weight_decay=0.1, **EXACT)


def mkor_over_muon(net: nn.Module) -> torch.optim.Optimizer:
    return hf_soo.build_optimizer(
        "mkor", net, lr=0.02, base="muon", base_args={"rest_lr": 0.005, **EXACT}, weight_decay=0.1
    )


@pytest.mark.parametrize("build", [muon_alone, mkor_over_muon])
def test_one_step_of_a_network(build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """Weights by Muon with decay, biases by AdamW at `rest_lr` without; under MKOR, on the preconditioned gradient."""
    net, mlp = twins()
    data = batches(1)
    before = [p.copy() for p in mlp.parameters()]
    base = oracle_training.MuonAndRest(
        0.005, oracle_training.Muon(weight_decay=0.1), oracle_training.AdamW(weight_decay=0.0)
    )
    config = {"update_period": 10, "warmup_updates": 10, "factor_decay": 0.95}
    oracle_training.simulate(mlp, data, oracle_training.Mkor(config) if build is mkor_over_muon else None, base, [0.02])
    optimizer = build(net)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.005, 0.02]
    optimizer.zero_grad()
    loss = (net(torch.from_numpy(data[0][0])) - torch.from_numpy(data[0][1])).square().sum(1).mean() / 2
    loss.backward()
    optimizer.step()
    for (name, p), q, old in zip(net.named_parameters(), mlp.parameters(), before, strict=True):
        rtol = 1e-10 if p.ndim == 2 else 1e-8  # a first AdamW step is lr·g / (|g| + 1e-8)
        assert_close_report(p.detach().numpy() - old, q - old, rtol, f"step of {name}")


def test_muon_lowers_the_loss_as_the_oracle_does() -> None:
    net, mlp = twins()
    data = batches(1) * 30
    base = oracle_training.MuonAndRest(
        0.02, oracle_training.Muon(weight_decay=0.0), oracle_training.AdamW(weight_decay=0.0)
    )
    losses = oracle_training.simulate(mlp, data, None, base, [0.02] * 30)
    optimizer = hf_soo.build_optimizer("muon", net, lr=0.02, weight_decay=0.0, **EXACT)
    run_library(net, optimizer, data, [0.02] * 30)
    with torch.no_grad():
        loss = (net(torch.from_numpy(data[0][0])) - torch.from_numpy(data[0][1])).square().sum(1).mean() / 2
    assert float(loss) == pytest.approx(mlp.loss(*data[0]), rel=1e-6)
    assert losses[-1] < 0.8 * losses[0]


# ---- groups, schedulers and refusals --------------------------------------------------------------------------------


def make_muon(params: list[nn.Parameter], **config: Any) -> Muon:
    return Muon(two_groups(params), lr=0.02, **{"rest_lr": 0.003, "matrices": params[:1], **config})


def test_muons_rest_is_torchs_adamw() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    run(make_muon(params, rest_betas=(0.8, 0.99), rest_eps=1e-5), params, range(5))
    rest = [{"params": others[1:2], "weight_decay": 0.01}, {"params": others[2:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=0.003, betas=(0.8, 0.99), eps=1e-5, fused=True)
    for step in range(5):
        set_grads(others, step)
        adamw.step()
    for a, b in zip(params[1:], others[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_own_up_to_its_bfloat16(nesterov: bool) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    before = params[0].detach().clone()
    run(make_muon(params, nesterov=nesterov, ns_dtype="bfloat16"), params, range(1))
    torchs = torch.optim.Muon(others[:1], lr=0.02, weight_decay=0.01, nesterov=nesterov)
    set_grads(others, 0)
    torchs.step()
    assert_close_report(params[0].detach() - before, (others[0].detach() - before).numpy(), BF16, "a step")


def test_muon_splits_groups_and_keeps_their_values() -> None:
    params = parameters()
    matrices = iter([params[0], params[1], nn.Parameter(torch.zeros(2, 2))])  # the last is in no group
    groups = [{"params": params[:1], "lr": 0.01, "weight_decay": 0.1, "name": "low"}, {"params": params[1:]}]
    optimizer = Muon(groups, lr=0.02, rest_lr=0.004, matrices=matrices, weight_decay=0.3)
    seen = [
        (g["algorithm"], g["lr"], g["weight_decay"], len(g["params"]), g.get("name")) for g in optimizer.param_groups
    ]
    assert seen == [("muon", 0.01, 0.1, 1, "low"), ("muon", 0.02, 0.3, 1, None), ("adamw", 0.004, 0.3, 2, None)]
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3)), "lr": 0.01})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0.01, "algorithm": "adamw"})
    assert [g["lr"] for g in optimizer.param_groups[3:]] == [0.002, 0.01]
    assert all(g["fused"] for g in optimizer.param_groups[2:])


def test_muon_obeys_schedulers_and_replaced_parameters() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    scheduled = make_muon(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1 / (step + 1))
    run(scheduled, params, range(1))
    scheduler.step()
    run(scheduled, params, range(1, 2))

    replaced = make_muon(parameters(torch.float32))
    table = dict(zip([id(p) for g in two_groups(params) for p in g["params"]], others, strict=True))
    order = [[params[0]], [params[1]], params[2:]]
    for group, mine in zip(replaced.param_groups, order, strict=True):
        group["params"] = [table[id(p)] for p in mine]  # as accelerate does under FSDP2
    run(replaced, others, range(1))
    for group in replaced.param_groups:
        group["lr"] /= 2
    run(replaced, others, range(1, 2))
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


def test_muon_rest_lr_falls_back_to_lr() -> None:
    params = parameters()
    assert [g["lr"] for g in make_muon(params, rest_lr=None).param_groups] == [0.02] * 3


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"rest_lr": -1.0}, "rest_lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"ns_steps": 100}, "ns_steps=100"),
        ({"ns_coefficients": "newton"}, "ns_coefficients='newton' is not allowed; give one of 'jordan'"),
        ({"ns_dtype": "float8"}, "ns_dtype='float8' is not allowed; give one of 'auto'"),
        ({"matrices": []}, "pass the hidden layers"),
    ],
)
def test_muon_names_the_bad_value(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_muon(parameters(), **bad)


def test_muon_refuses_what_it_would_get_wrong() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="two to four dimensions"):
        Muon(params, matrices=[params[2]])
    with pytest.raises(ValueError, match="'sgd' is unknown"):
        make_muon(params).add_param_group({"params": [nn.Parameter(torch.zeros(3))], "algorithm": "sgd"})
    state = torch.optim.AdamW(two_groups(params)).state_dict()
    with pytest.raises(ValueError, match="same optimizer"):
        make_muon(params).load_state_dict(state)

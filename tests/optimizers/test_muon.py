"""Muon and its AdamW against textbook float64.

Newton-Schulz runs in bfloat16, in torch as here, and its five iterations amplify rounding: over 2,000 random matrices
of these shapes torch's own result is within 4.5e-2 of the float64 one in 99 of 100, at worst 7e-2 (a square matrix with
a tiny singular value: 0.3). So one step of a matrix is compared at 0.1 and then exactly with torch's; everything before
and beside Newton-Schulz at float64 accuracy.
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
from hf_soo.optimizers.muon import Muon
from tests.optimizers.given import parameters, run, set_grads, two_groups
from tests.oracles import core as oracles
from tests.oracles import training as oracle_training
from tests.oracles.core import Array, assert_close_report
from tests.oracles.twin_runs import batches, run_library, twins

BF16 = 0.1
SHAPES = [(12, 8), (8, 12), (10, 5), (5,), (9, 4)]  # the last is a matrix that is not among `matrices`: an embedding


def start(rng: np.random.Generator) -> list[Array]:
    return [rng.normal(size=shape) for shape in SHAPES]


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[Array]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g.copy())
    optimizer.step()


def make(values: list[Array], **options: Any) -> tuple[Muon, list[nn.Parameter]]:
    params = [nn.Parameter(torch.from_numpy(v.copy())) for v in values]
    return Muon(params, lr=0.02, matrices=params[:3], rest_lr=0.003, **options), params


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
    "options", [{}, {"nesterov": False}, {"momentum": 0.8}, {"weight_decay": 0.1}, {"ns_steps": 3}], ids=str
)
def test_muon_is_the_oracle(rng: np.random.Generator, options: dict[str, Any]) -> None:
    values = start(rng)
    optimizer, params = make(values, **options)
    decay = options.get("weight_decay", 0.0)
    muon = oracle_training.Muon(**{"weight_decay": decay, **options})
    rest = oracle_training.AdamW(weight_decay=decay)
    matrices, others = [v.copy() for v in values[:3]], [v.copy() for v in values[3:]]
    for step in range(1, 7):
        grads = [rng.normal(size=shape) for shape in SHAPES]
        before = [p.detach().clone() for p in params[:3]]
        feed(optimizer, params, grads)
        old = [m.copy() for m in matrices]
        muon.step(matrices, grads[:3], 0.02)
        rest.step(others, grads[3:], 0.003)
        for i in range(3):
            # the buffer is plain float64; the step is compared from each side's own start
            assert_close_report(optimizer.state[params[i]]["momentum_buffer"], muon.buffers[i], 1e-14, "momentum")
            moved, expected = params[i].detach() - before[i], matrices[i] - old[i]
            assert_close_report(moved, expected, BF16, f"step {step} of matrix {i}")
        for p, q in zip(params[3:], others, strict=True):
            assert_close_report(p, q, 1e-13, f"AdamW after step {step}")


def test_muon_is_torchs_own_on_matrices(rng: np.random.Generator) -> None:
    values = start(rng)
    optimizer, params = make(values, weight_decay=0.1)
    theirs = [nn.Parameter(torch.from_numpy(v.copy())) for v in values[:3]]
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(4):
        grads = [rng.normal(size=shape) for shape in SHAPES]
        feed(optimizer, params, grads)
        feed(torchs, theirs, grads[:3])
    for p, q in zip(params[:3], theirs, strict=True):
        assert_close_report(p, q, 1e-12, "matrix after four steps")  # the same bf16 products in the same order


def muon_alone(net: nn.Module) -> torch.optim.Optimizer:
    return hf_soo.build_optimizer("muon", net, lr=0.02, rest_lr=0.005, weight_decay=0.1)


def mkor_over_muon(net: nn.Module) -> torch.optim.Optimizer:
    return hf_soo.build_optimizer("mkor", net, lr=0.02, base="muon", base_args={"rest_lr": 0.005}, weight_decay=0.1)


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
        rtol = BF16 if p.ndim == 2 else 1e-8  # a first AdamW step is lr·g / (|g| + 1e-8)
        assert_close_report(p.detach().numpy() - old, q - old, rtol, f"step of {name}")


def test_muon_lowers_the_loss_as_the_oracle_does() -> None:
    net, mlp = twins()
    data = batches(1) * 30
    base = oracle_training.MuonAndRest(
        0.02, oracle_training.Muon(weight_decay=0.0), oracle_training.AdamW(weight_decay=0.0)
    )
    losses = oracle_training.simulate(mlp, data, None, base, [0.02] * 30)
    optimizer = hf_soo.build_optimizer("muon", net, lr=0.02, weight_decay=0.0)
    run_library(net, optimizer, data, [0.02] * 30)
    with torch.no_grad():
        loss = (net(torch.from_numpy(data[0][0])) - torch.from_numpy(data[0][1])).square().sum(1).mean() / 2
    # bf16 noise of each step averages out: the losses agree far better than any one step
    assert float(loss) == pytest.approx(mlp.loss(*data[0]), rel=1e-2)
    assert losses[-1] < 0.8 * losses[0]


# ---- groups, schedulers and refusals --------------------------------------------------------------------------------


def make_muon(params: list[nn.Parameter], **config: Any) -> Muon:
    return Muon(two_groups(params), lr=0.02, **{"rest_lr": 0.003, "matrices": params[:1], **config})


def test_muon_is_torchs_two_optimizers() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    run(
        make_muon(params, rest_betas=(0.8, 0.99), rest_eps=1e-5, momentum=0.9, nesterov=False, ns_steps=4),
        params,
        range(5),
    )
    muon = torch.optim.Muon(
        others[:1], lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=False, ns_steps=4, adjust_lr_fn="original"
    )
    rest = [{"params": others[1:2], "weight_decay": 0.01}, {"params": others[2:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=0.003, betas=(0.8, 0.99), eps=1e-5, fused=True)
    for step in range(5):
        set_grads(others, step)
        muon.step()
        adamw.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


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
        ({"matrices": []}, "pass the hidden layers"),
    ],
)
def test_muon_names_the_bad_value(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_muon(parameters(), **bad)


def test_muon_refuses_what_it_would_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    with pytest.raises(ValueError, match="two dimensions"):
        Muon(params, matrices=[params[2]])
    with pytest.raises(ValueError, match="'sgd' is unknown"):
        make_muon(params).add_param_group({"params": [nn.Parameter(torch.zeros(3))], "algorithm": "sgd"})
    low = parameters(torch.bfloat16)
    with pytest.raises(ValueError, match="nesterov=True"):
        make_muon(low, nesterov=False)
    state = torch.optim.AdamW(two_groups(params)).state_dict()
    with pytest.raises(ValueError, match="same optimizer"):
        make_muon(params).load_state_dict(state)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RuntimeError, match="upgrade torch"):
        make_muon(params)

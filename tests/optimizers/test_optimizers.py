"""LAMB against a float64 textbook version, Muon against torch's two optimizers, and the pretraining schedule."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_soo.engine import chunks as pieces
from hf_soo.optimizers import Lamb, Muon, poly_warmup
from hf_soo.optimizers.schedules import poly_warmup_factor

Groups = list[dict[str, Any]]


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


def two_groups(params: list[nn.Parameter], decay: float = 0.01) -> Groups:
    return [{"params": params[:2], "weight_decay": decay}, {"params": params[2:], "weight_decay": 0.0}]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, scale: float = 1.0) -> None:
    for step in steps:
        set_grads(params, step, scale)
        optimizer.step()


def textbook_lamb(
    params: list[Tensor],
    decays: list[float],
    grads: Callable[[int], list[Tensor]],
    steps: int,
    *,
    lr: float,
    clip: float | None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    always_adapt: bool = False,
) -> list[Tensor]:
    params = [p.clone() for p in params]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t in range(1, steps + 1):
        g = grads(t - 1)
        norm = math.sqrt(sum(float((x * x).sum()) for x in g))
        divisor = 1.0 if clip is None else max(1.0, norm / clip)
        for i, w in enumerate(params):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i] / divisor
            v[i] = betas[1] * v[i] + (1 - betas[1]) * (g[i] / divisor) ** 2
            u = m[i] / (1 - betas[0] ** t) / ((v[i] / (1 - betas[1] ** t)).sqrt() + eps) + decays[i] * w
            adapted = decays[i] != 0 or always_adapt
            r = float(w.norm() / u.norm()) if adapted and float(w.norm()) > 0 and float(u.norm()) > 0 else 1.0
            params[i] = w - lr * r * u
    return params


def gradients_at(step: int) -> list[Tensor]:
    params = parameters()
    set_grads(params, step)
    return [p.grad for p in params if p.grad is not None]


def worst(actual: list[nn.Parameter], expected: list[Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(float(((a.detach().double() - e).norm() / e.norm()).detach()) for a, e in pairs)


# ---- LAMB ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 16, 100, 1 << 18])
@pytest.mark.parametrize("clip", [1.0, 1e6, None])
@pytest.mark.parametrize("always_adapt", [False, True])
def test_lamb_is_the_textbook_however_tensors_are_cut(
    monkeypatch: pytest.MonkeyPatch, piece: int, clip: float | None, always_adapt: bool
) -> None:
    monkeypatch.setattr(pieces, "CPU_PIECE", piece)
    params = parameters()
    optimizer = Lamb(two_groups(params), lr=0.02, max_grad_norm=clip, always_adapt=always_adapt)
    run(optimizer, params, range(12))
    expected = textbook_lamb(
        [p.detach() for p in parameters()],
        [0.01, 0.01, 0, 0],
        gradients_at,
        12,
        lr=0.02,
        clip=clip,
        always_adapt=always_adapt,
    )
    assert worst(params, expected) <= 1e-12


def test_lamb_moves_an_adapted_tensor_by_lr_of_its_norm() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params[:2]]
    run(Lamb(two_groups(params), lr=0.01), params, range(1))
    for old, new in zip(before, params, strict=False):
        assert float((new.detach() - old).norm() / old.norm()) == pytest.approx(0.01, rel=1e-12)


def test_lamb_gradient_scale_cancels_without_eps() -> None:
    results = []
    for scale in (1.0, 1e3):
        params = parameters()
        run(Lamb(two_groups(params), lr=0.01, eps=0.0, max_grad_norm=None), params, range(8), scale)
        results.append(params)
    assert worst(results[0], [p.detach() for p in results[1]]) <= 1e-12


def test_lamb_is_scale_equivariant_without_decay_and_eps() -> None:
    plain, scaled = parameters(), parameters()
    for param in scaled:
        param.data.mul_(7.0)
    for params in (plain, scaled):
        run(Lamb(params, lr=0.01, eps=0.0, weight_decay=0.0, always_adapt=True), params, range(8))
    assert worst(scaled, [7.0 * p.detach() for p in plain]) <= 1e-12


@pytest.mark.parametrize("zero", ["weight", "update"])
def test_lamb_ratio_is_one_where_a_norm_is_zero(zero: str) -> None:
    param = nn.Parameter(
        torch.zeros(5, 4, dtype=torch.float64) if zero == "weight" else torch.ones(5, 4, dtype=torch.float64)
    )
    grad = torch.randn(5, 4, dtype=torch.float64) if zero == "weight" else torch.zeros(5, 4, dtype=torch.float64)
    other = nn.Parameter(param.detach().clone())
    param.grad, other.grad = grad, grad.clone()
    Lamb([param], lr=0.1, weight_decay=0.0, always_adapt=True, max_grad_norm=None).step()
    torch.optim.Adam([other], lr=0.1, eps=1e-6).step()
    assert float((param - other).detach().abs().max()) <= 1e-15


def test_lamb_without_decay_takes_adam_steps() -> None:
    params, others = parameters(), parameters()
    run(Lamb(params, lr=0.01, weight_decay=0.0, max_grad_norm=None), params, range(5))
    run(torch.optim.Adam(others, lr=0.01, eps=1e-6), others, range(5))
    assert worst(params, [p.detach() for p in others]) <= 1e-13


def test_lamb_clips_one_norm_over_all_groups() -> None:
    params, others = parameters(), parameters()
    run(Lamb(two_groups(params), lr=0.01, max_grad_norm=0.5), params, range(4))
    optimizer = Lamb(two_groups(others), lr=0.01, max_grad_norm=None)
    for step in range(4):
        set_grads(others, step)
        nn.utils.clip_grad_norm_(others, 0.5)
        optimizer.step()
    assert worst(params, [p.detach() for p in others]) <= 1e-6  # torch adds 1e-6 to the norm it divides by


@pytest.mark.parametrize("piece", [16, 1 << 18])
def test_lamb_keeps_fp32_moments_for_bf16_parameters(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(pieces, "CPU_PIECE", piece)
    low = parameters(torch.bfloat16)
    high = [nn.Parameter(p.detach().float()) for p in low]
    optimizers = [Lamb(two_groups(params), lr=0.05) for params in (low, high)]
    for params in (low, high):
        set_grads(low, 0)
        for target, source in zip(params, low, strict=True):
            assert source.grad is not None
            target.grad = source.grad.to(target.dtype)
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(low, high, strict=True):
        state = optimizers[0].state[a]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], optimizers[1].state[b]["exp_avg"])
        assert torch.equal(a, b.to(torch.bfloat16))  # one rounding, at the very end


def test_lamb_skips_parameters_without_gradient_and_refuses_sparse_ones() -> None:
    params = parameters()
    before = params[0].detach().clone()
    optimizer = Lamb(params, lr=0.1)
    set_grads(params, 0)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        Lamb(embedding.parameters()).step()
    assert Lamb(parameters()).step(lambda: 3.5) == 3.5  # no gradients at all


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"max_grad_norm": 0.0}, "None to switch"),
    ],
)
def test_lamb_names_the_bad_value(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Lamb(parameters(), **bad)
    if "max_grad_norm" not in bad:
        with pytest.raises(ValueError, match=match):
            Lamb([{"params": parameters(), **bad}])


# ---- Muon ------------------------------------------------------------------------------------------------------------


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


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda params: Lamb(two_groups(params), lr=0.05), make_muon])
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


@pytest.mark.parametrize("make", [lambda params: Lamb(two_groups(params), lr=0.05), make_muon])
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


# ---- schedule --------------------------------------------------------------------------------------------------------


def test_poly_warmup_is_the_recipes_curve() -> None:
    """Phase 2 of BERT-Large: 1563 steps, 200 of warm-up, peak 4e-3, with the jump at the join."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [param]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-3}], lr=4e-3)
    scheduler = poly_warmup(optimizer, 200, 1563)
    rates = []
    for _ in range(1570):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    first = [rate for rate, _ in rates]
    assert first[0] == pytest.approx(4e-3 / 200)
    assert first[198] == pytest.approx(4e-3 * 199 / 200)
    assert first[199] == pytest.approx(4e-3 * math.sqrt(1 - 200 / 1563))  # x 0.934, not the peak
    assert first[1000] == pytest.approx(4e-3 * math.sqrt(1 - 1001 / 1563))
    assert first[1562:] == [0.0] * 8
    assert all(b == pytest.approx(a / 4) for a, b in rates)


def test_poly_warmup_degree_and_no_warmup() -> None:
    assert poly_warmup_factor(0, warmup=0, total=4, degree=1.0) == 0.75
    assert poly_warmup_factor(1, warmup=0, total=4, degree=2.0) == 0.25
    assert poly_warmup_factor(3, warmup=4, total=4, degree=0.5) == 0.0


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

"""What is put around a base: textbook float64, two weights, resumed runs, refusals."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_soo
from hf_soo.engine.strategy import LocalGradient
from hf_soo.optimizers.bases import BASES, ELEMENTWISE
from hf_soo.optimizers.wrappers import WRAPPERS, Wrappers
from hf_soo.registry import METHODS, takes_batch_size
from tests.methods.test_synchronisation import watched
from tests.oracles import directions
from tests.oracles.core import assert_close_report
from tests.oracles.training import AdamW, Lamb, Mkor, Muon, MuonAndRest, Sgd, simulate
from tests.oracles.twin_runs import batches, half_squares, twins
from tests.oracles.wrappers import Wrapped

STEPS = 9
DECAY = 0.1
MKOR: dict[str, Any] = {"update_period": 3, "warmup_updates": 2, "factor_decay": 0.9}
ALONE: dict[str, dict[str, Any]] = {
    "slow": {"slow_momentum": 0.8, "slow_weight": 1.5},
    "cautious": {"cautious": True},
    "ema": {"ema_decay": 0.7},
    "lookahead": {"lookahead": 0.9, "lookahead_decay": 0.8},
}
SETTINGS = ALONE | {"all": {key: value for each in ALONE.values() for key, value in each.items()}}


def oracle(name: str, base: Any, decays: list[float]) -> Wrapped:
    given = SETTINGS[name]
    return Wrapped(
        base,
        slow=(0.8, 1.5) if "slow_momentum" in given else None,
        cautious=decays if "cautious" in given else None,
        ema=given.get("ema_decay"),
        lookahead=(0.9, 0.8) if "lookahead" in given else None,
    )


def textbook(base: str, decays: list[float]) -> Any:
    """A base with decays of each parameter; none of them where the decay is put around it."""
    if base == "muon":
        matrices, vectors = decays[0], [decays[1], decays[3]]
        return MuonAndRest(0.03, Muon(weight_decay=matrices), AdamW(weight_decay=vectors))
    if base == "lamb":
        return Lamb(weight_decay=decays, always_adapt=True)
    return Sgd(0.9, decays) if base == "sgd" else AdamW(weight_decay=decays)


ARGS: dict[str, dict[str, Any]] = {
    "sgd": {}, "adamw": {}, "lamb": {"always_adapt": True}, "muon": {"rest_lr": 0.03, "ns_dtype": "float32"},
}  # fmt: skip


def run(net: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    for x, t in data:
        optimizer.zero_grad()
        half_squares(net, x, t).backward()
        optimizer.step()


def assert_the_oracles(net: nn.Module, optimizer: Any, params: list[Any], wrapped: Wrapped, what: str) -> None:
    for i, (p, q) in enumerate(zip(net.parameters(), params, strict=True)):
        assert_close_report(p, q, 1e-10, f"{what}: parameter {i}")
    trained = [p.detach().clone() for p in net.parameters()]
    optimizer.eval()
    for i, (p, q) in enumerate(zip(net.parameters(), wrapped.shown(params), strict=True)):
        assert_close_report(p, q, 1e-10, f"{what}: parameter {i} as shown")
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), trained, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("base", ARGS)
def test_a_base_is_the_oracle(base: str, name: str) -> None:
    net, mlp = twins()
    data, decays = batches(STEPS), [DECAY, 0.0, DECAY, 0.0]
    optimizer = hf_soo.build_optimizer(
        "mkor", net, lr=0.05, base=base, base_args=ARGS[base] | SETTINGS[name], weight_decay=DECAY, **MKOR
    )
    none = [0.0] * 4 if name in ("cautious", "all") else decays
    wrapped = oracle(name, textbook(base, none), decays)
    run(net, optimizer, data)
    simulate(mlp, data, Mkor(MKOR), wrapped, [0.05] * STEPS)
    assert_the_oracles(net, optimizer, mlp.parameters(), wrapped, f"{name} around {base}")


@pytest.mark.parametrize(("base", "place"), [("adamw", "momentum"), ("adamw", "update"), ("lamb", "momentum")])
def test_a_base_in_halves_is_the_oracle(base: str, place: str) -> None:
    net, mlp = twins()
    data = batches(STEPS)
    optimizer = hf_soo.build_optimizer(
        "mkor", net, lr=0.05, base=base, base_args=SETTINGS["all"] | ARGS[base], weight_decay=DECAY, apply_to=place,
        **MKOR,
    )  # fmt: skip
    lamb = base == "lamb"
    halves = directions.Adam(place, lamb=lamb, eps=1e-6 if lamb else 1e-8)
    wrapped = oracle("all", halves, [DECAY, 0.0, DECAY, 0.0])
    run(net, optimizer, data)
    directions.simulate(mlp, data, Mkor(MKOR), wrapped, [0.05] * STEPS)
    assert_the_oracles(net, optimizer, mlp.parameters(), wrapped, f"around {base} on its {place}")


def test_cautious_lamb_adapts_what_it_did() -> None:
    """Its ratio, of the update alone now, is where decay was."""
    net, mlp = twins()
    data, decays = batches(STEPS), [DECAY, 0.0, DECAY, 0.0]
    optimizer = hf_soo.build_optimizer("lamb", net, lr=0.05, weight_decay=DECAY, cautious=True)
    wrapped = Wrapped(_AdaptsMatrices(), cautious=decays)
    run(net, optimizer, data)
    simulate(mlp, data, None, wrapped, [0.05] * STEPS)
    assert_the_oracles(net, optimizer, mlp.parameters(), wrapped, "lamb")
    assert [group["cautious_decay"] for group in optimizer.param_groups if group.get("cautious_decay")] == [DECAY]


class _AdaptsMatrices(Lamb):
    """LAMB without decay, whose ratio is of matrices alone."""

    def step(self, params: Any, grads: Any, lr: float) -> None:
        plain = [p.copy() for p in params]
        self.weight_decay = 0.0
        super().step(plain, grads, lr)
        for p, q in zip(params, plain, strict=True):
            u = (p - q) / lr
            p -= lr * u * (np.linalg.norm(p) / np.linalg.norm(u) if p.ndim == 2 else 1.0)


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_setting_changes_the_run(name: str) -> None:
    ends = []
    others = {"slow_momentum": 0.8, "cautious": True, "ema_decay": 0.7, "lookahead": 0.9, "lookahead_decay": 0.8}
    other = {"slow_momentum": 0.9, "slow_weight": 2.0, "cautious": False, "ema_decay": 0.9, "lookahead": 0.1,
             "lookahead_decay": 0.7}  # fmt: skip
    for settings in (others, others | {name: other[name]}):
        net, _ = twins()
        optimizer = hf_soo.build_optimizer("adamw", net, lr=0.05, weight_decay=DECAY, **settings)
        run(net, optimizer, batches(STEPS))
        optimizer.eval()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).norm() > 1e-4 * ends[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_state_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    """Also in bf16, whose averages are in fp32: torch casts what it loads to the dtype of the weights."""

    def make() -> tuple[nn.Module, Any]:
        net = twins()[0].to(dtype)
        return net, hf_soo.build_optimizer("mkor", net, lr=0.05, base="adamw", weight_decay=DECAY, **SETTINGS["all"])

    def steps(net: nn.Module, optimizer: Any, data: Any) -> None:
        for x, t in data:
            optimizer.zero_grad()
            (net(torch.from_numpy(x).to(dtype)) - torch.from_numpy(t).to(dtype)).square().mean().backward()
            optimizer.step()

    net, optimizer = make()
    steps(net, optimizer, batches(4))
    buffer = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    optimizer.eval(), optimizer.train()  # between
    steps(net, optimizer, batches(3, seed=2))
    again, resumed = make()
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(again, resumed, batches(3, seed=2))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        for key in ("ema", "lookahead_average", "slow_momentum"):
            state, other = optimizer.state[p][key], resumed.state[q][key]
            assert state.dtype == other.dtype == torch.float32 and torch.equal(state, other), key


PAIRS = [
    *((name, None) for name in hf_soo.available()),
    *(("mkor", base) for base in BASES),
    # torch's own NAdam does not go on bit for bit in float64
    *(("mkor", cls) for cls in ELEMENTWISE if cls is not torch.optim.NAdam),
]


@pytest.mark.parametrize(("name", "base"), PAIRS, ids=str)
def test_every_method_and_base_goes_on_with_all_of_it(name: str, base: Any) -> None:
    settings = SETTINGS["all"] | ({"batch_size": 12} if takes_batch_size(name) else {})

    def make() -> tuple[nn.Module, Any]:
        net, _ = twins()
        decay = DECAY if base is None or base in BASES else None
        return net, hf_soo.build_optimizer(name, net, lr=1e-3, base=base, weight_decay=decay, **settings)

    def steps(net: nn.Module, optimizer: Any, data: Any) -> None:
        for x, t in data:
            optimizer.zero_grad()
            loss = half_squares(net, x, t)
            optimizer.report_loss(loss)
            loss.backward()
            optimizer.step()

    net, optimizer = make()
    steps(net, optimizer, batches(2))
    weights, state = ({key: v.clone() for key, v in net.state_dict().items()}, copy.deepcopy(optimizer.state_dict()))
    optimizer.eval()
    assert not any(torch.equal(p, weights[key]) for key, p in net.state_dict().items())
    optimizer.train()
    steps(net, optimizer, batches(2, seed=3))
    again, resumed = make()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    steps(again, resumed, batches(2, seed=3))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all()


def test_a_run_may_begin_to_average() -> None:
    """A checkpoint of before has neither the settings nor the states."""
    net, _ = twins()
    plain = hf_soo.build_optimizer("mkor", net, lr=0.05, base="adamw", weight_decay=DECAY)
    run(net, plain, batches(3))
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = hf_soo.build_optimizer("mkor", net, lr=0.05, base="adamw", weight_decay=DECAY, **SETTINGS["all"])
    optimizer.load_state_dict(plain.state_dict())
    run(net, optimizer, batches(1, seed=5))
    for p, first in zip(net.parameters(), start, strict=True):
        state = optimizer.state[p]
        x = p + (state["lookahead_average"] - p) * (reach := 0.9 * 0.2 / 0.8) / (1 + reach)
        assert_close_report(state["ema"], (first + 0.3 * (x - first)).detach().numpy(), 1e-12, "average")


def test_the_switch_to_the_base_keeps_what_is_around_it() -> None:
    net, _ = twins()
    optimizer = hf_soo.build_optimizer(
        "mkor_h", net, lr=0.01, base="adamw", rate_fraction=100.0, patience=1, min_steps=3, update_period=1,
        apply_to="momentum", **SETTINGS["all"],
    )  # fmt: skip
    for i, (x, t) in enumerate(batches(8)):
        assert optimizer.switched is (i > 3)
        before = {p: {key: value.clone() for key, value in optimizer.state[p].items()} for p in optimizer.state}
        optimizer.zero_grad()
        half_squares(net, x, t).backward()
        optimizer.report_loss(1 - i / 1000)
        optimizer.step()
    for p, state in before.items():
        for key in ("ema", "lookahead_average", "slow_momentum"):
            assert not torch.equal(optimizer.state[p][key], state[key]), key


def test_a_step_reads_no_value() -> None:
    net, _ = twins()
    optimizer = hf_soo.build_optimizer("lamb", net, lr=0.05, weight_decay=DECAY, **SETTINGS["all"])
    run(net, optimizer, batches(1))
    ((x, t),) = batches(1)
    half_squares(net, x, t).backward()
    with watched() as found:
        optimizer.step()
    assert found <= {""}


def test_a_model_with_other_weights_is_not_trained() -> None:
    net, _ = twins()
    optimizer = hf_soo.build_optimizer("mkor", net, lr=0.05, ema_decay=0.9)
    optimizer.eval()  # nothing to show yet
    run(net, optimizer, batches(2))
    optimizer.eval(), optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        run(net, optimizer, batches(1))


def test_a_scaled_gradient_in_a_part_of_a_flat_tensor() -> None:
    """As ZeRO has it, under a loss scale."""
    flat = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    wrappers = Wrappers(base := torch.optim.SGD([flat], lr=0.1), {"slow_momentum": 0.8, "slow_weight": 1.5})
    one, two = torch.arange(3.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for _ in range(2):
        pieces = [torch.clone(8 * each) for each in (one, two)]
        cuts = (slice(1, 4), slice(6, 8))
        wrappers.mix_pieces(
            LocalGradient(base.param_groups[0], flat, flat[cut], piece, cut, 8.0)
            for cut, piece in zip(cuts, pieces, strict=True)
        )
    for each, piece in zip((one, two), pieces, strict=True):
        assert_close_report(piece / 8, (each * (1 + 1.5 * (1 - 0.8**2))).numpy(), 1e-12, "mixed")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ema_decay": 1.0}, r"ema_decay=1.0 is not allowed; give a number in \(0, 1\) or None"),
        ({"lookahead": -1}, "lookahead=-1 is not allowed"),
        ({"cautious": "yes"}, "cautious='yes' is not allowed; give True or False"),
        ({"slow_weight": 2.0}, "slow_weight=2.0 has no effect without slow_momentum"),
        ({"lookahead_decay": 0.9, "lookahead": None}, "lookahead_decay=0.9 has no effect without lookahead"),
        ({"ema_decays": 0.9}, "Did you mean 'ema_decay'"),
        ({"base_args": {"ema_decay": 0.9}, "ema_decay": 0.8}, "'ema_decay' stands twice"),
        ({"params": [{"params": [nn.Parameter(torch.zeros(2))], "ema_decay": 2}], "lookahead": 0.5}, "ema_decay=2 is"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], match: str) -> None:
    net, _ = twins()
    place = {"base_args": settings} if settings.keys() & {"ema_decays", "slow_weight"} else settings
    with pytest.raises(ValueError, match=match):
        hf_soo.build_optimizer("adamw" if "params" in settings else "mkor", net, lr=0.1, **place)


def test_no_method_has_a_setting_of_that_name() -> None:
    names = {field for method in METHODS.values() if method.config for field in method.config.__dataclass_fields__}
    assert not names & WRAPPERS.keys()

"""hf-soo plan: its numbers against the published tables of BERT-Large, torch's own counts, and arithmetic by hand."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForPreTraining

from hf_soo.engine.gradients import Joint, run_whole
from hf_soo.plan.cost import PROFILES, Profile, _seconds_of, predict, work
from hf_soo.plan.memory import _activations, factors, memory
from hf_soo.plan.messages import Message, messages, sent
from hf_soo.plan.method_on_model import MethodOnModel, asked_methods
from hf_soo.plan.model_shape import BERTS, ModelShape, build_model
from hf_soo.plan.request import Layout, PlanConfig
from hf_soo.preconditioners.mkor import lowrank_product

MB, GB, TERA = 1e6, 1e9, 1e12


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, 512)


@pytest.fixture(scope="module")
def large() -> nn.Module:
    return meta_model("bert-large-uncased")


@pytest.fixture(scope="module")
def mini() -> nn.Module:
    return meta_model("bert-mini")


def asked(model: nn.Module, optim: str, optim_args: str | None = None, **flags: Any) -> tuple[MethodOnModel, Layout]:
    """A method on a model over 64 ranks."""
    flags = {"gpus": 64, "batch": 64 * 16, "beside": "", **flags}
    config = PlanConfig(optim=optim, optim_args=optim_args, **flags)
    (method,) = asked_methods(config, model)
    return method, Layout.of(config)


def by_kind(found: list[Message], kind: str) -> list[Message]:
    return [message for message in found if message.kind == kind]


# k, then of a rank: second-order data, directions received in a step, both on average with T_inv = 100 (GB), TFLOP of
# the products: KAISA on 64 ranks
KAISA_LARGE = [
    (64, 4.248, 0.0, 0.042, 2.485),
    (32, 2.124, 0.609, 0.630, 1.242),
    (16, 1.066, 0.915, 0.926, 0.623),
    (8, 0.537, 1.066, 1.071, 0.314),
    (4, 0.273, 1.142, 1.145, 0.159),
    (2, 0.143, 1.184, 1.185, 0.086),
    (1, 0.071, 1.200, 1.200, 0.043),
]
OWNED = 0.071  # GB of running factors, the owner with the most


@pytest.mark.parametrize(("k", "data", "directions", "average", "tera"), KAISA_LARGE)
def test_kfac_on_64_ranks_of_bert_large(
    large: nn.Module, k: int, data: float, directions: float, average: float, tera: float
) -> None:
    method, layout = asked(large, "kfac_expand", f"grad_workers={k},inverse_period=100")
    found = messages(method, ModelShape.of(large), layout)
    inverses = sum(m.received or 0 for m in by_kind(found, "inverses"))
    received = sum(m.received or 0 for m in by_kind(found, "directions"))
    assert inverses / GB == pytest.approx(data if k > 1 else 0, rel=0.01)
    assert received / GB == pytest.approx(directions, rel=0.01)
    assert (inverses / 100 + received) / GB == pytest.approx(average, rel=0.015)  # the table gives .042 two digits
    assert factors(method, layout)[1] / GB == pytest.approx(data + OWNED, rel=0.01)
    amount = work(method, ModelShape.of(large), layout)
    assert amount.precondition / TERA == pytest.approx(tera, rel=0.01)
    eigen, _ = asked(large, "kfac_expand", f"grad_workers={k},inverse=eigen")
    assert work(eigen, ModelShape.of(large), layout).precondition == 2 * amount.precondition


def test_kfac_factors_gradients_statistics_and_makespan(large: nn.Module) -> None:
    method, layout = asked(large, "kfac_expand", "grad_workers=8", strategy="zero1")
    shape = ModelShape.of(large)
    held, found = memory(method, shape, layout), messages(method, shape, layout)
    assert held["capture_transient"] / GB == pytest.approx(4.246, rel=0.01)
    assert 1.217 / 64 < held["gradient_copies"] / GB < 2 * 1.217 / 64  # each layer is whole at one rank
    (triangles,) = [m for m in by_kind(found, "statistics") if m.collective == "reduce"]
    assert triangles.bytes / GB == pytest.approx(2.124, rel=0.01)
    # The busiest rank inverts as much as one feed-forward layer is, 4096³ + 1025³, every 100 steps.
    assert work(method, shape, layout).inverse == pytest.approx((4096**3 + 1025**3) / 100, rel=0.01)


@pytest.mark.parametrize(
    ("k", "data", "directions", "tera"),
    [(8, 1.200, 0.0, 0.526), (4, 0.600, 0.172, 0.263), (2, 0.302, 0.260, 0.132), (1, 0.154, 0.302, 0.067)],
)
def test_kfac_on_8_ranks_of_bert_base(k: int, data: float, directions: float, tera: float) -> None:
    base = meta_model("bert-base-uncased")
    method, layout = asked(base, "kfac_expand", f"grad_workers={k}", gpus=8, batch=128)
    found = messages(method, ModelShape.of(base), layout)
    inverses = sum(m.received or 0 for m in by_kind(found, "inverses"))
    assert inverses / GB == pytest.approx(data if k > 1 else 0, rel=0.01)
    assert sum(m.received or 0 for m in by_kind(found, "directions")) / GB == pytest.approx(directions, rel=0.01)
    assert work(method, ModelShape.of(base), layout).precondition / TERA == pytest.approx(tera, rel=0.01)


def test_mkor_on_bert_large(large: nn.Module) -> None:
    shape = ModelShape.of(large)
    method, layout = asked(large, "mkor", "history=64", strategy="fsdp2")
    held, found = memory(method, shape, layout), messages(method, shape, layout)
    assert held["factors"] / MB == pytest.approx(114, rel=0.01)
    (statistics,) = by_kind(found, "statistics")
    assert statistics.bytes / MB == pytest.approx(0.9, rel=0.01)  # b = bias.grad
    shards = [m for m in by_kind(found, "shards") if m.when == "step"]
    assert sum(m.bytes for m in shards) / MB == pytest.approx(58, rel=0.01)
    assert [m.bytes for m in by_kind(found, "shards") if m.when == "update"] == [
        4 * sum(layer.shape[0] for layer in method.layers)
    ]
    whole, ddp = asked(large, "mkor", "history=64")
    assert work(whole, shape, ddp).precondition / 1e9 == pytest.approx(155, rel=0.01)
    assert work(method, shape, layout).precondition == work(whole, shape, ddp).precondition / 64
    grouped, _ = asked(large, "mkor", "rank=2")  # two groups: bias.grad no longer tells
    (statistics,) = by_kind(messages(grouped, shape, ddp), "statistics")
    assert statistics.bytes / 2 / MB == pytest.approx(1.8, rel=0.01)
    dense, _ = asked(large, "mkor", "representation=dense")
    assert memory(dense, shape, ddp)["factors"] / GB == pytest.approx(4.25, rel=0.01)
    assert work(dense, shape, ddp).precondition / TERA == pytest.approx(2.48, rel=0.01)


def test_options_of_mkor(mini: nn.Module) -> None:
    shape = ModelShape.of(mini)
    gated, sharded = asked(mini, "mkor", "gate=true", strategy="fsdp2")  # two halves, and no bias is gathered
    found = messages(gated, shape, sharded)
    (statistics,) = by_kind(found, "statistics")
    widths = [layer.shape for layer in gated.layers]
    assert statistics.bytes == 4 * sum(1 + d_in + 2 * d_out + 2 for d_out, d_in in widths)
    assert not [m for m in by_kind(found, "shards") if m.when == "update"]
    plain, ddp = asked(mini, "mkor")
    power, _ = asked(mini, "mkor", "exponent=0.25")
    sizes = sum(sum(layer.matrix) for layer in power.layers)
    assert factors(power, ddp)[1] - factors(plain, ddp)[1] == 4 * 32 * sizes  # C_p beside C
    more = work(power, shape, ddp).update / work(plain, shape, ddp).update  # CCᵀ, its eigenvectors and QᵀC
    assert more - 1 == pytest.approx((4 * 32 * sizes + 2 * 9 * 32**2 * len(power.layers)) / (5 * sizes), rel=1e-12)


def test_what_shards_need_of_each_other(mini: nn.Module) -> None:
    """FSDP2: thin products, a few scalars, or whole gradients at one rank each; ZeRO's fragments: always the latter."""
    shape = ModelShape.of(mini)

    def shards(optim: str, optim_args: str | None = None, strategy: str = "fsdp2") -> dict[str, int]:
        method, layout = asked(mini, optim, optim_args, strategy=strategy)
        found = by_kind(messages(method, shape, layout), "shards")
        return {when: sum(m.bytes for m in found if m.when == when) for when in {m.when for m in found}}

    method, _ = asked(mini, "mkor")
    sizes = [(layer.shape[0], layer.shape[1] + 1) for layer in method.layers]
    L, biases = len(sizes), 4 * sum(n for n, _ in sizes)

    # pieces to the owners, the largest layer back from its owner (there are more ranks than layers), and four norms
    def exchanged(pieces: int) -> int:
        return 4 * pieces + 4 * max(n * m for n, m in sizes) + 32 * L

    by_rows = exchanged(sum(-(-n // 64) * m for n, m in sizes))
    # beside what its formula needs, |G| of each layer for the unit of the squares
    assert shards("mkor") == {"step": 4 * (32 * sum(m for _, m in sizes) + (3 + 1) * L), "update": biases}
    assert shards("mkor", "sides=input") == {"step": 4 * (3 + 1) * L}
    assert shards("eva") == {"step": 4 * (2 + 1) * L, "update": biases}
    assert shards("eva_f") == {"step": 4 * (2 + 1) * L}
    assert shards("foof") == {"step": 4 * (3 + 1) * L}
    assert shards("kfac_expand") == {"step": by_rows}
    assert shards("mkor", "representation=dense") == {"step": by_rows, "update": biases}
    assert set(shards("shampoo")) == {"step", "update"}
    assert shards("lamb") == {}
    parts = [part for n, m in sizes for part in (n * (m - 1), n)]
    assert shards("mkor", strategy="zero3") == {"step": exchanged(sum(-(-part // 64) for part in parts))}
    for stage in ("zero1", "zero2"):
        assert shards("mkor", strategy=stage) == {"step": exchanged(-(-sum(parts) // 64))}
    assert shards("mkor", strategy="zero0") == shards("mkor", strategy="ddp") == {}


def test_every_strategy_shards_what_it_says(mini: nn.Module) -> None:
    shape = ModelShape.of(mini)
    P, W = shape.count, 64
    share = -(-P // W)
    expected = {  # parameters, gradients, base state (LAMB's 8 bytes), in fp32
        "ddp": (4 * P, 4 * P, 8 * P),
        "zero0": (4 * P, 4 * P, 8 * P),
        "zero1": (4 * P, 4 * P, 8 * share),
        "zero2": (4 * P, 4 * share, 8 * share),
        "zero3": (4 * share, 4 * share, 8 * share),
    }
    for strategy, sizes in expected.items():
        method, layout = asked(mini, "lamb", strategy=strategy)
        held = memory(method, shape, layout)
        assert (held["parameters"], held["gradients"], held["base_state"]) == sizes
        assert held["master_weights"] == 0
    method, layout = asked(mini, "lamb", strategy="zero2", precision="bf16")
    held = memory(method, shape, layout)
    assert (held["parameters"], held["gradients"], held["master_weights"]) == (2 * P, 2 * share, 4 * share)
    method, layout = asked(mini, "lamb", strategy="fsdp2")
    rows = sum(-(-s[0] // W) * s[1:].numel() for s in shape.parameters.values())
    assert memory(method, shape, layout)["base_state"] == 8 * rows


def test_every_strategy_sends_what_it_says(mini: nn.Module) -> None:
    """In a step of three micro-batches."""
    shape = ModelShape.of(mini)
    P = 4 * shape.count
    expected = {  # gradients, parameters
        "ddp": (P, 0),
        "zero0": (P, 0),
        "zero1": (P, P),
        "zero2": (3 * P, P),
        "zero3": (3 * P, 6 * P),
    }
    assert set(expected) == set(get_args(get_type_hints(PlanConfig)["strategy"])) - {"fsdp2"}
    for strategy, (gradients, parameters) in expected.items():
        method, layout = asked(mini, "lamb", strategy=strategy, micro_batch=16, batch=3 * 16 * 64)
        total = {"gradients": 0, "parameters": 0, "base": 0}
        for m in messages(method, shape, layout):
            total[m.kind] += m.bytes * (3 if m.when == "micro_batch" else 1)
        assert (total["gradients"], total["parameters"]) == (gradients, parameters)
        assert total["base"] == (4 * (2 * len(shape.parameters) + 2) if layout.sharded else 0)
    one, layout = asked(mini, "mkor", gpus=1, batch=16)
    assert messages(one, shape, layout) == []


def test_flops_are_what_torch_counts(mini: nn.Module) -> None:
    """Forward and backward pass, and low-rank MKOR's products."""
    shape = ModelShape.of(mini)
    method, layout = asked(mini, "mkor", batch=64 * 4, micro_batch=4)
    with torch.device("meta"):
        ids = torch.zeros(4, 512, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        out = mini(input_ids=ids)
        (out.prediction_logits.sum() + out.seq_relationship_logits.sum()).backward()
    for parameter in mini.parameters():
        parameter.grad = None
    decoder = 6 * shape.hidden * shape.vocabulary * layout.tokens  # a tied weight, which the plan does not count
    # what is left are the heads on one token of a sequence, which the rule counts for all
    assert work(method, shape, layout).passes == pytest.approx(counter.get_total_flops() - decoder, rel=0.03)
    layer = method.layers[0]
    n, m, K = layer.shape[0], layer.shape[1], 32
    G, bias = torch.empty(1, n, m, device="meta"), torch.empty(1, n, device="meta")
    left, right = torch.empty(1, K, n, device="meta"), torch.empty(1, K, m + 1, device="meta")
    with FlopCounterMode(display=False) as counter:
        run_whole(lowrank_product(Joint(G, bias), left, right))
    counted = counter.get_total_flops() + 2 * n * 2 * K * m  # torch does not count the last product, in place
    assert method.preconditioner.flops(layer)[0] == pytest.approx(counted, rel=0.1)  # Z = X C_aᵀ is left out


def test_a_sampled_loss_is_one_more_backward_pass(mini: nn.Module) -> None:
    shape = ModelShape.of(mini)
    passes = [
        work(method, shape, layout).passes
        for method, layout in (asked(mini, "kfac_expand", f"fisher={fisher}") for fisher in ("empirical", "mc"))
    ]
    assert passes[1] == pytest.approx(passes[0] * (1 + 2 / 3 / 10))  # on every tenth step


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_near_what_a_pass_keeps(checkpointing: bool) -> None:
    """With fused attention, in fp32. The estimate knows no masks of the loss and no second copies."""
    layout = Layout(1, "ddp", micro_batch=4, accumulation=1, seq=512, bf16=False, checkpointing=checkpointing)
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        # attention without dropout: the CPU's fused kernel has none, and would keep the scores
        config = BertConfig(attention_probs_dropout_prob=0.0, **BERTS["bert-large-uncased"])
        model = BertForPreTraining(config).bert.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.zeros(4, 512, dtype=torch.long))
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        saved = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
        shape = dataclasses.replace(ModelShape.of(model), vocabulary=0)
    estimate = _activations(shape, layout)
    if checkpointing:  # the block that runs again is not yet there
        estimate -= _activations(dataclasses.replace(shape, blocks=shape.blocks[:1]), layout) - 4 * 4 * 512 * 1024
    assert estimate == pytest.approx(saved, rel=0.15)


# ---- time -----------------------------------------------------------------------------------------------------------

HARDWARE = Profile("by hand", "a test", 200.0, 100.0, 10.0, 50.0, 4, 8.0, 2.0, 0.001)


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        (Message("gradients", "all_reduce", 64, 4), 2 * 3 / 4 * 64 / 8 + 6e-3),  # inside a node
        (Message("gradients", "all_reduce", 64, 64), 2 * 63 / 64 * 64 / 2 + 126e-3),  # across nodes
        (Message("parameters", "all_gather", 64, 64, count=3), 63 / 64 * 64 / 2 + 3 * 63e-3),
        (Message("gradients", "reduce_scatter", 64, 2), 1 / 2 * 64 / 8 + 1e-3),
        (Message("statistics", "reduce", 64, 64, count=64), 64 / 2 + 64 * 63e-3),
        (Message("directions", "broadcast", 64, 4), 64 / 8 + 3e-3),
        (Message("inverses", "broadcast", 64, 16, stride=4), 64 / (2 / 4) + 15e-3),  # four columns share a node's card
    ],
)
def test_messages_take_the_time_of_a_ring(message: Message, seconds: float) -> None:
    assert _seconds_of(message, HARDWARE, 64) == pytest.approx(seconds, rel=1e-12)


def test_the_prediction_adds_its_parts(mini: nn.Module) -> None:
    shape = ModelShape.of(mini)
    method, layout = asked(mini, "kaisa", "grad_workers=8")
    found, amount = messages(method, shape, layout), work(method, shape, layout)
    parts = predict(method, amount, found, layout, HARDWARE)
    assert parts["passes"] == amount.passes / 100
    assert parts["inverse"] == amount.inverse / 10
    assert parts["base"] == amount.base / 100 + amount.traffic / 50
    refresh = sum(_seconds_of(m, HARDWARE, 64) for m in found if m.when == "refresh")  # every tenth step
    always = sum(_seconds_of(m, HARDWARE, 64) for m in found if m.when != "refresh")
    assert parts["communication"] == pytest.approx(always + refresh / 10, rel=1e-12)
    assert parts["step"] == pytest.approx(sum(v for k, v in parts.items() if k != "step"), rel=1e-12)
    half = dataclasses.replace(layout, bf16=True)
    assert predict(method, amount, found, half, HARDWARE)["passes"] == amount.passes / 200
    assert set(PROFILES) == {"a100-80gb-4", "cpu"}


def test_a_step_of_a_kind_sends_its_messages_alone(mini: nn.Module) -> None:
    method, layout = asked(mini, "kaisa", "grad_workers=8")
    found, kinds = messages(method, ModelShape.of(mini), layout), method.step_kinds
    assert kinds is not None
    with_refresh, without = (sent(found, kind) for kind in kinds.distinct)
    assert with_refresh["inverses"] > 0 == without["inverses"]
    assert with_refresh["directions"] == without["directions"] > 0


def test_what_is_put_around_a_base_is_counted(mini: nn.Module) -> None:
    """Four bytes of a parameter for each state; cautious decay copies the weights for a step."""
    shape, settings = ModelShape.of(mini), "ema_decay=0.999,lookahead=0.5,slow_momentum=0.99"
    for optim in ("mkor", "adamw"):
        (plain, layout), (around, _) = asked(mini, optim), asked(mini, optim, f"{settings},cautious=true")
        one, other = memory(plain, shape, layout), memory(around, shape, layout)
        assert other["base_state"] - one["base_state"] == 12 * shape.count
        assert other["gradient_copies"] == max(one["gradient_copies"], layout.weight_bytes * shape.count)
        assert work(around, shape, layout).traffic - work(plain, shape, layout).traffic == 24 * shape.count
    with pytest.raises(ValueError, match="ema_decay=2 is not allowed"):
        asked(mini, "mkor", "ema_decay=2")

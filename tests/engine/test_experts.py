"""Experts that are stacked in one parameter step as if each were an nn.Linear of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations import moe

import hf_soo
from tests.oracles.core import assert_close_report

VOCABULARY, EXPERTS = 23, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16,
    "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": EXPERTS}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 6},
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": 6}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": EXPERTS}),
}
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def model_of(kind: str, implementation: str) -> Any:
    cls, config, own = MODELS[kind]
    torch.manual_seed(0)
    settings = config(**{**SIZES, **own})
    settings._experts_implementation = implementation
    model = cls(settings).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train()


class Apart(nn.Module):
    """The same experts, each of two nn.Linear; one that gets no token is called with none."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.gate = [experts._apply_gate]  # in a list: no submodule
        self.first, self.second = (nn.ModuleList(_linears(experts, name)) for name in ("gate_up_proj", "down_proj"))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for number, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            token, place = torch.where(index == number)
            made = second(self.gate[0](first(hidden[token])))
            total = total.index_add(0, token, made * weights[token, place, None])
        return total


def _linears(experts: Any, name: str) -> Iterator[nn.Linear]:
    stack, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    for number, matrix in enumerate(stack.detach()):
        matrix = matrix.mT if experts.is_transposed else matrix
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=biases is not None).double()
        linear.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format))
        if biases is not None:
            linear.bias = nn.Parameter(biases.detach()[number].clone())
        yield linear


def apart(model: Any) -> list[tuple[Any, Apart]]:
    """Replace the experts of a model; pairs of the old ones and the new."""
    pairs = []
    for layer in model.model.layers:
        pairs.append((layer.mlp.experts, Apart(layer.mlp.experts)))
        layer.mlp.experts = pairs[-1][1]
    return pairs


def run(model: Any, optimizer: Any, steps: int = 4, forward: Any = None) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        # ever fewer tokens: in the last steps some experts get none
        tokens = torch.randint(VOCABULARY, (3, 8), generator=generator)[: 1 if step > 1 else 3, : 2 if step > 1 else 8]
        optimizer.zero_grad()
        logits = (model if forward is None else forward)(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        if optimizer.wants_sampled_loss:
            optimizer.backward_sampled(logits.square().mean())
        optimizer.report_loss(loss)
        loss.backward()
        optimizer.step()


CASES = [
    *((kind, "eager", method, {}) for kind in MODELS for method in ("mkor", "eva", "kfac_expand")),
    *((kind, way, "kfac_expand", {}) for kind in MODELS for way in ("batched_mm", "grouped_mm")),
    *(("gpt_oss", way, "mkor", {}) for way in ("batched_mm", "grouped_mm")),
    ("gpt_oss", "eager", "mkor", {"representation": "dense"}),
    ("mixtral", "grouped_mm", "eva_f", {}),
    ("gpt_oss", "eager", "kfac_reduce", {}),
    ("gpt_oss", "eager", "foof", {}),
    ("mixtral", "eager", "mkor_h", {}),
    ("mixtral", "batched_mm", "kfac_expand", {"fisher": "mc"}),
]


@pytest.mark.parametrize("kind, implementation, method, settings", CASES, ids=str)
def test_each_expert_is_a_layer(
    kind: str, implementation: str, method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "grouped_mm":  # torch's kernel takes no float64, transformers' own does
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    if method.startswith("kfac"):
        settings = {
            "loss_terms": 24,
            **settings,
        }  # else that of the last layer but experts: another
    base = "adamw" if method == "mkor" else "sgd"
    stacked, other = model_of(kind, implementation), model_of(kind, implementation)
    pairs = apart(other)
    optimizers = [
        hf_soo.build_optimizer(method, model, lr=0.01, base=base, weight_decay=0.0, **{"update_period": 1, **settings})
        for model in (stacked, other)
    ]
    optimizers[0].stages.batched = implementation == "batched_mm"  # as on a GPU, a stack at a time, or one by one
    for model, optimizer in zip((stacked, other), optimizers, strict=True):
        run(model, optimizer)
    empty = {name: rule for name, rule in optimizers[0].routing().items() if "no statistics" in rule}
    assert "of its 4 matrices got no input at the last update" in str(empty) and all(
        "experts" in name for name in empty
    )
    for layer, (_, linears) in zip(stacked.model.layers, pairs, strict=True):
        experts = layer.mlp.experts
        for name, mine in (("gate_up_proj", linears.first), ("down_proj", linears.second)):
            for matrix, linear in zip(getattr(experts, name), mine, strict=True):
                assert_close_report(matrix.mT if experts.is_transposed else matrix, linear.weight, 1e-10, name)
            for bias, linear in zip(getattr(experts, f"{name}_bias", ()), mine, strict=False):
                assert_close_report(bias, linear.bias, 1e-10, f"{name}_bias")
    for name, weight in stacked.named_parameters():
        if "experts" not in name:
            assert_close_report(weight, other.get_parameter(name), 1e-10, name)


def test_the_loss_terms_are_not_an_expert_s_rows() -> None:
    """R is told from the last layer that sees every token, and the last of all is an expert."""
    counted, given = model_of("gpt_oss", "eager"), model_of("gpt_oss", "eager")
    for model, terms in ((counted, None), (given, 24)):
        run(model, hf_soo.build_optimizer("kfac_expand", model, lr=0.01, loss_terms=terms), steps=2)
    for mine, other in zip(counted.parameters(), given.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_stack_is_worked_on_in_place() -> None:
    """Batched, all experts of a parameter are one view of its gradient; nothing as large as it is copied."""
    model = model_of("gpt_oss", "eager")
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.01)
    optimizer.stages.batched = True
    run(model, optimizer, steps=1)
    stages, experts = optimizer.stages, model.model.layers[0].mlp.experts
    groups = [group for group in stages._groups(optimizer.layers) if group[0].module is experts]
    assert [len(group) for group in groups] == [EXPERTS, EXPERTS]
    with torch.no_grad():
        for grad, name in zip(stages.strategy.read(groups), ("gate_up_proj", "down_proj"), strict=True):
            stack, bias = getattr(experts, name).grad, getattr(experts, f"{name}_bias").grad
            assert grad.weight.data_ptr() == stack.data_ptr() and torch.equal(grad.weight, stack.mT)
            assert grad.bias is not None and grad.bias.data_ptr() == bias.data_ptr() and torch.equal(grad.bias, bias)


def after_padding_to(width: int, kind: str, implementation: str, method: str, told: bool = True) -> list[Tensor]:
    """The weights after two steps on three sequences of 8, 5 and 2 tokens."""
    model = model_of(kind, implementation)
    optimizer = hf_soo.build_optimizer(method, model, lr=0.01, base="sgd", weight_decay=0.0)
    if not told:
        optimizer.stages.capture.padding.remove()
    tokens = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(width) < torch.tensor([8, 5, 2])[:, None]).long()
    padded = F.pad(tokens, (0, width - 8)) * mask
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(padded, attention_mask=mask).logits
        F.cross_entropy(logits[mask.bool()], padded[mask.bool()]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


PADDED = [
    *(("gpt_oss", way, "eva") for way in IMPLEMENTATIONS),
    *(("gpt_oss", "eager", method) for method in ("mkor", "eva_f", "kfac_expand")),
    ("mixtral", "grouped_mm", "mkor"),
]


@pytest.mark.parametrize("kind, implementation, method", PADDED)
def test_padding_is_no_expert_s_sample(
    kind: str, implementation: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "grouped_mm":
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    narrow, wide = (after_padding_to(width, kind, implementation, method) for width in (8, 16))
    far = after_padding_to(16, kind, implementation, method, told=False)
    told, unknown = (
        max(((a - b).norm() / a.norm()).item() for a, b in zip(narrow, each, strict=True)) for each in (wide, far)
    )
    assert told < 1e-12 and (method == "kfac_expand" or unknown > 1e-4), (told, unknown)  # K-FAC tells it by gradients

"""Adapters to a Kronecker method: two thin layers, of which one begins at zero; what counts, what is left, what moves.

Under Trainer: test_peft.py and test_trl.py; under other strategies: ranks/test_adapters.py.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import hf_soo
from hf_soo.preconditioners.mkor import SIDE_NAMES
from tests.clients.toys import llama
from tests.oracles import lora

# ---- each factor of its own, as the textbook has it ------------------------------------------------------------------

RULES: dict[str, tuple[lora.Rule, dict[str, Any]]] = {
    "mkor": (lora.mkor, {"representation": "dense"}),
    "eva": (lora.eva, {"kl_clip": None}),
    "kfac_expand": (lora.kfac, {"inverse_period": 1, "rescale": "none"}),
}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_is_the_textbook_s(name: str, rank_stabilised: bool) -> None:
    """B = 0 at first: no gradient reaches A, whose output side learns nothing from it."""
    rule, settings = RULES[name]
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["layer"], use_rslora=rank_stabilised)
    model = get_peft_model(One().double(), config).double()
    layer = model.base_model.model.layer
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    known = [each.detach().numpy().copy() for each in (layer.base_layer.weight, A, B)]
    oracle = lora.Adapter(*known, s=4 / (math.sqrt(3) if rank_stabilised else 3), rule=rule, lr=0.01)
    optimizer = hf_soo.build_optimizer(
        name, model, lr=0.01, base="sgd", base_args={"momentum": 0.0}, weight_decay=0.0, update_period=1, **settings
    )
    for _ in range(5):
        x, target = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
        optimizer.zero_grad()
        ((model(x) - target).square().sum() / 24).backward()
        optimizer.step()
        oracle.step(x.numpy(), target.numpy())
        # rounding alone, through inverses of matrices of condition 1e2
        np.testing.assert_allclose(A.detach().numpy(), oracle.A, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(B.detach().numpy(), oracle.B, rtol=1e-10, atol=1e-13)
    assert np.abs(oracle.B).max() > 1e-3 and np.abs(oracle.A - known[1]).max() > 1e-5


# ---- every row once --------------------------------------------------------------------------------------------------


class Stored(nn.Linear):
    """A base layer as QLoRA has it: whole numbers, which its forward multiplies out."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        numbers = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def stored(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(block.self_attn, name, Stored(getattr(block.self_attn, name)))
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "all": {"target_modules": "all-linear"},
    "some blocks": {"layers_to_transform": [1]}, "quantised": {}, "bias": {"lora_bias": True, "bias": "none"},
    "reentrant": {}, "not reentrant": {}, "two active": {}, "one of two": {},
}  # fmt: skip


def adapted(kind: str) -> Any:
    model = llama()
    if kind == "quantised":
        stored(model)
    if kind == "bias":
        for block in model.model.layers:
            for part in (block.self_attn.q_proj, block.self_attn.v_proj):
                part.bias = nn.Parameter(torch.zeros(part.out_features))
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | VARIANTS[kind]
    made = get_peft_model(model, LoraConfig(**settings))
    if kind in ("two active", "one of two"):
        made.add_adapter("other", LoraConfig(**settings))
    if kind == "two active":
        made.base_model.set_adapter(["default", "other"])
    if kind.endswith("reentrant"):
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    return made.train()


@pytest.mark.parametrize("name", ["mkor", "kfac_expand"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_each_row_counts_once(kind: str, name: str) -> None:
    """Padding none; nor do passes with the adapters off, or those that DoRA makes for their product."""
    model = adapted(kind)
    all_of_it = {"queries_and_keys": True} if name == "mkor" else {}
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-2, base="adamw", update_period=1, **all_of_it)
    ids, mask = torch.randint(5, 20, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for _ in range(2):  # in the first step nothing flows back through B = 0
        optimizer.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        model(**batch).loss.backward()
        counts = {layer: float(buffers[0][0]) for layer, buffers in optimizer.stages.capture.buffers.items()}
        optimizer.step()
    trained = [n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2]
    assert sorted(counts) == sorted(trained) and counts
    if name == "mkor":
        assert set(counts.values()) == {16.0}, counts
        return
    # K-FAC counts tokens that a loss depends on: not the last of a sequence. The first attends to itself alone, so that
    # its query and key have no gradient, but for rounding.
    of_scores = {layer: counts.pop(layer) for layer in [*counts] if "q_proj" in layer or "k_proj" in layer}
    assert set(counts.values()) == {13.0} and all(10 <= count <= 13 for count in of_scores.values()), of_scores


# ---- what is left to the base, and why -------------------------------------------------------------------------------


def bert(**more: Any) -> Any:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    settings = {"r": 2, "target_modules": ["query", "word_embeddings"]} | more
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(**settings))


def rules(model: Any, name: str, **settings: Any) -> dict[str, str]:
    """The end of each parameter's name -> its rule."""
    table = hf_soo.build_optimizer(name, model, **{"lr": 1e-2, "base": "adamw"} | settings).routing()
    return {".".join(key.split(".")[-4:]): rule for key, rule in table.items()}


@pytest.mark.parametrize("name", ["mkor", "shampoo", "eva_s"])
def test_an_embedding_s_adapters_are_left_as_the_embedding_is(name: str) -> None:
    """A is a table with a column for each word: a factor of it would be as wide as the vocabulary."""
    table = rules(bert(use_dora=True), name)
    moved = {key for key, rule in table.items() if rule.startswith(f"{name} ->")}
    assert {key for key in moved if "lora_A" in key or "lora_B" in key} == moved | {
        "self.query.lora_A.default.weight"[5:], "self.query.lora_B.default.weight"[5:]
    }  # fmt: skip
    left = {key: rule for key, rule in table.items() if "word_embeddings" in key}
    assert len(left) == 3 and set(left.values()) == {"AdamW: embedding"}, left
    magnitude = next(rule for key, rule in table.items() if "query.lora_magnitude_vector" in key)
    assert magnitude == ("AdamW: no matrix [16]" if name == "mkor" else magnitude) and magnitude.startswith("AdamW")


def test_a_copied_head_is_a_head_to_muon() -> None:
    """PEFT trains a copy of the classifier; its two rows are no hidden matrix, the adapters are."""
    model = bert(modules_to_save=["classifier"], target_modules=["query"])
    table = {key: rule for key, rule in rules(model, "mkor", base="muon").items() if rule.startswith("mkor")}
    assert {key.split(".")[-3 if "lora" in key else -4] for key in table} == {"lora_A", "lora_B", "classifier"}
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="muon")
    named = {id(p): name for name, p in model.named_parameters()}
    turned = {named[id(p)] for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]}
    assert len(turned) == 2 and all("query.lora_" in name for name in turned)


def test_no_false_alarm_of_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """A's gradient is 0 while B is: K-FAC sees no row of it that counts. A layer that never runs is another thing."""
    with caplog.at_level(logging.WARNING):
        model = adapted("plain")
        step(model, hf_soo.build_optimizer("kfac_expand", model, lr=1e-2, base="adamw"))
        assert "keeps the old factors" not in caplog.text
        model = adapted("two active")
        optimizer = hf_soo.build_optimizer("kfac_expand", model, lr=1e-2, base="adamw")
        model.base_model.set_adapter("default")
        step(model, optimizer)
    assert caplog.text.count("keeps the old factors of 8 layers (no rows)") == 1 and ".other" in caplog.text


def test_lamb_hardly_moves_what_is_zero(caplog: pytest.LogCaptureFixture) -> None:
    """Its rate is a share of B's norm; without weight decay it is Adam, and nothing is said."""
    with caplog.at_level(logging.WARNING):
        for base, decay in (("adamw", 0.01), ("lamb", 0.0), ("lamb", 0.01)):
            assert "are zero" not in caplog.text
            hf_soo.build_optimizer("mkor", adapted("plain"), lr=1e-2, base=base, weight_decay=decay)
    assert "q_proj.lora_B.default.weight" in caplog.text and "(4 matrices) are zero" in caplog.text


def test_adapters_of_one_row_are_the_base_s() -> None:
    with pytest.raises(ValueError, match=r"one output or input \[1, 16\]"):
        rules(bert(r=1, target_modules=["query"]), "mkor")
    table = rules(bert(r=1, target_modules=["query"]), "kfac_expand")
    assert {rule for key, rule in table.items() if "lora" in key} == {"kfac_expand -> AdamW"}


@pytest.mark.parametrize("name", ["mkor", "kfac_reduce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_s_adapters_get_noise(name: str, dtype: torch.dtype) -> None:
    """Their output gradients sum to zero, but for rounding; fp32 adapters of a bf16 model get the model's."""
    config = BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128,
    )  # fmt: skip
    bert = BertForSequenceClassification(config).to(dtype)
    model = get_peft_model(bert, LoraConfig(r=4, lora_alpha=6, target_modules=["query", "key"])).train()
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-3, base="adamw", update_period=1)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=torch.randint(5, 60, (4, 128)), labels=torch.randint(0, 2, (4,))).loss.backward()
        optimizer.step()
    outcomes = {layer: row["output_side"] for layer, row in optimizer.diagnostics().items()}
    assert {layer for layer, said in outcomes.items() if "noise" in str(said)} == {
        la for la in outcomes if ".key." in la
    }


# ---- adapters that come, go and take turns ---------------------------------------------------------------------------


def step(model: Any, optimizer: Any, seed: int = 0) -> None:
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("when", [0, 100])
def test_adapters_that_come_later_are_warned_of(when: int, caplog: pytest.LogCaptureFixture) -> None:
    """They are in no group: nothing would ever move, and nobody would say so."""
    model = llama()
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="adamw", update_period=100)
    if when:
        step(model, optimizer)
        optimizer.steps = when
    assert "came into the model" not in caplog.text
    later = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: p.detach().clone() for name, p in later.named_parameters()}
    with caplog.at_level(logging.WARNING):
        step(later, optimizer)
        optimizer.steps = 200
        step(later, optimizer)
    assert caplog.text.count("(4 parameters) came into the model after the optimizer was built") == 1
    assert "'model.layers.0.self_attn.q_proj.lora_A.default.weight'" in caplog.text
    assert all(torch.equal(p, before[name]) for name, p in later.named_parameters())


def test_adapters_take_turns() -> None:
    """The one that is off keeps its weights and its factors, to the last bit, and goes on when it is on again."""
    model = adapted("two active")
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="adamw", update_period=1)

    def of(adapter: str) -> dict[str, Tensor]:
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}." in name}
        factors = {
            f"{layer.name} {side}": optimizer.stages.states[layer.name][side]["columns"].clone()
            for layer in optimizer.layers if layer.name.endswith(f".{adapter}") for side in SIDE_NAMES.values()
        }  # fmt: skip
        return weights | factors

    for turn, adapter in enumerate(["default", "other", "default"]):
        other = {"default": "other", "other": "default"}[adapter]
        before, rests = of(adapter), of(other)
        model.base_model.set_adapter(adapter)
        step(model, optimizer, turn)
        after, rested = of(adapter), of(other)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        # B = 0 in an adapter's first step: A's gradient is 0, its weight decays, and its output side learns nothing
        still = {name for name in before if "lora_A" in name and name.endswith("left")} if turn < 2 else set()
        assert moved == before.keys() - still
        assert all(torch.equal(rests[name], rested[name]) for name in rests)


def test_adapters_alone_and_the_optimizer_s_state_go_on(tmp_path: Path) -> None:
    """A loop of one's own: save_pretrained and state_dict, of which neither has the model."""

    def begin(model: Any) -> tuple[Any, Any]:
        return model.train(), hf_soo.build_optimizer("mkor", model, lr=1e-2, base="adamw", update_period=2)

    model, optimizer = begin(adapted("dora"))
    for number in range(3):
        step(model, optimizer, number)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again, later = begin(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    later.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for number in range(3, 6):
        step(model, optimizer, number)
        step(again, later, number)
    mine, its = model.state_dict(), again.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    fresh = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="no trainable parameter"):
        begin(fresh)


def test_merged_for_an_evaluation(one_thread: None) -> None:
    """The weights with the adapters in them, and out again: the run goes on as if nothing had been."""
    ends = []
    for merges in (False, True):
        torch.manual_seed(0)
        model = adapted("plain").double()
        optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2, base="adamw", update_period=1)
        for number in range(4):
            step(model, optimizer, number)
            if merges:
                kept = copy.deepcopy(optimizer.second_order_state()["layers"])
                model.eval()
                model.merge_adapter()
                model(input_ids=torch.ones(1, 4, dtype=torch.long))
                model.unmerge_adapter()
                model.train()
                now = optimizer.second_order_state()["layers"]
                assert all(torch.equal(kept[a][b], now[a][b]) for a in kept for b in kept[a])
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    # what a merge and an unmerge leave behind in float64
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)

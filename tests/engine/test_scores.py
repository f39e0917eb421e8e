"""muon_mkor leaves attention's queries and keys to Muon: by the names of transformers' families, and exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

import hf_soo
from hf_soo.engine.selection import Selection, select_layers
from hf_soo.preconditioners.mkor import MKOR, MKORConfig

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "vocab_size": 32, "pad_token_id": 0,
}  # fmt: skip
OTHER_SIZES = {
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    "ctrl": {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 24},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "whisper": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    },
    "deepseek_v3": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "first_k_dense_replace": 1, "num_key_value_heads": 2,
    },
    "deberta-v2": {"pooler_hidden_size": 16},
    "longformer": {"attention_window": [4]},
}  # fmt: skip
# The last part of the names of the layers in attention: those that make scores, alone or not, and the others.
FAMILIES = {
    "bert": ("query key", "value dense"),
    "electra": ("query key", "value dense"),
    "deberta-v2": ("query_proj key_proj", "value_proj dense"),
    "distilbert": ("q_lin k_lin", "v_lin out_lin"),
    "longformer": ("query key query_global key_global", "value value_global dense"),
    "vit": ("q_proj k_proj", "v_proj o_proj"),
    "llama": ("q_proj k_proj", "v_proj o_proj"),
    "mixtral": ("q_proj k_proj", "v_proj o_proj"),
    "whisper": ("q_proj k_proj", "v_proj out_proj"),
    "t5": ("q k", "v o"),
    "ctrl": ("Wq Wk", "Wv dense"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox": ("query_key_value", "dense"),
    "bloom": ("query_key_value", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
    "deepseek_v3": ("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj", "o_proj"),
}


def without_scores(model: nn.Module) -> Selection:
    return select_layers(model, skip_reason=MKOR(MKORConfig(queries_and_keys=False)).skip_reason)


ROTARY = {
    "llama", "mixtral", "gpt_neox", "phi3", "deepseek_v3", "qwen3", "gemma3_text", "modernbert", "falcon", "gptj",
    "codegen", "roformer", "cohere", "gpt_oss", "glm4", "olmo2", "dinov3_vit", "nomic_bert",
}  # fmt: skip
LEARNT = {
    "bert", "electra", "deberta-v2", "distilbert", "vit", "whisper", "t5", "ctrl", "gpt2", "bloom", "opt", "bart",
    "mpt",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(ROTARY | LEARNT))
def test_families_with_rotary_positions(family: str) -> None:
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    sizes = {**SIZES, **OTHER_SIZES.get(family, {})}
    config = AutoConfig.for_model(family)
    known = {key: value for key, value in sizes.items() if hasattr(config, key)}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **known))
    layers = select_layers(model).layers
    assert {layer.rotary for layer in layers} == {family in ROTARY}
    scores = {layer.name for layer in layers if layer.scores}
    moved = {layer.name for layer in select_layers(model, skip_reason=MKOR(MKORConfig()).skip_reason).layers}
    assert scores and ({layer.name for layer in layers} - moved == (scores if family in ROTARY else set()))


def test_a_tower_with_learnt_positions_beside_a_rotary_one() -> None:
    known = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    with torch.device("meta"):
        towers = {family: AutoModel.from_config(AutoConfig.for_model(family, **known)) for family in ("bert", "llama")}
    layers = select_layers(nn.ModuleDict({"tower": nn.ModuleDict(towers)})).layers
    assert {("llama" in layer.name) == layer.rotary for layer in layers} == {True}
    assert {layer.rotary for layer in layers if layer.scores} == {True, False}


def attention_layers(model: nn.Module) -> dict[str, str]:
    """Name of each layer inside an attention -> its last part; an MLP's is none."""
    names = (layer.name for layer in select_layers(model).layers)
    return {name: name.rpartition(".")[2] for name in names if "attn" in name or "attention" in name.lower()}


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_of_a_family(family: str) -> None:
    sizes = {**SIZES, **OTHER_SIZES.get(family, {})}
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        known = {key: value for key, value in sizes.items() if hasattr(config, key)}
        model = AutoModel.from_config(AutoConfig.for_model(family, **known))
    scores, others = (set(names.split()) for names in FAMILIES[family])
    found, moved = attention_layers(model), without_scores(model)
    assert set(found.values()) >= scores | others, found
    names = {layer.name for layer in moved.layers}
    for name, last in found.items():
        assert (name in names) == (last not in scores), name
    left = {layer.name for layer in select_layers(model).layers} - names
    assert {name.rpartition(".")[2] for name in left} == scores
    assert {moved.skipped[name] for name in left} == {"query or key of attention (queries_and_keys)"} <= moved.meant


@pytest.mark.parametrize(
    "name", ["top_k.mlp", "keys_to_skip", "monkey", "question", "encoder_q.mlp.0", "k_steps.fc", "talk"]
)
def test_other_names_are_moved(name: str) -> None:
    model = nn.Module()
    *path, last = name.split(".")
    here = model
    for part in path:
        here.add_module(part, nn.Module())
        here = here.get_submodule(part)
    here.add_module(last, nn.Linear(4, 4))
    assert [layer.name for layer in without_scores(model).layers] == [name]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


def trained(name: str, steps: int = 6, **settings: Any) -> dict[str, torch.Tensor]:
    model = llama()
    optimizer = hf_soo.build_optimizer(name, model, lr=0.02, weight_decay=0.01, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(32, (4, 12), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: weight.detach().clone() for key, weight in model.named_parameters()}


def test_it_is_mkor_on_the_momentum_without_them() -> None:
    exclude = [r"\.(q|k)_proj$"]
    ours = trained("muon_mkor", base_args={"rest_lr": 3e-3}, update_period=2)
    over_muon = {"base": "muon", "base_args": {"rest_lr": 3e-3}, "apply_to": "momentum", "update_period": 2}
    for more in ({"exclude": exclude}, {"queries_and_keys": False}):
        same = trained("mkor", **over_muon, **more)
        for key, weight in ours.items():
            assert torch.equal(weight, same[key]), (more, key)
    for key, weight in trained("mkor", **over_muon).items():  # these positions are rotary
        assert torch.equal(weight, ours[key]), key
    everywhere = trained("muon_mkor", base_args={"rest_lr": 3e-3}, update_period=2, queries_and_keys=True)
    for key, weight in trained("mkor", **over_muon, queries_and_keys=True).items():
        assert torch.equal(weight, everywhere[key]), key


def test_the_first_step_of_queries_and_keys_is_muons() -> None:
    start, settings = dict(llama().named_parameters()), {"rest_lr": 3e-3}
    muon, ours = trained("muon", 1, **settings), trained("muon_mkor", 1, base_args=settings)
    over_muon = {"base": "muon", "apply_to": "momentum", "base_args": settings}
    everywhere = trained("mkor", 1, **over_muon, queries_and_keys=True)
    for key, weight in ours.items():
        is_score = key.endswith(("q_proj.weight", "k_proj.weight"))
        is_matrix = "layers" in key and "norm" not in key
        assert not torch.equal(weight, start[key]), key
        assert torch.allclose(weight, muon[key], rtol=0, atol=1e-15) == (is_score or not is_matrix), key
        assert torch.allclose(weight, everywhere[key], rtol=0, atol=1e-15) != is_score, key


def test_adapters_of_queries_and_keys_are_left_too() -> None:
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert {layer.name.split(".")[-3] for layer in without_scores(adapted).layers} == {"v_proj"}
    assert {layer.name.split(".")[-3] for layer in select_layers(adapted).layers} == {"q_proj", "v_proj"}


def test_every_family_of_the_table_is_real() -> None:
    assert set(FAMILIES) <= set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)

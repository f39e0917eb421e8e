"""Matrices that modules multiply with themselves: every way to write the product gives what nn.Linear gives."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

import hf_soo
from tests.engine.test_experts import model_of, run
from tests.oracles.core import assert_close_report

E, IN, OUT = 3, 4, 5

# rows [n, IN], which expert each is of [n], the stack -> [n, OUT]
WAYS: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "linear of one": (False, lambda x, at, W: _each(x, at, lambda rows, i: F.linear(rows, W[i]))),
    "linear by keyword": (False, lambda x, at, W: _each(x, at, lambda rows, i: F.linear(rows, weight=W[i]))),
    "linear of a 0-d number": (
        False, lambda x, at, W: _each(x, at, lambda rows, i: F.linear(rows, W[torch.tensor(i)])),
    ),
    "linear from the end": (False, lambda x, at, W: _each(x, at, lambda rows, i: F.linear(rows, W[i - E]))),
    "linear in another dtype and back": (
        False, lambda x, at, W: _each(x, at, lambda rows, i: F.linear(rows.to(W.dtype), W.contiguous()[i].double())),
    ),
    "rows @ Wᵀ": (False, lambda x, at, W: _each(x, at, lambda rows, i: rows @ W[i].T)),
    "rows @ W": (True, lambda x, at, W: _each(x, at, lambda rows, i: rows @ W[i])),
    "matmul": (True, lambda x, at, W: _each(x, at, lambda rows, i: torch.matmul(rows, W[i]))),
    "mm": (True, lambda x, at, W: _each(x, at, lambda rows, i: torch.mm(rows, W[i]))),
    "W @ columns": (False, lambda x, at, W: _each(x, at, lambda rows, i: (W[i] @ rows.mT).mT)),
    "linear of the transpose": (
        True, lambda x, at, W: _each(x, at, lambda rows, i: F.linear(rows, W.transpose(1, 2)[i])),
    ),
    "batched, W on the left": (False, lambda x, at, W: torch.bmm(W[at], x.unsqueeze(-1)).squeeze(-1)),
    "batched, W on the right": (True, lambda x, at, W: torch.bmm(x.unsqueeze(1), W[at]).squeeze(1)),
    "batched, transposed": (False, lambda x, at, W: (x.unsqueeze(1) @ W[at].mT).squeeze(1)),
    "batched, all": (True, lambda x, at, W: (x.expand(E, *x.shape) @ W)[at, torch.arange(len(x))]),
}  # fmt: skip


def _each(x: Tensor, at: Tensor, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    out = x.new_zeros(len(x), OUT)
    for i in range(E):
        out = out.index_add(0, torch.where(at == i)[0], product(x[at == i], i))
    return out


class Stack(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.num_experts, (self.is_transposed, self.way) = E, WAYS[way]
        self.proj = nn.Parameter(torch.randn(E, IN, OUT) if self.is_transposed else torch.randn(E, OUT, IN))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return self.way(x, at, self.proj).add_(0.5)  # in place, as grouped products add a bias


class Linears(nn.Module):
    def __init__(self, stack: Stack, all_rows: bool) -> None:
        super().__init__()
        self.all_rows = all_rows
        self.each = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(E))
        for linear, matrix in zip(self.each, stack.proj.detach(), strict=True):
            linear.weight = nn.Parameter((matrix.mT if stack.is_transposed else matrix).clone().contiguous())

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        if self.all_rows:
            return torch.stack([linear(x) for linear in self.each])[at, torch.arange(len(x))] + 0.5
        return _each(x, at, lambda rows, i: self.each[i](rows)) + 0.5


def trained(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x, at = (
            torch.randn(9, IN, dtype=torch.float64, generator=generator),
            torch.randint(E, (9,), generator=generator),
        )
        model(x, at).tanh().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["mkor", "kfac_expand"])
def test_every_way_to_multiply_with_a_stack(way: str, method: str) -> None:
    torch.manual_seed(0)
    stack = Stack(way).double()
    linears = Linears(stack, way == "batched, all").double()
    given = {"loss_terms": 9} if method == "kfac_expand" else {}
    for model in (stack, linears):
        optimizer = hf_soo.build_optimizer(method, model, lr=0.05, base="sgd", weight_decay=0.0, **given)
        trained(model, optimizer)
        assert not [rule for rule in optimizer.routing().values() if "no statistics" in rule]
    for matrix, linear in zip(stack.proj, linears.each, strict=True):
        assert_close_report(matrix.mT if stack.is_transposed else matrix, linear.weight, 1e-12, way)
    assert not _get_current_function_mode_stack()


def test_a_product_that_is_not_followed_says_so() -> None:
    class Other(Stack):
        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return torch.einsum("ni,noi->no", x, self.proj[at])

    model = Other("linear of one").double()
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.05)
    trained(model, optimizer, 1)
    assert optimizer.routing()["proj"].endswith("(no statistics: 3 of its 3 matrices got no input at the last update)")


class Router(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.num_experts, self.weight = OUT, nn.Parameter(torch.randn(OUT, IN))
        self.bias = nn.Parameter(torch.randn(OUT)) if bias else None

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, IN), self.weight.float().double(), self.bias)


class Tuple(nn.Linear):
    num_experts = OUT

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.dt_proj = nn.Parameter(torch.zeros(2, 2)), nn.Linear(IN, OUT)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return (self.dt_proj.weight @ x.mT).mT + self.dt_proj.bias + self.A_log.sum()


class Called(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, at: Tensor) -> Any:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", ["router", "router with a bias", "a layer that returns a tuple", "Mamba's step"])
@pytest.mark.parametrize("method", ["mkor", "kfac_expand"])
def test_matrices_that_are_no_stack(kind: str, method: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "router": lambda: Router(False), "router with a bias": lambda: Router(True),
        "a layer that returns a tuple": lambda: Called(Tuple(IN, OUT)), "Mamba's step": Mixer,
    }[kind]().double()  # fmt: skip
    holder = {"a layer that returns a tuple": "layer", "Mamba's step": "dt_proj"}.get(kind)
    own = model if holder is None else getattr(model, holder)
    with torch.no_grad():
        own.weight.copy_(own.weight.float())
    linear = nn.Linear(IN, OUT, bias=own.bias is not None).double()
    linear.load_state_dict(own.state_dict())
    for each in (model, Called(linear)):
        optimizer = hf_soo.build_optimizer(method, each, lr=1e-3, base="sgd", weight_decay=0.0)
        trained(each, optimizer, 1)
        assert not [rule for rule in optimizer.routing().values() if "no statistics" in rule]
    assert_close_report(own.weight, linear.weight, 1e-10, kind)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1, "dilation": 2}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("method", ["mkor", "kfac_expand", "kfac_reduce"])
def test_conv1d_is_a_convolution_of_images_of_height_one(settings: dict[str, Any], method: str) -> None:
    torch.manual_seed(0)
    one = nn.Conv1d(3, 4, 3, **settings).double()

    def wide(value: Any, lead: int) -> Any:
        return (lead, value) if isinstance(value, int) else value

    sides = {key: wide(value, 0 if key == "padding" else 1) for key, value in settings.items()}
    two = nn.Conv2d(3, 4, (1, 3), **sides).double()
    with torch.no_grad():
        two.weight.copy_(one.weight.unsqueeze(-2))
        two.bias.copy_(one.bias)
    data = torch.randn(3, 5, 3, 8, dtype=torch.float64)
    for model, lift in ((one, False), (two, True)):
        optimizer = hf_soo.build_optimizer(method, model, lr=0.05, base="sgd", weight_decay=0.0)
        for x in data:
            optimizer.zero_grad()
            model(x.unsqueeze(-2) if lift else x).tanh().square().mean().backward()
            optimizer.step()
    assert_close_report(one.weight, two.weight[:, :, 0], 1e-12, "weight")
    assert_close_report(one.bias, two.bias, 1e-12, "bias")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_checkpointed_experts(reentrant: bool, implementation: str) -> None:
    plain, other = (model_of("gpt_oss", implementation) for _ in range(2))
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    for model in (plain, other):
        run(model, hf_soo.build_optimizer("kfac_expand", model, lr=0.01), steps=2)
    for mine, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not _get_current_function_mode_stack()


def test_only_what_trains_commits_and_nothing_stays_behind() -> None:
    """Evaluation, no_grad, an input's gradient alone and a forward pass that fails leave statistics and modes alone."""
    model = model_of("mixtral", "eager")
    optimizer = hf_soo.build_optimizer("eva", model, lr=0.01)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        model(tokens)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    torch.autograd.grad(model(inputs_embeds=embedded).logits.square().mean(), embedded)
    model.eval()
    model(tokens).logits.square().mean().backward()
    model.train()
    with pytest.raises(IndexError):
        model.model.layers[0].mlp.experts(torch.randn(2, 8).double(), torch.tensor([[0], [1]]), torch.ones(2, 0))
    assert not _get_current_function_mode_stack()
    experts = [name for name in optimizer.stages.capture.buffers if "experts" in name]
    assert len(experts) == 16 and not any(optimizer.stages.capture.buffers[name][0].any() for name in experts)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied(tokens).logits.square().mean().backward()
    assert not any(optimizer.stages.capture.buffers[name][0].any() for name in experts)
    model(tokens).logits.square().mean().backward()
    assert sum(optimizer.stages.capture.buffers[name][0].item() for name in experts) == 2 * 2 * 2 * 8
    optimizer.remove_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_checkpoint_of_before_leaves_the_new_kinds_to_the_base() -> None:
    model = model_of("gpt_oss", "eager")
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.01, queries_and_keys=True)
    run(model, optimizer, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    second = saved["second_order"]
    del second["added"], saved["parameters"]
    second["layers"] = {k: v for k, v in second["layers"].items() if "experts" not in k and "router" not in k}
    resumed = hf_soo.build_optimizer("mkor", model, lr=0.01, queries_and_keys=True)
    resumed.load_state_dict(saved)
    run(model, resumed, steps=1)
    rules = resumed.routing()
    left = {name for name, rule in rules.items() if rule.startswith("Lamb: the checkpoint that this run goes on from")}
    assert left == {name for name in rules if "experts" in name or "router" in name} and len(left) == 12
    assert (
        not [layer for layer in resumed.layers if "experts" in layer.name]
        and rules["model.layers.0.self_attn.q_proj.weight"] == "mkor -> Lamb"
    )


TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "time_step_rank", "state_size"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "moe_intermediate_size", "shared_expert_intermediate_size", "patch_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "max_position_embeddings": 64, "n_positions": 64, "vocab_size": 40, "image_size": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ARCHITECTURES = (
    "afmoe albert aria_text bart bert bloom clip convnext deberta-v2 deepseek_v2 deepseek_v3 electra ernie4_5_moe "
    "falcon_mamba gemma3_text glm4_moe gpt2 gpt_neox gpt_oss gptj granitemoe hunyuan_v1_moe jamba jetmoe llama "
    "llama4_text longformer mamba minimax mistral mixtral modernbert mpnet nemotron_h nllb-moe olmoe opt phi3 phimoe "
    "qwen2_moe qwen3 qwen3_moe recurrent_gemma roformer rwkv splinter switch_transformers t5 vit whisper"
)
NOT_FOLLOWED = {  # what is left of the matrices, and by whom they are read
    "falcon_mamba": {"A_log"}, "jamba": {"A_log"}, "mamba": {"A_log"}, "rwkv": {"time_mix"},
    "recurrent_gemma": {"gate_weight", "gate_bias"}, "vit": {"cls_token", "position_embeddings"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES.split())
def test_every_parameter_of_an_architecture_has_a_reason(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="hf_soo")
    sizes = {key: value for key, value in TINY.items() if hasattr(CONFIG_MAPPING[kind](), key)}
    config = CONFIG_MAPPING[kind](**sizes)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:  # no language model
            model = AutoModel.from_config(config)
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.01)
    rules = optimizer.routing()
    assert rules.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for name, rule in rules.items():
        reason = rule.partition(": ")[2]
        assert rule == "mkor -> Lamb" or reason, (name, rule)
        if reason.startswith("no matrix"):
            assert len(shapes[name]) < 2, (name, rule)
        if "itself" in reason:
            assert any(part in name for part in NOT_FOLLOWED.get(kind, ())), (name, rule)
    assert "leaves" not in caplog.text

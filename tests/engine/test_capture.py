"""Capture: exact sums, once for each micro-batch, whatever runs the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import hf_soo
from hf_soo.engine.capture import Capture
from hf_soo.engine.selection import _as_layer, select_layers
from hf_soo.engine.sums import SumRecorder
from tests.oracles.core import assert_close_report

ALL = SumRecorder(inputs=True, outputs=True, groups=1, noise=True)


def watched(module: nn.Module, recorder: SumRecorder = ALL) -> Capture:
    layers = [layer for name, m in module.named_modules() if (layer := _as_layer(name, m)) is not None]
    capture = Capture(layers, recorder)
    capture.collecting = True
    return capture


class Block(nn.Module):
    """Two layers and an in-place activation on a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu_(self.first(x)))


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks, self.kind = nn.ModuleList(Block() for _ in range(2)), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.kind == "none":
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.kind == "reentrant")
        return x


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_one_commit_for_each_micro_batch(kind: str, compiled: bool, autocast: bool) -> None:
    def run(kind: str, compiled: bool) -> dict[str, list[torch.Tensor]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Stack(kind)
        capture = watched(model)
        step = torch.compile(model, backend="aot_eager") if compiled else model
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            x = torch.randn(3, 5, 6, generator=generator).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = step(x).float().square().mean()
            loss.backward()
        return {name: [t.clone() for t in b] for name, b in capture.buffers.items()}

    expected, actual = run("none", False), run(kind, compiled)
    for name in expected:
        assert actual[name][0].item() == 2 * 15, name
        for got, want in zip(actual[name][1:], expected[name][1:], strict=True):
            # fp32 sums; compiled bf16 may fuse casts, which moves single roundings (2^-9)
            assert_close_report(got, want, 2e-2 if autocast and compiled else 1e-6, f"{name} {kind}")


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = Stack("none")
    capture = watched(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 6)).sum().backward()
    assert capture.buffers["blocks.0.first"][0].item() == 6


CASES = {
    "linear-2d": (nn.Linear(4, 3), (7, 4)),
    "linear-3d": (nn.Linear(4, 3), (2, 5, 4)),
    "linear-4d": (nn.Linear(4, 3), (2, 3, 2, 4)),
    "conv1d": (Conv1D(3, 4), (2, 5, 4)),
    "conv2d": (nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, dilation=2), (2, 2, 9, 8)),
    "conv2d-same": (nn.Conv2d(2, 3, (3, 2), padding="same"), (2, 2, 5, 6)),
    "conv2d-valid": (nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 5, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_output_sums_are_the_bias_gradient(case: str) -> None:
    """mkor_eva 9.13: Σ dL/dy = bias.grad. Two groups make the capture commit the sums itself."""
    module, shape = CASES[case]
    module = module.double().requires_grad_()
    module.zero_grad()
    capture = watched(module, SumRecorder(inputs=True, outputs=True, groups=2))
    for _ in range(4):
        module(torch.randn(shape, dtype=torch.float64)).square().mean().backward()
    buffers = capture.buffers[""]
    assert_close_report(buffers[2].sum(0), module.bias.grad, 1e-12, case)  # the same numbers in another order
    capture.remove()


@pytest.mark.parametrize("case", CASES)
def test_input_sums_and_gradient_matrix(case: str) -> None:
    """For one row G = b aᵀ exactly; so with a single output row the captured sums rebuild the gradient matrix."""
    module, shape = CASES[case]
    module = module.double().requires_grad_()
    module.zero_grad()
    if isinstance(module, nn.Conv2d):  # one image of the size that gives one position
        kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
        pads = (0, 0) if isinstance(padding, str) else padding
        size = [dilation[i] * (kernel[i] - 1) + 1 - 2 * pads[i] for i in range(2)]
        x = torch.randn(1, 2, *size, dtype=torch.float64)
        if padding == "same":
            pytest.skip("'same' gives one position only for a 1 x 1 image")
    else:
        x = torch.randn([1] * (len(shape) - 1) + [shape[-1]], dtype=torch.float64)
    capture = watched(module, SumRecorder(inputs=True, outputs=True))
    module(x).square().sum().backward()
    layer = _as_layer("", module)
    assert layer is not None and capture.buffers[""][0].item() == 1
    b, a = module.bias.grad, capture.buffers[""][1][0]
    assert_close_report(torch.outer(b, a), layer.as_matrix(module.weight.grad), 1e-12, case)
    capture.remove()


def test_conv_patch_mean_is_the_unfolded_mean() -> None:
    """mkor_eva 9.14, stride 2, padding 1, dilation 2."""
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2).double()
    x = torch.randn(5, 3, 11, 12, dtype=torch.float64)
    layer = _as_layer("", conv)
    assert layer is not None
    sums, rows = layer.input_sums(x, 1)
    patches = nn.functional.unfold(x, 3, dilation=2, padding=1, stride=2)
    assert rows == patches.shape[0] * patches.shape[2]
    assert_close_report(sums[0] / rows, patches.mean((0, 2)), 4e-16 * 1e4, "patch mean")  # spec 1e-12


def test_input_given_by_keyword() -> None:
    layer = nn.Linear(3, 2)
    capture = watched(nn.Sequential(layer))
    layer(input=torch.ones(5, 3)).sum().backward()
    assert capture.buffers["0"][1].tolist() == [[5.0, 5.0, 5.0]]


def test_groups_are_consecutive_rows() -> None:
    layer = _as_layer("", nn.Linear(3, 2))
    assert layer is not None
    x = torch.arange(15.0).view(5, 3)
    sums, rows = layer.input_sums(x, 2)
    assert rows == 5
    assert torch.equal(sums, torch.stack([x[:3].sum(0), x[3:].sum(0)]))
    capture = watched(nn.Sequential(layer.module), SumRecorder(inputs=True, groups=2))
    layer.module(x).sum().backward()
    assert capture.buffers["0"][0].tolist() == [3.0, 2.0]


def test_nothing_is_collected_in_evaluation_or_when_not_asked() -> None:
    model = Block()
    capture = watched(model)
    model.eval()
    model(torch.randn(4, 6)).sum().backward()
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 6))
    capture.collecting = False
    model(torch.randn(4, 6)).sum().backward()
    assert all(not t.any() for b in capture.buffers.values() for t in b)


def test_noise_is_told_from_data() -> None:
    """Rows that cancel but for rounding are noise in fp32 and bf16; rows that do not are data."""
    for dtype in (torch.float32, torch.bfloat16):
        for cancels in (True, False):
            layer = nn.Linear(4, 64).to(dtype)
            capture = watched(nn.Sequential(layer))
            e = torch.randn(512, 64, dtype=torch.float64)
            if cancels:
                e = e - e.mean(0)
            layer(torch.randn(512, 4).to(dtype)).backward(e.to(dtype))
            total, level = capture.buffers["0"][3].tolist()
            assert (total <= level) is cancels, (dtype, cancels, total, level)


def test_noise_guard_skips_the_output_side_alone() -> None:
    """Attention's key projection: its output gradients sum to zero analytically (softmax does not see a shift)."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.query(x), self.key(x), self.value(x)
            return (q @ k.mT / 32**0.5).softmax(-1) @ v

    model = Attention().bfloat16()
    optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-3, weight_decay=0.01)
    model(torch.randn(4, 64, 32).bfloat16()).float().square().mean().backward()
    optimizer.step()
    rows = optimizer.diagnostics()
    assert rows["key"]["output_side"] == "zero or rounding noise" and rows["key"]["output_distance"] == 0
    assert rows["key"]["input_side"] == "updated" and float(rows["key"]["input_distance"]) > 0.5
    assert rows["value"]["output_side"] == "updated"
    assert optimizer.health()["noise_layers"] >= 1


def test_selection_names_its_reasons() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.kept, self.excluded, self.frozen = (nn.Linear(4, 4) for _ in range(3))
            self.frozen.requires_grad_(False)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
            self.decoder = nn.Linear(4, 9)
            self.tied = nn.Linear(4, 9)
            self.tied.weight = self.embedding.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.decoder

    selection = select_layers(Model(), exclude=["^excl"])
    assert [layer.name for layer in selection.layers] == ["kept"]
    assert selection.skipped == {
        "embedding": "embedding",
        "excluded": "exclude='^excl'",
        "frozen": "frozen weight",
        "grouped": "grouped convolution (groups=2)",
        "circular": "padding_mode='circular'",
        "decoder": "vocabulary decoder",
        "tied": "weight tied to embedding",
    }
    assert [layer.name for layer in select_layers(Model(), include=["kept"]).layers] == ["kept"]


def test_conv1d_is_a_transposed_linear() -> None:
    """HF Conv1D stores [in, out]: the same step as nn.Linear with the transposed weight."""
    linear, conv = nn.Linear(5, 4).double(), Conv1D(4, 5).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    data = [torch.randn(6, 5, dtype=torch.float64) for _ in range(4)]
    for module in (linear, conv):
        optimizer = hf_soo.build_optimizer("mkor", module, lr=1e-2, base="sgd", weight_decay=0.0)
        for x in data:
            optimizer.zero_grad()
            module(x).tanh().square().sum().backward()
            optimizer.step()
    assert_close_report(conv.weight.T, linear.weight, 1e-12, "weights")


def test_decoders_of_inner_models_and_attention_are_left() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.attention = Inner(), nn.MultiheadAttention(4, 2)

    selection = select_layers(Outer())
    assert [layer.name for layer in selection.layers] == ["inner.body"]
    assert selection.skipped["inner.lm_head"] == "vocabulary decoder"
    assert "without calling" in selection.skipped["attention.out_proj"]


def test_a_layer_that_returns_a_tuple_is_not_hooked_into() -> None:
    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return super().forward(input), None

    layer = Pair(3, 2)
    capture = watched(nn.Sequential(layer))
    layer(torch.ones(5, 3))[0].sum().backward()
    assert capture.buffers["0"][0].item() == 0

"""The library's K-FAC factors of every layer kind, against curvlinops, and where its step is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_soo.engine.fisher import sampled_cross_entropy
from tests.oracles import kfac
from tests.oracles import kfac_cases as cases
from tests.oracles.core import assert_close_report, relative_error
from tests.oracles.kfac_cases import Net, joint, rows_of, with_ones
from tests.oracles.kfac_curvlinops import curvlinops_block, curvlinops_factors, curvlinops_kfac
from tests.oracles.kfac_runs import after_backward, assert_factors, factors_of, one_batch, one_step

APPROX = pytest.mark.parametrize("approx", ["expand", "reduce"])
TASK = pytest.mark.parametrize("task", ["token", "mean", "sum"])
EXACT = {"inverse": "eigen", "damping_mode": "absolute", "damping": 0.01}

# ---- layer kinds (spec 9.1) ------------------------------------------------------------------------------------------


def conv_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches of each position by slicing, [N, S, channels x kh x kw]."""
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    if conv.padding == "same":
        th, tw = dh * (kh - 1), dw * (kw - 1)
        pads = (tw // 2, tw - tw // 2, th // 2, th - th // 2)
    else:
        ph, pw = conv.padding
        pads = (pw, pw, ph, ph)
    x = F.pad(x, pads)
    height, width = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    patches = [
        x[:, :, i : i + height : dh, j : j + width : dw].flatten(1)
        for i in range(0, x.shape[2] - height + 1, sh)
        for j in range(0, x.shape[3] - width + 1, sw)
    ]
    return torch.stack(patches, dim=1)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear-2d": (lambda: nn.Linear(4, 3), (7, 4)),
    "linear-3d": (lambda: nn.Linear(4, 3), (3, 5, 4)),
    "linear-4d": (lambda: nn.Linear(4, 3), (3, 3, 2, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (3, 5, 4)),
    "conv1d": (lambda: Conv1D(3, 4), (3, 5, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, dilation=2), (3, 2, 9, 8)),
    "conv2d-same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), (3, 2, 4, 5)),
    "patches": (lambda: nn.Conv2d(2, 3, 2, stride=2, bias=False), (3, 2, 4, 6)),
}


@APPROX
@pytest.mark.parametrize("kind", KINDS)
def test_factors_and_step_of_every_layer_kind(kind: str, approx: str) -> None:
    make, shape = KINDS[kind]
    module = make().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)  # Conv1D starts near zero
    x, terms = 0.3 + torch.randn(shape, dtype=torch.float64), 11
    optimizer = one_batch(f"kfac_{approx}", module, loss_terms=terms)
    y = module(x)
    weights = torch.randn_like(y)
    loss = (torch.sin(y) * weights).sum() / terms
    is_conv = isinstance(module, nn.Conv2d)
    a = with_ones(conv_patches(module, x) if is_conv else x, module.bias is not None)
    g = torch.cos(y.detach()) * weights / terms
    g = g.flatten(2).mT if is_conv else g
    loss.backward()
    # the free identities: they hold the rows above against autograd; sums in another order, 2e-16 in the spec
    assert_close_report(kfac.gradient(a, g), joint(module), 1e-12, "Σ g aᵀ")
    if module.bias is not None:
        assert_close_report(g.flatten(0, -2).sum(0), module.bias.grad, 1e-12, "Σ g")
    ((G, P),) = after_backward(optimizer).values()
    expected = kfac.factors(a, g, terms, approx)
    assert_factors(optimizer, "", expected, 1e-12)
    # condition numbers of about 1e3 at relative damping 0.1
    assert_close_report(P, kfac.factored(*expected, G, 0.1), 1e-10, "P")
    if kind == "linear-2d":
        other = kfac.factors(a, g, terms, "reduce" if approx == "expand" else "expand")
        assert_close_report(expected[0], other[0], 1e-14, "one position each: expand is reduce")
    else:
        assert relative_error(expected[0], kfac.factors(a[:2], g[:2], terms, approx)[0]) > 1e-3  # rows matter


def test_a_layer_called_twice_adds_its_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    net, x = Twice().double(), torch.randn(6, 4, dtype=torch.float64)
    optimizer = one_batch("kfac_expand", net, loss_terms=6)
    hidden = net.layer(x)
    second = torch.tanh(hidden)
    y = net.layer(second)
    g = torch.autograd.grad(y.square().sum() / 6, (hidden, y))
    a = with_ones(torch.cat([x, second.detach()]))
    one_step(optimizer, lambda: net(x).square().sum() / 6)
    assert_factors(optimizer, "layer", kfac.factors(a, torch.cat(g), 6), 1e-12)  # sums in another order


# ---- an independent reference (spec 9.2) -----------------------------------------------------------------------------


@APPROX
@TASK
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_factors_are_those_of_curvlinops(fisher: str, task: str, approx: str) -> None:
    net, x = Net(task), cases.inputs()
    y = cases.labels(net)
    K = curvlinops_kfac(net, nn.CrossEntropyLoss(), x, y, fisher_type=fisher, kfac_approx=approx)
    optimizer = one_batch(f"kfac_{approx}", net, loss_terms=net.terms(x), row_filter="all")
    one_step(
        optimizer,
        lambda: cases.cross_entropy(net(x), y) if fisher == "empirical" else cases.every_label_loss(net, x),
    )
    for name, expected in curvlinops_factors(K).items():
        assert_factors(optimizer, name, expected, 1e-12)  # 3e-16 in the spec: sums in another order


class WithUnused(Net):
    """A network whose last layer is never called."""

    def __init__(self) -> None:
        super().__init__("token")
        self.unused = nn.Linear(2, 2).double()


def test_loss_terms_are_counted_where_they_are_not_given() -> None:
    """R is the number of rows with a gradient in the last layer that has any, here tokens with a label."""
    net, x = WithUnused(), cases.inputs()
    y = cases.labels(net)
    y[0, 1:] = y[3] = -100
    optimizer = one_batch("kfac_expand", net)
    rows = rows_of(net, lambda: cases.cross_entropy(net(x), y))
    one_step(optimizer, lambda: cases.cross_entropy(net(x), y))
    for name, pair in rows.items():
        assert_factors(optimizer, name, kfac.factors(*pair, 13), 1e-12)  # 20 tokens, 7 without a label
    diagnosis = optimizer.diagnostics()["unused"]
    assert diagnosis["input_side"] == diagnosis["output_side"] == "no rows"


# ---- exact steps (spec 9.3, 9.4) -------------------------------------------------------------------------------------


@APPROX
@TASK
def test_a_step_is_the_gauss_newton_step_where_the_theory_says(task: str, approx: str) -> None:
    """Deep linear, squares: expand fits a loss of each token, reduce a loss of pooled tokens; crossed they are off."""
    net = Net(task, linear=True)
    x, t = cases.orthogonal_residuals(net, cases.inputs())
    blocks = {name: cases.ggn_block(net, name, x, cases.unit_hessian) for name in cases.linears(net)}
    optimizer = one_batch(f"kfac_{approx}", net, loss_terms=net.terms(x), **EXACT)
    errors = {}
    for name, (G, P) in one_step(optimizer, lambda: cases.half_squares(net, x, t)).items():
        newton = np.linalg.solve(blocks[name] + EXACT["damping"] * np.eye(G.size), G.flatten())
        errors[name] = relative_error(P.flatten(), newton)
    if (approx == "expand") == (task == "token"):
        assert max(errors.values()) <= 1e-10, errors  # 7e-16 for the factors in the spec, times a condition number
    else:
        assert min(errors.values()) > 0.1, errors


@APPROX
def test_a_step_on_one_datum_is_the_gauss_newton_step_for_any_loss(approx: str) -> None:
    net, x = Net("token"), cases.inputs(1)[:, :1]
    y = torch.zeros(1, 1, dtype=torch.long)  # the block does not depend on it
    blocks = {name: curvlinops_block(net, nn.CrossEntropyLoss(), x, y, name) for name in cases.linears(net)}
    optimizer = one_batch(f"kfac_{approx}", net, loss_terms=1, **EXACT)
    for name, (G, P) in one_step(optimizer, lambda: cases.every_label_loss(net, x)).items():
        newton = np.linalg.solve(blocks[name] + EXACT["damping"] * np.eye(G.size), G.flatten())
        assert_close_report(P.flatten(), newton, 1e-10, name)  # condition number about 1e2


# ---- the Fisher of sampled labels (spec 9.5) -------------------------------------------------------------------------


def test_sampled_loss_draws_labels_from_the_model() -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    y = torch.randint(5, (3, 4))
    y[0, :2] = y[2, 3] = -100
    valid = y != -100
    counts, draws = torch.zeros(3, 4, 5, dtype=torch.float64), 400
    for _ in range(draws):
        (grad,) = torch.autograd.grad(sampled_cross_entropy(logits, y), logits)
        assert not grad[~valid].any()
        drawn = logits.detach().softmax(-1) - grad * valid.sum()  # (p - e_c) / R -> e_c
        # each is a vector of the standard basis; rounding alone
        assert_close_report(drawn[valid].sort(-1).values[:, -1], np.ones(int(valid.sum())), 1e-12, "drawn")
        assert float(drawn[valid].abs().sum()) == pytest.approx(int(valid.sum()), rel=1e-12)
        counts[valid] += drawn[valid].round()
    # standard deviation at most √(1/4 / 400) = 0.025, largest of 45 entries: 4 of them
    assert float((counts / draws - logits.detach().softmax(-1))[valid].abs().max()) < 0.1


def test_sampled_labels_approach_the_exact_fisher() -> None:
    net, x = Net("token"), cases.inputs()
    y = cases.labels(net)
    y[0, 1:] = -100
    rows = rows_of(net, lambda: cases.every_label_loss(net, x))
    weights = (y != -100).to(x).repeat(cases.CLASSES, 1)[..., None]
    labelled = int((y != -100).sum())
    optimizer = one_batch("kfac_expand", net, fisher="mc")
    samples: dict[str, list[Tensor]] = {name: [] for name in rows}
    plain = rows_of(net, lambda: cases.cross_entropy(net(x), y))
    for _ in range(200):
        optimizer.zero_grad()
        logits = net(x)
        assert optimizer.wants_sampled_loss
        optimizer.backward_sampled(sampled_cross_entropy(logits, y))
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())
        cases.cross_entropy(logits, y).backward()
        for name, (G, _) in after_backward(optimizer).items():
            assert_close_report(G, kfac.gradient(*plain[name]), 1e-12, f"G of {name}")  # the real loss's alone
            A, B = factors_of(optimizer, name)
            assert_close_report(A, kfac.factors(*plain[name])[0], 1e-12, f"A of {name}")  # sums in another order
            samples[name].append(B)
    for name, (a, g) in rows.items():
        # every_label_loss is over all tokens: drop those without a label, and put R for R
        _, exact = kfac.factors(a, g * weights * (net.terms(x) / labelled), labelled)

        def rms(size: int, name: str = name, exact: np.ndarray = exact) -> float:
            means = torch.stack(samples[name]).unflatten(0, (-1, size)).mean(1).numpy()
            errors = [np.linalg.norm(mean - exact) / np.linalg.norm(exact) for mean in means]
            return float(np.sqrt(np.mean(np.square(errors))))

        assert rms(100) <= 0.1, (name, rms(100))  # 0.056 in the spec, with about as many rows
        assert 0.4 < rms(4) / rms(1) < 0.6, (name, rms(4), rms(1))  # 1/2 in expectation; 50 groups: about 10 %


def test_sampled_labels_are_asked_for_on_update_steps_alone() -> None:
    net, x = Net("token"), cases.inputs()
    y = cases.labels(net)
    wanted = {}
    for fisher in ("mc", "empirical"):
        optimizer = one_batch("kfac_expand", net, fisher=fisher, update_period=2, inverse_period=2, warmup_updates=1)
        wanted[fisher] = []
        for _ in range(4):
            optimizer.zero_grad()
            logits = net(x)
            wanted[fisher].append(bool(optimizer.wants_sampled_loss))
            if optimizer.wants_sampled_loss:
                optimizer.backward_sampled(sampled_cross_entropy(logits, y))
            cases.cross_entropy(logits, y).backward()
            optimizer.step()
    assert wanted == {"mc": [True, False, True, False], "empirical": [False] * 4}

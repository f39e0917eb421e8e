"""Small float64 networks and losses for the K-FAC tests, their rows, and exact curvature; no code of hf_soo.

Two losses make the *empirical* factors of an ordinary backward pass equal to exact (type-2) ones, so that exactness
can be tested on a whole optimizer step: `every_label_loss` for cross-entropy, `orthogonal_residuals` for squares.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.oracles.core import Array

N, T, D_IN, D_HIDDEN, CLASSES = 5, 4, 4, 3, 3


class Net(nn.Module):
    """Layers on [N, T, d]; the outputs are those of each token, or their mean or sum over tokens."""

    def __init__(self, task: str = "token", linear: bool = False, depth: int = 3, bias: bool = True) -> None:
        super().__init__()
        widths = [D_IN, *[D_HIDDEN] * (depth - 1), CLASSES]
        self.layers = nn.ModuleList(nn.Linear(p, q, bias=bias) for p, q in pairwise(widths)).double()
        self.task, self.linear = task, linear

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 or self.linear else torch.tanh(x))
        return {"token": lambda: x, "mean": lambda: x.mean(1), "sum": lambda: x.sum(1)}[self.task]()

    def terms(self, x: Tensor) -> int:
        """R of a loss that is a mean over tokens, or over examples."""
        return len(x) * x.shape[1] if self.task == "token" else len(x)


def inputs(examples: int = N) -> Tensor:
    return 0.3 + torch.randn(examples, T, D_IN, dtype=torch.float64)


def labels(net: Net, examples: int = N) -> Tensor:
    return torch.randint(CLASSES, (examples, T) if net.task == "token" else (examples,))


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), y.flatten())


def every_label_loss(net: Net, x: Tensor) -> Tensor:
    """Each example once for each label c, its loss times √p_c, over the R terms of `x` alone.

    Σ_c p_c (e_c - p)(e_c - p)ᵀ = diag(p) - ppᵀ, so the empirical B with that R is the one of the softmax Hessian;
    A does not change, as all copies have the same input.
    """
    with torch.no_grad():
        p = net(x).softmax(-1)
    log_p = net(x.repeat(CLASSES, 1, 1)).log_softmax(-1).unflatten(0, (CLASSES, len(x)))
    own = torch.stack([log_p[c, ..., c] for c in range(CLASSES)], dim=-1)
    return -(p.sqrt() * own).sum() / net.terms(x)


def orthogonal_residuals(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """A regression data set: each example C times, with residuals √C q_c, the q_c orthonormal.

    Their second moment is I, the Hessian of |f - t|² / 2, so the empirical Fisher is the Gauss-Newton matrix.
    """
    Q = torch.linalg.qr(torch.randn(CLASSES, CLASSES, dtype=torch.float64)).Q * CLASSES**0.5
    x = x.repeat_interleave(CLASSES, 0)
    with torch.no_grad():
        outputs = net(x)
    shape = (CLASSES, *[1] * (outputs.ndim - 2), CLASSES)
    return x, outputs - Q.T.reshape(shape).repeat(len(x) // CLASSES, *[1] * (outputs.ndim - 1))


def half_squares(net: Net, x: Tensor, t: Tensor) -> Tensor:
    """Mean over the terms of |f - t|² / 2."""
    return (net(x) - t).square().sum() / (2 * net.terms(x))


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def rows_of(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per linear layer the rows that go in, 1 last where there is a bias, and the loss's gradient by what comes out.

    The module's own gradients are left as they were. A zero is added to each output, and its gradient taken, so that
    the output may be changed in place.
    """
    ins: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            ins[name] = with_ones(args[0].detach().clone(), layer.bias is not None)
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in linears(module).items()]
    scalar = loss()
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(scalar, list(zeros.values()))
    return {name: (ins[name], grad) for name, grad in zip(zeros, grads, strict=True)}


def with_ones(rows: Tensor, bias: bool = True) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if bias else rows


def joint(module: nn.Module, grads: bool = True) -> Tensor:
    """[W | b] of a layer as [d_out, d_in (+ 1)], or its gradient; Conv1D is transposed, Conv2d flattened."""
    W, b = ((p.grad if grads else p.detach()) if p is not None else None for p in (module.weight, module.bias))
    W = W.T if type(module).__name__ == "Conv1D" else W.flatten(1)
    return (W if b is None else torch.cat([W, b[:, None]], 1)).clone()


def ggn_block(net: Net, name: str, x: Tensor, hessian: Callable[[Tensor], Tensor]) -> Array:
    """Σ over terms of JᵀHJ / R for one layer, J by its joint matrix row by row; `hessian`: one output row -> H."""
    own = {key: p.detach() for key, p in net.named_parameters()}
    W, b = own[f"{name}.weight"], own[f"{name}.bias"]

    def outputs(Wb: Tensor) -> Tensor:
        changed = {**own, f"{name}.weight": Wb[:, :-1], f"{name}.bias": Wb[:, -1]}
        return functional_call(net, changed, (x,)).flatten(0, -2)

    J = jacrev(outputs)(torch.cat([W, b[:, None]], 1)).flatten(2)  # [terms, C, nm]
    H = torch.stack([hessian(row) for row in net(x).detach().flatten(0, -2)])
    return (torch.einsum("rcp,rcd,rdq->pq", J, H, J) / len(H)).numpy()


def softmax_hessian(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return p.diag() - torch.outer(p, p)


def unit_hessian(outputs: Tensor) -> Tensor:
    return torch.eye(len(outputs), dtype=outputs.dtype)


# ---- a run of the released kfac-pytorch ------------------------------------------------------------------------------


def waves(*shape: int, shift: float = 0.0) -> Tensor:
    """Numbers anybody can make again: sin(2.3 k + shift), k from 1."""
    k = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64)
    return torch.sin(2.3 * k + shift).reshape(shape)


def released_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(waves(*p.shape, shift=float(i)))
    return net


def released_batch(step: int) -> tuple[Tensor, Tensor]:
    return waves(4, 2, 3, shift=10.0 + step), waves(4, 2, 2, shift=20.0 + step)


def released_loss(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return (net(x) - t).square().sum(-1).mean() / 2


RELEASED_CONFIG = {"factor_decay": 0.5, "damping": 3e-3, "kl_clip": 1e-4, "update_period": 1, "inverse_period": 1}
"""`factor_update_steps=1, inv_update_steps=1, factor_decay=0.5, damping=3e-3, kl_clip=1e-4, lr=0.1` there."""

RELEASED_STEPS = [
    [
        [-0.015026622451841831, -0.020369622856378555, 0.042170193046331406, 0.04293056204915047],
        [0.00497850775718689, 0.024601029232144356, -0.03776063770055771, -0.05573524534702301],
    ],
    [
        [-0.047147855162620544, -0.071381576359272, -0.12858006358146667],
        [-0.07860012352466583, -0.019252117723226547, 0.16125550866127014],
    ],
]
"""[W | b].grad of both layers after the third step, the parameters never moved."""

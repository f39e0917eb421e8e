"""Whole training runs in numpy float64: a two-layer network with its backward pass written out, MKOR, Eva, bases.

As `oracles.py`: written from the equations, sharing no code with hf_soo. `simulate` trains the network in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tests.oracles.core import (
    JORDAN,
    Array,
    agreement,
    blend,
    eva,
    eva_f,
    exact,
    from_columns,
    kl_scale,
    kronecker_vectors,
    newton_schulz,
    norm_match,
    paper,
    polar_express,
    power,
    stabilized,
)


@dataclass
class Mlp:
    """y = W2 tanh(W1 x + c1) + c2, loss = mean over rows of |y - t|² / 2; `c[l]` is None for a layer without bias."""

    W: list[Array]
    c: list[Array | None]

    def backward(self, x: Array, t: Array) -> list[tuple[Array, Array]]:
        """Per layer the rows `a` [N, m(+1)] that went in and `e` [N, n], the loss's gradient by what came out."""
        hidden = np.tanh(x @ self.W[0].T + self._bias(0))
        e_out = (hidden @ self.W[1].T + self._bias(1) - t) / len(x)
        e_in = (e_out @ self.W[1]) * (1 - hidden**2)
        return [(self._rows(0, x), e_in), (self._rows(1, hidden), e_out)]

    def loss(self, x: Array, t: Array) -> float:
        hidden = np.tanh(x @ self.W[0].T + self._bias(0))
        return float(((hidden @ self.W[1].T + self._bias(1) - t) ** 2).sum() / (2 * len(x)))

    def parameters(self) -> list[Array]:
        """In the order of torch's `Sequential.parameters()`."""
        return [p for W, c in zip(self.W, self.c, strict=True) for p in (W, c) if p is not None]

    def _bias(self, layer: int) -> Array | float:
        bias = self.c[layer]
        return 0.0 if bias is None else bias

    def _rows(self, layer: int, x: Array) -> Array:
        return x if self.c[layer] is None else np.hstack([x, np.ones((len(x), 1))])


@dataclass
class MkorFactor:
    """One side of one layer: the dense F, and the last `history` columns where the low-rank form is simulated."""

    dim: int
    F: Array = field(init=False)
    columns: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.F = np.eye(self.dim)

    def update(self, V: Array, config: dict[str, Any]) -> None:
        """One update with the vectors V [d, r]; a limited history is simulated for r = 1."""
        gamma, rule, history = config["factor_decay"], config.get("update_rule", "blend"), config.get("history")
        if rule == "blend" and history is None:
            self.F = blend(self.F, V, gamma)
        elif rule == "blend":
            v = V.squeeze(1)
            u = (gamma * self.F + (1 - gamma) * np.eye(self.dim)) @ v
            self.columns = [math.sqrt(gamma) * c for c in self.columns] + [u / math.sqrt(1 + v @ u)]
            self.columns = self.columns[-history:]
            self.F = from_columns(self.columns, self.dim)
        else:
            F = stabilized(self.F, config["stabilizer_threshold"], config["stabilizer_blend"])
            self.F = {"exact": exact, "paper": paper}[rule](F, V.squeeze(1), gamma)


@dataclass
class Mkor:
    """P = ‖G‖ · LGR / ‖LGR‖ per layer; `config` has the names of the library's fields (`history` None: dense)."""

    config: dict[str, Any]
    t: int = 0
    factors: list[tuple[MkorFactor, MkorFactor]] = field(default_factory=list)

    def transform(
        self, layers: list[tuple[Array, Array]], lr: float, directions: list[Array] | None = None
    ) -> list[Array]:
        """P of each layer's gradient, or of another direction; the factors are of the gradient's rows all the same."""
        cfg = self.config
        if not self.factors:
            self.factors = [(MkorFactor(e.shape[1]), MkorFactor(a.shape[1])) for a, e in layers]
        updates = self.t < cfg["warmup_updates"] or self.t % cfg["update_period"] == 0
        self.t += 1
        moved = []
        for i, ((rows_a, rows_e), (left, right)) in enumerate(zip(layers, self.factors, strict=True)):
            G = rows_e.T @ rows_a if directions is None else directions[i]
            if updates:
                scale = cfg.get("kv_scale", "unit"), cfg.get("kv_target", 1.0), cfg.get("rank", 1)
                a, b = kronecker_vectors(rows_a, rows_e, cfg.get("clip_value", 100.0), *scale)
                sides = cfg.get("sides", "both")
                trust = agreement(rows_e) if cfg.get("gate") else 1.0
                if sides in ("both", "output") and trust:
                    left.update(trust * b, cfg)
                if sides in ("both", "input"):
                    right.update(a, cfg)
            p = cfg.get("exponent", 1.0)
            P = left.F @ G @ right.F if p == 1 else power(left.F, p) @ G @ power(right.F, p)
            moved.append(norm_match(G, P) if cfg.get("rescale", "norm") == "norm" else P)
        return moved


@dataclass
class Eva:
    """Equation (4) on running vectors, or (5) where `input_only`, then the KL clip over all layers together."""

    config: dict[str, Any]
    input_only: bool = False
    t: int = 0
    running: list[list[Array]] = field(default_factory=list)

    def transform(
        self, layers: list[tuple[Array, Array]], lr: float, directions: list[Array] | None = None
    ) -> list[Array]:
        cfg = self.config
        if self.t < cfg.get("warmup_updates", 0) or self.t % cfg.get("update_period", 1) == 0:
            new = [kronecker_vectors(a, e, math.inf, cfg.get("kv_scale", "sum")) for a, e in layers]
            xi = cfg["kv_new_weight"]  # the share of the new vector, where MKOR's factor_decay is the old one's
            old = self.running or new  # the first vector is copied
            self.running = [
                [(1 - xi) * v + xi * w for v, w in zip(*sides, strict=True)] for sides in zip(old, new, strict=True)
            ]
        self.t += 1
        pairs = []
        for i, ((rows_a, rows_e), vectors) in enumerate(zip(layers, self.running, strict=True)):
            G, (a, b) = rows_e.T @ rows_a if directions is None else directions[i], [v.squeeze(1) for v in vectors]
            P = eva_f(G, a, cfg["damping"]) if self.input_only else eva(G, a, b, cfg["damping"])
            pairs.append((G, P))
        nu = kl_scale(pairs, lr, cfg.get("kl_clip"))
        return [nu * P for _, P in pairs]


# --------------------------------------------------------------------------------------------------- base optimizers


Decay = float | Sequence[float]  # one for all parameters, or one for each


def _each(decay: Decay, params: Sequence[Array]) -> list[float]:
    return [float(d) for d in np.broadcast_to(decay, len(params))]


@dataclass
class Sgd:
    """torch.optim.SGD: L2 weight decay into the gradient, heavy-ball momentum without dampening."""

    momentum: float = 0.0
    weight_decay: Decay = 0.0
    buffers: list[Array] = field(default_factory=list)

    def step(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        self.buffers = self.buffers or [np.zeros_like(p) for p in params]
        for p, g, buffer, decay in zip(params, grads, self.buffers, _each(self.weight_decay, params), strict=True):
            buffer[...] = self.momentum * buffer + g + decay * p
            p -= lr * buffer


@dataclass
class Lamb:
    """apex FusedLAMB: one global clip, corrected moments and decay inside u, ratio |w|/|u| where decay != 0.

    `corrected=False` leaves the bias correction out, which the library cannot: an identity of the tests needs it.
    """

    weight_decay: Decay = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    max_grad_norm: float = 1.0
    corrected: bool = True
    always_adapt: bool = False
    t: int = 0
    moments: list[tuple[Array, Array]] = field(default_factory=list)

    def step(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        self.t += 1
        self.moments = self.moments or [(np.zeros_like(p), np.zeros_like(p)) for p in params]
        total = math.sqrt(sum(float((g**2).sum()) for g in grads))
        excess = max(1.0, total / self.max_grad_norm)
        for p, g, (m, v), decay in zip(params, grads, self.moments, _each(self.weight_decay, params), strict=True):
            u = self._adam(m, v, g / excess) + decay * p
            norms = np.linalg.norm(p), np.linalg.norm(u)
            ratio = norms[0] / norms[1] if (decay != 0 or self.always_adapt) and min(norms) > 0 else 1.0
            p -= lr * ratio * u

    def _adam(self, m: Array, v: Array, g: Array) -> Array:
        (beta1, beta2), t = self.betas, self.t
        m[...] = beta1 * m + (1 - beta1) * g
        v[...] = beta2 * v + (1 - beta2) * g**2
        correct = (1 - beta1**t, 1 - beta2**t) if self.corrected else (1.0, 1.0)
        root = np.sqrt(v / correct[1]) + self.eps
        return np.divide(m / correct[0], root, out=np.zeros_like(m), where=root > 0)


@dataclass
class AdamW:
    """torch.optim.AdamW: decay decoupled and before the step, eps outside the root."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Decay = 0.01
    t: int = 0
    moments: list[tuple[Array, Array]] = field(default_factory=list)

    def step(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        self.t += 1
        self.moments = self.moments or [(np.zeros_like(p), np.zeros_like(p)) for p in params]
        beta1, beta2 = self.betas
        for p, g, (m, v), decay in zip(params, grads, self.moments, _each(self.weight_decay, params), strict=True):
            m[...] = beta1 * m + (1 - beta1) * g
            v[...] = beta2 * v + (1 - beta2) * g**2
            p *= 1 - lr * decay
            p -= lr * (m / (1 - beta1**self.t)) / (np.sqrt(v / (1 - beta2**self.t)) + self.eps)


@dataclass
class Muon:
    """torch.optim.Muon for matrices: averaged momentum, Nesterov, decoupled decay, lr · sqrt(max(1, n/m))."""

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    ns_steps: int = 5
    ns_coefficients: str = "jordan"
    buffers: list[Array] = field(default_factory=list)

    def step(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        self.buffers = self.buffers or [np.zeros_like(p) for p in params]
        for p, g, buffer in zip(params, grads, self.buffers, strict=True):
            buffer[...] = self.momentum * buffer + (1 - self.momentum) * g
            moved = (1 - self.momentum) * g + self.momentum * buffer if self.nesterov else buffer
            p *= 1 - lr * self.weight_decay
            p -= lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * self.polar(moved)

    def polar(self, direction: Array) -> Array:
        table = [JORDAN] if self.ns_coefficients == "jordan" else polar_express(self.ns_steps)
        return newton_schulz(direction, self.ns_steps, coefficients=table)


@dataclass
class MuonAndRest:
    """Matrices by `Muon`, everything else by `AdamW` at its own learning rate; None: at the same."""

    rest_lr: float | None
    muon: Muon = field(default_factory=Muon)
    rest: AdamW = field(default_factory=AdamW)

    def step(self, params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
        pairs = list(zip(params, grads, strict=True))
        for rule, rate, chosen in (
            (self.muon, lr, [pair for pair in pairs if pair[0].ndim == 2]),
            (self.rest, lr if self.rest_lr is None else self.rest_lr, [pair for pair in pairs if pair[0].ndim != 2]),
        ):
            rule.step([p for p, _ in chosen], [g for _, g in chosen], rate)


class Method(Protocol):
    """What `simulate` asks of a method."""

    def transform(self, layers: list[tuple[Array, Array]], lr: float) -> list[Array]:
        """P of each layer, of the rows `a` [N, m(+1)] that went in and `e` [N, n]; G is `e.T @ a`."""
        ...


def simulate(
    mlp: Mlp, batches: Sequence[tuple[Array, Array]], method: Method | None, base: Any, lrs: Sequence[float]
) -> list[float]:
    """Train `mlp` in place, one step per batch; returns the losses before each step."""
    losses = []
    for (x, t), lr in zip(batches, lrs, strict=True):
        losses.append(mlp.loss(x, t))
        layers = mlp.backward(x, t)
        moved = method.transform(layers, lr) if method else [e.T @ a for a, e in layers]
        grads: list[Array] = []
        for P, bias in zip(moved, mlp.c, strict=True):
            grads += [P] if bias is None else [P[:, :-1], P[:, -1]]
        base.step(mlp.parameters(), grads, lr)
    return losses

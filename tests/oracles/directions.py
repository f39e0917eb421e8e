"""Bases in two halves, in numpy float64: what they make of the gradients, and how the weights move by what is given.

As the other oracles: written from the equations, sharing no code with hf_soo. ``simulate`` trains with a method between
the halves, whose factors are of the step's own rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tests.oracles.core import Array
from tests.oracles.training import Mlp, Muon


class Halves(Protocol):
    """What `simulate` asks of a base."""

    def take(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        """The direction of each parameter."""
        ...

    def move(self, params: Sequence[Array], directions: Sequence[Array], lr: float) -> None:
        """The parameters, in place."""
        ...


@dataclass
class Sgd:
    """m ← μm + g + κw; the direction is m, or g + κw + μm."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    m: list[Array] = field(default_factory=list)

    def take(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        full = [g + self.weight_decay * w for w, g in zip(params, grads, strict=True)]
        before = self.m or [np.zeros_like(w) for w in params]
        self.m = [self.momentum * m + g for m, g in zip(before, full, strict=True)]
        return [g + self.momentum * m if self.nesterov else m.copy() for g, m in zip(full, self.m, strict=True)]

    def move(self, params: Sequence[Array], directions: Sequence[Array], lr: float) -> None:
        for w, d in zip(params, directions, strict=True):
            w -= lr * d


@dataclass
class Adam:
    """The direction is m, m̂, or m̂ / (√v̂ + ε); ``lamb`` clips first, and moves by the trust ratio of u = ... + κw."""

    place: str
    lamb: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    t: int = 0
    m: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)

    def take(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        (beta1, beta2), self.t = self.betas, self.t + 1
        if self.lamb:
            norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
            grads = [g / max(1.0, norm) for g in grads]
        zeros = [np.zeros_like(w) for w in params]
        self.m = [beta1 * m + (1 - beta1) * g for m, g in zip(self.m or zeros, grads, strict=True)]
        self.v = [beta2 * v + (1 - beta2) * g**2 for v, g in zip(self.v or zeros, grads, strict=True)]
        if self.place == "momentum":
            return [m.copy() for m in self.m]
        if self.place == "numerator":
            return [m / (1 - beta1**self.t) for m in self.m]
        return self._divided(self.m)

    def move(self, params: Sequence[Array], directions: Sequence[Array], lr: float) -> None:
        moved = self._divided(directions) if self.place == "momentum" else directions
        for w, d in zip(params, moved, strict=True):
            if not self.lamb:
                w -= lr * self.weight_decay * w + lr * d
                continue
            u = d + self.weight_decay * w
            w -= lr * np.linalg.norm(w) / np.linalg.norm(u) * u

    def _divided(self, directions: Sequence[Array]) -> list[Array]:
        one, two = (1 - beta**self.t for beta in self.betas)
        return [d / one / (np.sqrt(v / two) + self.eps) for d, v in zip(directions, self.v, strict=True)]


@dataclass
class MuonAndRest:
    """Muon's direction is its (Nesterov) momentum or the polar factor of it; vectors are AdamW's, at ``rest_lr``."""

    place: str
    rest_lr: float
    rest: Adam
    momentum: float = 0.95
    nesterov: bool = True
    m: list[Array] = field(default_factory=list)

    def take(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        vectors = iter(self.rest.take(*([p for p in each if p.ndim == 1] for each in (params, grads))))
        matrices = [g for g in grads if g.ndim == 2]
        mu, before = self.momentum, self.m or [np.zeros_like(g) for g in matrices]
        self.m = [mu * m + (1 - mu) * g for m, g in zip(before, matrices, strict=True)]
        found = [(1 - mu) * g + mu * m if self.nesterov else m.copy() for m, g in zip(self.m, matrices, strict=True)]
        ours = iter([Muon().polar(d) for d in found] if self.place == "update" else found)
        return [next(ours if g.ndim == 2 else vectors) for g in grads]

    def move(self, params: Sequence[Array], directions: Sequence[Array], lr: float) -> None:
        vectors = [[p for p in each if p.ndim == 1] for each in (params, directions)]
        self.rest.move(*vectors, self.rest_lr)
        for W, D in zip(params, directions, strict=True):
            if W.ndim == 2:
                W -= (
                    lr
                    * math.sqrt(max(1.0, W.shape[0] / W.shape[1]))
                    * (D if self.place == "update" else Muon().polar(D))
                )


class Method(Protocol):
    """What `simulate` asks of a method."""

    def transform(self, layers: list[tuple[Array, Array]], lr: float, directions: list[Array]) -> list[Array]:
        """P of each layer's direction, with the factors of the rows."""
        ...


def simulate(
    mlp: Mlp, batches: Sequence[tuple[Array, Array]], method: Method, base: Halves, lrs: Sequence[float]
) -> None:
    """Train ``mlp`` in place, one step a batch, with the method between the halves of the base."""
    for (x, t), lr in zip(batches, lrs, strict=True):
        layers, params = mlp.backward(x, t), mlp.parameters()
        grads = _apart([e.T @ a for a, e in layers], mlp)
        taken = iter(base.take(params, grads))
        joint = [np.hstack([next(taken), next(taken)[:, None]]) if c is not None else next(taken) for c in mlp.c]
        base.move(params, _apart(method.transform(layers, lr, joint), mlp), lr)


def _apart(joint: Sequence[Array], mlp: Mlp) -> list[Array]:
    """[G | bias] of each layer as two parameters."""
    parts: list[Array] = []
    for J, c in zip(joint, mlp.c, strict=True):
        parts += [J] if c is None else [J[:, :-1], J[:, -1]]
    return parts

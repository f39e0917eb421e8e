"""An adapter as the textbook has it: two linear layers without biases, in float64 and numpy, stepped by SGD.

y = W x + s B (A x) with W frozen, L = Σ |y - target|² / 2N over N rows. A sees rows x and gets s Bᵀ e, B sees A x and
gets s e, e = dL/dy. Each of the two is a layer of its own to a Kronecker method. Nothing of hf_soo is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
State = dict[str, Any]
Rule = Callable[[State, Array, Array, Array], Array]
"""From a layer's state, input rows [N, d_in], their output gradients [N, d_out] and G to P; it changes the state."""


def unit(vector: Array) -> Array:
    """|v|² = d."""
    return vector * np.sqrt(len(vector)) / np.linalg.norm(vector)


def mkor(state: State, rows: Array, out: Array, G: Array, decay: float = 0.95) -> Array:
    """The released code's rule on dense factors, with vectors of unit scale; a zero vector teaches nothing."""
    for key, vector in (("a", rows.mean(0)), ("b", out.sum(0))):
        F = state.setdefault(key, np.eye(len(vector)))
        if vector.any():
            v = unit(vector)
            M = decay * F + (1 - decay) * np.eye(len(v))
            state[key] = np.linalg.inv(np.linalg.inv(M) + np.outer(v, v))
    P = state["b"] @ G @ state["a"]
    length = np.linalg.norm(P)
    return P * np.linalg.norm(G) / length if length else P


def eva(state: State, rows: Array, out: Array, G: Array, damping: float = 0.03, new: float = 0.95) -> Array:
    """(aaᵀ ⊗ bbᵀ + γI)⁻¹ vec(G) by a dense solve; the running average begins with the first vector that is not zero."""
    for key, vector in (("a", rows.mean(0)), ("b", out.sum(0))):
        if vector.any():
            old = state.get(key, vector)
            state[key] = (1 - new) * old + new * vector
    a, b = state["a"], state.get("b", np.zeros(len(G)))
    C = np.kron(np.outer(a, a), np.outer(b, b)) + damping * np.eye(G.size)
    return np.linalg.solve(C, G.flatten(order="F")).reshape(G.shape, order="F")


def kfac(state: State, rows: Array, out: Array, G: Array, damping: float = 0.1, decay: float = 0.95) -> Array:
    """Bias-corrected factors of the rows with a gradient, each damped by √λ of its mean eigenvalue."""
    live = out.any(1)
    if live.any():
        state["updates"] = state.get("updates", 0) + 1
        for key, each, scale in (("a", rows[live], 1 / live.sum()), ("b", out[live], len(rows))):
            state[key] = decay * state.get(key, 0) + (1 - decay) * scale * each.T @ each
    if "updates" not in state:
        return G
    damped = {}
    for key in "ab":
        F = state[key] / (1 - decay ** state["updates"])
        damped[key] = F + np.sqrt(damping) * np.trace(F) / len(F) * np.eye(len(F))
    return np.linalg.solve(damped["b"], G) @ np.linalg.inv(damped["a"])


@dataclass
class Adapter:
    """W, A, B and s, and what a rule has learnt of A and of B."""

    W: Array
    A: Array
    B: Array
    s: float
    rule: Rule
    lr: float
    states: tuple[State, State] = field(default_factory=lambda: ({}, {}))

    def step(self, x: Array, target: Array) -> None:
        """One step on rows x [N, d_in]."""
        hidden = x @ self.A.T
        e = (x @ self.W.T + self.s * hidden @ self.B.T - target) / len(x)
        of_a, of_b = self.s * e @ self.B, self.s * e
        P_a = self.rule(self.states[0], x, of_a, of_a.T @ x)
        P_b = self.rule(self.states[1], hidden, of_b, of_b.T @ hidden)
        self.A, self.B = self.A - self.lr * P_a, self.B - self.lr * P_b

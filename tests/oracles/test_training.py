"""The simulated optimizers of whole runs against torch's own."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tests.oracles import training as oracle_training
from tests.oracles.core import assert_close_report

SHAPES = [(7, 5), (4,), (3, 2, 2), (6, 7)]


def test_oracles_agree_with_torch(rng: np.random.Generator) -> None:
    """The simulated bases against torch's, and LAMB without its clip and ratio against Adam."""
    start, grads = [rng.normal(size=s) for s in SHAPES], [[rng.normal(size=s) for s in SHAPES] for _ in range(10)]
    pairs = [
        (oracle_training.Sgd(0.9, 0.01), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01)),
        (oracle_training.AdamW(), lambda p: torch.optim.AdamW(p, lr=0.02)),
        (oracle_training.Lamb(0.0, max_grad_norm=1e9), lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-6)),
    ]
    for oracle, make in pairs:
        theirs = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
        ours, optimizer = [p.copy() for p in start], make(theirs)
        for step in grads:
            for p, g in zip(theirs, step, strict=True):
                p.grad = torch.from_numpy(g.copy())
            optimizer.step()
            oracle.step(ours, step, 0.02)
        for i, (p, q) in enumerate(zip(theirs, ours, strict=True)):
            assert_close_report(p, q, 1e-13, f"parameter {i}")  # ten steps of rounding

"""MKOR-H: MKOR that hands over to its base when the loss stops falling (Mozaffari et al., NeurIPS 2023, 3.3.2).

The paper says "a loss decrease rate-based switching method" and gives no formula. Here, with l_t the training loss of
the global batch, ρ = rate_decay, β = rate_fraction and t₀ the first step:

    S_t = bias-corrected average of l, decay ρ          r_t = that of S_{t-1} - S_t
    R_t = (S_{t₀} - S_t) / (t - t₀)                     the mean decrease since the start
    switch once r_t < β R_t in `patience` checks in a row and t >= min_steps;  a check in each factor update

The switch is final. Each layer's gradient norm was kept, so the base's moments fit on: from the next step on the run is
the base's own, without hooks and without factors. Every rank sees the same all-reduced loss and so decides alike;
averages and decision are in the checkpoint.

============= ============= ==================
paper         here          the released code
============= ============= ==================
loss decrease rate_decay,   none was released
rate          rate_fraction
============= ============= ==================

Deviation: the rule itself, since the paper's is not stated. Both averages lag by some 1/(1-ρ) steps, so a knee is seen
two to three times that later, plus `patience` checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.checks import Count, Positive, Share, Whole
from hf_soo.engine.preconditioner import Method
from hf_soo.preconditioners.mkor import MKOR, MKORConfig


@dataclass(frozen=True)
class MKORHConfig(MKORConfig):
    """Settings of MKOR-H; see ``MKORConfig`` for the others.

    Args:
        rate_decay: ρ.
        rate_fraction: β.
        patience: checks in a row.
        min_steps: the first step that may switch.
    """

    rate_decay: Share = 0.98
    rate_fraction: Positive = 0.3
    patience: Count = 20
    min_steps: Whole = 100


class MKORH(MKOR):
    """MKOR with an eye on the loss; ``watch`` holds what the rule remembers."""

    watches_loss = True
    config: MKORHConfig

    def __init__(self, config: MKORHConfig) -> None:
        """Take the settings."""
        super().__init__(config)
        # the sums of both averages, losses seen, t₀, S at t₀, checks in a row
        self.watch = torch.zeros(6, dtype=torch.float64)

    def observe(self, loss: Tensor, step: int) -> bool:
        """Add a loss to the averages; at a factor update check the rate, which reads one number from the device.

        Args:
            loss: the global batch's; one that is not finite is passed over.
            step: its step.

        Returns:
            Whether to switch.
        """
        checks = self.updates_at(step)
        if self.watch.device != loss.device:
            self.watch = self.watch.to(loss.device)
        seen = _watched(self.watch, loss, step, self.config.rate_decay, self.config.rate_fraction, checks)
        self.watch.copy_(torch.where(loss.isfinite(), seen, self.watch))
        return checks and step >= self.config.min_steps and self.watch[5].item() >= self.config.patience

    def global_state(self) -> dict[str, Tensor]:
        """The averages and the count of checks."""
        return {"watch": self.watch}


def _watched(watch: Tensor, loss: Tensor, step: int, decay: float, fraction: float, checks: bool) -> Tensor:
    """What the rule remembers after one more loss.

    Args:
        watch: as in ``MKORH``.
        loss: l_t.
        step: t.
        decay: ρ.
        fraction: β.
        checks: whether this step is a check.
    """
    loss_sum, rate_sum, n, start, start_S, below = watch.unbind()
    first = n == 0
    old_S = loss_sum / (1 - decay**n).clamp(min=1e-300)
    loss_sum = decay * loss_sum + (1 - decay) * loss
    S = loss_sum / (1 - decay ** (n + 1))
    rate_sum = torch.where(first, 0.0, decay * rate_sum + (1 - decay) * (old_S - S))
    rate = rate_sum / (1 - decay**n).clamp(min=1e-300)
    start, start_S = torch.where(first, float(step), start), torch.where(first, S, start_S)
    mean_rate = (start_S - S) / (step - start).clamp(min=1)
    if checks:
        below = torch.where(~first & (rate < fraction * mean_rate), below + 1, 0.0)
    return torch.stack([loss_sum, rate_sum, n + 1, start, start_S, below])


METHOD = Method(
    "mkor_h",
    "MKOR-H, which switches to its base (Mozaffari et al., NeurIPS 2023)",
    base="lamb",
    config=MKORHConfig,
    make=MKORH,
    rates=(4e-3, 4e-2),
)

"""The loss that a window's forward passes ended with."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_soo.engine.comm import Communicator


class LossWatch:
    """The training loss of a window's micro-batches, for methods that decide by it (MKOR-H); handed over once."""

    def __init__(self) -> None:
        """Start with nothing reported."""
        self._sum: Tensor | None = None

    def report(self, loss: Tensor | float, device: torch.device) -> None:
        """Add this rank's loss of a micro-batch, kept on ``device``; nothing waits for it."""
        value = torch.as_tensor(loss).detach().to(device, torch.float64)
        self._sum = value if self._sum is None else self._sum + value

    def forget(self) -> None:
        """Drop the window's losses: a step was skipped."""
        self._sum = None

    def require(self, method: str) -> None:
        """Refuse to step without a loss.

        Raises:
            RuntimeError: nobody reported one.
        """
        if self._sum is None:
            raise RuntimeError(
                f"{method} decides by the training loss: call optimizer.report_loss(loss) between zero_grad() and "
                "each step(), or use SecondOrderTrainer."
            )

    def take(self, comm: Communicator) -> Tensor:
        """The loss of the global batch, the mean over ranks; the window's is forgotten. Every rank must call it."""
        assert self._sum is not None  # ``require`` stands before each step
        loss, self._sum = self._sum / comm.world_size, None
        comm.sum_([loss])
        return loss

"""The Monte-Carlo Fisher: output factors from labels that are drawn from the model itself (Martens and Grosse, 2015).

A second backward pass, from the same forward pass and only as far as the layers' outputs, so that no weight gradient is
computed twice and no reducer of gradients runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_soo.engine.capture import Capture

IGNORED = -100


def sampled_cross_entropy(logits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The cross entropy of labels drawn from softmax(logits), averaged over the positions that have a label.

    Args:
        logits: [..., classes].
        labels: the real labels [...]; only where they are -100 matters, those positions are left out.
        generator: where the draws come from; None: torch's default.

    Returns:
        A 0-d tensor.
    """
    rows, valid = logits.flatten(0, -2), labels.flatten() != IGNORED
    drawn = torch.multinomial(rows.detach().float().softmax(-1), 1, generator=generator).squeeze(-1)
    return F.cross_entropy(rows, torch.where(valid, drawn, IGNORED), ignore_index=IGNORED)


def sampled_squared_error(outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The mean squared error to targets drawn from N(outputs, 1/2), the distribution whose log-likelihood it is.

    Args:
        outputs: of any shape.
        generator: where the draws come from; None: torch's default.

    Returns:
        A 0-d tensor.
    """
    noise = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
    return F.mse_loss(outputs, outputs.detach() + noise * 0.5**0.5)


@torch.enable_grad()
def backward_sampled(capture: Capture, loss: Tensor) -> None:
    """Differentiate a sampled loss by the watched layers' outputs; the recorder adds to its output factors.

    Args:
        capture: what watches the layers.
        loss: on the graph of the real loss, which stays usable.
    """
    assert capture.sampled is not None
    fisher_pass = capture.recorder.fisher_pass
    assert fisher_pass is not None
    fisher_pass.which, fisher_pass.passes = "outputs", fisher_pass.passes + 1
    try:
        torch.autograd.grad(loss, capture.sampled, retain_graph=True, allow_unused=True)
    finally:
        fisher_pass.which = "inputs"
        capture.sampled.clear()

"""K-FAC factors and exact Gauss-Newton blocks from curvlinops 3.0.1, an independent reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from curvlinops import GGNLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from tests.oracles.core import Array
from tests.oracles.kfac_cases import Net


class ChannelsFirst(nn.Module):
    """What curvlinops wants of a cross-entropy over tokens: [N, C, T]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).movedim(-1, 1)


def curvlinops_kfac(net: Net, loss: nn.Module, x: Tensor, y: Tensor, **options: Any) -> KFACLinearOperator:
    """Its operator over [W | b] of all layers, factors computed."""
    model = ChannelsFirst(net) if isinstance(loss, nn.CrossEntropyLoss) else net
    options = {"separate_weight_and_bias": False, "check_deterministic": False, **options}
    K = KFACLinearOperator(model, loss, list(net.parameters()), [(x, y)], **options)
    K.compute_kronecker_factors()  # adds to what is there: once
    return K


def curvlinops_factors(K: KFACLinearOperator) -> dict[str, tuple[Array, Array]]:
    """(A, B) by the layer's name in the bare network."""
    inputs, outputs = K._input_covariances, K._gradient_covariances
    return {name.removeprefix("net."): (inputs[name].numpy(), outputs[name].numpy()) for name in inputs}


def joint_order(shape: tuple[int, int]) -> Array:
    """Positions of [W | b], row by row, in the flat parameters W, b; `shape` is [d_out, d_in] of W."""
    n, m = shape
    return np.hstack([np.arange(n * m).reshape(n, m), n * m + np.arange(n)[:, None]]).flatten()


def curvlinops_block(net: Net, loss: nn.Module, x: Tensor, y: Tensor, name: str) -> Array:
    """The layer's block of the GGN, [W | b] row by row."""
    layer = net.get_submodule(name)
    model = ChannelsFirst(net) if isinstance(loss, nn.CrossEntropyLoss) else net
    G = GGNLinearOperator(model, loss, [layer.weight, layer.bias], [(x, y)])
    order = joint_order(tuple(layer.weight.shape))
    dense = (G @ torch.eye(G.shape[1], dtype=torch.float64)).numpy()
    return dense[np.ix_(order, order)]

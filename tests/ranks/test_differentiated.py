"""A backward pass to the inputs alone counts nothing on several ranks either."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import hf_soo
from tests.ranks.distributed import run_ranks


def trained(rank: int, world: int, way: str, perturbed: bool) -> tuple[Tensor, list[float]]:
    """What the model says after three steps, and how many rows of each layer counted in the last one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model: nn.Module = net
    if way == "fsdp2, sharded first":
        shard(net, world)
    optimizer = hf_soo.build_optimizer("mkor", net, lr=0.1)
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(net)
    chance = torch.Generator().manual_seed(rank)
    counts: list[float] = []
    for _ in range(3):
        x, y = torch.randn(4, 8, generator=chance), torch.randint(4, (4,), generator=chance)
        optimizer.zero_grad()
        if perturbed:
            near = x.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(near), y), near)
        F.cross_entropy(model(x), y).backward()
        counts = [buffers[0].item() for buffers in optimizer.stages.capture.buffers.values()]
        optimizer.step()
    with torch.no_grad():
        return model(torch.ones(2, 8)), counts


def shard(net: nn.Sequential, world: int) -> None:
    """FSDP2, each layer on its own: the hook of a layer runs beside those that gather and free its weight."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in [*net, net]:
        if not isinstance(layer, nn.Tanh):
            fully_shard(layer, mesh=mesh)


def both(rank: int, world: int, way: str) -> tuple[tuple[Tensor, list[float]], tuple[Tensor, list[float]]]:
    return trained(rank, world, way, True), trained(rank, world, way, False)


@pytest.mark.parametrize("way", ["ddp", "fsdp2, sharded first"])
def test_input_gradients_on_two_ranks(way: str) -> None:
    for (perturbed, counts), (plain, _) in run_ranks(2, both, way):
        assert counts == [4.0, 4.0, 4.0] and torch.equal(perturbed, plain)

"""On a GPU: every method takes the steps that it takes on a CPU, and no step between updates waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.methods.test_synchronisation import PAIRS, over, passed
from tests.methods.toy import CASES, batches, build, toy, train, weights

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "base"), PAIRS)
def test_no_step_between_updates_waits(name: str, base: str | None) -> None:
    model, optimizer = over(name, base, "cuda")
    for step in range(6):
        passed(model, optimizer)
        refreshes, updates = optimizer.preconditioner.refreshes_at(step), optimizer._updating
        if step >= 3 and not refreshes and (not updates or optimizer.preconditioner.updates_at(step + 1)):
            with waiting_is_an_error():
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_a_cpu(case: str) -> None:
    """In float64, five steps; Muon iterates in half precision there, and is as near as that is."""
    data, found = batches(5), []
    for device in ("cpu", "cuda"):
        model = toy().to(device)
        optimizer = build(case, model)
        if optimizer.wants_sampled_loss:
            pytest.skip("the labels are drawn, by another generator on each device")
        train(model, optimizer, [(x.to(device), y.to(device)) for x, y in data])
        found.append(weights(model).cpu())
    start = weights(toy())
    cpu, cuda = (each - start for each in found)
    assert torch.linalg.vector_norm(cuda - cpu) <= (2e-2 if "muon" in case else 1e-6) * torch.linalg.vector_norm(cpu)


def test_a_bench_counts_kernels() -> None:
    from hf_soo.bench.rounds import _launches_of

    numbers, device = torch.ones(1000, device="cuda"), torch.device("cuda")
    assert _launches_of(lambda: numbers.mul_(2), device) == 1
    assert _launches_of(lambda: numbers.mul_(2).add_(1), device) == 2

"""Between updates no step waits for the device: nothing reads a value on the host, or copies one to it or from it.

On a CPU the reads are seen as they happen; on a GPU `test_cuda.py` asks CUDA itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_soo
from hf_soo.engine import gradients
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.optimizers.bases import BASES
from hf_soo.registry import METHODS, takes_batch_size

_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}


def _site() -> str:
    """The innermost function of the package that is being called; "" if it asks for a CPU, where reading is free."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/hf_soo/" not in frame.f_code.co_filename:
        frame = frame.f_back
    code = frame.f_code
    if "/hf_soo/" in code.co_filename and 'device.type == "cpu"' in inspect.getsource(code):
        return ""
    return f"{code.co_filename.rpartition('/hf_soo/')[2]}:{code.co_name}"


class _Reads(TorchDispatchMode):
    """Notes where operations read values: `.item()`, `bool()`, a mask as an index."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        by_mask = name in {"index", "index_put", "index_put_"} and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if name in _READ or by_mask:
            self.found.add(_site())
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[set[str]]:
    """The places that read or make a value on the host; what torch's dispatcher does not see is wrapped."""
    found: set[str] = set()

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.add(_site())
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, _Reads(found):
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(Tensor, name, noting(getattr(Tensor, name)))
        patch.setattr(torch, "tensor", noting(torch.tensor))
        yield found


def over(name: str, base: str | None, device: str = "cpu") -> tuple[nn.Module, PreconditionedOptimizer]:
    """A method with updates every third step, over matrices, vectors and a layer without a bias."""
    config = METHODS[name].config
    given: dict[str, Any] = {"batch_size": 4} if takes_batch_size(name) else {}
    if config is not None:
        known = {field.name for field in dataclasses.fields(config)}
        given |= {key: value for key, value in OFTEN.items() if key in known}
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10), nn.LayerNorm(10), nn.Linear(10, 6, bias=False))
    model.to(device)
    return model, hf_soo.build_optimizer(name, model, lr=1e-3, base=base, weight_decay=0.01, **given)


OFTEN = {"update_period": 3, "warmup_updates": 1, "inverse_period": 6}
NO_HALVES = {("soap", "rmsprop"), ("muon_mkor", "rmsprop")}  # refused
PAIRS = [
    pair
    for name, method in METHODS.items()
    for base in (BASES if method.config else [None])
    if (pair := (name, base)) not in NO_HALVES
]


def passed(model: nn.Module, optimizer: PreconditionedOptimizer) -> None:
    """A pass before a step."""
    optimizer.zero_grad()
    loss = model(torch.randn(16, 12, device=next(model.parameters()).device)).square().mean()
    optimizer.report_loss(loss.detach())
    loss.backward()


def test_no_step_between_updates_reads_a_value() -> None:
    """Every method over every base; steps that update or refresh may look at what came of it."""
    for name, base in PAIRS:
        model, optimizer = over(name, base)
        for step in range(6):
            passed(model, optimizer)
            refreshes, updates = optimizer.preconditioner.refreshes_at(step), optimizer._updating
            with watched() as found:
                optimizer.step()
            if step >= 3 and not refreshes and (not updates or optimizer.preconditioner.updates_at(step + 1)):
                assert found <= {""}, (name, base, step)


def test_reads_are_seen() -> None:
    """The watch itself: each way to wait is noted."""
    values = torch.arange(3.0)
    ways: dict[str, Callable[[], object]] = {
        "item": lambda: values[0].item(),
        "bool": lambda: bool(values[0] > 1),
        "tolist": lambda: values.tolist(),
        "mask": lambda: values[values > 1],
        "nonzero": lambda: values.nonzero(),
        "made": lambda: torch.tensor([1.0]),
        "cpu": lambda: values.cpu(),
    }
    for name, way in ways.items():
        with watched() as found:
            way()
        assert found and "" not in found, name
    with watched() as found:
        gradients._is_usual(values, 1)
    assert found == {""}
    with watched() as found:
        torch.where(values > 1, values, 0.0).sum().sqrt_()
    assert not found

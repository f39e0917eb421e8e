"""Two ranks that were given different things in one place, or in none: every function is a rank's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hf_soo
from hf_soo.engine import diagnostics


def net(width: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def groups(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    first, last = list(model.parameters())[:2], list(model.parameters())[2:]
    return [{"params": first}, {"params": last, **second}]


def mkor(model: nn.Module, **settings: Any) -> Any:
    return hf_soo.build_optimizer("mkor", model, **{"lr": 1e-2, **settings})


def changed(**values: Any) -> Callable[[], tuple[nn.Module, Any]]:
    """Of the second group, after it was built."""
    model = net()
    optimizer = mkor(model)
    optimizer.param_groups[1].update(values)
    return model, optimizer


def frozen() -> tuple[nn.Module, Any]:
    model = net()
    model[0].bias.requires_grad_(False)
    return model, mkor(model)


def renamed() -> tuple[nn.Module, Any]:
    model = net()
    named = nn.Sequential(OrderedDict(zip(("0", "1", "last"), model, strict=True)))
    return named, mkor(named)


def reordered() -> tuple[nn.Module, Any]:
    model = net()
    optimizer = mkor(model)
    optimizer.param_groups[0]["params"].reverse()
    for names in optimizer.parameter_index.parameters[:1]:
        names.reverse()
    return model, optimizer


def extended() -> tuple[nn.Module, Any]:
    model = net()
    optimizer = mkor(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    return model, optimizer


def built(seed: int = 0, width: int = 5, **settings: Any) -> tuple[nn.Module, Any]:
    model = net(width, seed)
    return model, mkor(model, **settings)


DIFFERENT: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str, str, str]] = {
    "learning rate": (lambda: built(lr=2e-2), "base settings", "'lr': 0.01", "'lr': 0.02"),
    "betas": (lambda: built(base_args={"betas": (0.9, 0.99)}), "base settings", "(0.9, 0.999)", "(0.9, 0.99)"),
    "epsilon": (lambda: built(base_args={"eps": 1e-5}), "base settings", "'eps': 1e-06", "'eps': 1e-05"),
    "weight decay": (lambda: built(weight_decay=0.1), "weight_decay of group 0", "'0.01'", "'0.1'"),
    "rate of a group": (lambda: changed(lr=0.5), "lr of group 1", "'0.01'", "'0.5'"),
    "rate in a tensor": (lambda: changed(lr=torch.tensor(0.5)), "lr of group 1", "'0.01'", "'0.5'"),
    "decay of a group": (lambda: changed(weight_decay=0.3), "weight_decay of group 1", "'0.0'", "'0.3'"),
    "key of a group": (lambda: changed(initial_lr=0.5), "initial_lr of group 1", "'nothing'", "'0.5'"),
    "one group more": (extended, "lr of group 2", "'nothing'", "'0.5'"),
    "frozen parameter": (frozen, "parameters of group 1", "('0.bias', (5,))", "[('2.bias', (3,))]"),
    "order of parameters": (reordered, "parameters of group 0", "[('0.weight', (5, 4))", "[('2.weight', (3, 5))"),
    "name of a parameter": (renamed, "parameters of group 0", "('2.weight', (3, 5))", "('last.weight', (3, 5))"),
    "shape of a parameter": (lambda: built(width=6), "parameters of group 0", "(5, 4)", "(6, 4)"),
    "history": (lambda: built(history=8), "settings", "'history': 32", "'history': 8"),
    "clip value": (lambda: built(clip_value=7.0), "settings", "'clip_value': 100.0", "'clip_value': 7.0"),
    "apply to": (lambda: built(apply_to="momentum"), "settings", "'gradient'", "'momentum'"),
    "excluded layer": (lambda: built(exclude=["0"]), "layers", "[('0', (5, 4)), ('2', (3, 5))]", "[('2', (3, 5))]"),
    "first weights": (lambda: built(seed=1), "weights", "'0.weight': ", "'0.weight': "),
}
"""What -> how rank 1 builds (rank 0 with every default), the name in the error, and what it shows of the two."""


class Handle:
    """A setting without a value that could be compared."""


ALIKE: dict[str, Callable[[int], tuple[nn.Module, Any]]] = {
    "nothing": lambda rank: built(),
    "another state of the random numbers": lambda rank: (built(), torch.manual_seed(rank))[0],
    "an object": lambda rank: changed(handle=Handle(), call=lambda: rank, where=SimpleNamespace(rank=rank)),
    "first weights under DDP": lambda rank: built(seed=rank),
}


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, 4, generator=generator), torch.randint(3, (4,), generator=generator)


def one_step(model: nn.Module, optimizer: Any, rank: int) -> str:
    """The error of a step, or "nothing"."""
    x, y = batch(rank)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    except ValueError as error:
        assert all(map(torch.equal, before, (p.detach() for p in model.parameters())))
        return str(error)
    return "nothing"


def first_steps(rank: int, world: int) -> dict[str, str]:
    """What a first step says in every case."""
    found = {}
    for case, (other, *_) in DIFFERENT.items():
        model, optimizer = other() if rank == 1 else built()
        found[case] = one_step(model, optimizer, rank)
    for case, build in ALIKE.items():
        model, optimizer = build(rank)
        wrapped = DistributedDataParallel(model) if case.endswith("DDP") else model
        found[case] = one_step(wrapped, optimizer, rank)
    found["drifts"] = drifting(rank)
    return found


def drifting(rank: int) -> str:
    """Warm-ups of other lengths are the same at the first step, and not at the second."""
    diagnostics.CHECK_PERIOD = 2
    model = net()
    optimizer = mkor(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / (10 * (rank + 1))))
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        optimizer.zero_grad()
        error = one_step(wrapped, optimizer, rank)
        if error != "nothing":
            return f"{step}: {error}"
        schedule.step()
    return "nothing"


# ---- ranks with other numbers of batches -----------------------------------------------------------------------------

JOINED: dict[str, tuple[str, dict[str, Any]]] = {
    "mkor": ("refused", {}),
    "mkor on a wrapped model": ("refused", {}),
    "mkor_h": ("refused", {}),
    "eva": ("refused", {}),
    "eva_f": ("refused", {}),
    "kfac_expand": ("refused", {}),
    "foof": ("refused", {}),
    "eva ends with the first": ("ended", {"throw_on_early_termination": True}),
    "mkor ends with the first": ("ended", {"throw_on_early_termination": True}),
    "eva without joining": ("done", {"enable": False}),
    "eva_s": ("done", {}),
    "if_shampoo": ("done", {}),
    "rf_rmsprop": ("done", {}),
    "shampoo": ("done", {}),
    "soap": ("done", {}),
    "adamw": ("done", {}),
    "lamb": ("done", {}),
}
"""A method, or a use of one -> what becomes of a loop of 3 and 7 batches in join(), and its arguments."""


def joined(rank: int, world: int) -> dict[str, Any]:
    """How each loop ended, after how many steps, and its weights."""
    diagnostics.CHECK_PERIOD = 2
    found = {}
    for case, (_, arguments) in JOINED.items():
        name, model = case.split()[0], net()
        ddp = DistributedDataParallel(model)
        needed = {"batch_size": 8} if name in ("if_shampoo", "rf_rmsprop") else {}
        optimizer = hf_soo.build_optimizer(name, ddp if "wrapped" in case else model, lr=1e-2, **needed)
        steps = 0
        try:
            with ddp.join(**arguments):
                for step in range(3 if rank == 0 or arguments.get("enable") is False else 7):
                    optimizer.zero_grad()
                    x, y = batch(10 * step + rank)
                    loss = nn.functional.cross_entropy(ddp(x), y)
                    optimizer.report_loss(loss)
                    loss.backward()
                    optimizer.step()
                    steps += 1
            end = "done"
        except RuntimeError as error:  # NotImplementedError is one
            end = str(error)
        found[case] = {
            "end": end,
            "steps": steps,
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        }
        optimizer.remove_hooks()
    return found

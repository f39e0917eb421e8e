"""What an optimizer's arguments may be, ours, torch's and anybody's."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hf_soo import build_optimizer
from hf_soo.optimizers.bases import BASES, base_arguments
from hf_soo.optimizers.ranges import ARGUMENTS, check_arguments

NAN, INF = float("nan"), float("inf")
MODEL = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


class Theirs(torch.optim.SGD):
    """Somebody's class, in which familiar names mean other things, and whose annotations say little."""

    def __init__(  # type: ignore[no-untyped-def]
        self, params, lr: float = 0.1, eps=(1e-30, 1e-3), betas=(0.9, 0.9, 0.99), momentum=None, alpha: float = 5.0,
        warm: int = 3, exact: bool = False, limit: float | None = 1.0, mode="fast", clip=1.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr)


TAKEN = [
    {"eps": (0.0, 1.0)}, {"betas": [0.1, 0.2, 0.3]}, {"momentum": 0.5}, {"momentum": "x"}, {"alpha": -7}, {"warm": 0},
    {"warm": 2.5}, {"exact": True}, {"limit": None}, {"mode": "slow"}, {"mode": None}, {"clip": None}, {"clip": -1},
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"eps": 1e-8}, "Theirs: eps=1e-08 is not allowed; give 2 values, a finite number or None."),
    ({"eps": (NAN, 1.0)}, "Theirs: eps=(nan, 1.0)"),
    ({"betas": (0.9, 0.99)}, "Theirs: betas=(0.9, 0.99) is not allowed; give 3 values, a finite number or None."),
    ({"momentum": INF}, "Theirs: momentum=inf"),
    ({"momentum": 10**400}, "Theirs: momentum=(a number of 1329 bits)"),
    ({"alpha": True}, "Theirs: alpha=True is not allowed; give a finite number."),
    ({"warm": "3"}, "Theirs: warm='3'"),
    ({"warm": NAN}, "Theirs: warm=nan"),
    ({"exact": 1}, "Theirs: exact=1 is not allowed; give True or False."),
    ({"limit": False}, "Theirs: limit=False is not allowed; give a finite number or None."),
]


@pytest.mark.parametrize("given", TAKEN, ids=str)
def test_what_a_class_of_ones_own_takes(given: dict[str, Any]) -> None:
    check_arguments(Theirs, given)


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_no_class_takes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_optimizer("eva", MODEL, **{"lr": 0.1, "base": Theirs, "base_args": given})  # type: ignore[arg-type]


def defaults(cls: type[Optimizer]) -> dict[str, Any]:
    known = inspect.signature(cls.__init__).parameters
    return {name: known[name].default for name in base_arguments(cls)}


TORCH = [
    getattr(torch.optim, name)
    for name in dir(torch.optim)
    if inspect.isclass(getattr(torch.optim, name)) and getattr(torch.optim, name) is not Optimizer
]


@pytest.mark.parametrize(
    "cls", list(dict.fromkeys([*TORCH, *(base.cls for base in BASES.values())])), ids=lambda cls: cls.__name__
)
def test_defaults_are_allowed_and_no_number_may_be_nan_or_a_truth_value(cls: type[Optimizer]) -> None:
    """Every argument of every class: a truth value where its default is a number, and the other way round."""
    check_arguments(cls, defaults(cls))
    for name, default in defaults(cls).items():
        wrong: list[Any] = [NAN, INF, -INF, 10**400]
        if isinstance(default, bool):
            wrong += [0, 1, "true", 0.5]
        elif isinstance(default, int | float):
            wrong += [True, "0.1", [0.1]]
        elif isinstance(default, tuple):
            wrong += [(), default[:1], 0.5, *((*default[:-1], bad) for bad in (NAN, True, "0.9"))]
        for value in wrong:
            with pytest.raises(ValueError, match=rf"{cls.__name__}: {name}=.* is not allowed; give "):
                check_arguments(cls, {name: value})


def test_every_argument_of_our_bases_has_a_range() -> None:
    without = {name for base in BASES.values() for name, default in defaults(base.cls).items() if name not in ARGUMENTS
               and not isinstance(default, bool)}  # fmt: skip
    assert without == set()


def test_what_contradicts_is_one_short_line() -> None:
    """An error of the class itself is passed on with what was given, and never with the weights."""
    together = [
        ("sgd", {"nesterov": True, "momentum": 0.0}, "SGD with {'nesterov': True, 'momentum': 0.0}: Nesterov"),
        ("adamw", {"foreach": True, "fused": True}, "cannot be `True` together"),
    ]
    for base, args, message in together:
        with pytest.raises(ValueError, match=re.escape(message)):
            build_optimizer("eva", MODEL, lr=0.1, base=base, base_args=args)
    with pytest.raises(ValueError, match="none of the parameters is among") as error:
        build_optimizer("muon", nn.LayerNorm(2000), lr=0.1, rest_eps=1e-9)
    assert len(str(error.value)) < 250


def test_groups_of_ones_own_are_checked_too() -> None:
    for key, value in (("lr", NAN), ("weight_decay", True), ("betas", ()), ("eps", -1.0)):
        with pytest.raises(ValueError, match=rf"AdamW: {key}=.* is not allowed"):
            build_optimizer("adamw", MODEL, lr=0.1, params=[{"params": list(MODEL.parameters()), key: value}])


def test_a_decay_that_the_base_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=0.1 has no effect with Rprop, which has none; leave it out."):
        build_optimizer("eva", MODEL, lr=0.1, base="torch.optim:Rprop", weight_decay=0.1)
    with pytest.raises(ValueError, match=r"Rprop: weight_decay=True is not allowed"):
        build_optimizer("eva", MODEL, lr=0.1, base="torch.optim:Rprop", weight_decay=True)
    build_optimizer("eva", MODEL, lr=0.1, base="torch.optim:Rprop", weight_decay=0.0).remove_hooks()

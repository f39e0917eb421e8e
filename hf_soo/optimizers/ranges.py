"""What the arguments of optimizers may be, ours, torch's and anyone's: torch itself takes NaN, True and momentum=5."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from hf_soo.engine.checks import Bounds, NonNegative, OpenShare, Portion, Positive, Share, fits, require
from hf_soo.optimizers.polar import COEFFICIENTS, DTYPES

_MORE_THAN_ONE = Annotated[float, Bounds(1, open_low=True)]
ARGUMENTS: dict[str, Any] = {
    "lr": NonNegative, "rest_lr": NonNegative | None, "weight_decay": NonNegative, "lr_decay": NonNegative,
    "betas": tuple[Share, Share], "rest_betas": tuple[Share, Share], "eps": NonNegative, "rest_eps": NonNegative,
    "momentum": Share, "dampening": Portion, "alpha": Share, "ASGD.alpha": Portion, "rho": Share,
    "momentum_decay": NonNegative, "lambd": NonNegative, "t0": NonNegative, "initial_accumulator_value": NonNegative,
    "etas": tuple[OpenShare, _MORE_THAN_ONE], "step_sizes": tuple[Positive, Positive],
    "max_grad_norm": Positive | None, "ns_steps": Annotated[int, Bounds(1, 100)],
    "ns_coefficients": Literal[tuple(COEFFICIENTS)] | Sequence[tuple[float, float, float]],
    "adjust_lr_fn": Literal["original", "match_rms_adamw", "none"], "row_beta": Share | None,
    "ns_dtype": Literal[tuple(["auto", *DTYPES])],
    "foreach": bool | None, "fused": bool | None,
}  # fmt: skip
"""What the names mean that optimizers share."""


def check_arguments(cls: type[Optimizer], arguments: Mapping[str, Any]) -> None:
    """Check what an optimizer is given, all of it or a group's own.

    A name in `ARGUMENTS` means the same in every class whose own default agrees; what another one may be is told by
    its default. A tensor is taken for its value.

    Args:
        cls: its class.
        arguments: by name; names that its constructor does not have are passed over.

    Raises:
        ValueError: a value is not allowed.
    """
    known = inspect.signature(cls.__init__).parameters
    for name, value in arguments.items():
        if name not in known and name not in {"lr", "weight_decay"}:  # which every group may have
            continue
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        require(f"{cls.__name__}: {name}", value, _hint(cls, known[name]) if name in known else ARGUMENTS[name])


def _hint(cls: type[Optimizer], parameter: inspect.Parameter) -> Any:
    name, default = parameter.name, parameter.default
    hint = ARGUMENTS.get(f"{cls.__name__}.{name}", ARGUMENTS.get(name))
    if hint is None or (default is not parameter.empty and not fits(default, hint)):
        hint = _like(default)
    without = parameter.annotation is parameter.empty or any(
        word in str(parameter.annotation) for word in ("None", "Optional")
    )
    return hint | None if without or default is None else hint


def _like(default: Any) -> Any:
    """The type of what may stand in the place of a default: True for False, another number for a number."""
    if isinstance(default, bool):
        return bool
    if isinstance(default, int | float):
        return float
    if isinstance(default, tuple) and default:
        return tuple[tuple(map(_like, default))]  # type: ignore[misc]
    return Any

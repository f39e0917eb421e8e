"""The base optimizers: a name, a class, or "package.module:Class" -> an optimizer over decay and no-decay groups."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_soo.engine.checks import shown, unknown_key
from hf_soo.engine.dtensors import is_dtensor
from hf_soo.optimizers.groups import Groups
from hf_soo.optimizers.halves import ApplyTo, halves_of
from hf_soo.optimizers.lamb import Lamb
from hf_soo.optimizers.muon import FUSED_DEVICES, Muon
from hf_soo.optimizers.ranges import check_arguments
from hf_soo.optimizers.wrappers import WRAPPERS, Wrappers, split_arguments

logger = logging.getLogger(__name__)

HEADS = re.compile(r"(^|\.)(classifier|score|qa_outputs|seq_relationship|lm_head)(\.modules_to_save\.[^.]+)?$")
"""Task heads, also PEFT's copies: their few output rows are no hidden matrix, so Muon leaves them to its AdamW."""


OTHER_KERNELS = {"foreach", "capturable", "differentiable"}
"""Arguments of torch's optimizers that choose another implementation than the fused one."""


ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    )
)  # fmt: skip
"""torch's optimizers that treat every entry of a parameter alike, whatever tensor it lies in."""


@dataclass(frozen=True)
class _Base:
    """A base optimizer by name.

    Args:
        title: one line about it.
        cls: its class.
        defaults: our defaults where they differ from the class's.
        state_bytes: of its state for an fp32 parameter (Muon: of a hidden matrix; the rest takes AdamW's 8).
        rates: the range of learning rates to start from.
    """

    title: str
    cls: type[Optimizer]
    defaults: Mapping[str, Any]
    state_bytes: int
    rates: tuple[float, float]


BASES: dict[str, _Base] = {
    "lamb": _Base("LAMB with apex FusedLAMB's semantics (You et al., ICLR 2020)", Lamb, {}, 8, (4e-3, 2e-2)),
    "adamw": _Base(
        "AdamW (Loshchilov and Hutter, ICLR 2019), torch's fused kernel",
        torch.optim.AdamW, {"fused": True}, 8, (2e-5, 1e-3),
    ),
    "sgd": _Base(
        "SGD with momentum 0.9, torch's fused kernel",
        torch.optim.SGD, {"momentum": 0.9, "fused": True}, 4, (1e-2, 1e-1),
    ),
    "rmsprop": _Base("RMSProp (Tieleman and Hinton, 2012)", torch.optim.RMSprop, {}, 4, (1e-4, 1e-3)),
    "muon": _Base("Muon for hidden matrices, AdamW for the rest (Jordan et al., 2024)", Muon, {}, 4, (5e-3, 4e-2)),
}  # fmt: skip


ADAM_FIELDS: dict[str, tuple[tuple[str, str], int | None]] = {
    "adam_beta1": (("betas", "rest_betas"), 0),
    "adam_beta2": (("betas", "rest_betas"), 1),
    "adam_epsilon": (("eps", "rest_eps"), None),
}
"""A field of the Trainer for Adam -> the arguments of a base that mean it, and which entry of them."""


def build_base(
    base: str | type[Optimizer], groups: Groups, lr: float, args: Mapping[str, Any], hidden: Iterable[nn.Parameter]
) -> Optimizer:
    """Make a base optimizer.

    Args:
        base: a name in ``BASES``, an optimizer class, or "package.module:Class".
        groups: parameter groups.
        lr: learning rate of all groups.
        args: further arguments of the class, and of what is put around it (``wrappers_of``).
        hidden: the weights of hidden layers, for a base that treats matrices apart.

    Returns:
        The optimizer.

    Raises:
        ValueError: the base or one of its arguments is unknown, or it refuses a value.
    """
    cls, defaults = _resolve_base(base)
    valid = base_arguments(cls)
    args, around = split_arguments(args, valid)
    for key in args:
        if key not in valid:
            raise ValueError(unknown_key(f"argument of base optimizer {cls.__name__}", str(key), [*valid, *WRAPPERS]))
    check_arguments(cls, {"lr": lr, **args})
    for group in groups:
        check_arguments(cls, {key: value for key, value in group.items() if key != "params"})
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"base optimizer {cls.__name__} evaluates the model itself, through a closure that it calls several times "
            f"a step; a base steps on the gradients that it is given: use another, such as one of {list(BASES)}."
        )
    settings = {**defaults, **args}
    if "fused" not in args and (OTHER_KERNELS & args.keys() or not _fused_is_right(cls, groups)):
        settings.pop("fused", None)
    if args.get("fused") and not _fused_is_right(cls, groups):
        raise ValueError(f"fused=True is not right for {cls.__name__} with these parameters; leave it out.")
    if issubclass(cls, Muon):
        settings["matrices"] = list(hidden)
    if issubclass(cls, Lamb) and all(group.get("weight_decay") == 0 for group in groups):
        logger.warning("LAMB adapts only groups with weight decay, and all have 0: it steps as Adam. Set weight_decay.")
    try:
        optimizer: Optimizer = cls(groups, lr=lr, **settings)  # type: ignore[call-arg]
    except NotImplementedError:  # a RuntimeError too
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        given = f" with {shown(dict(args))}" if args else ""
        raise ValueError(f"base optimizer {cls.__name__}{given}: {error}") from error
    decays = [decay for group in groups if (decay := group.get("weight_decay"))]
    if decays and "weight_decay" not in optimizer.defaults and not around.get("cautious"):
        raise ValueError(f"weight_decay={decays[0]} has no effect with {cls.__name__}, which has none; leave it out.")
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.register_step_pre_hook(_mend_fused_sgd)
    return optimizer


def wrappers_of(base: Optimizer, args: Mapping[str, Any]) -> Wrappers | None:
    """What its arguments put around a base; None for nothing.

    Args:
        base: from ``build_base``.
        args: as given there.
    """
    _, around = split_arguments(args, base_arguments(type(base)))
    return Wrappers(base, around) if any(around.values()) else None


def check_base(base: str | type[Optimizer], args: Mapping[str, Any], apply_to: ApplyTo = "gradient") -> None:
    """Build a base over a tiny model, so that a wrong argument shows before there is a model.

    Args:
        base: as ``build_base``'s.
        args: as ``build_base``'s.
        apply_to: as ``halves_of``'s place.

    Raises:
        ValueError: the base or one of its arguments is unknown, or it refuses a value.
        NotImplementedError: it cannot be cut there.
    """
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    halves_of(build_base(base, [{"params": [matrix, vector]}], 1e-3, args, [matrix]), apply_to)


def _mend_fused_sgd(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """What torch's fused SGD cannot do (torch 2.13).

    DTensors, sparse gradients, and a parameter whose first gradient comes late.
    """
    for group in optimizer.param_groups:
        if group["fused"] and any(
            (type(p) is not nn.Parameter and is_dtensor(p)) or (p.grad is not None and p.grad.is_sparse)
            for p in group["params"]
        ):
            group["fused"] = False
        if group["fused"] and group["momentum"] != 0:
            _start_late_momenta(optimizer, group)


def check_flat(base: type[Optimizer], where: str) -> None:
    """Refuse a base that cannot step on flat pieces of many parameters.

    Args:
        base: the base optimizer's class.
        where: what makes the pieces, for the message.

    Raises:
        NotImplementedError: it needs whole tensors.
    """
    if base not in (*ELEMENTWISE, Lamb, Muon):  # a subclass may look at whole tensors (LARS is an SGD)
        raise NotImplementedError(
            f"base {base.__name__} under {where}, which hands it flat pieces of many parameters: it may need "
            f"whole tensors; use {', '.join(cls.__name__ for cls in (*ELEMENTWISE, Lamb, Muon))}, or stage 0, DDP or "
            "FSDP2."
        )


def _start_late_momenta(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Give a parameter whose first gradient comes after the others' a momentum.

    The buffer is such that it becomes the gradient, as in a first step.
    """
    momentum, dampening = group["momentum"], group["dampening"]
    given = [p for p in group["params"] if p.grad is not None]
    late = [p for p in given if optimizer.state[p].get("momentum_buffer") is None]
    for p in late if len(late) < len(given) else ():
        buffer = torch.zeros_like(p.grad)
        if dampening:
            grad = -p.grad if group["maximize"] else p.grad
            buffer.add_(grad.add(p, alpha=group["weight_decay"]), alpha=dampening / momentum)
        optimizer.state[p]["momentum_buffer"] = buffer


def _fused_is_right(cls: type[Optimizer], groups: Groups) -> bool:
    """Whether torch's fused kernel gives the right step.

    Its SGD with momentum for half precision on a CPU does not (torch 2.13: from 16 elements on, where it vectorises).
    """
    parameters = [p for group in groups for p in group["params"]]
    if issubclass(cls, torch.optim.SGD) and any(p.device.type == "cpu" and p.dtype.itemsize < 4 for p in parameters):
        return False
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _resolve_base(base: str | type[Optimizer]) -> tuple[type[Optimizer], Mapping[str, Any]]:
    """The class of a base and our defaults for it.

    Args:
        base: a name, a class, or "package.module:Class".

    Returns:
        The class and the defaults.

    Raises:
        ValueError: there is no such optimizer.
    """
    if isinstance(base, str) and base in BASES:
        return BASES[base].cls, BASES[base].defaults
    if isinstance(base, str) and ":" in base:
        module, _, name = base.partition(":")
        try:
            base = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # ":A", "..a:B"
            raise ValueError(f"base={base!r} cannot be imported ({error}); give 'package.module:Class'.") from error
    if isinstance(base, type) and issubclass(base, Optimizer):
        return base, {}
    raise ValueError(
        f"base={base!r} is no base optimizer; give one of {list(BASES)}, a torch.optim.Optimizer class, or "
        "'package.module:Class'."
    )


def with_adam_fields(
    base: str | type[Optimizer], args: Mapping[str, Any], fields: Mapping[str, float]
) -> dict[str, Any]:
    """A base's arguments, with what the Trainer's fields for Adam say in those that are not given.

    Args:
        base: as ``build_base``'s.
        args: as ``build_base``'s; they win.
        fields: of "adam_beta1", "adam_beta2" and "adam_epsilon" those that are set, with their values.

    Raises:
        ValueError: the base has no argument for it.
    """
    cls, _ = _resolve_base(base)
    valid, defaults = base_arguments(cls), inspect.signature(cls.__init__).parameters
    found: dict[str, Any] = {}
    for field, value in fields.items():
        names, place = ADAM_FIELDS[field]
        name = next((name for name in names if name in valid), "")
        if name in args:
            continue
        default = found.get(name, defaults[name].default if name else None)
        if place is None and isinstance(default, float):
            found[name] = value
        elif place is not None and isinstance(default, (tuple, list)) and len(default) == 2:
            found[name] = (*default[:place], value, *default[place + 1 :])
        else:
            raise ValueError(
                f"{field}={value!r} has no effect with base optimizer {cls.__name__}, which has no {names[0]!r} for "
                f"it; leave it out. Valid: {', '.join(valid)}."
            )
    return {**found, **args}


def base_arguments(cls: type[Optimizer]) -> Sequence[str]:
    """The keyword arguments that a user may set on a base."""
    taken = {"self", "params", "lr", "weight_decay", "matrices"}
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [p.name for p in parameters if p.name not in taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

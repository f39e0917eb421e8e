"""Names -> methods, and the one way to build an optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from hf_soo.engine.checks import require_range, unknown_key
from hf_soo.engine.layers import full_shape
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.preconditioner import Identity, Preconditioner
from hf_soo.engine.selection import Selection, select_all_parameters, select_layers, select_parameters
from hf_soo.optimizers.bases import BASES, HEADS, Groups, build_base, decay_groups
from hf_soo.preconditioners.config import make_config
from hf_soo.preconditioners.eva import Eva, EvaConfig, EvaF
from hf_soo.preconditioners.eva_s import EvaS, EvaSConfig
from hf_soo.preconditioners.if_shampoo import IFShampoo, IFShampooConfig
from hf_soo.preconditioners.kfac import FOOF, KAISA, KFAC, KFACReduce
from hf_soo.preconditioners.kfac_config import FOOFConfig, KAISAConfig, KFACConfig
from hf_soo.preconditioners.mkor import MKOR, MKORConfig
from hf_soo.preconditioners.mkor_h import MKORH, MKORHConfig
from hf_soo.preconditioners.rmsprop import RMSProp, RMSPropConfig
from hf_soo.preconditioners.shampoo import Shampoo, ShampooConfig


@dataclass(frozen=True)
class Method:
    """One row of the table of optimizers.

    Args:
        title: name and paper.
        base: the default base optimizer.
        config: the preconditioner's settings, or None for a base optimizer alone.
        preconditioner: config -> preconditioner.
        select: which layers, or parameters, of a model it moves.
    """

    title: str
    base: str
    config: type[Any] | None = None
    preconditioner: Callable[[Any], Preconditioner] = lambda config: Identity()
    select: Callable[..., Selection] = select_layers


METHODS: dict[str, Method] = {
    "mkor": Method("MKOR, low-rank form (Mozaffari et al., NeurIPS 2023)", "lamb", MKORConfig, MKOR),
    "mkor_h": Method("MKOR-H, which switches to its base (Mozaffari et al., NeurIPS 2023)", "lamb", MKORHConfig, MKORH),
    "eva": Method("Eva, rank-1 Kronecker vectors (Zhang, Shi, Li, ICLR 2023)", "sgd", EvaConfig, Eva),
    "eva_f": Method("Eva-f, vectorised FOOF (Zhang, Shi, Li, 2023)", "sgd", EvaConfig, EvaF),
    "eva_s": Method(
        "Eva-s, vectorised Shampoo (Zhang, Shi, Li, ICLR 2023)", "sgd", EvaSConfig, EvaS, select_parameters
    ),
    "kfac_expand": Method("K-FAC, expand (Martens, Grosse, 2015; Eschenhagen et al., 2023)", "sgd", KFACConfig, KFAC),
    "kfac_reduce": Method("K-FAC, reduce (Eschenhagen et al., NeurIPS 2023)", "sgd", KFACConfig, KFACReduce),
    "kaisa": Method("KAISA: K-FAC over a grid of ranks (Pauloski et al., SC 2021)", "lamb", KAISAConfig, KAISA),
    "foof": Method("FOOF, the input factor alone (Benzing, ICML 2022)", "sgd", FOOFConfig, FOOF),
    "if_shampoo": Method(
        "Inverse-free Shampoo, no roots (Lin et al., ICML 2024)", "sgd", IFShampooConfig, IFShampoo, select_parameters
    ),
    "rf_rmsprop": Method(
        "Root-free RMSProp (Lin et al., ICML 2024)", "sgd", RMSPropConfig, RMSProp, select_all_parameters
    ),
    "shampoo": Method(
        "Shampoo, blocked and grafted (Gupta et al., ICML 2018; Shi et al., 2023)",
        "adamw",
        ShampooConfig,
        Shampoo,
        select_parameters,
    ),
    **{name: Method(base.title, name) for name, base in BASES.items()},
}


def available() -> dict[str, str]:
    """Name of each optimizer -> its title."""
    return {name: method.title for name, method in METHODS.items()}


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    base: str | type[Optimizer] | None = None,
    base_args: Mapping[str, Any] | None = None,
    weight_decay: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    **config: Any,
) -> PreconditionedOptimizer:
    """Build an optimizer for a model.

    Build it before ``torch.compile`` and before DistributedDataParallel (or hand over the wrapped DDP model): the
    hooks sit on the layers.

    Args:
        name: one of ``available()``.
        model: the model.
        lr: learning rate.
        base: the optimizer that steps on the preconditioned gradients; None: the method's default.
        base_args: further arguments of the base, such as ``{"betas": (0.9, 0.999)}``.
        weight_decay: for all parameters but biases and norms; None: the base's default.
        include: regular expressions on module names; only these layers are preconditioned.
        exclude: regular expressions on module names that are left to the base.
        **config: the method's own settings; for a base optimizer alone, its arguments.

    Returns:
        A torch.optim.Optimizer.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or no layer selected.
        NotImplementedError: the model is wrapped in a way that cannot work.
    """
    model = bare_model(model)
    groups = decay_groups(model, weight_decay)
    return assemble(
        name, model, groups, lr=lr, base=base, base_args=base_args, include=include, exclude=exclude, settings=config
    )


def assemble(
    name: str,
    model: nn.Module,
    groups: Groups,
    *,
    lr: float,
    base: str | type[Optimizer] | None,
    base_args: Mapping[str, Any] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> PreconditionedOptimizer:
    """``build_optimizer`` over parameter groups that somebody else made (Trainer).

    Args:
        name: one of ``available()``.
        model: the bare model.
        groups: parameter groups over its parameters.
        lr: see ``build_optimizer``.
        base: see ``build_optimizer``.
        base_args: see ``build_optimizer``.
        include: see ``build_optimizer``.
        exclude: see ``build_optimizer``.
        settings: the method's own settings.

    Returns:
        A torch.optim.Optimizer.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or no layer selected.
    """
    if name not in METHODS:
        raise ValueError(unknown_key("optimizer", name, list(METHODS)))
    method = METHODS[name]
    require_range("lr", lr, 0, float("inf"))
    if not any(group["params"] for group in groups):
        raise ValueError("the model has no trainable parameter; unfreeze some, or check requires_grad.")
    args = dict(base_args or {})
    if method.config is None:
        _refuse(name, base=base, include=include, exclude=exclude)
        args, settings = {**args, **settings}, {}
        selection, preconditioner, config = Selection([], {}), method.preconditioner(None), {}
    else:
        made = make_config(name, method.config, settings)
        _require_batch_size(name, made)
        preconditioner, config = method.preconditioner(made), dataclasses.asdict(made)
        selection = method.select(model, include, exclude, preconditioner.skip_reason)
    inner = build_base(base or method.base, groups, lr, args, hidden_weights(model))
    return PreconditionedOptimizer(
        inner, preconditioner, selection, name=name, config=config, parameter_names=dict(model.named_parameters())
    )


def takes_batch_size(name: str) -> bool:
    """Whether a method's curvature is scaled with the batch size, and its gradients must come unclipped.

    Args:
        name: one of ``available()``.
    """
    config = METHODS[name].config
    return config is not None and any(field.name == "batch_size" for field in dataclasses.fields(config))


def _require_batch_size(name: str, config: Any) -> None:
    if takes_batch_size(name) and config.batch_size is None:
        raise ValueError(
            f"batch_size=None: {name!r} needs the number of loss terms averaged in a step; give batch_size=..., the "
            "global batch over all processes and accumulated micro-batches, never the local one (SecondOrderTrainer "
            "fills it in)."
        )


def _refuse(name: str, **options: object) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"{option}={value!r} has no effect with {name!r}, which preconditions nothing; leave it out."
            )


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of hidden Linear and Conv1D layers: no embedding, decoder or task head."""
    try:
        layers = select_layers(model, exclude=[HEADS.pattern]).layers
    except ValueError:  # the model has no such layer; a base that needs one says so itself
        return []
    return [layer.weight for layer in layers if len(full_shape(layer.weight)) == 2]


def bare_model(model: nn.Module) -> nn.Module:
    """The model without its DistributedDataParallel wrapper.

    Args:
        model: a model.

    Returns:
        The module whose layers are hooked.

    Raises:
        NotImplementedError: it is wrapped in DataParallel or compiled.
    """
    if isinstance(model, DataParallel):
        raise NotImplementedError(
            "torch.nn.DataParallel runs replicas whose statistics are lost; start one process for each GPU with "
            "torchrun or accelerate launch."
        )
    if hasattr(model, "_orig_mod"):
        raise NotImplementedError(
            "the model is already compiled, and hooks added now may be ignored; build the optimizer first, then call "
            "torch.compile."
        )
    return model.module if isinstance(model, DistributedDataParallel) else model

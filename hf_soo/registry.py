"""Names -> methods, and the one way to build an optimizer."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from hf_soo import preconditioners
from hf_soo.engine.checks import once, require, shown, unknown_key
from hf_soo.engine.dtensors import full_shape, is_dtensor
from hf_soo.engine.layers import Conv1dLayer, Layer
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.placement import make_plan
from hf_soo.engine.preconditioner import Method, Preconditioner
from hf_soo.engine.selection import Selection, compile_patterns, select_layers
from hf_soo.optimizers.bases import BASES, HEADS, build_base, check_base, wrappers_of
from hf_soo.optimizers.groups import Groups, decay_groups, given_groups
from hf_soo.optimizers.halves import ApplyTo, halves_of
from hf_soo.optimizers.lamb import Lamb
from hf_soo.optimizers.muon import Muon
from hf_soo.optimizers.wrappers import WRAPPERS, around
from hf_soo.preconditioners.config import make_config

logger = logging.getLogger(__name__)

FIRST = ("mkor", "muon_mkor", "mkor_h", "eva", "eva_s", "kfac", "if_shampoo", "rmsprop", "shampoo", "soap")
"""Files of ``hf_soo.preconditioners`` whose methods lead every table, in this order; the others' follow by name."""


def _methods() -> dict[str, Method]:
    """The ``METHOD``, or ``METHODS``, that a file of ``hf_soo.preconditioners`` ends with, and the bases alone."""
    files = sorted(module.name for module in pkgutil.iter_modules(preconditioners.__path__))
    found: list[Method] = []
    for file in sorted(files, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        module = vars(importlib.import_module(f"{preconditioners.__name__}.{file}"))
        found += module.get("METHODS", [module["METHOD"]] if "METHOD" in module else [])
    found += [Method(name, base.title, base=name) for name, base in BASES.items()]
    assert len({method.name for method in found}) == len(found), [method.name for method in found]
    return {method.name: method for method in found}


METHODS: dict[str, Method] = _methods()
"""Name -> method, in the order of the tables."""


def available() -> dict[str, str]:
    """Name of each optimizer -> its title."""
    return {name: method.title for name, method in METHODS.items()}


@dataclass(frozen=True)
class OptimizerSettings:
    """What an optimizer is built from, with everything checked that can be checked without a model.

    Args:
        name: one of ``available()``.
        base: the optimizer that steps.
        base_args: its arguments.
        config: the method's own settings, an object of its Config; None for a base alone.
        include: regular expressions on module names.
        exclude: regular expressions on module names.
        apply_to: what of the base the method acts on.
    """

    name: str
    base: str | type[Optimizer]
    base_args: Mapping[str, Any]
    config: Any | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    apply_to: ApplyTo = "gradient"

    @classmethod
    def of(
        cls,
        name: str,
        settings: Mapping[str, Any],
        *,
        base: str | type[Optimizer] | None = None,
        base_args: Mapping[str, Any] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> OptimizerSettings:
        """Check what ``build_optimizer`` is given; ``settings`` are its ``config``.

        Raises:
            ValueError: an unknown name, key or base, a value out of range, or no regular expression.
            NotImplementedError: ``apply_to`` with a base that cannot do it.
        """
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(unknown_key("optimizer", str(name), list(METHODS)))
        require("base_args", base_args, dict[str, Any] | None)
        method, args, config = METHODS[name], dict(base_args or {}), None
        if base in (None, method.base):
            args = {**method.base_args, **args}
        place = settings.get("apply_to", method.apply_to)
        if method.config is None:
            _refuse(name, base=base, include=include, exclude=exclude)
            args |= settings
        else:
            require("apply_to", place, ApplyTo)
            args = once([*args.items(), *((key, value) for key, value in settings.items() if key in WRAPPERS)])
            own = {key: value for key, value in settings.items() if key not in {"apply_to", *WRAPPERS}}
            config = make_config(name, method.config, own)
        for what, patterns in (("include", include), ("exclude", exclude)):
            compile_patterns(what, patterns)
        stepper = method.base if base is None else base
        check_base(stepper, args, place)
        return cls(name, stepper, args, config, include, exclude, place)

    @property
    def title(self) -> str:
        """Its name, and its base's where that is another: "mkor over lamb"."""
        return self.name if self.base == self.name else f"{self.name} over {getattr(self.base, '__name__', self.base)}"

    @property
    def rates(self) -> tuple[float, float] | None:
        """The range of learning rates to start from; None: nobody knows it of this base."""
        method = METHODS[self.name]
        if method.rates is not None and self.base == method.base:
            return method.rates
        return BASES[self.base].rates if self.base in BASES else None

    @property
    def lacks_batch_size(self) -> bool:
        """Whether the method needs the batch size, and it is not given."""
        return takes_batch_size(self.name) and self.config is not None and self.config.batch_size is None

    def with_batch_size(self, batch_size: int) -> OptimizerSettings:
        """The same for a global batch: loss terms averaged in a step, over all processes and micro-batches."""
        assert self.config is not None
        return dataclasses.replace(self, config=dataclasses.replace(self.config, batch_size=batch_size))

    def check_on(self, model: nn.Module, lr: float, weight_decay: float, ranks: int) -> None:
        """Refuse what could not be built for a model: no layer, a base without its matrices, workers that do not fit.

        Args:
            model: on any device, the meta device too.
            lr: learning rate.
            weight_decay: of its matrices.
            ranks: that will train it.

        Raises:
            ValueError: as ``build``, or workers that do not divide the ranks.
        """
        settings = self.with_batch_size(1) if self.lacks_batch_size else self
        elsewhere = {key: value for key, value in self.base_args.items() if key != "fused"}  # than on that device
        settings = dataclasses.replace(settings, base_args=elsewhere)
        _, preconditioner, _ = settings._parts(model, decay_groups(model, weight_decay or None), lr)
        if (workers := preconditioner.workers(ranks)) is not None:
            make_plan({}, ranks, workers)

    def build(self, model: nn.Module, groups: Groups, lr: float) -> PreconditionedOptimizer:
        """The optimizer of a model.

        Args:
            model: the bare model.
            groups: parameter groups over its parameters; its layers that are in none are left alone.
            lr: learning rate.

        Raises:
            ValueError: the learning rate is out of range, there is no batch size, no layer is selected, or the base
                refuses the parameters.
        """
        lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"{lazy[0]!r} has no shape yet (a lazy module that has seen no input, one of {len(lazy)} such "
                "parameters); run one batch through the model before the optimizer is built."
            )
        if not any(group["params"] for group in groups):
            raise ValueError("the model has no trainable parameter; unfreeze some, or check requires_grad.")
        if self.lacks_batch_size:
            raise ValueError(
                f"batch_size=None: {self.name!r} needs the number of loss terms averaged in a step; give "
                "batch_size=..., the global batch over all processes and accumulated micro-batches, never the local "
                "one (SecondOrderTrainer fills it in)."
            )
        inner, preconditioner, selection = self._parts(model, groups, lr)
        config, defaults = {}, {}
        if self.config is not None:
            config = dataclasses.asdict(self.config) | {"apply_to": self.apply_to}
            defaults = dataclasses.asdict(type(self.config)()) | {"apply_to": "gradient"}
        else:
            selection = Selection([], _left_to_adamw(inner, model))
        if isinstance(inner, Lamb):
            _warn_of_zeros(inner, model, self.title)
        wrappers = wrappers_of(inner, self.base_args)
        return PreconditionedOptimizer(
            inner, preconditioner, selection, name=self.name, config=config, defaults=defaults,
            model=model, halves=around(halves_of(inner, self.apply_to), wrappers), wrappers=wrappers,
        )  # fmt: skip

    def _parts(self, model: nn.Module, groups: Groups, lr: float) -> tuple[Optimizer, Preconditioner, Selection]:
        """The base, the method, and the layers that it moves."""
        method = METHODS[self.name]
        preconditioner, selection = method.make(self.config), Selection([], {})
        if self.config is not None:
            held = {id(parameter) for group in groups for parameter in group["params"]}

            def skip_reason(layer: Layer) -> str | None:
                if id(layer.weight) not in held:
                    return "in no parameter group"
                return preconditioner.skip_reason(layer)

            selection = method.select(model, self.include, self.exclude, skip_reason)
        return build_base(self.base, groups, lr, self.base_args, hidden_weights(model)), preconditioner, selection


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    base: str | type[Optimizer] | None = None,
    base_args: Mapping[str, Any] | None = None,
    params: Iterable[Any] | None = None,
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
        params: parameter groups of your own, as torch.optim takes them, with rates (``lr``) and decays where they
            differ; None: all trainable parameters, in a group with and one without weight decay.
        weight_decay: for all parameters but biases and norms, or for those of your ``params`` whose group does not say;
            None: the base's default.
        include: regular expressions on module names; only these layers are preconditioned.
        exclude: regular expressions on module names that are left to the base.
        **config: the method's own settings; for a base optimizer alone, its arguments. Every method takes ``apply_to``:
            "gradient", the base's "momentum" (Nesterov's where it has it), its "update", or the update's "numerator";
            see ``optimizers.halves``.

    Returns:
        A torch.optim.Optimizer.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or no layer selected.
        NotImplementedError: the model is wrapped in a way that cannot work, or ``apply_to`` with a base that cannot
            hand out its direction.
    """
    model = bare_model(model)
    settings = OptimizerSettings.of(name, config, base=base, base_args=base_args, include=include, exclude=exclude)
    groups = decay_groups(model, weight_decay) if params is None else given_groups(params, weight_decay)
    return settings.build(model, groups, lr)


def takes_batch_size(name: str) -> bool:
    """Whether a method's curvature is scaled with the batch size, and its gradients must come unclipped."""
    config = METHODS[name].config
    return config is not None and any(field.name == "batch_size" for field in dataclasses.fields(config))


def _refuse(name: str, **options: object) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"{option}={shown(value)} has no effect with {name!r}, which preconditions nothing; leave it out."
            )


def _warn_of_zeros(base: Lamb, model: nn.Module, title: str) -> None:
    """LAMB's step is a share of a weight's norm: a matrix that begins at zero, as an adapter's B does, hardly moves."""
    adapted = {id(p) for group in base.param_groups if base.adapts(group) for p in group["params"]}
    zeros = [
        name for name, p in model.named_parameters()
        if id(p) in adapted and p.ndim > 1 and p.numel() and not p.is_meta and not is_dtensor(p) and not p.any()
    ]  # fmt: skip
    if zeros:
        logger.warning(
            "%s: %s (%d matrices) are zero, and LAMB moves a weight in proportion to its norm: they will learn slowly. "
            "For adapters use base='adamw' (--base_optim adamw).",
            title, zeros[:2], len(zeros),
        )  # fmt: skip


def _left_to_adamw(base: Optimizer, model: nn.Module) -> dict[str, str]:
    """Why Muon's AdamW moves a parameter, by name; nothing under another base."""
    if not isinstance(base, Muon):
        return {}
    matrices = {id(p) for group in base.groups_by("muon") for p in group["params"]}
    reasons = select_layers(model, exclude=[HEADS.pattern]).skipped
    return {
        name: reasons.get(name) or reasons.get(name.rpartition(".")[0]) or f"no single matrix {list(full_shape(p))}"
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in matrices
    }


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of hidden layers, stacks of experts and convolutions of images among them.

    No embedding, decoder or task head.
    """
    try:
        layers = select_layers(model, exclude=[HEADS.pattern]).layers
    except ValueError:  # the model has no such layer; a base that needs one says so itself
        return []
    weights = [layer.weight for layer in layers if not isinstance(layer, Conv1dLayer)]
    return list({id(weight): weight for weight in weights}.values())


def bare_model(model: nn.Module) -> nn.Module:
    """The model without its DistributedDataParallel wrapper: the module whose layers are hooked.

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

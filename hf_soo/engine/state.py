"""What a PreconditionedOptimizer shares with its base and saves, and how that is checked before anything changes.

The factors are plain tensors keyed by module name, the same for every world size:

    {"optimizer": name, "base": class, "config": {...}, "steps": t, "switched": bool, "own": {name: tensor},
     "layers": {module name: {"side.tensor": tensor}}, "added": [name of a parameter that came in later]}

Beside them, and beside the base's state, stand the names of the parameters of each group, under "parameters".
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hf_soo.engine.comm import Communicator, checksums, text_of
from hf_soo.engine.dtensors import full_shape, whole
from hf_soo.engine.layers import Layer
from hf_soo.engine.preconditioner import LayerState, Preconditioner
from hf_soo.engine.routing import UNNAMED, ParameterIndex
from hf_soo.engine.step import Step
from hf_soo.engine.strategy import Names

logger = logging.getLogger(__name__)


def _layer_tensors(states: Mapping[str, LayerState]) -> LayerState:
    """Module name -> {"side.tensor": tensor}."""
    return {
        name: {f"{side}.{key}": tensor for side, factor in state.items() for key, tensor in factor.items()}
        for name, state in states.items()
    }


@dataclass(frozen=True)
class Identity:
    """What must be the same to go on from a checkpoint, and on every rank.

    Args:
        name: the method.
        base: the base's class.
        config: the method's settings; a difference to a checkpoint's is allowed and logged.
        defaults: of the settings; what a checkpoint ran with that knows one of them not yet.
    """

    name: str
    base: str
    config: dict[str, Any]
    defaults: dict[str, Any]

    def agree(
        self,
        comm: Communicator,
        base: Optimizer,
        parameters: Sequence[Sequence[tuple[str, Tensor]]],
        layers: Sequence[Layer],
        steps: int,
        *,
        weights: bool,
    ) -> None:
        """Compare what the ranks were built with, group by group.

        Args:
            comm: between them.
            base: with its settings.
            parameters: of each of its groups, the model's own, with their names.
            layers: what the method moves.
            steps: steps done.
            weights: compare the weights too, where each rank has them whole.

        Raises:
            ValueError: they were built differently, resumed at different steps, or start from different weights.
        """
        if comm.world_size == 1:
            return
        named = [each for group in parameters for each in group] if weights else []
        comm.agree(
            {
                "method": f"{self.name} over {self.base}",
                "settings": text_of(self.config),
                "base settings": text_of(base.defaults),
                "steps done": str(steps),
                **{
                    f"{key} of group {i}": text_of(value)
                    for i, group in enumerate(base.param_groups)
                    for key, value in group.items()
                    if key != "params"
                },
                **{
                    f"parameters of group {i}": str([(name, full_shape(p)) for name, p in group])
                    for i, group in enumerate(parameters)
                },
                "layers": str([(layer.name, layer.shape) for layer in layers]),
                "weights": str(checksums(named)),
            }
        )

    def saved(
        self, steps: int, switched: bool, added: list[str], own: Mapping[str, Tensor], layers: Mapping[str, LayerState]
    ) -> dict[str, Any]:
        """The factors' checkpoint: ``own`` belongs to no layer, ``layers`` are whole states by name."""
        header: dict[str, Any] = {"optimizer": self.name, "base": self.base, "config": dict(self.config)}
        header |= {"steps": steps, "switched": switched, "added": added}
        return header | {"own": own, "layers": _layer_tensors(layers)}

    def check(
        self, saved: dict[str, Any] | None, fresh: Iterable[tuple[str, LayerState]], switched: bool
    ) -> dict[str, Any]:
        """The saved state, if it belongs to this optimizer.

        Args:
            saved: ``PreconditionedOptimizer.second_order_state()`` of an earlier run, or None.
            fresh: (layer name, a whole state) of this run; looked at one by one.
            switched: whether this run has handed over to its base.

        Returns:
            The saved state.

        Raises:
            ValueError: there is none, it is another method's or another base's, or the layers differ.
        """
        if saved is None:
            raise ValueError(
                f"this checkpoint has no state of {self.name!r}: another optimizer wrote it, or a tool that keeps the "
                "base's state alone; resume with that optimizer, or start a new run from the model's weights alone."
            )
        for what, key, mine in (("optimizer", "optimizer", self.name), ("base optimizer", "base", self.base)):
            if saved[key] != mine:
                raise ValueError(
                    f"this checkpoint was written with {what} {saved[key]!r}, this run has {mine!r}; resume with "
                    f"{saved[key]!r}, or start a new run from the model's weights alone."
                )
        before = self.defaults | saved["config"]
        if changed := {k: (before[k], v) for k, v in self.config.items() if before[k] != v}:
            logger.warning("%s resumes with changed settings (saved, now): %s", self.name, changed)
        if not saved.get("switched", False):
            if switched:
                raise ValueError(
                    f"this {self.name} has switched to its base, the checkpoint's has not; build a new optimizer to "
                    "resume."
                )
            _check_layers(fresh, saved["layers"])
        return saved


def _check_layers(fresh: Iterable[tuple[str, LayerState]], saved: LayerState) -> None:
    """Check that saved tensors fit the states of this run.

    Args:
        fresh: (layer name, a whole state) of this run; looked at one by one.
        saved: what ``_layer_tensors`` gave.

    Raises:
        ValueError: a layer is missing or unknown, or a tensor has another name, shape or dtype.
    """
    own = {name: _signature(_layer_tensors({name: state})[name]) for name, state in fresh}
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"the checkpoint's layers differ from the model's: missing {missing[:3]} ({len(missing)}), unknown "
            f"{unknown[:3]} ({len(unknown)}); use the same model and layers (include, exclude, queries_and_keys)."
        )
    for name, wanted in own.items():
        if wanted != _signature(saved[name]):
            raise ValueError(
                f"the checkpoint's state of layer {name!r} is {_signature(saved[name])}, this run needs {wanted}; "
                "resume with the settings the checkpoint was written with."
            )


def _signature(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {key: f"{tensor.dtype}{list(tensor.shape)}" for key, tensor in sorted(tensors.items())}


class OverBase(Optimizer):
    """What a PreconditionedOptimizer leaves to its base, and what it saves and loads.

    ``param_groups``, ``state`` and ``defaults`` are the base's own objects.
    """

    base: Optimizer
    preconditioner: Preconditioner
    stages: Step
    parameter_index: ParameterIndex
    _identity: Identity
    steps: int
    switched: bool
    external_step: bool
    carries_state: bool

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied, with a TypeError: the copy would have no layers to hook."""
        raise TypeError("a PreconditionedOptimizer cannot be copied or pickled; save state_dict() and build another.")

    def _share_with_base(self) -> None:
        """Loading replaces the base's containers; ours must be the same objects again."""
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base; it moves them alone, whatever layer they belong to."""
        base = getattr(self, "base", None)
        if base is None:  # called by Optimizer.__init__, on the base's own groups
            super().add_param_group(param_group)
        else:
            known = len(base.param_groups)
            base.add_param_group(param_group)
            self.parameter_index.extend(base.param_groups[known:])

    def _linked_base(self) -> Optimizer:
        """The base over our groups as they are now: DeepSpeed swaps our list for one of a single group at a time."""
        if self.external_step:
            self.base.param_groups = self.param_groups
        return self.base

    def _makes_state(self) -> bool:
        """Whether a first step moves nothing: torch's distributed checkpoint takes one to fill its state."""
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not any(bool(whole(norm)) for norm in norms)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """While it lasts ``step`` is the base's alone: some loaders take one to make the state that they fill."""
        before, self.external_step = self.external_step, True
        try:
            yield
        finally:
            self.external_step = before

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and the factors under "second_order" unless somebody else saves them.

        The first group has them too, the same tensors: torch's distributed checkpoint takes states and groups alone.
        """
        saved = dict(self._linked_base().state_dict()) | {"parameters": [*map(list, self.parameter_index.parameters)]}
        if not self.carries_state:
            return saved
        saved["second_order"] = self.second_order_state()
        if not self.external_step:  # DeepSpeed's checkpoints take all of it
            first, *others = saved["param_groups"]
            saved["param_groups"] = [first | {"second_order": saved["second_order"]}, *others]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of the same optimizer over the same model, which is left as it is.

        Raises ``ValueError``, before anything changes, if it is another optimizer's or the layers differ.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        beside = [factors for group in groups if (factors := group.pop("second_order", None)) is not None]
        rest = {key: value for key, value in state_dict.items() if key not in ("second_order", "parameters")}
        rest["param_groups"] = [self._completed(group) for group in groups]
        factors = state_dict.get("second_order", beside[0] if beside else None)
        saved = self.check_second_order_state(factors) if self.carries_state else None
        self._regroup(state_dict.get("parameters"), rest["param_groups"])
        self._linked_base().load_state_dict(rest)
        self._share_with_base()
        if saved is not None:
            self._restore(saved)

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """A saved group with all settings that the base has: an older version of it had fewer."""
        mine = self.base.defaults.keys() & self.base.param_groups[0].keys() - group.keys()
        return {**group, **{key: value for key, value in self.base.defaults.items() if key in mine}}

    def _regroup(self, names: Names | None, groups: Sequence[Mapping[str, Any]]) -> None:
        """Put the same parameters into the groups of a checkpoint, where some came in after construction.

        Args:
            names: of the parameters of its groups; None: an older version wrote it.
            groups: their settings.

        Raises:
            ValueError: it is of other parameters.
        """
        index = self.parameter_index
        if names is None or names == index.parameters or self.external_step:
            return
        mine, theirs = (
            {name for group in grouped for name in group} - {UNNAMED} for grouped in (index.parameters, names)
        )
        missing, unknown = sorted(mine - theirs), sorted(theirs - index.slots.keys())
        if (missing or unknown) and [*map(len, names)] == [*map(len, index.parameters)]:
            return  # the same model under other names, for all that torch's optimizers ask
        if missing or unknown or any(UNNAMED in group for group in names):
            raise ValueError(
                f"the checkpoint's optimizer moves other parameters: missing {missing[:3]} ({len(missing)}), unknown "
                f"{unknown[:3]} ({len(unknown)}); freeze and add the same parameters before it is loaded."
            )
        self.base.param_groups[:] = [
            {**group, "params": [index.parameter(name) for name in own]}
            for group, own in zip(groups, names, strict=True)
        ]
        index.number(self.base.param_groups, self.stages.layers)

    def second_order_state(self) -> dict[str, Any]:
        """Name, settings, step count and factors, keyed by layer name; loadable with ``weights_only=True``.

        Where ranks share the work or the state (K-FAC under several processes, root-free RMSProp under FSDP2) every
        rank must call it: they exchange factors.
        """
        layers = {layer.name: self.stages.whole_state(layer) for layer in self.stages.layers}
        added = sorted(self.parameter_index.added)
        return self._identity.saved(self.steps, self.switched, added, self.preconditioner.global_state(), layers)

    def load_second_order_state(self, saved: dict[str, Any] | None) -> None:
        """Continue from ``second_order_state()``; errors as ``check_second_order_state``."""
        self._restore(self.check_second_order_state(saved))

    def check_second_order_state(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        """What ``second_order_state`` returned, or a ``ValueError`` if ``load_second_order_state`` would refuse it."""
        left = self._left_by(saved)
        layers = (layer for layer in self.stages.layers if layer.name not in left)
        return self._identity.check(
            saved, ((layer.name, self.preconditioner.init(layer)) for layer in layers), self.switched
        )

    def _left_by(self, saved: Mapping[str, Any] | None) -> list[str]:
        """The layers that a checkpoint left to the base: they were added after construction, or of no kind it knew."""
        if saved is None or saved.get("switched", False):
            return []
        held = self.parameter_index.layers
        late = {layer for name in saved.get("added", ()) for layer in held.get(name, ())}
        if "added" not in saved:
            late |= {layer.name for layer in self.stages.layers if not layer.in_old_checkpoints}
        return [layer.name for layer in self.stages.layers if layer.name in late - saved["layers"].keys()]

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take what ``check_second_order_state`` has approved of."""
        raise NotImplementedError

    def base_state(self, keep: bool = True) -> dict[str, Any]:
        """The base's state in whole tensors, the same for every strategy, if this rank wants to ``keep`` it.

        Every rank must call it.
        """
        return self.stages.strategy.base_state(self._linked_base(), self.parameter_index.parameters, keep)

    def load_base_state(self, saved: dict[str, Any]) -> None:
        """Continue from ``base_state()`` of a run under any strategy; ``ValueError`` for another optimizer's."""
        base = self._linked_base()
        self.stages.strategy.load_base_state(base, self.parameter_index.parameters, saved)
        base.__setstate__({})  # where torch brings what an older version of it has written up to date

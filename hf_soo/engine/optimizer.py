"""The step loop: collect, sync, update, transform, base step. It knows a method by its abstract class alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.engine import statistics
from hf_soo.engine.capture import Capture
from hf_soo.engine.checkpoint import check_layers, check_saved, layer_tensors, restore_layers
from hf_soo.engine.comm import Communicator
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.gradients import Grad, PlainGradients, stack
from hf_soo.engine.layers import Layer, Selection
from hf_soo.engine.linalg import Moved
from hf_soo.engine.preconditioner import LayerState, Preconditioner

STATE_KEY = "second_order"


class PreconditionedOptimizer(Optimizer):
    """A base optimizer that steps on preconditioned gradients.

    ``param_groups`` and ``state`` are the base's own objects, so schedulers, GradScaler and Trainer see an ordinary
    optimizer. The factors live apart, keyed by module name, and are never cast.

    Attributes:
        base: the optimizer that takes the step.
        preconditioner: the method.
        layers: the layers it moves.
        steps: optimizer steps done.
        loss_scale: a function to the factor on the loss in the backward pass (fp16 GradScaler); read on update steps.
        batched: work on layers of one shape together, or one by one, in place and in cache; None: the latter on a CPU.
        carries_state: whether ``state_dict`` holds the factors. False where somebody else saves them beside it.
    """

    def __init__(
        self,
        base: Optimizer,
        preconditioner: Preconditioner,
        selection: Selection,
        *,
        name: str,
        config: dict[str, Any],
        parameter_names: dict[str, nn.Parameter],
    ) -> None:
        """Wrap a base optimizer. ``hf_soo.build_optimizer`` is the way to make one.

        Args:
            base: any torch.optim.Optimizer over the model's parameters.
            preconditioner: the method.
            selection: the layers it moves, and the reasons for those it does not.
            name: the method's name in the registry.
            config: the method's settings as plain values, kept in checkpoints.
            parameter_names: the model's named parameters, for ``routing``.
        """
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self._share_with_base()
        self.preconditioner = preconditioner
        self.name, self.config = name, config
        self.layers, self._left = selection.layers, selection.left
        self._parameter_names = {id(p): n for n, p in parameter_names.items()}
        self.states: dict[str, LayerState] = {layer.name: preconditioner.init(layer) for layer in self.layers}
        self.capture = Capture(self.layers, preconditioner.needs)
        self.gradients = PlainGradients()
        self.comm = Communicator()
        self.diagnostic = Diagnostics()
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.batched: bool | None = None
        self.carries_state = True
        self.steps = 0
        self._schedule_capture()

    # ---- the loop ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the factors if it is their turn, precondition the gradients, and let the base step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before anything else.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layers:
            with torch.autocast(self.layers[0].weight.device.type, enabled=False):
                if self.capture.collecting:
                    self._update_factors()
                self._transform_gradients()
        self.base.step()
        self.steps += 1
        self.diagnostic.check(self.steps, self.name)
        self._schedule_capture()
        return loss

    def _schedule_capture(self) -> None:
        self.capture.collecting = bool(self.capture.buffers) and self.preconditioner.updates_at(self.steps)

    def _update_factors(self) -> None:
        of = statistics.collect(self.capture, self.layers, self.gradients, self.comm, self.loss_scale)
        self.diagnostic.begin_update()
        for group in self._groups(self.layers):
            state, updated = self.preconditioner.update(self._stacked(group), of(group))
            for i, layer in enumerate(group):
                _assign(self.states[layer.name], state, i)
            self.diagnostic.record_update([layer.name for layer in group], updated)
        self.capture.clear()

    def _transform_gradients(self) -> None:
        """G -> P for every layer that has a gradient, then the rescale; jointly if the rule couples the layers."""
        self.diagnostic.begin_transform()
        groups = list(self._groups([layer for layer in self.layers if self.gradients.has(layer)]))
        for batch in [groups] if self.preconditioner.rescale.joint else [[group] for group in groups]:
            grads = [self.gradients.read(group) for group in batch]
            moved = [
                self.preconditioner.transform(self._stacked(group), grad)
                for group, grad in zip(batch, grads, strict=True)
            ]
            self._rescale(batch, grads, moved)
            for group, grad, record in zip(batch, grads, moved, strict=True):
                self.gradients.write(group, grad)
                self.diagnostic.record_transform([layer.name for layer in group], record)

    def _rescale(self, batch: list[list[Layer]], grads: list[Grad], moved: list[Moved]) -> None:
        rule = self.preconditioner.rescale
        scales = rule.scales(moved, self._learning_rates(batch, moved) if rule.joint else [])
        if scales is not None:
            for grad, scale in zip(grads, scales, strict=True):
                grad.scale_(scale)

    def _learning_rates(self, batch: list[list[Layer]], moved: list[Moved]) -> list[Tensor]:
        """The scheduled learning rate of each layer's weight, [L] for each group."""
        of = {id(p): float(g["lr"]) for g in self.param_groups for p in g["params"]}
        rates = ([of.get(id(layer.weight), 0.0) for layer in group] for group in batch)
        return [m.inner.new_tensor(rate) for m, rate in zip(moved, rates, strict=True)]

    def _groups(self, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
        """Layers to work on together."""
        on_cpu = all(layer.weight.device.type == "cpu" for layer in layers)
        if self.batched is False or (self.batched is None and on_cpu):
            yield from ([layer] for layer in layers)
            return
        by_shape: dict[Any, list[Layer]] = defaultdict(list)
        for layer in layers:
            by_shape[(layer.shape, layer.bias is None, layer.weight.dtype, layer.weight.device)].append(layer)
        yield from by_shape.values()

    def _stacked(self, group: Sequence[Layer]) -> LayerState:
        states = [self.states[layer.name] for layer in group]
        device = group[0].weight.device
        for state in states:
            for factor in state.values():
                for key, tensor in factor.items():
                    if tensor.device != device:  # the model moved after construction
                        factor[key] = tensor.to(device)
        return {
            side: {key: stack([state[side][key] for state in states]) for key in factor}
            for side, factor in states[0].items()
        }

    # ---- windows ---------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what the window has collected (a step may have been skipped)."""
        super().zero_grad(set_to_none)
        self.begin_window()

    def begin_window(self) -> None:
        """Drop partial statistics: a step was skipped, or a batch is tried again."""
        if self.capture.collecting:
            self.capture.clear()

    def remove_hooks(self) -> None:
        """Remove all hooks from the model; the optimizer goes on with the factors it has."""
        self.capture.remove()
        self._schedule_capture()

    # ---- what it does, in words and numbers --------------------------------------------------------------------------

    def routing(self) -> dict[str, str]:
        """Per parameter of the base: which rule moves it, and why a layer is left to the base."""
        base = type(self.base).__name__
        rules: dict[int, str] = {}
        idle = self.diagnostic.without_rows()
        for layer in self.layers:
            note = " (no statistics: it got no input at the last update)" if layer.name in idle else ""
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    rules[id(parameter)] = f"{self.name} -> {base}{note}"
        table = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                name = self._parameter_names.get(id(parameter), "(unnamed)")
                reason = self._left.get(name.rpartition(".")[0])
                rule = f"{base} ({group['algorithm']})" if "algorithm" in group else base
                table[name] = rules.get(id(parameter), rule if reason is None else f"{rule}: {reason}")
        return table

    def diagnostics(self) -> dict[str, dict[str, float | str]]:
        """Per layer: cos(G, P) of the last step; |a|², |b|², |F - I| of both sides; what became of each side."""
        table = self.diagnostic.rows()
        for layer in self.layers:
            distances = self.preconditioner.distances(self._stacked([layer]))[0].tolist()
            table.setdefault(layer.name, {}).update(zip(("input_distance", "output_distance"), distances, strict=True))
        return table

    def health(self) -> dict[str, float]:
        """A few numbers for a log line; see ``Diagnostics.health``."""
        return self.diagnostic.health([layer.name for layer in self.layers])

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and the factors under "second_order" unless somebody else saves them."""
        saved = dict(self.base.state_dict())
        if self.carries_state:
            saved[STATE_KEY] = self.second_order_state()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; the argument is left as it is.

        Args:
            state_dict: what ``state_dict`` of the same optimizer over the same model returned.

        Raises:
            ValueError: it is another optimizer's, or the layers differ.
        """
        rest = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        # What is not ours is refused before anything changes.
        saved = self._checked(state_dict.get(STATE_KEY)) if self.carries_state else None
        self.base.load_state_dict(rest)
        self._share_with_base()
        if saved is not None:
            self._restore(saved)

    def second_order_state(self) -> dict[str, Any]:
        """Name, settings, step count and factors, keyed by module name; loadable with ``weights_only=True``."""
        return {
            "optimizer": self.name,
            "base": type(self.base).__name__,
            "config": dict(self.config),
            "steps": self.steps,
            "layers": layer_tensors(self.states),
        }

    def load_second_order_state(self, saved: dict[str, Any] | None) -> None:
        """Continue from ``second_order_state()``.

        Args:
            saved: what it returned, or None if a checkpoint has none.

        Raises:
            ValueError: it is another optimizer's, or the layers differ.
        """
        self._restore(self._checked(saved))

    def _checked(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        saved = check_saved(saved, self.name, type(self.base).__name__, self.config)
        check_layers(self.states, saved["layers"])
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        restore_layers(self.states, saved["layers"])
        self.steps = int(saved["steps"])
        self._schedule_capture()
        self.capture.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied: the copy would have no layers to hook.

        Raises:
            TypeError: always.
        """
        raise TypeError("a PreconditionedOptimizer cannot be copied or pickled; save state_dict() and build another.")

    def _share_with_base(self) -> None:
        """Loading replaces the base's containers; ours must be the same objects again."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.defaults = self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base; new layers are not preconditioned."""
        base = getattr(self, "base", None)
        if base is None:  # called by Optimizer.__init__, on the base's own groups
            super().add_param_group(param_group)
        else:
            base.add_param_group(param_group)


def _assign(target: LayerState, stacked: LayerState, index: int) -> None:
    for side, factor in stacked.items():
        for key, tensor in factor.items():
            target[side][key].copy_(tensor[index])

"""The step loop: collect, sync, update, refresh, transform, base step. It knows a method by its abstract class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.engine import fisher
from hf_soo.engine.base_state import Keeper
from hf_soo.engine.capture import Capture
from hf_soo.engine.comm import Communicator
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.dtensors import locate
from hf_soo.engine.grouping import stacked
from hf_soo.engine.loss_watch import LossWatch
from hf_soo.engine.preconditioner import Preconditioner
from hf_soo.engine.routing import ParameterIndex, routing
from hf_soo.engine.selection import Selection
from hf_soo.engine.state import Saving
from hf_soo.engine.strategy import Gradients, PlainGradients

logger = logging.getLogger(__name__)


class PreconditionedOptimizer(Saving, Optimizer):
    """A base optimizer that steps on preconditioned gradients.

    ``param_groups`` and ``state`` are the base's own objects, so schedulers, GradScaler and Trainer see an ordinary
    optimizer. The factors live apart, keyed by the name of the module (or parameter), and are never cast.

    Attributes:
        base: the optimizer that takes the step.
        preconditioner: the method.
        layers: the layers it moves.
        states: layer name -> its factors, as far as this rank keeps them.
        steps: optimizer steps done.
        switched: whether the method has handed over to its base for good (MKOR-H).
        loss_scale: a function to the factor on the loss in the backward pass (fp16 GradScaler); read on update steps.
        batched: work on layers of one shape together, or one by one, in place and in cache; None: the latter on a CPU,
            and for methods whose factors are too large to be stacked.
        external_step: whether somebody else takes the step (DeepSpeed's engine): ``step`` is then the base's alone, and
            the other calls ``precondition`` before and ``advance`` after it.
        keeper: who keeps the base's state if it is not in whole tensors or DTensors by parameter (ZeRO).
        ranks_checked: whether the ranks have compared what they were built with; they do before the first step.
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
        self.layers, self._skipped = selection.layers, dict(selection.skipped)
        self.parameter_index = ParameterIndex.of(base.param_groups, parameter_names, self.layers)
        self.comm = Communicator()
        self.gradients: Gradients = locate(self.layers, PlainGradients(), self.comm)
        self.diagnostic = Diagnostics(preconditioner.side_names)
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.batched: bool | None = None
        self.external_step = False
        self.keeper: Keeper | None = None
        self.carries_state = True
        self.switched = False
        self.steps = 0
        self.ranks_checked = False
        self._loss = LossWatch()
        self._place()
        self.capture = Capture(self.layers, preconditioner.recorder)
        self._schedule()

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
            if loss is not None:
                self.report_loss(loss)
        if self.external_step:
            self._step_base()
        else:
            self.precondition()
            self._step_base()
            self.advance()
        return loss

    @torch.no_grad()
    def precondition(self) -> None:
        """The part of ``step`` before the base's: update the factors if it is their turn, and G -> P."""
        self._agree()
        if not self.steps and not self.external_step:
            self.parameter_index.check(self.param_groups, self.layers, self.name)
        if self.layers:
            if self.preconditioner.watches_loss:
                self._loss.require(self.name)
            self._follow_layout()
            with torch.autocast(self.layers[0].weight.device.type, enabled=False):
                if self._updating:
                    self._update_factors(self.loss_scale() if self.capture.buffers else 1.0)
                if self.preconditioner.refreshes_at(self.steps):
                    self._refresh_inverses()
                self._transform_gradients()

    def _agree(self) -> None:
        """Compare what the ranks were built with, before their first step and after loading."""
        if self.ranks_checked:
            return
        plain = (bool, int, float, str, tuple)
        settings = {key: value for key, value in self.base.defaults.items() if isinstance(value, plain)}
        self.comm.agree(
            {
                "method": f"{self.name} over {type(self.base).__name__}",
                "settings": str(self.config),
                "base settings": str(settings),
                "layers": str([(layer.name, layer.shape) for layer in self.layers]),
                "steps done": str(self.steps),
            }
        )
        self.ranks_checked = True

    def _step_base(self) -> None:
        self._linked_base().step()

    def _linked_base(self) -> Optimizer:
        """The base over our groups as they are now: ZeRO swaps our list for one of a single group, step by step."""
        if self.external_step:
            self.base.param_groups = self.param_groups
        return self.base

    @torch.no_grad()
    def advance(self) -> None:
        """The part of ``step`` after the base's: it is done."""
        if self.layers and self.preconditioner.watches_loss:
            self._observe_loss()
        self.steps += 1
        self.diagnostic.check(self.steps, self.name)
        self._schedule()

    def _schedule(self) -> None:
        """Whether the next step updates factors, and so what the forward passes before it collect."""
        hooks = self.preconditioner.recorder.hooks
        self._updating = self.preconditioner.updates_at(self.steps) and (bool(self.capture.buffers) or not hooks)
        self.capture.collect(self._updating and hooks)

    def _follow_layout(self) -> None:
        """Place the factors anew if the process group was started, or the model sharded, after construction.

        Raises:
            RuntimeError: that happened after the first step.
        """
        self.gradients = locate(self.layers, self.gradients, self.comm)
        if self.placed == self._layout():
            return
        if self.steps:
            raise RuntimeError(
                f"{self.name} was built and has stepped at (workers, gradients) {self.placed}, but it is "
                f"{self._layout()} now; start the process group before the optimizer is built, and shard the "
                "model before its first step."
            )
        self._place()

    # ---- windows ---------------------------------------------------------------------------------------------------

    def mask_rows(self, mask: Tensor | None) -> None:
        """Leave padding out of the means of layer inputs, in the forward and backward passes until the step ends.

        A layer whose input is [B, T, d] for a mask of [B, T] counts the rows where it is not zero; all others count
        every row. Methods that keep factors (K-FAC, FOOF) tell padding by its gradient and need no mask.

        Args:
            mask: the micro-batch's attention mask [B, T], 1 for tokens and 0 for padding; None: there is no padding.
        """
        self.capture.mask = None if mask is None else mask != 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what the window has collected (a step may have been skipped).

        It may stand between a forward pass and its backward passes.
        """
        super().zero_grad(set_to_none)
        self._drop_window(outputs=False)

    def begin_window(self) -> None:
        """Drop partial statistics: a step was skipped, or a batch is tried again."""
        self._drop_window(outputs=True)

    def _drop_window(self, *, outputs: bool) -> None:
        self._loss.forget()
        if self.capture.collecting:
            self.capture.clear(outputs=outputs)

    def remove_hooks(self) -> None:
        """Remove all hooks from the model; the optimizer goes on with the factors it has."""
        self.capture.remove()
        self._schedule()

    @property
    def wants_sampled_loss(self) -> bool:
        """Whether this window needs ``backward_sampled`` (``fisher="mc"``, in windows that collect statistics)."""
        return self.capture.collecting and self.capture.sampled is not None

    def backward_sampled(self, loss: Tensor) -> None:
        """Collect the output factors from a loss whose labels were drawn from the model, before the real backward.

        Args:
            loss: such as ``fisher.sampled_cross_entropy(logits, labels)``, averaged and weighted as the real loss is.

        Raises:
            RuntimeError: this window does not want one (see ``wants_sampled_loss``).
        """
        if not self.wants_sampled_loss:
            raise RuntimeError("this window wants no sampled loss; ask optimizer.wants_sampled_loss first.")
        fisher.backward_sampled(self.capture, loss * self.loss_scale())

    def report_loss(self, loss: Tensor | float) -> None:
        """Tell the training loss, once for each micro-batch, before ``step``: what you call ``backward`` on.

        ``zero_grad`` forgets it, since a step may have been skipped.

        Methods that do not look at the loss (all but MKOR-H) ignore it. SecondOrderTrainer does this itself.

        Args:
            loss: this rank's, weighted as in the backward pass; the micro-batches of a window are summed.
        """
        if self.layers and self.preconditioner.watches_loss:
            self._loss.report(loss, self.layers[0].weight.device)

    def _observe_loss(self) -> None:
        """Show the method the loss of the global batch, and switch it off if it says so."""
        if self.preconditioner.observe(self._loss.take(self.comm), self.steps):
            logger.info("%s hands over to %s after step %d", self.name, type(self.base).__name__, self.steps)
            self._switch_off()

    def _switch_off(self) -> None:
        """From now on the base alone: hooks and factors go."""
        self._skipped |= {layer.name: f"{self.name} has switched to its base" for layer in self.layers}
        self.capture.remove()
        self.layers, self.states, self.switched = [], {}, True
        self.diagnostic = Diagnostics(self.preconditioner.side_names)  # the last step's numbers are no news any more

    # ---- what it does, in words and numbers --------------------------------------------------------------------------

    def routing(self) -> dict[str, str]:
        """Per parameter of the base: which rule moves it, and why a layer is left to the base."""
        return routing(
            self.param_groups, self.parameter_index, self._skipped, self.diagnostic.without_rows(),
            method=self.name, base=type(self.base).__name__,
        )  # fmt: skip

    def diagnostics(self) -> dict[str, dict[str, float | str]]:
        """Per layer: cos(G, P) of the last step; |a|², |b|², |F - I| of each side; what became of each side.

        Where ranks share the work (K-FAC), |F - I| is of the layers that this rank preconditions.
        """
        table = self.diagnostic.rows()
        names = [f"{side}_distance" for side in self.preconditioner.side_names]
        for layer in self.layers:
            if self.placement.is_gradient_worker(layer.name):
                state = stacked([self.states[layer.name]], [layer], self.preconditioner.shared)
                distances = self.preconditioner.distances(state)[0].tolist()
                table.setdefault(layer.name, {}).update(zip(names, distances, strict=True))
        return table

    def health(self) -> dict[str, float]:
        """A few numbers for a log line; see ``Diagnostics.health``."""
        return self.diagnostic.health([layer.name for layer in self.layers])

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """While it lasts ``step`` is the base's alone: some loaders take one to make the state that they fill."""
        before, self.external_step = self.external_step, True
        try:
            yield
        finally:
            self.external_step = before

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
            known = len(base.param_groups)
            base.add_param_group(param_group)
            self.parameter_index.extend(base.param_groups[known:])

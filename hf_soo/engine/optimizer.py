"""The step loop: collect, sync, update, refresh, transform, base step. It knows a method by its abstract class."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from hf_soo.engine import diagnostics, fisher
from hf_soo.engine.around import Halves, TwoWeights, Wrappers
from hf_soo.engine.comm import refuse_join
from hf_soo.engine.layers import Layer
from hf_soo.engine.passes.loss import LossWatch
from hf_soo.engine.preconditioner import Preconditioner
from hf_soo.engine.routing import ParameterIndex, routing, warn_of_what_is_left
from hf_soo.engine.selection import Selection
from hf_soo.engine.state import Identity
from hf_soo.engine.step import Step
from hf_soo.engine.strategy import Strategy

logger = logging.getLogger(__name__)


class PreconditionedOptimizer(TwoWeights):
    """A base optimizer that steps on preconditioned gradients.

    ``param_groups`` and ``state`` are the base's own objects, so schedulers, GradScaler and Trainer see an ordinary
    optimizer. The factors live apart, keyed by the name of the module (or parameter), and are never cast.

    Attributes:
        base, preconditioner: the optimizer that takes the step, and the method.
        halves, wrappers: the base's step cut in two, where the method acts on what lies between; what is put around it.
        stages: what it does to its layers before the base steps; it owns layers, factors, hooks and strategy.
        steps: optimizer steps done.
        switched: whether the method has handed over to its base for good (MKOR-H).
        loss_scale: a function to the factor on the loss in the backward pass (fp16 GradScaler); read on update steps.
        external_step: whether somebody else (DeepSpeed's engine) goes through ``step_around``; ``step`` is the base's.
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
        defaults: dict[str, Any],
        model: nn.Module,
        halves: Halves | None = None,
        wrappers: Wrappers | None = None,
    ) -> None:
        """Wrap a base over the model's parameters. ``hf_soo.build_optimizer`` is the way to make one.

        Checkpoints keep ``name`` and ``config``; ``selection`` and ``model`` are for ``routing`` too.
        ``halves`` of the base make the method act on the base's directions instead of on the gradients.
        """
        super().__init__(base.param_groups, base.defaults)
        self.base, self.halves, self.wrappers, self._taken = base, halves, wrappers, False
        self._share_with_base()
        self.preconditioner = preconditioner
        self.name, self.config = name, config
        self._identity = Identity(name, type(base).__name__, config, defaults)
        self._skipped = dict(selection.skipped)
        self.parameter_index = ParameterIndex.of(base.param_groups, model, selection.layers)
        if selection.layers:
            warn_of_what_is_left(self.parameter_index, selection, name, type(base).__name__)
        self.stages = Step(preconditioner, selection.layers, model)
        if hasattr(base, "comm"):  # it shares work between the ranks
            base.comm = self.stages.comm
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.external_step = self.switched = self.ranks_checked = False
        self.carries_state, self.steps = True, 0
        self._loss = LossWatch()
        self._schedule()

    @property
    def layers(self) -> list[Layer]:
        """The layers that the method moves."""
        return self.stages.layers

    @_disable_dynamo  # torch.compile(optimizer.step) runs it as it stands
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
        if self.external_step or (not self.state and self._makes_state()):
            self._step_base()
        else:
            self.step_around(self._step_base)
        return loss

    @torch.no_grad()
    def step_around(self, base_step: Callable[[], Any], skipped: Callable[[], bool] = lambda: False) -> Any:
        """The whole step, around a step of the base that somebody else may take.

        Args:
            base_step: takes it, on the gradients as they are then.
            skipped: whether it took none after all (an overflow); then this step did not happen.

        Returns:
            What ``base_step`` returned.
        """
        self._check()
        stages = self.stages
        if stages.layers:
            index = self.parameter_index.group if self.preconditioner.rescale.joint else {}
            with torch.autocast(stages.device.type, enabled=False):
                first = self.preconditioner.refreshes_first
                if self._refreshing and first:
                    stages.refresh()
                if self._updating:
                    stages.update(self.loss_scale() if stages.capture.buffers else 1.0)  # collect, sync, update
                if self._refreshing and not first:
                    stages.refresh()  # inverses, for methods that have them
                if self.halves is not None:
                    names, moved = self.parameter_index.parameters, self.parameter_index.moved(self.layers)
                    self.halves.take(stages.strategy.local_gradients(self._linked_base(), names, moved))
                    self._taken = True
                rates = {layer: self.param_groups[group]["lr"] for layer, group in index.items()}
                stages.transform(rates)  # G -> P, and its length
        if self.wrappers is not None and not self._taken:
            self.wrappers.mix(self._linked_base(), stages.strategy, self.parameter_index.parameters)
        result, self._taken = base_step(), False
        if skipped():
            self.begin_window()
        else:
            self._advance()
        return result

    def _check(self) -> None:
        """Before a step: the ranks agree, the loss is known, and the tensors lie where they lay."""
        if (wrapper := self.stages.capture.wrapper()) is not None:
            refuse_join(wrapper, self.name)
        self._agree()
        if not self.steps and not self.external_step:
            self.parameter_index.check(self.param_groups, self.layers, self.name)
            self.parameter_index.refuse_sparse(self.base, self.layers, self.name)
        if self.parameter_index.frozen:
            self.parameter_index.warn_of_thawed(self.name)
        if self.steps % diagnostics.CHECK_PERIOD == 0:
            self.parameter_index.warn_of_newcomers(self.stages.model, self.param_groups, self.name)
        if self.layers:
            if self.preconditioner.watches_loss:
                self._loss.require(self.name)
            self.stages.follow_layout(self.name, self.steps)

    def _agree(self) -> None:
        """Before the first step the ranks compare what they have; with the diagnostics' checks if they talk anyway."""
        talks = self.stages.capture.hooks or self.stages.strategy.in_pieces
        again = self.layers and talks and self.steps and self.steps % diagnostics.CHECK_PERIOD == 0
        if not self.ranks_checked or again:
            base, strategy = self._linked_base(), self.stages.strategy
            parameters = strategy.model_parameters(base, self.parameter_index.parameters)
            self._identity.agree(
                self.stages.comm, base, parameters, self.layers, self.steps, weights=not self.ranks_checked
            )
            self.ranks_checked = True

    def _step_base(self) -> None:
        """The base's step, or its second half where the method has acted on what the first one made."""
        base = self._linked_base() if self.external_step else self.base
        inner_step(base, self.halves.move if self._taken and self.halves else None)

    def _advance(self) -> None:
        """The step is done; a method that watches the loss of the global batch may be done for good."""
        watches = self.layers and self.preconditioner.watches_loss
        if watches and self.preconditioner.observe(self._loss.take(self.stages.comm), self.steps):
            logger.info("%s hands over to %s after step %d", self.name, type(self.base).__name__, self.steps)
            self._switch_off()
        self.steps += 1
        self.stages.diagnostics.check(self.steps, self.name)
        self._schedule()

    def _schedule(self) -> None:
        """Whether the next step updates factors or inverses, and so what the forward passes before it collect."""
        capture, method = self.stages.capture, self.preconditioner
        self._updating = (bool(capture.buffers) or not capture.hooks) and method.updates_at(self.steps)
        self._refreshing = method.refreshes_at(self.steps)
        if capture.collecting != (self._updating and capture.hooks):
            capture.collect(not capture.collecting)

    def use(self, strategy: Strategy) -> None:
        """Let tensors lie as ``strategy`` says, from before the first step on."""
        self.stages.strategy = strategy
        self.external_step = strategy.external_step
        self.loss_scale = lambda: strategy.loss_scale
        if hasattr(self.base, "partition"):  # it needs the norms of whole parameters
            self.base.partition = strategy.partition

    def mask_rows(self, mask: Tensor | None) -> None:
        """Leave padding out of the means of layer inputs, in the forward and backward passes until the step ends.

        A model whose forward takes an ``attention_mask`` (or torch's ``src_key_padding_mask``) needs no call. Where it
        takes none, layers with an input [B, T, d], [T, B, d] or [B * T, d] count the rows where this mask is not zero;
        where it does, rows count by both. Methods that keep factors (K-FAC, FOOF) tell padding by its gradient.

        Args:
            mask: the micro-batch's attention mask [B, T], 1 for tokens and 0 for padding; None: as the model is told.
        """
        self.stages.capture.padding.explicit = None if mask is None else mask != 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what the window has collected (a step may have been skipped).

        It may stand between a forward pass and its backward passes.
        """
        super().zero_grad(set_to_none)
        self.begin_window(outputs=False)

    def begin_window(self, *, outputs: bool = True) -> None:
        """Drop partial statistics: a step was skipped, or a batch is tried again; ``outputs`` as for ``Capture``."""
        self._loss.forget()
        if self.stages.capture.collecting:
            self.stages.capture.clear(outputs=outputs)

    def remove_hooks(self) -> None:
        """Remove all hooks from the model; the optimizer goes on with the factors it has."""
        self.stages.capture.remove()
        self._schedule()

    @property
    def wants_sampled_loss(self) -> bool:
        """Whether this window needs ``backward_sampled`` (``fisher="mc"``, in windows that collect statistics)."""
        return self.stages.capture.collecting and self.stages.capture.sampled is not None

    def backward_sampled(self, loss: Tensor) -> None:
        """Collect the output factors from a loss whose labels were drawn from the model, before the real backward.

        Args:
            loss: such as ``fisher.sampled_cross_entropy(logits, labels)``, averaged and weighted as the real loss is.

        Raises:
            RuntimeError: this window does not want one (see ``wants_sampled_loss``).
        """
        if not self.wants_sampled_loss:
            raise RuntimeError("this window wants no sampled loss; ask optimizer.wants_sampled_loss first.")
        fisher.backward_sampled(self.stages.capture, loss * self.loss_scale())

    def report_loss(self, loss: Tensor | float) -> None:
        """Tell the training loss, once for each micro-batch, before ``step``: what you call ``backward`` on.

        It is this rank's, weighted as in the backward pass; a window's are summed, and ``zero_grad`` forgets them.
        Methods that do not look at the loss (all but MKOR-H) ignore it. SecondOrderTrainer does this itself.
        """
        if self.layers and self.preconditioner.watches_loss:
            self._loss.report(loss, self.layers[0].weight.device)

    def _switch_off(self) -> None:
        """From now on the base alone: hooks and factors go."""
        self._skipped |= {layer.name: f"{self.name} has switched to its base" for layer in self.layers}
        self.stages.switch_off()
        self.switched = True

    def routing(self) -> dict[str, str]:
        """Per parameter of the base: which rule moves it, and why a layer is left to the base."""
        return routing(
            self.param_groups, self.parameter_index, self._skipped, self.stages.diagnostics.without_rows(),
            method=self.name, base=type(self.base).__name__,
        )  # fmt: skip

    def diagnostics(self) -> dict[str, dict[str, float | str]]:
        """Per layer: cos(G, P) of the last step; |a|², |b|², |F - I| of each side; what became of each side.

        Where ranks share the work (K-FAC), |F - I| is of the layers that this rank preconditions.
        """
        return self.stages.diagnostics.rows(self.stages.distances())

    def health(self) -> dict[str, float]:
        """A few numbers for a log line; see ``Diagnostics.health``; and what the base has to say, as ``Muon`` may."""
        own = self.stages.diagnostics.health([layer.name for layer in self.layers])
        return own | getattr(self.base, "health", dict)()

    def state_dict(self) -> dict[str, Any]:
        """See ``OverBase``; with the hooks that are registered for it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = super().state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, saved)
            saved = saved if replaced is None else replaced
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``OverBase``; with the hooks that are registered for it."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        super().load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved.get("switched", False):
            self._switch_off()
        self.parameter_index.added.update(saved.get("added", ()))
        if left := self._left_by(saved):
            self._skipped |= dict.fromkeys(left, "the checkpoint that this run goes on from left it to the base")
            self.stages.leave(left)
        self.stages.follow_layout(self.name, self.steps)
        self.stages.restore_states(saved["layers"])
        self.preconditioner.load_global_state(saved.get("own", {}))
        self.steps = int(saved["steps"])
        self.ranks_checked = False
        self._schedule()
        self.stages.capture.clear()


def inner_step(optimizer: Optimizer, instead: Callable[[], None] | None = None) -> Any:
    """The step of an optimizer inside another one, or what is done ``instead``.

    With its own hooks, but without those on the step of every optimizer: the outer one's step has called them.
    """
    step = type(optimizer).step
    if instead is None and ("step" in vars(optimizer) or not getattr(step, "hooked", False)):
        return optimizer.step()
    for before in optimizer._optimizer_step_pre_hooks.values():
        before(optimizer, (), {})
    result = step.__wrapped__(optimizer) if instead is None else instead()  # type: ignore[attr-defined]
    for after in optimizer._optimizer_step_post_hooks.values():
        after(optimizer, (), {})
    return result

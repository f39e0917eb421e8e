"""What flows into and out of a layer, reduced at once and committed by the backward pass.

A forward hook hands the layer's input to a ``Recorder``, which passes the output through an autograd node whose
backward adds to the layer's buffers, if this backward pass accumulates the weight's gradient. So there is exactly one
commit for each micro-batch under gradient checkpointing of both kinds, under torch.compile (the state is tensors
changed in place: no graph break) and under autocast, and none in evaluation, or where somebody differentiates by
inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from hf_soo.engine.gradients import Groups, Joint
from hf_soo.engine.layers import Layer, RowLayer, accumulation_dtype
from hf_soo.engine.passes.backward import Target, is_transformed, number_of
from hf_soo.engine.passes.follow import follow
from hf_soo.engine.passes.padding import Padding
from hf_soo.engine.passes.reads import ReadLayer
from hf_soo.engine.placement import Placement
from hf_soo.engine.strategy import Strategy

Buffers = list[Tensor]
"""What a recorder sums for one layer in the current window; the recorder knows the order."""


@dataclass(slots=True)
class Statistics:
    """What a method learns from, for layers of one shape, stacked.

    Args:
        samples: the rows of the window over all ranks, [L]; 0 where there is nothing to learn from.
        inputs: what the recorder made of the layers' inputs, or None.
        outputs: what it made of dL/dy, L the mean loss of the global batch, or None.
        noise: whether Σ dL/dy is rounding noise, [L]; or None.
        agreement: the cosine of Σ dL/dy of one half of the batch and of the other, [L]; or None.
        grad: the averaged gradients, for methods that learn from them alone.
    """

    samples: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    noise: Tensor | None = None
    agreement: Tensor | None = None
    grad: Joint | None = None


@dataclass(slots=True)
class Window:
    """The steps since the last ``step()``, as a recorder sees them.

    Args:
        layers: all layers, in the same order on every rank.
        buffers: layer name -> what was summed on this rank.
        strategy: where gradients are read: averaged over ranks, and without the loss scale.
        placement: sums over ranks, at each layer's owner.
        unit: what turns dL/dy of this rank's scaled loss into that of the global mean loss.
    """

    layers: Sequence[Layer]
    buffers: dict[str, Buffers]
    strategy: Strategy
    placement: Placement
    unit: float


class FisherPass:
    """Which factors a backward pass adds to, where a sampled loss has a backward pass of its own.

    Attributes:
        which: "outputs" in the sampled loss's pass, "inputs" in the real one.
        passes: sampled passes in this window.
    """

    def __init__(self) -> None:
        self.which: Literal["inputs", "outputs"] = "inputs"
        self.passes = 0


class Recorder(Protocol):
    """What is kept of a window, and how it becomes statistics."""

    @property
    def needs(self) -> str:
        """What a method learns from, in words, for a list of methods."""

    @property
    def hooks(self) -> bool:
        """Whether forward hooks are needed at all."""

    @property
    def transient(self) -> bool:
        """Whether the buffers are large: they are then held in windows that collect alone."""

    @property
    def fisher_pass(self) -> FisherPass | None:
        """Where a sampled loss is wanted: which pass this is."""

    def allocate(self, layer: Layer) -> Buffers:
        """Zero buffers for a layer."""

    def commit(
        self, layer: RowLayer, x: Tensor, output: Tensor, buffers: Buffers, padding: Padding, target: Target
    ) -> Tensor:
        """The output, with a node behind it that adds to the buffers where the backward pass ``accumulates``."""

    def ready(self, layers: Sequence[Layer], strategy: Strategy) -> list[Layer]:
        """The layers that can be updated in this step."""

    def collect(self, window: Window) -> Callable[[Groups], list[Statistics]]:
        """Sum over ranks; a function from groups of layers of one shape to their statistics."""


class GradientRecorder:
    """For methods that learn from the averaged gradient: nothing is hooked."""

    needs = "gradients only"
    hooks = False
    transient = False
    fisher_pass = None

    def allocate(self, layer: Layer) -> Buffers:
        """Nothing."""
        return []

    def commit(
        self, layer: RowLayer, x: Tensor, output: Tensor, buffers: Buffers, padding: Padding, target: Target
    ) -> Tensor:
        """Not called: there are no hooks."""
        return output

    def ready(self, layers: Sequence[Layer], strategy: Strategy) -> list[Layer]:
        """Those with a gradient."""
        return [layer for layer in layers if strategy.has(layer)]

    def collect(self, window: Window) -> Callable[[Groups], list[Statistics]]:
        """The gradients themselves; they are averaged over ranks already."""
        return lambda groups: [
            Statistics(samples=grad.weight.new_ones(len(grad.weight)), grad=grad)
            for grad in window.strategy.read(groups)
        ]


class Capture:
    """The hooks and buffers of all layers.

    ``collecting`` is read by every forward pass; the optimizer sets it at the end of a step (``collect``), so that all
    micro-batches of a window, and both passes of a checkpointed one, see the same value.

    ``padding`` keeps the masks of the current micro-batch until the next one's: a checkpointed layer runs again in the
    backward pass.

    ``wrapper`` is the DistributedDataParallel in whose forward pass the layers ran last, as far as is known.
    """

    def __init__(self, layers: Sequence[Layer], recorder: Recorder, model: nn.Module | None = None) -> None:
        """Install the hooks.

        Args:
            layers: the layers to watch.
            recorder: what to keep; nothing is hooked if it needs no hooks.
            model: what they lie in; it is asked for padding. None: there is none.
        """
        self.recorder = recorder
        self.hooks = recorder.hooks
        self.collecting = False
        self.wrapper: Callable[[], DistributedDataParallel | None] = lambda: None
        self.sampled: list[Tensor] | None = None if recorder.fisher_pass is None else []  # outputs; see fisher.py
        self._sampled_layers: set[str] = set()
        self.layers = [layer for layer in layers if isinstance(layer, RowLayer)] if self.hooks else []
        self.buffers: dict[str, Buffers] = {
            layer.name: [] if recorder.transient else recorder.allocate(layer) for layer in self.layers
        }
        dtypes = {p.dtype for p in ([] if model is None else model.parameters()) if p.is_floating_point()}
        for layer in self.layers:
            layer.coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)
        self.padding = Padding(model if model is not None and self.layers else nn.Identity(), self.layers)
        self._handles = [
            layer.module.register_forward_hook(_CommitHook(self, layer).commit, prepend=True, with_kwargs=True)
            for layer in self.layers
            if not isinstance(layer, ReadLayer)
        ]
        self._handles += follow(self.layers, lambda own: _CommitHook(self, *own))

    def collect(self, collecting: bool) -> None:
        """Whether forward passes collect from now on; never called in one (a compiled graph needs the buffers)."""
        if self.recorder.transient and collecting != self.collecting:
            for layer in self.layers if self.buffers else ():
                self.buffers[layer.name] = self.recorder.allocate(layer) if collecting else []
        self.collecting = self.padding.watching = collecting

    def to_weights(self, layers: Sequence[Layer]) -> None:
        """Start the buffers of layers anew whose weights were moved to another device after construction."""
        for layer in layers:
            buffers = self.buffers.get(layer.name)
            if buffers and buffers[0].device != layer.weight.device:
                self.buffers[layer.name] = self.recorder.allocate(layer)

    def commit_in_backward(self, layer: RowLayer, x: Tensor, output: Tensor, target: Target) -> Tensor:
        """The output, with a node behind it that commits what the recorder keeps.

        Args:
            layer: the layer that ran.
            x: its input, as it got it.
            output: its output.
            target: its weight's.

        Raises:
            RuntimeError: the layer has another precision than its statistics.
        """
        if not torch.compiler.is_compiling():
            ddp = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
            self.wrapper = ref(ddp) if ddp is not None else self.wrapper
        if self.buffers[layer.name][0].device != x.device:
            self.to_weights([layer])
        if self.buffers[layer.name][0].dtype != accumulation_dtype(layer.weight.dtype):
            raise RuntimeError(
                f"{layer.name!r} is {layer.weight.dtype} now, but its statistics are in "
                f"{self.buffers[layer.name][0].dtype}; convert the model before the optimizer is built."
            )
        if self.sampled is not None:
            self._keep_sampled(layer, output)
        return self.recorder.commit(layer, x, output, self.buffers[layer.name], self.padding, target)

    def _keep_sampled(self, layer: RowLayer, output: Tensor) -> None:
        """Remember an output for the sampled loss's backward pass.

        Raises:
            NotImplementedError: that pass cannot reach the layer.
        """
        assert self.sampled is not None
        if torch.compiler.is_compiling():
            raise NotImplementedError("fisher='mc' under torch.compile is not supported; use fisher='empirical'.")
        if torch._C._current_graph_task_id() == -1:
            self.sampled.append(output)
            self._sampled_layers.add(layer.name)
        elif layer.name not in self._sampled_layers:  # a backward pass runs it again, and nobody saw its first run
            raise NotImplementedError(
                f"fisher='mc' under reentrant gradient checkpointing ({layer.name!r}) is not supported; checkpoint "
                "with use_reentrant=False, or use fisher='empirical'."
            )

    def clear(self, *, outputs: bool = True) -> None:
        """Drop what the current window has collected (a skipped step, an out-of-memory retry).

        Args:
            outputs: those kept for a sampled loss, and the masks; False if the backward pass may be still to come.
        """
        tensors = [tensor for buffers in self.buffers.values() for tensor in buffers]
        if tensors:
            torch._foreach_zero_(tensors)
        if self.recorder.fisher_pass is not None:
            self.recorder.fisher_pass.passes = 0
        if not outputs:
            return
        self.padding.forget()
        if self.sampled is not None:
            self.sampled.clear()
            self._sampled_layers.clear()

    def remove(self) -> None:
        """Remove the hooks and free the buffers."""
        for handle in self._handles:
            handle.remove()
        self.padding.remove()
        self._handles, self.buffers = [], {}


class _CommitHook:
    """The forward hook of one layer, or what finds a module's products with its own matrices.

    A copied or unpickled model takes a hook along that does nothing.
    """

    def __init__(self, capture: Capture | None = None, *layers: RowLayer) -> None:
        self.capture, self.layers = capture, layers
        self.numbers = {layer.name: number_of(layer) for layer in layers}

    def active(self, module: nn.Module) -> bool:
        """Whether a forward pass of the module collects."""
        return self.capture is not None and self.capture.collecting and module.training

    def commit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Let the output's backward pass commit, if this forward pass is one that trains the layer's own weight."""
        if not self.active(module) or not isinstance(output, Tensor):
            return None
        (layer,) = self.layers
        return self.rows(layer, (*args, *kwargs.values())[0], output)  # layer(x) or layer(input=x): one input

    def rows(self, layer: RowLayer, x: Tensor, output: Tensor) -> Tensor | None:
        """The output of a layer's rows x, with a node that commits both; None: this pass does not train the layer."""
        if self.capture is None or not output.requires_grad or is_transformed():
            return None
        if not isinstance(weight := layer.weight, nn.Parameter) or not weight.requires_grad:  # frozen, functional_call
            return None
        if torch.compiler.is_compiling():
            target: Target = self.numbers[layer.name]
        else:
            target = get_gradient_edge(weight).node
        return self.capture.commit_in_backward(layer, x, output, target)

    def tokens(self, layer: RowLayer, x: Tensor) -> Tensor | None:
        """Which rows of a module's input are no padding, [rows], as far as anybody has said; batches come first."""
        masks = [] if self.capture is None else self.capture.padding.masks_around(layer, x)
        return masks[0].flatten() if masks else None

    def declare(self, layer: RowLayer, tokens: Tensor | None) -> None:
        """Say which of the rows are no padding that come next, [rows]; None: it is not known."""
        assert self.capture is not None
        self.capture.padding.places[layer.name].declared = tokens

    def __reduce__(self) -> tuple[type[_CommitHook], tuple[()]]:
        return _CommitHook, ()


def _scripted(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    """What torch.jit.script takes the hook for."""


_CommitHook.commit.__wrapped__ = _scripted  # type: ignore[attr-defined]

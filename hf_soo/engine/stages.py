"""The stages of a step before the base's: update the factors, refresh the inverses, turn G into P."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_soo.engine.capture import Capture, Window
from hf_soo.engine.comm import Communicator
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.gradients import Groups, Joint, RowSums, TransformNorms, run_with_shared_sums
from hf_soo.engine.grouping import groups_of, stacked, unstack_
from hf_soo.engine.layers import Layer
from hf_soo.engine.placement import Placement, held, place
from hf_soo.engine.preconditioner import LayerState, Preconditioner, Updated
from hf_soo.engine.routing import ParameterIndex
from hf_soo.engine.strategy import Gradients


class Stages:
    """What a PreconditionedOptimizer does to its layers; it sets the attributes."""

    preconditioner: Preconditioner
    layers: list[Layer]
    states: dict[str, LayerState]
    placement: Placement
    placed: tuple[object, object]
    capture: Capture
    gradients: Gradients
    comm: Communicator
    diagnostic: Diagnostics
    batched: bool | None
    param_groups: list[dict[str, Any]]
    parameter_index: ParameterIndex

    def _layout(self) -> tuple[object, object]:
        """What the placement follows from: the ranks that share work, and where gradients lie."""
        return self.preconditioner.workers(self.comm.world_size) and self.comm.world_size, self.gradients.layout

    def _place(self) -> None:
        """Decide which rank keeps what, and start the states."""
        self.placement, self.placed = place(self.layers, self.preconditioner, self.comm), self._layout()
        self.gradients.row_wise = self.preconditioner.row_wise and self.placement.everywhere
        names = self.preconditioner.shared
        self.states = {}
        for layer in self.layers:
            state = held(self.placement, layer.name, self.preconditioner.init(layer), names)
            self.states[layer.name] = {
                side: {key: self._own_rows(layer, key, tensor) for key, tensor in factor.items()}
                for side, factor in state.items()
            }

    def _own_rows(self, layer: Layer, key: str, tensor: Tensor) -> Tensor:
        """What this rank keeps of a tensor of a layer's state."""
        rows = self.gradients.rows(layer)
        if key not in self.preconditioner.row_state or rows == slice(None):
            return tensor
        return tensor[rows].clone()

    def _groups(self, layers: list[Layer]) -> Groups:
        """Layers to work on together: preconditioned by the same ranks, and whole or by rows alike."""
        together = self.batched if self.preconditioner.stacks or self.batched is not None else False
        alike: dict[tuple[int, bool], list[Layer]] = defaultdict(list)
        for layer in layers:
            alike[self.placement.column(layer.name), self.gradients.by_rows(layer)].append(layer)
        return [group for key in sorted(alike) for group in groups_of(alike[key], together)]

    def _update_factors(self, loss_scale: float) -> None:
        self.capture.to_weights(self.layers)
        # Captured output gradients are of each rank's own mean loss, times the loss scale; .grad is free of both.
        unit = 1.0 / (self.comm.world_size * loss_scale)
        window = Window(self.layers, self.capture.buffers, self.gradients, self.placement, unit)
        recorder = self.preconditioner.recorder
        of = recorder.collect(window)
        self.diagnostic.begin_update()
        owned = [layer for layer in self.layers if self.placement.is_inverse_worker(layer.name)]
        records = []
        for batch in self.gradients.batches(self._groups(recorder.ready(owned, self.gradients))):
            states = [[self.states[layer.name] for layer in group] for group in batch]
            computations = [
                self.preconditioner.update_rows(stacked(state, group), statistics)
                for state, group, statistics in zip(states, batch, of(batch), strict=True)
            ]
            done = run_with_shared_sums(computations, partial(self.gradients.sum_, batch))
            for state, group, (new, updated) in zip(states, batch, done, strict=True):
                unstack_(state, new)
                records.append(([layer.name for layer in group], updated))
        for names, updated in self._seen_by_all(records):
            self.diagnostic.record_update(names, updated)
        self.capture.clear()

    def _seen_by_all(self, records: list[tuple[list[str], Updated]]) -> list[tuple[list[str], Updated]]:
        """The records of all owners on every rank, in one small sum; as they are where every rank owns all."""
        if self.placement.world is None:
            return records
        index = {layer.name: i for i, layer in enumerate(self.layers)}
        device, sides = self.layers[0].weight.device, len(self.preconditioner.side_names)
        outcomes, norms = torch.zeros(2, len(index), sides, dtype=torch.float64, device=device)
        for names, updated in records:
            rows = [index[name] for name in names]
            outcomes[rows], norms[rows] = updated.outcomes.double(), updated.norms.double()
        self.placement.sum_([outcomes, norms])
        return [(list(index), Updated(outcomes.long(), norms))]

    def _refresh_inverses(self) -> None:
        """New inverses of the layers that this rank owns; then every rank gets those it works with."""
        self.diagnostic.begin_refresh()
        owned = [layer for layer in self.layers if self.placement.is_inverse_worker(layer.name)]
        records = []
        for group in self._groups(owned):
            states = [self.states[layer.name] for layer in group]
            new, outcomes = self.preconditioner.refresh(stacked(states, group))
            unstack_(states, new)
            records.append(([layer.name for layer in group], Updated(outcomes, torch.zeros_like(outcomes))))
        for names, refreshed in self._seen_by_all(records):
            self.diagnostic.record_refresh(names, refreshed.outcomes)
        shared = self.preconditioner.shared
        if shared is not None:
            self.placement.broadcast_inverses(
                {
                    name: [t for factor in state.values() for key, t in factor.items() if key in shared]
                    for name, state in self.states.items()
                }
            )

    def _transform_gradients(self) -> None:
        """G -> P for every layer that has a gradient, then the rescale; jointly if the rule couples the layers."""
        self.diagnostic.begin_transform()
        joint, waiting = self.preconditioner.rescale.joint, _Waiting([], [], [])
        groups = self._groups([layer for layer in self.layers if self.gradients.has(layer)])
        for batch in self.gradients.batches(groups, joined=self.placement.world is not None):
            waiting.add(batch, *self._move(batch))
            if not joint:
                waiting = self._write(waiting)
        self._write(waiting)

    def _move(self, batch: Groups) -> tuple[list[Joint], list[TransformNorms]]:
        """What this rank stores of the groups' P, and its norms; gathered gradients are free again afterwards."""
        grads = self.gradients.read(batch)
        computations = [self._transform(group, grad) for group, grad in zip(batch, grads, strict=True)]
        moved = run_with_shared_sums(computations, partial(self.gradients.sum_, batch))
        self._broadcast_preconditioned_gradients(batch, grads, moved)
        return self.gradients.own(batch, grads), moved

    def _transform(self, group: list[Layer], grad: Joint) -> RowSums[TransformNorms]:
        if not self.placement.is_gradient_worker(group[0].name):
            return TransformNorms.nothing(grad.weight)  # it comes from a rank that does
        states = [self.states[layer.name] for layer in group]
        state = stacked(states, group, self.preconditioner.shared)
        return (yield from self.preconditioner.transform_rows(state, grad))

    def _broadcast_preconditioned_gradients(
        self, batch: Groups, grads: list[Joint], moved: list[TransformNorms]
    ) -> None:
        """P, and what was measured on it, from the ranks that made it to those that did not."""
        if self.placement.world is None:
            return
        of = {
            layer.name: [*grad.parts(i), *(norms[i : i + 1] for norms in record.tensors())]
            for group, grad, record in zip(batch, grads, moved, strict=True)
            for i, layer in enumerate(group)
        }
        self.placement.broadcast_preconditioned_gradients(
            {layer.name: of[layer.name] for layer in self.layers if layer.name in of}
        )

    def _write(self, waiting: _Waiting) -> _Waiting:
        """Give P its length and store it; then nothing waits."""
        rule = self.preconditioner.rescale
        rates = self._learning_rates(waiting) if rule.joint else []
        scales = rule.scales(waiting.moved, rates) if waiting.groups else None
        for i, (group, grad, record) in enumerate(zip(waiting.groups, waiting.grads, waiting.moved, strict=True)):
            if scales is not None:
                grad.scale_(scales[i])
            self.gradients.write(group, grad)
            self.diagnostic.record_transform([layer.name for layer in group], record)
        return _Waiting([], [], [])

    def _learning_rates(self, waiting: _Waiting) -> list[Tensor]:
        """The scheduled learning rate of each layer's weight, [L] for each group."""
        rate_of = {name: float(self.param_groups[i]["lr"]) for name, i in self.parameter_index.group.items()}
        rates = ([rate_of.get(layer.name, 0.0) for layer in group] for group in waiting.groups)
        return [m.inner.new_tensor(rate) for m, rate in zip(waiting.moved, rates, strict=True)]

    def _whole_state(self, layer: Layer) -> LayerState:
        """A layer's state with what other ranks keep."""
        own = self.states[layer.name]
        if self.placement.world is None:
            return {
                side: {
                    key: self.gradients.gather(layer, tensor) if key in self.preconditioner.row_state else tensor
                    for key, tensor in factor.items()
                }
                for side, factor in own.items()
            }
        whole = self.preconditioner.init(layer)
        for side, factor in own.items() if self.placement.is_inverse_worker(layer.name) else ():
            for key, tensor in factor.items():
                whole[side][key].copy_(tensor)
        self.placement.from_owner(layer.name, [tensor for factor in whole.values() for tensor in factor.values()])
        return whole

    def _restore_states(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill the states with what ``layer_tensors`` gave, as far as this rank keeps it."""
        for layer in self.layers:
            for side, factor in self.states[layer.name].items():
                for key, tensor in factor.items():
                    tensor.copy_(self._own_rows(layer, key, saved[layer.name][f"{side}.{key}"]))


@dataclass(slots=True)
class _Waiting:
    """Groups whose P is computed and not yet stored.

    Args:
        groups: layers of one shape.
        grads: what this rank stores of their P.
        moved: the norms of the whole.
    """

    groups: Groups
    grads: list[Joint]
    moved: list[TransformNorms]

    def add(self, groups: Groups, grads: list[Joint], moved: list[TransformNorms]) -> None:
        self.groups += groups
        self.grads += grads
        self.moved += moved

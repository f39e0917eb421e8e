"""The stages of a step before the base's: update the factors, refresh the inverses, turn G into P."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_soo.engine.capture import Capture, Window
from hf_soo.engine.comm import Communicator
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.gradients import Grad, PlainGradients
from hf_soo.engine.grouping import groups_of, stacked, unstack_
from hf_soo.engine.layers import Layer
from hf_soo.engine.linalg import Moved
from hf_soo.engine.placement import Placement, held, place
from hf_soo.engine.preconditioner import LayerState, Preconditioner, Updated


class Stages:
    """What a PreconditionedOptimizer does to its layers; it sets the attributes."""

    preconditioner: Preconditioner
    layers: list[Layer]
    states: dict[str, LayerState]
    placement: Placement
    placed_world: int
    capture: Capture
    gradients: PlainGradients
    comm: Communicator
    diagnostic: Diagnostics
    batched: bool | None
    param_groups: list[dict[str, Any]]

    def _place(self) -> None:
        """Decide which rank keeps what, and start the states."""
        self.placement, self.placed_world = place(self.layers, self.preconditioner, self.comm), self.comm.world_size
        names = self.preconditioner.shared
        self.states = {
            layer.name: held(self.placement, layer.name, self.preconditioner.init(layer), names)
            for layer in self.layers
        }

    def _groups(self, layers: list[Layer]) -> Iterator[list[Layer]]:
        """Layers to work on together."""
        together = self.batched if self.preconditioner.stacks or self.batched is not None else False
        return groups_of(layers, together)

    def _update_factors(self, loss_scale: float) -> None:
        self.capture.to_weights(self.layers)
        # Captured output gradients are of each rank's own mean loss, times the loss scale; .grad is free of both.
        unit = 1.0 / (self.comm.world_size * loss_scale)
        window = Window(self.layers, self.capture.buffers, self.gradients, self.placement, unit)
        recorder = self.preconditioner.recorder
        of = recorder.collect(window)
        self.diagnostic.begin_update()
        owned = [layer for layer in self.layers if self.placement.owns(layer.name)]
        records = []
        for group in self._groups(recorder.ready(owned, self.gradients)):
            states = [self.states[layer.name] for layer in group]
            new, updated = self.preconditioner.update(stacked(states, group), of(group))
            unstack_(states, new)
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
        owned = [layer for layer in self.layers if self.placement.owns(layer.name)]
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
            self.placement.share_inverses(
                {
                    name: [t for factor in state.values() for key, t in factor.items() if key in shared]
                    for name, state in self.states.items()
                }
            )

    def _transform_gradients(self) -> None:
        """G -> P for every layer that has a gradient, then the rescale; jointly if something couples the layers."""
        self.diagnostic.begin_transform()
        layers = [layer for layer in self.layers if self.gradients.has(layer)]
        columns = sorted({self.placement.column(layer.name) for layer in layers})
        groups = [  # the same on every rank, so that all sum in one order
            group
            for column in columns
            for group in self._groups([r for r in layers if self.placement.column(r.name) == column])
        ]
        coupled = self.preconditioner.rescale.joint or self.placement.world is not None
        for batch in [groups] if coupled and groups else [[group] for group in groups]:
            grads = [self.gradients.read(group) for group in batch]
            moved = [self._transform(group, grad) for group, grad in zip(batch, grads, strict=True)]
            self._share_directions(batch, grads, moved)
            self._rescale(batch, grads, moved)
            for group, grad, record in zip(batch, grads, moved, strict=True):
                self.gradients.write(group, grad)
                self.diagnostic.record_transform([layer.name for layer in group], record)

    def _transform(self, group: list[Layer], grad: Grad) -> Moved:
        if not self.placement.works(group[0].name):
            return Moved.nothing(grad.weight)  # it comes from a rank that does
        states = [self.states[layer.name] for layer in group]
        return self.preconditioner.transform(stacked(states, group, self.preconditioner.shared), grad)

    def _share_directions(self, batch: list[list[Layer]], grads: list[Grad], moved: list[Moved]) -> None:
        """P, and what was measured on it, from the ranks that made it to those that did not."""
        if self.placement.world is None:
            return
        of = {
            layer.name: [*grad.parts(i), *(norms[i : i + 1] for norms in record.tensors())]
            for group, grad, record in zip(batch, grads, moved, strict=True)
            for i, layer in enumerate(group)
        }
        self.placement.share_directions({layer.name: of[layer.name] for layer in self.layers if layer.name in of})

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

    def _whole_state(self, layer: Layer) -> LayerState:
        """A layer's state with what other ranks keep."""
        if self.placement.world is None:
            return self.states[layer.name]
        whole = self.preconditioner.init(layer)
        for side, factor in self.states[layer.name].items() if self.placement.owns(layer.name) else ():
            for key, tensor in factor.items():
                whole[side][key].copy_(tensor)
        self.placement.from_owner(layer.name, [tensor for factor in whole.values() for tensor in factor.values()])
        return whole

"""Lines 1 to 5 of a step: collect and sync the statistics, update the factors, refresh the inverses, turn G into P."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_soo.engine.capture import Capture, Statistics, Window
from hf_soo.engine.comm import Communicator
from hf_soo.engine.diagnostics import Diagnostics
from hf_soo.engine.dtensors import is_dtensor
from hf_soo.engine.gradients import ALL_ROWS, Groups, Joint, RowSums, TransformNorms, run_with_shared_sums
from hf_soo.engine.layers import Layer, groups_of
from hf_soo.engine.pieces.row_shards import RowShards
from hf_soo.engine.placement import Assignment, Grid, Placement, Replicated, make_plan
from hf_soo.engine.preconditioner import LayerState, Preconditioner, Updated, local_state, stacked, unstack_
from hf_soo.engine.rescale import rates_of
from hf_soo.engine.strategy import Strategy, WholeTensors

LearningRates = Mapping[str, float | Tensor]
"""Layer name -> the scheduled learning rate of its weight."""


class Step:
    """What an optimizer does to its layers before the base steps.

    Attributes:
        preconditioner: the method.
        layers, model: the layers it moves, and what they lie in.
        states: layer name -> its factors, as far as this rank keeps them.
        capture: the hooks on the layers.
        strategy: where tensors lie.
        placement: which rank works for which layer.
        comm: the means of communication.
        diagnostics: records of the last step.
        batched: see ``groups_of``; None: one by one for methods whose factors are too large to be stacked.
    """

    def __init__(self, preconditioner: Preconditioner, layers: list[Layer], model: nn.Module) -> None:
        """Start the states, and hook the layers.

        Args:
            preconditioner: the method.
            layers: what it moves.
            model: what they lie in.
        """
        self.preconditioner, self.layers, self.model = preconditioner, layers, model
        self.comm = Communicator()
        self._shares_work = preconditioner.workers(1) is not None
        self.strategy: Strategy = WholeTensors()
        self.diagnostics = Diagnostics(preconditioner.side_names)
        self.batched: bool | None = None
        self.device = layers[0].weight.device if layers else torch.device("cpu")
        self._groups_of: dict[tuple[object, ...], Groups] = {}
        self._follow_sharding()
        self.assign()
        self.capture = Capture(layers, preconditioner.recorder, model)

    # ---- who does what -----------------------------------------------------------------------------------------------

    def assign(self) -> None:
        """Decide which rank keeps what, and start the states.

        Raises:
            ValueError: the method's number of workers does not divide the world size.
        """
        self._started = dist.is_available() and dist.is_initialized()
        self.placed, self.placement = self._layout(), self._placement()
        self.strategy.row_wise = self.preconditioner.row_wise and self.placement.everywhere
        self.strategy.share_work(self.layers, lambda layer: self.preconditioner.flops(layer)[0], self.placement)
        self.states, self._assigned = {}, {}
        self._groups_of.clear()
        for layer in self.layers:
            name = layer.name
            mine = self._assigned[name] = Assignment.of(self.placement, name)
            state = local_state(
                self.preconditioner.init(layer), self.preconditioner.shared, mine.keeps, mine.preconditions
            )
            self.states[name] = {
                side: {key: self._own_rows(layer, key, tensor) for key, tensor in factor.items()}
                for side, factor in state.items()
            }

    def _placement(self) -> Placement:
        """What the method asks for at the current world size."""
        world = self.comm.world_size
        workers = self.preconditioner.workers(world)
        if workers is None or world == workers == 1:
            return Replicated(self.comm)
        costs = {layer.name: self.preconditioner.cost(layer) for layer in self.layers}
        return Grid(self.comm, make_plan(costs, world, workers))

    def _layout(self) -> tuple[object, object]:
        """What the assignment follows from: the ranks that share work, and where gradients lie."""
        return self._shares_work and self.comm.world_size, self.strategy.layout

    def _follow_sharding(self) -> None:
        """Take FSDP2's strategy if it has sharded the model."""
        whole = isinstance(self.strategy, WholeTensors)
        if whole and any(is_dtensor(layer.weight) for layer in self.layers):
            self.strategy = RowShards(self.layers, self.comm)

    def follow_layout(self, method: str, steps: int) -> None:
        """Assign anew if the process group was started, or the model sharded, after construction.

        Args:
            method: the optimizer's name, for the message.
            steps: steps done.

        Raises:
            RuntimeError: that happened after the first step.
        """
        if not self.layers:
            return
        weight = self.layers[0].weight
        self.device = weight.device
        if not steps or type(weight) is not nn.Parameter:
            self._follow_sharding()
        elif self._started == (dist.is_available() and dist.is_initialized()):
            return
        if self.placed == self._layout():
            return
        if steps:
            raise RuntimeError(
                f"{method} was built and has stepped at (workers, gradients) {self.placed}, but it is "
                f"{self._layout()} now; start the process group before the optimizer is built, and shard the "
                "model before its first step."
            )
        self.assign()

    def _own_rows(self, layer: Layer, key: str, tensor: Tensor) -> Tensor:
        """What this rank keeps of a tensor of a layer's state."""
        rows = self.strategy.rows(layer)
        if key not in self.preconditioner.row_state or rows == ALL_ROWS:
            return tensor
        return tensor[rows].clone()

    def _groups(self, layers: list[Layer]) -> Groups:
        """Layers to work on together: preconditioned by the same ranks, and whole or by rows alike."""
        key = (self.batched, self.device, *(layer.name for layer in layers))
        if key not in self._groups_of:
            together = self.batched if self.preconditioner.stacks or self.batched is not None else False
            alike: dict[tuple[int, bool], list[Layer]] = defaultdict(list)
            for layer in layers:
                alike[self._assigned[layer.name].column, self.strategy.by_rows(layer)].append(layer)
            most = self.preconditioner.cpu_stack
            self._groups_of[key] = [group for key in sorted(alike) for group in groups_of(alike[key], together, most)]
        return self._groups_of[key]

    def _kept(self) -> list[Layer]:
        return [layer for layer in self.layers if self._assigned[layer.name].keeps]

    def switch_off(self) -> None:
        """Hooks and factors go; the base goes on alone."""
        self.capture.remove()
        self.layers, self.states = [], {}
        self.diagnostics = Diagnostics(self.preconditioner.side_names)  # the last step's numbers are no news any more

    def leave(self, names: Collection[str]) -> None:
        """Give layers up before the first step: their hooks and factors go."""
        self.capture.remove()
        self.layers = [layer for layer in self.layers if layer.name not in names]
        self.capture = Capture(self.layers, self.preconditioner.recorder, self.model)
        self.assign()

    # ---- the five lines ----------------------------------------------------------------------------------------------

    def update(self, loss_scale: float) -> None:
        """Lines 1 to 3: take the window's statistics, sum them over ranks, and update each layer's factors.

        Args:
            loss_scale: the factor on the captured output gradients.
        """
        self.capture.to_weights(self.layers)
        # Captured output gradients are of each rank's own mean loss, times the loss scale; .grad is free of both.
        unit = 1.0 / (self.comm.world_size * loss_scale)
        window = Window(self.layers, self.capture.buffers, self.strategy, self.placement, unit)
        recorder = self.preconditioner.recorder
        statistics_of = recorder.collect(window)
        self.diagnostics.begin_update()
        records = []
        for batch in self.strategy.batches(self._groups(recorder.ready(self._kept(), self.strategy))):
            records += self._update(batch, statistics_of(batch))
        for names, updated in self._seen_by_all(records):
            self.diagnostics.record_update(names, updated)
        self.capture.clear()

    def _update(self, batch: Groups, statistics: Sequence[Statistics]) -> list[tuple[list[str], Updated]]:
        """The factors of a portion of the layers."""
        states = [[self.states[layer.name] for layer in group] for group in batch]
        computations = [
            self.preconditioner.update_rows(stacked(state, self.device), seen)
            for state, group, seen in zip(states, batch, statistics, strict=True)
        ]
        sum_ = partial(self.strategy.sum_, batch) if self.strategy.in_pieces else None
        done = run_with_shared_sums(computations, sum_)
        for state, (new, _) in zip(states, done, strict=True):
            unstack_(state, new)
        return [([layer.name for layer in group], updated) for group, (_, updated) in zip(batch, done, strict=True)]

    def _seen_by_all(self, records: list[tuple[list[str], Updated]]) -> list[tuple[list[str], Updated]]:
        """The records of all inverse workers on every rank, in one small sum; as they are where every rank is one."""
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

    def refresh(self) -> None:
        """Line 4: new inverses of the layers that this rank keeps; then every rank gets those it works with."""
        self.diagnostics.begin_refresh()
        records = []
        for group in self._groups(self._kept()):
            states = [self.states[layer.name] for layer in group]
            new, outcomes = self.preconditioner.refresh(stacked(states, self.device))
            unstack_(states, new)
            records.append(([layer.name for layer in group], Updated(outcomes, torch.zeros_like(outcomes))))
        for names, refreshed in self._seen_by_all(records):
            self.diagnostics.record_refresh(names, refreshed.outcomes)
        shared = self.preconditioner.shared
        if shared is not None:
            self.placement.broadcast_inverses(
                {
                    name: [t for factor in state.values() for key, t in factor.items() if key in shared]
                    for name, state in self.states.items()
                }
            )

    def transform(self, rates: LearningRates) -> None:
        """Line 5: G -> P for every layer that has a gradient, then its length, by ``rates`` if layers are coupled."""
        rule, waiting, done = self.preconditioner.rescale, [], []
        groups = self._groups([layer for layer in self.layers if self.strategy.has(layer)])
        for batch, grads in self.strategy.portions(groups, joined=self.placement.world is not None):
            waiting += self._transform(batch, grads)
            del grads  # what was gathered is free again before the next portion is
            if not rule.joint:
                done += self._write(waiting, rates)
                waiting = []
        done += self._write(waiting, rates)
        self.diagnostics.record_transform(done)

    def _transform(self, batch: Groups, grads: Sequence[Joint | None]) -> list[_Transformed]:
        """What this rank stores of the groups' P, and the norms of the whole."""
        sum_ = partial(self.strategy.sum_, batch) if self.strategy.in_pieces else None
        mine = [(group, grad) for group, grad in zip(batch, grads, strict=True) if grad is not None]
        products = [self._product(*each) for each in mine]
        if self.preconditioner.measures:  # before the first of them begins
            run_with_shared_sums([grad.measure_() for _, grad in mine], sum_)
        norms = run_with_shared_sums(products, sum_)
        for each, (_, grad) in zip(norms, mine, strict=True):
            each.unit = grad.unit
        if self.placement.world is not None and not self.strategy.shares_work:
            self._broadcast(mine, norms)
        own = [grad for _, grad in mine]
        if self.strategy.in_pieces:
            own, norms = self.strategy.own(batch, grads, norms)
        return [_Transformed(*each) for each in zip(batch, own, norms, strict=True)]

    def _product(self, group: list[Layer], grad: Joint) -> RowSums[TransformNorms]:
        if not self._assigned[group[0].name].preconditions:
            return _made_elsewhere(grad)
        states = [self.states[layer.name] for layer in group]
        return self.preconditioner.transform_rows(stacked(states, self.device, self.preconditioner.shared), grad)

    def _broadcast(self, batch: list[tuple[list[Layer], Joint]], norms: list[TransformNorms]) -> None:
        """P, and what was measured on it, from the gradient workers to the other ranks."""
        of = {
            layer.name: [*grad.parts(i), *(norm[i : i + 1] for norm in record.tensors())]
            for (group, grad), record in zip(batch, norms, strict=True)
            for i, layer in enumerate(group)
        }
        self.placement.broadcast_preconditioned_gradients(
            {layer.name: of[layer.name] for layer in self.layers if layer.name in of}
        )

    def _write(self, ready: list[_Transformed], rates: LearningRates) -> list[tuple[list[str], TransformNorms]]:
        """Give P its length and store it; the layers' names and norms, group by group."""
        rule, norms = self.preconditioner.rescale, [each.norms for each in ready]
        learning_rates = [
            rates_of([rates.get(layer.name, 0.0) for layer in each.group], each.norms.inner)
            for each in (ready if rule.joint else ())
        ]
        scales = rule.scales(norms, learning_rates) if ready else None
        for i, each in enumerate(ready):
            each.grad.scale_(None if scales is None else scales[i])
            self.strategy.write(each.group, each.grad)
        return [([layer.name for layer in each.group], each.norms) for each in ready]

    # ---- states, for checkpoints -------------------------------------------------------------------------------------

    def distances(self) -> Iterator[tuple[str, list[float]]]:
        """|F - I| of each side of the layers that this rank preconditions, by layer name."""
        for layer in self.layers:
            if self._assigned[layer.name].preconditions:
                state = stacked([self.states[layer.name]], self.device, self.preconditioner.shared)
                yield layer.name, self.preconditioner.distances(state)[0].tolist()

    def whole_state(self, layer: Layer) -> LayerState:
        """A layer's state with what other ranks keep; every rank must call it."""
        own = self.states[layer.name]
        if self.placement.world is None:
            return {
                side: {
                    key: self.strategy.gather(layer, tensor) if key in self.preconditioner.row_state else tensor
                    for key, tensor in factor.items()
                }
                for side, factor in own.items()
            }
        whole = self.preconditioner.init(layer)
        for side, factor in own.items() if self._assigned[layer.name].keeps else ():
            for key, tensor in factor.items():
                whole[side][key].copy_(tensor)
        self.placement.from_owner(layer.name, [tensor for factor in whole.values() for tensor in factor.values()])
        return whole

    def restore_states(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill the states, as far as this rank keeps them, from layer -> "side.tensor" -> the whole tensor."""
        for layer in self.layers:
            for side, factor in self.states[layer.name].items():
                for key, tensor in factor.items():
                    tensor.copy_(self._own_rows(layer, key, saved[layer.name][f"{side}.{key}"]))


@dataclass(slots=True)
class _Transformed:
    """Layers of one shape whose P is computed and not yet stored: this rank's part of it, and norms of the whole."""

    group: list[Layer]
    grad: Joint
    norms: TransformNorms


def _made_elsewhere(grad: Joint) -> RowSums[TransformNorms]:
    """What a rank has of P that comes from another one."""
    return TransformNorms.nothing(grad.weight)
    yield []

"""Where tensors lie: one object that reads and writes gradients, keeps the base's state and knows whole norms.

``WholeTensors`` is one process, DistributedDataParallel and ZeRO-0; ``RowShards`` (row_shards.py) is FSDP2, and
``ZeroFragments`` (integrations/zero.py) is ZeRO-1, 2 and 3. Tensor parallelism would be one more of them.

A base's state is kept in whole tensors by parameter name, so that a run can go on with other ranks than it had:

    {"groups": [{"lr": ..., "betas": ...}, ...], "state": {parameter name: {"exp_avg": tensor, "step": tensor, ...}}}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.engine import dtensors
from hf_soo.engine.gradients import ALL_ROWS, Groups, Joint, TransformNorms
from hf_soo.engine.layers import Layer, joined
from hf_soo.engine.pieces.exchange import Cut
from hf_soo.engine.placement import Placement

Entry = dict[str, Any]
"""The state of one parameter in a base optimizer: {"exp_avg": tensor, "step": tensor, ...}."""

Names = Sequence[Sequence[str]]
"""The names of the parameters of each group of the base."""

Value = Callable[[dict[str, Any], Tensor, "slice | None"], Tensor]
"""(group, the tensor that the base steps on, a parameter's place in it as `LocalGradient.cut`) -> this rank's part."""


class Partition(Protocol):
    """How the tensors that an optimizer steps on make up whole parameters; LAMB needs their norms.

    All pieces of a whole tensor are stepped on in the same call of ``step``, on all ranks.
    """

    tensors: int
    """The number of whole tensors, over all ranks and groups."""

    def parts_of(self, param: Tensor) -> Sequence[Any]:
        """What a flat parameter consists of, in order, padding left out: ``Fragment``s."""

    def sum_norms_(self, values: Tensor) -> None:
        """Sum values over the ranks that hold pieces, in place; called once by every rank in every step."""

    def grad_norm(self) -> Tensor:
        """‖g‖ over all whole tensors of all groups and ranks, 0-d; for the clip.

        Of the gradients as ``step`` finds them (unscaled, after a clip outside), and the same in every call that makes
        up one step: stepping a group overwrites its gradients, so this is measured before the first.
        """


class FlatPartition(Partition, Protocol):
    """What of which whole tensors lies in flat ones; Muon makes matrices of it."""

    def matrices_in(self, param: Tensor) -> Sequence[tuple[Cut, slice]]:
        """The whole tensors of which a flat parameter has pieces on any rank, and where this rank's lie in it.

        In one order on all ranks.
        """


@dataclass(frozen=True, slots=True)
class LocalGradient:
    """What of a gradient lies on this rank, and where the base keeps what belongs to it.

    Args:
        group: of the base, with its settings.
        param: the tensor that the base steps on, by which its state is known.
        weight: this rank's part of it.
        grad: this rank's part of the gradient, where it is stored.
        cut: where it lies in a flat ``param`` of several pieces; None: it is all that this rank has of ``param``.
        scale: the factor on the gradient as it is stored.
        moved: whether the method moves it.
    """

    group: dict[str, Any]
    param: Tensor
    weight: Tensor
    grad: Tensor
    cut: slice | None = None
    scale: float = 1.0
    moved: bool = True

    def of(self, state: Tensor) -> Tensor:
        """The part of a tensor of the base's state, as a view."""
        return dtensors.local(state) if self.cut is None else state.view(-1)[self.cut]


class Strategy(ABC):
    """What every strategy answers. Every rank makes the same calls in the same order: some communicate.

    Attributes:
        in_pieces: whether each rank stores a piece of every gradient.
        layout: what distinguishes it from others; factors are placed anew when it changes before the first step.
        row_wise: whether the method can work on rows of a gradient; the step says so.
        shares_work: whether each gradient in pieces that are no rows is transformed by one rank, and comes back.
        external_step: whether somebody else takes the step (DeepSpeed's engine).
        partition: how the base's tensors make up whole parameters, where they are flat pieces of several.
    """

    layout: str
    in_pieces = False
    row_wise = False
    shares_work = False
    external_step = False
    partition: FlatPartition | None = None

    @property
    def loss_scale(self) -> float:
        """The factor on the gradients as they are stored."""
        return 1.0

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def has(self, layer: Layer) -> bool:
        """Whether this step produced a gradient for the layer's weight, and for its bias if it trains one."""
        return layer.has_gradients

    def by_rows(self, layer: Layer) -> bool:
        """Whether ``read`` gives the rows of this rank alone."""
        return False

    def rows(self, layer: Layer) -> slice:
        """Those rows; all where ``read`` gives the whole gradient."""
        return ALL_ROWS

    @abstractmethod
    def batches(self, groups: Groups, joined: bool = False) -> list[Groups]:
        """The groups in portions that are read, transformed and written one after the other.

        Few are better where a portion costs messages whatever its size (``joined``).
        """

    @abstractmethod
    def read(self, groups: Groups) -> list[Joint]:
        """The groups' gradients in the accumulation dtype.

        A single layer in that dtype may be a view: changing it in place writes the gradient.
        """

    def share_work(self, layers: Sequence[Layer], cost: Callable[[Layer], float], placement: Placement) -> None:
        """Deal layers in pieces that are no rows, by the cost of G -> P, to the ranks that can transform them."""
        self.shares_work = False

    def portions(self, groups: Groups, joined: bool) -> Iterator[tuple[Groups, Sequence[Joint | None]]]:
        """``batches`` with their gradients, each read when it is its turn; None for what another rank transforms."""
        for batch in self.batches(groups, joined):
            yield batch, self.read(batch)

    @abstractmethod
    def write(self, group: list[Layer], grad: Joint) -> None:
        """Store P, or this rank's part of it as ``own`` gave it, in the dtype that is stored."""

    @abstractmethod
    def biases(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Whole gradients of the layers' biases in the accumulation dtype, [d_out] each."""

    def own(
        self, groups: Groups, grads: Sequence[Joint | None], norms: list[TransformNorms]
    ) -> tuple[list[Joint], list[TransformNorms]]:
        """What of the groups' P this rank stores, and all norms; from P that it was given whole or by rows."""
        return [grad for grad in grads if grad is not None], norms

    @abstractmethod
    def sum_(self, groups: Groups, tensors: Sequence[Tensor]) -> None:
        """Sum what was computed from the groups' rows over all rows, in place. For pieces alone."""

    def gather(self, layer: Layer, rows: Tensor) -> Tensor:
        """A tensor [rows of this rank, ...] of a layer read by rows, with the rows of all ranks."""
        return rows

    def local_gradients(self, base: Optimizer, names: Names, moved: Collection[str]) -> Iterator[LocalGradient]:
        """This rank's part of every gradient, trained by the method or not.

        Args:
            base: the optimizer.
            names: of the parameters of each group.
            moved: the names of those that the method moves.
        """
        for group, mine in zip(base.param_groups, names, strict=True):
            for name, param in zip(mine, group["params"], strict=True):
                if param.grad is not None:
                    weight, grad = dtensors.local(param.detach()), dtensors.local(param.grad)
                    yield LocalGradient(group, param, weight, grad, moved=name in moved)

    def model_parameters(self, base: Optimizer, names: Names) -> list[list[tuple[str, Tensor]]]:
        """The model's own parameters of each group of the base, with their names."""
        groups = zip(names, base.param_groups, strict=False)  # whose lengths are checked afterwards
        return [list(zip(mine, group["params"], strict=False)) for mine, group in groups]

    def weights(self, base: Optimizer, names: Names, value: Value) -> Iterator[tuple[Tensor, Tensor]]:
        """(where this rank keeps a weight that the model computes with, what shall stand there).

        Every rank must go through all, and call ``forget_gathered`` when it has written them.

        Args:
            base: the optimizer.
            names: of the parameters of each group.
            value: what shall stand there.
        """
        for group in base.param_groups:
            for param in group["params"]:
                yield dtensors.local(param.detach()), value(group, param, None)

    def forget_gathered(self, model: nn.Module) -> None:
        """Weights were written where they are kept: what ranks have gathered of them for a pass is old (FSDP2)."""
        for module in model.modules():
            getattr(module, "reshard", lambda: None)()

    # ---- the base's state --------------------------------------------------------------------------------------------

    def base_state(self, base: Optimizer, names: Names, keep: bool) -> dict[str, Any]:
        """The base's state for a checkpoint, in whole tensors by parameter name; every rank must call it.

        A rank that does not ``keep`` it holds one parameter's state at a time, and returns none.
        """
        state = {name: entry for name, entry in self.base_entries(base, names) if keep}
        return {"groups": [_settings(group) for group in base.param_groups], "state": state}

    def load_base_state(self, base: Optimizer, names: Names, saved: Mapping[str, Any]) -> None:
        """Continue from the ``base_state`` of a run under any strategy.

        Args:
            base: the optimizer.
            names: of the parameters of each group.
            saved: what was saved.

        Raises:
            ValueError: the groups or the parameters differ.
        """
        mine = {name for group in names for name in group}
        missing, unknown = sorted(mine - set(saved["state"])), sorted(set(saved["state"]) - mine)
        if missing or unknown or len(saved["groups"]) != len(base.param_groups):
            raise ValueError(
                f"the checkpoint's optimizer has {len(saved['groups'])} groups, this one {len(base.param_groups)}; "
                f"missing {missing[:3]} ({len(missing)}), unknown {unknown[:3]} ({len(unknown)}); use the same model "
                "and optimizer."
            )
        for group, values in zip(base.param_groups, saved["groups"], strict=True):
            group.update(values)
        self.restore_base_entries(base, names, saved["state"])

    def base_entries(self, base: Optimizer, names: Names) -> Iterator[tuple[str, Entry]]:
        """(name, state) of each parameter, in whole tensors on the CPU; every rank must go through all."""
        for name, parameter in _named(base, names).items():
            entry = base.state.get(parameter, {})
            yield name, {key: on_cpu(dtensors.whole(v) if isinstance(v, Tensor) else v) for key, v in entry.items()}

    def restore_base_entries(self, base: Optimizer, names: Names, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep this rank's part of what ``base_entries`` gave, under any strategy."""
        for name, parameter in _named(base, names).items():
            base.state[parameter] = {key: _like(value, parameter) for key, value in saved[name].items()}


class WholeTensors(Strategy):
    """Gradients that are whole, ordinary tensors: one process, DistributedDataParallel, ZeRO-0."""

    layout = "whole"

    def batches(self, groups: Groups, joined: bool = False) -> list[Groups]:
        """One by one: in cache."""
        return [groups] if joined else [[group] for group in groups]

    def read(self, groups: Groups) -> list[Joint]:
        """See ``Strategy``."""
        grads = [Joint(*joined([layer.gradients() for layer in group])) for group in groups]
        for grad in grads:
            grad.waits = len(grad.weight) == 1 and grad.weight.device.type == "cpu"
        return grads

    def write(self, group: list[Layer], grad: Joint) -> None:
        """See ``Strategy``."""
        for i, layer in enumerate(group):
            layer.set_gradients(grad.weight[i], None if grad.bias is None else grad.bias[i])

    def sum_(self, groups: Groups, tensors: Sequence[Tensor]) -> None:
        """Nothing: all rows are here."""

    def biases(self, layers: Sequence[Layer]) -> list[Tensor]:
        """See ``Strategy``."""
        return [bias for layer in layers if (bias := layer.bias_gradient()) is not None]


def _named(base: Optimizer, names: Names) -> dict[str, Tensor]:
    """Name -> parameter of a base that steps on the model's own parameters, or on DTensors of them."""
    groups = zip(base.param_groups, names, strict=True)
    return {name: p for group, mine in groups for name, p in zip(mine, group["params"], strict=True)}


def on_cpu(value: Any) -> Any:
    """A value of a state, as it is kept in a checkpoint."""
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """A saved value where the parameter is, and cut as it is if it has its rows."""
    if not isinstance(value, Tensor):
        return value
    if dtensors.is_dtensor(parameter) and value.shape[:1] == parameter.shape[:1]:
        return dtensors.placed_as(value, parameter)
    return value.to(parameter.device, copy=True)


def from_state_dict(saved: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Torch's ``Optimizer.state_dict()`` of one process or DDP as ``Strategy.base_state`` has it.

    Args:
        saved: the state dict; parameters are known by their number.
        names: of the parameters of each group.

    Raises:
        ValueError: the groups have other sizes.
    """
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(mine) for mine in names]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes} parameters, this one of {[len(m) for m in names]}; use "
            "the same model and optimizer."
        )
    numbers = (number for group in saved["param_groups"] for number in group["params"])
    flat = [name for mine in names for name in mine]
    return {
        "groups": [_settings(group) for group in saved["param_groups"]],
        "state": {name: saved["state"].get(number, {}) for number, name in zip(numbers, flat, strict=True)},
    }


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def mend_steps(state: Mapping[Any, dict[str, Any]]) -> None:
    """Make step counts the tensors that torch's kernels take, in place; an older version wrote numbers."""
    for parameter, entry in state.items():
        if isinstance(entry.get("step"), (int, float)):
            entry["step"] = torch.tensor(float(entry["step"]), device=parameter.device)

"""LAMB: layer-wise adaptive moments (You et al., ICLR 2020), with the semantics of NVIDIA apex's FusedLAMB.

    g ← g / max(1, ‖g‖_all / max_grad_norm)            one norm over every group
    m ← β₁m + (1-β₁)g        v ← β₂v + (1-β₂)g²
    u = (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε) + κw      decay inside the norm
    r = ‖w‖ / ‖u‖,  1 where a norm is 0 or κ = 0       one ratio per tensor
    w ← w - η r u

| paper | name here | apex's name |
|---|---|---|
| η | `lr` | `lr` |
| β₁, β₂ | `betas` | `betas` |
| ε | `eps` | `eps` |
| λ (κ above) | `weight_decay` | `weight_decay` |
| φ | the identity, unclamped | the same |
| - | `max_grad_norm` | `max_grad_norm` |
| - | `always_adapt` | `use_nvlamb` |

Deviation: `max_grad_norm=None` switches the clip off (apex's 0 would zero every gradient, so 0 is refused here);
half-precision parameters keep fp32 moments; the step counter is kept per parameter.

How it is fast: a tensor is walked in pieces (chunks.py) that stay in cache while all of the above happens to them. A
piece's gradient goes to scratch memory, over the clip, and -κw takes its place, which torch's fused Adam kernel turns
into -u; there it waits until the tensor's ratio is known. **So `.grad` is scratch space: after `step` its content is
unspecified** (as with apex).

Where ranks hold pieces of a parameter (`Partition`), all pieces are turned into -u
first, and one all-reduce makes their norms those of whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_soo.engine.chunks import (
    Slot,
    bundles,
    piece_norms,
    piece_size,
    slots_of,
    total_norm,
    whole_norms,
    wide_dtype,
)
from hf_soo.engine.flops import BaseWork
from hf_soo.engine.pieces.row_shards import Job, Share, check_placement, divide
from hf_soo.engine.strategy import Partition, mend_steps
from hf_soo.optimizers.ranges import check_arguments

Turn = Callable[[list[Slot], list[Tensor], dict[str, Any]], None]
"""Turns -κw, which the gradients of a piece hold, into -u by what they held before, with the group's settings."""


@dataclass(slots=True)
class _Update:
    """A bundle whose gradients hold -u; the norms are None where no ratio is wanted."""

    group: dict[str, Any]
    slots: list[Slot]
    pieces: list[list[Slot]]
    norms: Tensor | None  # ‖w‖ and ‖u‖ of the slots, [2, slots]


class Lamb(Optimizer):
    """LAMB over per-tensor trust ratios; no host synchronisation in `step`."""

    partition: Partition | None = None
    """What the parameters are pieces of, if they are flat partitions; copies of the optimizer do not keep it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        always_adapt: bool = False,
    ) -> None:
        """Validate the hyperparameters and set up the groups.

        Args:
            params: parameters or parameter groups.
            lr: step size η; the trust ratio multiplies it.
            betas: decay of the first and second moment.
            eps: added to √v̂.
            weight_decay: κ, decoupled from the moments but inside the trust ratio. Groups with 0 take plain Adam steps.
            max_grad_norm: clip the gradient's norm over all groups to this; None: no clip. Do not clip outside too.
            always_adapt: apply the trust ratio to groups without weight decay too.

        Raises:
            ValueError: if a value is outside its range.
        """
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, always_adapt=always_adapt)
        check_arguments(Lamb, {**defaults, "max_grad_norm": max_grad_norm})
        # The clip spans the groups: like apex it is read from the defaults, which a pickled optimizer keeps.
        super().__init__(params, {**defaults, "max_grad_norm": max_grad_norm})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose own values have been validated.

        Raises:
            ValueError: a value is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        if any(param.is_complex() for param in self.param_groups[-1]["params"]):
            raise ValueError("Lamb: a parameter of complex numbers is not supported; use base='adamw' or 'sgd'.")
        check_placement(self.param_groups[-1]["params"])
        check_arguments(Lamb, {key: value for key, value in self.param_groups[-1].items() if key != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `.grad` is overwritten.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        divided = self.divided()
        excess = self.clip_divisor(divided)
        for group in self.param_groups:
            given = [self.state_of(param)["step"] for param in group["params"] if param.grad is not None]
            if given:
                torch._foreach_add_(given, 1)
        self.move(_adam_, divided, excess)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the moments keep the dtype they were saved in (torch casts them to the parameter's)."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        owned = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, owned, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bring a state up to date that an older version has written."""
        super().__setstate__(state)
        mend_steps(self.state)
        for group in self.param_groups:
            group.setdefault("always_adapt", False)

    def divided(self) -> tuple[list[Job], list[Share]]:
        """What is stepped on: whole parameters that have a gradient, and shares of others."""
        return divide(self.param_groups, self.partition)

    @staticmethod
    def adapts(group: dict[str, Any]) -> bool:
        """Whether a group's steps take the trust ratio."""
        return bool(group["weight_decay"] != 0 or group["always_adapt"])

    def minimal_work(self, param: Tensor, group: dict[str, Any]) -> BaseWork:
        """|g| of all before the moments; |u| before the weights: u is written and read, and w read again."""
        clips = self.defaults["max_grad_norm"] is not None
        return BaseWork(again=clips + (3 if self.adapts(group) else 0))

    def clip_divisor(self, divided: tuple[list[Job], list[Share]]) -> Tensor | None:
        """max(1, ‖g‖_all / max_grad_norm) as a 0-dim tensor, or None without a clip."""
        limit = self.defaults["max_grad_norm"]
        if limit is None:
            return None
        whole, shares = divided
        norms = [norm for job in whole for norm in piece_norms([p.grad for p in job.params if p.grad is not None])]
        norms += [share.partition.grad_norm() for share in shares]
        if not norms:
            return None
        total = total_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return torch.clamp(total / limit, min=1.0)

    def move(self, turn: Turn, divided: tuple[list[Job], list[Share]], excess: Tensor | None = None) -> None:
        """W ← W - η r u of the gradients over ``excess`` (None: 1); ``turn`` says what u is beside κw."""
        whole, shares = divided
        for job in whole:
            for update in self._updates(job, turn, excess):
                _apply_(update, None if update.norms is None else _trust_ratio(update.norms))
        for share in shares:
            self._step_pieces(share, turn, excess)

    def _step_pieces(self, share: Share, turn: Turn, excess: Tensor | None) -> None:
        """Step pieces of parameters: all updates, then the sum over ranks, then the ratios."""
        updates = [update for job in share.jobs for update in self._updates(job, turn, excess, share.partition)]
        known = [(update.slots, update.norms) for update in updates if update.norms is not None]
        ratios = _trust_ratio(whole_norms(known, share.partition, share.prototype)).unbind()
        for update in reversed(updates):
            adapt = update.norms is not None
            _apply_(update, torch.stack([ratios[slot.tensor] for slot in update.slots]) if adapt else None)

    def _updates(
        self, job: Job, turn: Turn, excess: Tensor | None, partition: Partition | None = None
    ) -> Iterator[_Update]:
        """Update moments bundle by bundle, each when it is asked for: what is applied at once is still in cache."""
        size = piece_size(job.params[0])
        scratch = torch.empty(size, dtype=wide_dtype(job.params[0]), device=job.params[0].device)
        for slots, pieces in bundles(slots_of(job.params, self.state, job.ranks is not None, partition), size):
            found = [_update_(piece, scratch, job.group, turn, excess) for piece in pieces]
            norms = [norm for norm in found if norm is not None]
            total = torch.linalg.vector_norm(torch.stack(norms), dim=0) if norms else None
            yield _Update(job.group, slots, pieces, total)

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """A parameter's step count and moments, zeros where it has none yet."""
        state: dict[str, Tensor] = self.state[param]
        if not state:
            dtype = wide_dtype(param)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):  # like the parameter, cut as it is
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        return state


def _update_(
    piece: list[Slot], scratch: Tensor, group: dict[str, Any], turn: Turn, excess: Tensor | None
) -> Tensor | None:
    """Leave -u of a piece in its gradients.

    Args:
        piece: slots.
        scratch: at least as many elements as the piece.
        group: the hyperparameters.
        turn: see ``Turn``.
        excess: what the gradients are divided by first; None: 1.

    Returns:
        ‖w‖ and ‖u‖ of each slot, [2, slots], or None where no ratio is wanted.
    """
    params, grads = [slot.param for slot in piece], [slot.grad for slot in piece]
    sizes = [param.numel() for param in params]
    given = scratch[: sum(sizes)]
    taken = list(torch.split(given, sizes))
    if len(piece) == 1 and excess is not None:
        torch.div(grads[0], excess.to(given.device), out=given)
    else:
        torch._foreach_copy_(taken, grads)
        if excess is not None:
            given.div_(excess.to(given.device))
    adapt = Lamb.adapts(group)
    norms: list[Tensor] = []
    if adapt:
        norms += torch._foreach_norm(params, dtype=given.dtype)  # ‖w‖
        _scale(params, -group["weight_decay"], grads)
    else:
        torch._foreach_zero_(grads)
    turn(piece, taken, group)
    if adapt:
        norms += torch._foreach_norm(grads)  # ‖u‖
    return torch.stack(norms).view(2, len(piece)) if adapt else None


def _scale(tensors: list[Tensor], factor: float, out: list[Tensor]) -> None:
    """The tensors times a factor, in the dtype of ``out``; a large one in one pass."""
    if len(tensors) == 1 and tensors[0].dtype == out[0].dtype:
        torch.mul(tensors[0], factor, out=out[0])
    else:
        torch._foreach_copy_(out, tensors)
        torch._foreach_mul_(out, factor)


def _adam_(piece: list[Slot], grads: list[Tensor], group: dict[str, Any]) -> None:
    """-κw ← -κw - m̂ / (√v̂ + ε) with the moments updated."""
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [slot.grad for slot in piece],
        grads,
        [slot.exp_avg for slot in piece],
        [slot.exp_avg_sq for slot in piece],
        [],
        [slot.step for slot in piece],
        lr=1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _apply_(update: _Update, ratios: Tensor | None) -> None:
    """W ← w - η r u over the pieces of one bundle, the latest first: it is still in cache.

    Args:
        update: its gradients hold -u.
        ratios: r of each slot, [slots]; None: 1.
    """
    lr = update.group["lr"]
    rates = None if ratios is None else (lr * ratios).unbind()
    for piece in reversed(update.pieces):
        if rates is None:
            torch._foreach_add_([slot.param for slot in piece], [slot.grad for slot in piece], alpha=lr)
            continue
        for slot, rate in zip(piece, rates, strict=True):
            slot.param.addcmul_(slot.grad, rate)
    for slot in update.slots:
        if not slot.home.is_contiguous():
            slot.write_back()


def _trust_ratio(norms: Tensor) -> Tensor:
    """‖w‖ / ‖u‖ of each tensor, 1 where either is 0: [2, tensors] -> [tensors]."""
    w_norm, u_norm = norms
    return torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)

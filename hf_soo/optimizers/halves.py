"""A base's step cut in two, so that a method acts on the base's direction instead of on the gradient.

    take     the base's moments take the gradient in, and `.grad` becomes its direction D
    G -> P   the method, in place in `.grad`, with the factors of this step
    move     the weights move by what `.grad` holds then

    base    D of "momentum"                       D of "update"      move
    SGD     m ← μm + g + κw; m, or g + κw + μm    -                  w ← w - ηD
    Muon    B ← μB + (1-μ)g; B, or (1-μ)g + μB    polar factor       W ← (1-ηκ)W - η√.. polar(D), or D as it is
    AdamW   m ← β₁m + (1-β₁)g, and v from g       m̂ / (√v̂ + ε)       w ← (1-ηκ)w - ηD̂ / (√v̂ + ε), or - ηD
    LAMB    as AdamW's, of the clipped g          m̂ / (√v̂ + ε)       u = D̂ / (√v̂ + ε) + κw, or D + κw, by its ratio

"numerator" leaves the denominator to the method, and P is moved along as the update is: D = m̂ of AdamW and LAMB (for
parameters that the method does not move the update), m of SGD, B of Muon, whose polar factor is P's.

A hat divides by 1 - βᵗ. State, checkpoints and settings are the base's own: a run may change from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_soo.engine.chunks import Slot
from hf_soo.engine.dtensors import local
from hf_soo.engine.strategy import LocalGradient
from hf_soo.optimizers.lamb import Lamb
from hf_soo.optimizers.muon import Muon

ApplyTo = Literal["gradient", "momentum", "update", "numerator"]


class Halves:
    """``take`` and ``move`` of SGD, AdamW and Muon; every parameter of the base goes through both."""

    def __init__(self, base: Optimizer, place: ApplyTo) -> None:
        """Cut a base's step at a place, any but "gradient"."""
        self.base, self.place = base, place

    def take(self, gradients: Iterable[LocalGradient]) -> None:
        """The gradients become directions.

        Args:
            gradients: all, as far as they lie on this rank.
        """
        begun: set[int] = set()
        for piece in gradients:
            state = self.base.state[piece.param]
            first = id(piece.param) not in begun  # of the pieces that lie in one flat tensor
            begun.add(id(piece.param))
            grad = piece.grad if piece.scale == 1.0 else piece.grad / piece.scale
            direction = self._direction(piece, state, grad, first)
            piece.grad.copy_(direction if piece.scale == 1.0 else direction * piece.scale)

    def move(self) -> None:
        """The weights move by what the gradients hold."""
        for group in self.base.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group)

    def _direction(self, piece: LocalGradient, state: dict[str, Tensor], grad: Tensor, first: bool) -> Tensor:
        raise NotImplementedError

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class _SgdHalves(Halves):
    """torch.optim.SGD."""

    def _direction(self, piece: LocalGradient, state: dict[str, Tensor], grad: Tensor, first: bool) -> Tensor:
        group = piece.group
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(piece.param)
        buffer = piece.of(state["momentum_buffer"])
        grad = grad.to(buffer.dtype).add(piece.weight, alpha=group["weight_decay"])
        buffer.mul_(group["momentum"]).add_(grad)
        return grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        param.add_(param.grad, alpha=-group["lr"])


class _AdamHalves(Halves):
    """Adam's moments."""

    def _direction(self, piece: LocalGradient, state: dict[str, Tensor], grad: Tensor, first: bool) -> Tensor:
        if not state:
            where = piece.param.device if piece.group.get("fused") else torch.device("cpu")  # as torch
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(piece.param), torch.zeros_like(piece.param)
        return _adam_direction(piece, state, grad, first, self.place)

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state, direction = self.base.state[param], local(param.grad)
        weight = local(param.detach())
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        if self.place == "momentum":
            m, v = local(state["exp_avg"]), local(state["exp_avg_sq"])
            direction = _divided(direction.to(m.dtype), v, state["step"], group)
        weight.add_(direction, alpha=-group["lr"])


class _AdamWHalves(_AdamHalves):
    """torch.optim.AdamW, whose own kernel steps on what the method leaves to it, where the rest is cut apart anyway."""

    def take(self, gradients: Iterable[LocalGradient]) -> None:
        """See ``Halves``."""
        pieces = list(gradients)
        apart = self.place == "numerator" and all(piece.cut is None for piece in pieces)
        self._left = {piece.param for piece in pieces if apart and not piece.moved}
        super().take(piece for piece in pieces if piece.param not in self._left)

    def move(self) -> None:
        """See ``Halves``."""
        params = [(param, group) for group in self.base.param_groups for param in group["params"]]
        grads = {param: param.grad for param, _ in params if param.grad is not None and param not in self._left}
        for param, group in params:
            if param in grads:
                self._move(param, group)
        if self._left:
            step = type(self.base).step
            for param in grads:
                param.grad = None
            # without its hooks, which are for a whole step
            (step.__wrapped__ if getattr(step, "hooked", False) else step)(self.base)  # type: ignore[attr-defined]
            for param, grad in grads.items():
                param.grad = grad


class _MuonHalves(_AdamHalves):
    """Muon on its matrices; AdamW on the rest."""

    base: Muon

    def take(self, gradients: Iterable[LocalGradient]) -> None:
        """See ``Halves``; the polar factors of "update" go through one rank each."""
        at_once: list[LocalGradient] = []
        groups: dict[int, list[LocalGradient]] = {}
        for piece in gradients:
            whole = self.place == "update" and piece.group["algorithm"] == "muon"
            (groups.setdefault(id(piece.group), []) if whole else at_once).append(piece)
        super().take(at_once)
        for pieces in groups.values():
            self._take_whole(pieces)

    def _take_whole(self, pieces: list[LocalGradient]) -> None:
        """The gradients of a group's matrices become pieces of their polar factors."""
        at = {_place(piece.param, piece.cut): piece for piece in pieces}
        params = list({id(piece.param): piece.param for piece in pieces}.values())  # ZeRO-3 empties the group's list
        found = self.base.orthogonalised(
            pieces[0].group, lambda piece: self.base.direction(at[_place(piece.param, piece.part)]), params
        )
        for where, factor in found:
            piece = at[_place(where.param, where.part)]
            piece.grad.copy_(factor.view_as(piece.grad))
            if piece.scale != 1.0:
                piece.grad.mul_(piece.scale)

    def _direction(self, piece: LocalGradient, state: dict[str, Tensor], grad: Tensor, first: bool) -> Tensor:
        if piece.group["algorithm"] == "adamw":
            return super()._direction(piece, state, grad, first)
        return self.base.direction(piece).view_as(piece.grad)

    def move(self) -> None:
        """See ``Halves``."""
        for group in self.base.groups_by("muon"):
            if self.place == "update":
                for piece in self.base.pieces(group):
                    self.base.move_along(piece, group, piece.gradient(group).grad)
            else:
                self.base.turn(group, lambda piece, group=group: piece.gradient(group).grad)  # type: ignore[misc]
        for group in self.base.groups_by("adamw"):
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group)


def _place(param: Tensor, part: slice | None) -> tuple[int, ...]:
    """Where a piece lies, as a key."""
    return (id(param),) if part is None else (id(param), part.start, part.stop)


class _LambHalves(Halves):
    """LAMB: it clips by the norm of all gradients first, and moves all pieces of a tensor by one ratio."""

    base: Lamb

    def take(self, gradients: Iterable[LocalGradient]) -> None:
        """See ``Halves``."""
        self._excess = self.base.clip_divisor(self.base.divided())
        super().take(gradients)

    def _direction(self, piece: LocalGradient, state: dict[str, Tensor], grad: Tensor, first: bool) -> Tensor:
        if self._excess is not None:
            grad = grad / self._excess.to(grad.device)
        return _adam_direction(piece, self.base.state_of(piece.param), grad, first, self.place)

    def move(self) -> None:
        """See ``Halves``."""
        self.base.move(self._turn, self.base.divided())

    def _turn(self, piece: list[Slot], directions: list[Tensor], group: dict[str, Any]) -> None:
        """-κw ← -κw - D̂ / (√v̂ + ε), or -κw - D."""
        for slot, D in zip(piece, directions, strict=True):
            slot.grad.sub_(_divided(D, slot.exp_avg_sq, slot.step, group) if self.place == "momentum" else D)


def _adam_direction(
    piece: LocalGradient, state: dict[str, Tensor], grad: Tensor, first: bool, place: ApplyTo
) -> Tensor:
    """The moments take in a gradient; then m, m̂, or m̂ / (√v̂ + ε).

    Args:
        piece: where they lie.
        state: of the whole parameter.
        grad: this rank's part of the gradient.
        first: whether it is the first piece of the parameter in this step.
        place: "momentum", "numerator" or "update".
    """
    if first:
        state["step"].add_(1)
    (beta1, beta2), m, v = piece.group["betas"], piece.of(state["exp_avg"]), piece.of(state["exp_avg_sq"])
    grad = grad.to(m.dtype).view_as(m)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if place == "momentum":
        direction = m
    elif place == "numerator" and piece.moved:
        direction = _corrected(m, state["step"], beta1)
    else:
        direction = _divided(m, v, state["step"], piece.group)
    return direction.view_as(piece.grad)


def _divided(direction: Tensor, v: Tensor, step: Tensor, group: dict[str, Any]) -> Tensor:
    """D̂ / (√v̂ + ε) of directions and second moments of one shape."""
    beta1, beta2 = group["betas"]
    root = _corrected(v, step, beta2).sqrt_().add_(group["eps"])
    return _corrected(direction, step, beta1).div_(root)


def _corrected(moment: Tensor, step: Tensor, beta: float) -> Tensor:
    """A moment divided by 1 - βᵗ, which is computed in double precision, as torch does."""
    return moment / (1 - beta ** step.to(moment.device, torch.float64)).to(moment.dtype)


_HALVES: dict[type[Optimizer], type[Halves]] = {
    torch.optim.SGD: _SgdHalves, torch.optim.AdamW: _AdamWHalves, Muon: _MuonHalves, Lamb: _LambHalves,
}  # fmt: skip


def halves_of(base: Optimizer, place: ApplyTo) -> Halves | None:
    """How a base's step is cut at a place; None for "gradient", where it is not.

    Raises:
        NotImplementedError: a base, or a setting of it, that cannot be cut.
        ValueError: nothing would differ.
    """
    if place == "gradient":
        return None
    name = type(base).__name__
    if type(base) not in _HALVES:  # a subclass may do anything
        raise NotImplementedError(
            f"apply_to={place!r} with base {name}, whose {place} is not known; use "
            f"{', '.join(cls.__name__ for cls in _HALVES)}, or apply_to='gradient'."
        )
    for group in base.param_groups:
        for key in ("maximize", "amsgrad", "dampening", "capturable", "differentiable"):
            if group.get(key):
                raise NotImplementedError(f"apply_to={place!r} with {key}={group[key]!r} of {name}; leave it out.")
    if isinstance(base, torch.optim.SGD):
        if place == "update":
            raise ValueError("apply_to='update' with base SGD, whose update is its momentum; use apply_to='momentum'.")
        if place == "momentum" and any(group["momentum"] == 0 for group in base.param_groups):
            raise ValueError("apply_to='momentum' with momentum=0 of SGD would change nothing; set momentum.")
    return _HALVES[type(base)](base, place)

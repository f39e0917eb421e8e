"""What may be put around the step of any base, by settings among its arguments; all of it is off by default.

    slow_momentum β   s ← βs + (1-β)g     g ← g + αs, α `slow_weight`: before the base, whose momentum is the fast one
    cautious          w ← w - ηκ w₀ [(w₀ - w) w₀ ≥ 0]: after the base, which steps from w₀ to w without its decay κ
    ema_decay δ       e ← δe + (1-δ)w: what the model is evaluated and saved with, in place of w
    lookahead β       x = w, a ← γa + (1-γ)x, γ `lookahead_decay`, w ← x + βρ (1-γ)/γ (x - a), ρ the scheduled rate over
                      its peak: trained at w, evaluated and saved as x

They act in this order, and e is the average of x. Averages begin as the first weights, s as 0. All is elementwise: the
state lies beside the base's own, wherever that lies, and goes with it into checkpoints and to other ranks.

- Two time scales: Pagliardini et al., "The AdEMAMix optimizer" (ICLR 2025), whose m₂ and α these are (β₃ there is β).
  Deviation: g + αm₂ goes through the base's own moments, so that any base will do; in theirs √v sees g alone, and α and
  β₃ are warmed up. Over Muon it is a sum of two exponentials of gradients, as the steps benchmark's two time scales.
- Cautious decay: Chen et al., "Cautious weight decay" (2025), decoupled from every base: SGD's and LAMB's too, and
  LAMB's trust ratio is then of the update alone.
- Look-ahead: Yau et al., "EMA-Nesterov" (2026): m ← γm + (1-γ)(x⁺ - x), gradients at x + βρm. This m is
  (1-γ)/γ (x⁺ - a⁺), of the average a of x, which is all that is kept. Theirs switches β off at both ends of a run: any
  of these numbers may be set in a group, as a schedule sets its rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_soo.engine.around import Halves
from hf_soo.engine.checks import OpenShare, Positive, require
from hf_soo.engine.chunks import piece_size, wide_dtype
from hf_soo.engine.dtensors import local
from hf_soo.engine.strategy import LocalGradient, Names, Strategy
from hf_soo.optimizers.lamb import Lamb

WRAPPERS: dict[str, tuple[Any, str | None, Any]] = {
    "slow_momentum": (OpenShare | None, None, None),
    "slow_weight": (Positive, "slow_momentum", 5.0),
    "cautious": (bool, None, False),
    "ema_decay": (OpenShare | None, None, None),
    "lookahead": (Positive | None, None, None),
    "lookahead_decay": (OpenShare, "lookahead", 0.99),
}
"""Setting -> what it may be, the setting without which it has no effect, its default."""

STATES = {"slow_momentum": "slow_momentum", "ema_decay": "ema", "lookahead": "lookahead_average"}
"""Setting -> the state of a parameter that it keeps, in at least fp32."""


def split_arguments(arguments: Mapping[str, Any], own: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A base's arguments, and those of what is put around it; a name that is the base's own means what it says there.

    Args:
        arguments: by name.
        own: the base's names.

    Raises:
        ValueError: a value is out of range, or has no effect.
    """
    around = {name: value for name, value in arguments.items() if name in WRAPPERS and name not in own}
    for name, value in around.items():
        hint, switch, _ = WRAPPERS[name]
        require(name, value, hint)
        if switch is not None and around.get(switch) is None:
            raise ValueError(f"{name}={value!r} has no effect without {switch}; give {switch} too, or leave it out.")
    return {name: value for name, value in arguments.items() if name not in around}, around


def state_bytes(settings: Mapping[str, Any]) -> int:
    """Bytes of a parameter's element that settings ask for."""
    return 4 * sum(settings.get(name) is not None for name in STATES)


class Wrappers:
    """What is put around one base. Whoever steps the base goes through it: it is a hook before and after its step."""

    def __init__(self, base: Optimizer, settings: Mapping[str, Any]) -> None:
        """Put the settings, some of which are on, into the base's groups, and hook its step.

        Args:
            base: the base.
            settings: by name; a group's own win.

        Raises:
            ValueError: a group's own is out of range.
        """
        base.defaults |= {name: settings.get(name, default) for name, (_, _, default) in WRAPPERS.items()}
        for group in base.param_groups:
            for name, (hint, _, _) in WRAPPERS.items():
                require(name, group.setdefault(name, base.defaults[name]), hint)
        self._base = base
        self._early: dict[Tensor, dict[str, Tensor]] = {}  # states until the base has made its own
        self._before: dict[Tensor, Tensor] = {}
        self._put: list[tuple[Tensor, Tensor]] = []  # where there is something else than what is trained, and that
        self._settled: Callable[[], None] = lambda: None
        base.register_step_pre_hook(lambda *_: self.begin())
        base.register_step_post_hook(lambda *_: self.finish())
        base.register_load_state_dict_pre_hook(lambda _, saved: setattr(self, "_loading", saved))
        base.register_load_state_dict_post_hook(lambda _: self._keep_dtypes())

    # ---- the step ----------------------------------------------------------------------------------------------------

    def mix(self, base: Optimizer, strategy: Strategy, names: Names) -> None:
        """Two time scales, before the base takes the gradients in."""
        self.mix_pieces(strategy.local_gradients(base, names, ()))

    def mix_pieces(self, gradients: Iterable[LocalGradient]) -> None:
        """In place: s ← βs + (1-β)g, then g ← g + αs."""
        for piece in gradients:
            beta = piece.group["slow_momentum"]
            if beta is None:
                continue
            state = piece.of(self._state(piece.param, "slow_momentum"))
            for slow, grad in _in_cache(state, piece.grad):
                unscaled = grad if piece.scale == 1.0 else grad / piece.scale
                slow.lerp_(unscaled.to(slow.dtype), 1 - beta)
                grad.add_(slow, alpha=piece.group["slow_weight"] * piece.scale)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the base's step.

        Raises:
            RuntimeError: the model shows the weights that it is evaluated with.
        """
        if self._put:
            raise RuntimeError("the model has the weights for evaluation; call optimizer.train() before it is trained.")
        for group, param in self._stepped():
            if group["cautious"] and group.get("weight_decay"):
                group["cautious_decay"], group["weight_decay"] = group["weight_decay"], 0.0
                if isinstance(self._base, Lamb):
                    group["always_adapt"] = True
            for name, state in STATES.items():
                if group[name] is not None:
                    self._state(param, state)
            if group.get("cautious_decay"):
                self._before[param] = local(param.detach()).clone()

    @torch.no_grad()
    def finish(self) -> None:
        """After it."""
        for group, param in self._stepped():
            weight = local(param.detach())
            if (before := self._before.pop(param, None)) is not None:
                _decay(weight, before, group["lr"] * group["cautious_decay"])
            if param in self._early:
                self._base.state[param].update(self._early.pop(param))
            if group["ema_decay"] is not None:
                for average, w in _in_cache(local(self._state(param, "ema")), weight):
                    average.lerp_(w.to(average.dtype), 1 - group["ema_decay"])
            if group["lookahead"] is not None:
                reach = group["lookahead_reach"] = _reach(group)
                for average, w in _in_cache(local(self._state(param, "lookahead_average")), weight):
                    average.lerp_(w.to(average.dtype), 1 - group["lookahead_decay"])
                    w.copy_(torch.lerp(w.to(average.dtype), average, -reach))

    def _stepped(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self._base.param_groups:
            yield from ((group, param) for param in group["params"] if param.grad is not None)

    def _state(self, param: Tensor, name: str) -> Tensor:
        """A state of a parameter. For a first step most bases take one that is not empty for their own."""
        state: dict[str, Tensor] = self._base.state.get(param, {})
        if name not in state:
            state = self._early.setdefault(param, {})
        if name not in state:
            state[name] = param.detach().to(wide_dtype(param), copy=True)
            if name == "slow_momentum":
                state[name].zero_()
        return state[name]

    def _keep_dtypes(self) -> None:
        """Torch has cast the states that were loaded to the dtypes of the parameters."""
        saved: Mapping[str, Any] = self.__dict__.pop("_loading")
        numbers, params = (
            [each for group in groups for each in group["params"]]
            for groups in (saved["param_groups"], self._base.param_groups)
        )
        for number, param in zip(numbers, params, strict=True):
            for name in STATES.values():
                value = saved["state"].get(number, {}).get(name)
                if value is not None and value.dtype != self._base.state[param][name].dtype:
                    self._base.state[param][name] = value.to(param.device)

    # ---- what the model is evaluated and saved with ------------------------------------------------------------------

    @property
    def shows(self) -> bool:
        """Whether those are other weights than it is trained with."""
        return any(group[name] is not None for group in self._base.param_groups for name in ("ema_decay", "lookahead"))

    @torch.no_grad()
    def show(self, strategy: Strategy, names: Names, model: nn.Module) -> None:
        """Give the model the weights for evaluation, if they are others; every rank must call it.

        Args:
            strategy: says where weights lie.
            names: of the parameters of each group.
            model: what they lie in.
        """
        if self._put or not self.shows or not self._base.state:
            return
        for where, value in strategy.weights(self._base, names, self._shown):
            self._put.append((where, where.clone()))
            where.copy_(value)
        self._settled = partial(strategy.forget_gathered, model)
        self._settled()

    @torch.no_grad()
    def hide(self) -> None:
        """Give the model back what it is trained with, bit for bit; every rank must call it."""
        if self._put:
            for where, trained in self._put:
                where.copy_(trained)
            self._put.clear()
            self._settled()

    def _shown(self, group: dict[str, Any], param: Tensor, cut: slice | None) -> Tensor:
        """E, or x, of this rank's part of a parameter; the weight where there is none."""

        def part(tensor: Tensor) -> Tensor:
            return local(tensor) if cut is None else tensor.view(-1)[cut]

        state, weight = self._base.state.get(param, {}), part(param.detach())
        if group["ema_decay"] is not None and "ema" in state:
            return part(state["ema"])
        if group["lookahead"] is not None and "lookahead_average" in state:
            average, reach = part(state["lookahead_average"]), group.get("lookahead_reach", 0.0)
            return torch.lerp(weight.to(average.dtype), average, reach / (1 + reach))
        return weight


def _reach(group: Mapping[str, Any]) -> float:
    """β η/η₀ (1-γ)/γ; 0 at a rate of 0."""
    rate, peak, decay = group["lr"], group.get("initial_lr", group["lr"]), group["lookahead_decay"]
    return float(group["lookahead"] * rate / peak * (1 - decay) / decay) if peak else 0.0


def _decay(weight: Tensor, before: Tensor, rate: float | Tensor) -> None:
    """In place: w ← w - ηκ w₀ [(w₀ - w) w₀ ≥ 0]."""
    for w, old in _in_cache(weight, before):
        agrees = (old - w).mul_(old).ge_(0)  # 0 or 1: a mask of truth values takes several times as long on a CPU
        w.sub_(agrees.mul_(old).mul_(rate))


def _in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, in pieces of rows on which several operations find each other's results in cache."""
    first = tensors[0]
    if first.ndim == 0:
        yield tensors
        return
    rows = max(1, piece_size(first) * len(first) // max(1, first.numel()))
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class _Around:
    """A base's step in two, with what is put around it."""

    def __init__(self, halves: Halves, wrappers: Wrappers) -> None:
        self.halves, self.wrappers = halves, wrappers

    def take(self, gradients: Iterable[LocalGradient]) -> None:
        """See ``Halves``."""
        pieces = list(gradients)
        self.wrappers.mix_pieces(pieces)
        self.halves.take(pieces)

    def move(self) -> None:
        """See ``Halves``; the base's hooks are called around it."""
        self.halves.move()


def around(halves: Halves | None, wrappers: Wrappers | None) -> Halves | None:
    """A base's step in two, if it is, with what is put around it, if anything is."""
    return halves if halves is None or wrappers is None else _Around(halves, wrappers)

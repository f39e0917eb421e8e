"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer (Jordan 2024; torch.optim.Muon).

    Muon    B ← μB + (1-μ)G     O = NewtonSchulz₅((1-μ)G + μB), in bf16      W ← (1-ηκ)W - η √max(1, rows/columns) O
    AdamW   as in torch, with its own rate `rest_lr`

Each given group is split in two, marked `algorithm: "muon"` and `"adamw"`; torch's two optimizers step those very
dictionaries and share one state. So schedulers, GradScaler, checkpoints, and whoever replaces `group["params"]`, see
one ordinary optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FUSED_DEVICES = ("cpu", "cuda")


class Muon(Optimizer):
    """Muon on the given matrices, AdamW on the rest."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        matrices: Iterable[Tensor] = (),
        rest_lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        rest_betas: tuple[float, float] = (0.9, 0.999),
        rest_eps: float = 1e-8,
    ) -> None:
        """Split the groups and build the two rules.

        Args:
            params: parameters or groups. A group's own `lr` scales the rates of both its parts by `group["lr"] / lr`;
                its own `weight_decay` holds for both. A group that names its `algorithm` is taken as it is.
            lr: step size of the matrices.
            matrices: parameters that are the weights of hidden layers, each of two dimensions; those in no group are
                ignored. Embeddings, the vocabulary decoder and heads do not belong here.
            rest_lr: AdamW's step size for everything else; None takes `lr`. Tune it: no value matters more.
            weight_decay: κ, decoupled, for both.
            momentum: μ.
            nesterov: whether Newton-Schulz sees (1-μ)G + μB rather than B.
            ns_steps: Newton-Schulz iterations.
            rest_betas: AdamW's moment decays.
            rest_eps: AdamW's ε.

        Raises:
            RuntimeError: if torch has no Muon.
            ValueError: if a value is outside its range, a matrix has not two dimensions, or no parameter is a matrix.
        """
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"muon needs torch.optim.Muon, torch 2.9 or newer, but torch is {torch.__version__}; upgrade torch."
            )
        self._lr = lr
        self._rest_lr = lr if rest_lr is None else rest_lr
        _check(lr, self._rest_lr, momentum, ns_steps)
        self._matrices = list(matrices)
        # The rules get their groups in step(); a placeholder lets torch validate the values and tell the defaults.
        self._rules: dict[str, Optimizer] = {
            "muon": torch.optim.Muon(
                [torch.zeros(1, 1)],
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="original",
            ),
            "adamw": torch.optim.AdamW(
                [torch.zeros(1)], lr=self._rest_lr, betas=rest_betas, eps=rest_eps, weight_decay=weight_decay
            ),
        }
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if not any(group["algorithm"] == "muon" for group in self.param_groups):
            raise ValueError(
                "Muon: none of the parameters is among `matrices`; pass the hidden layers' weights, or use AdamW."
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_lr", "_rest_lr", "_matrices", "_rules")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by algorithm unless it names its own.

        Raises:
            ValueError: if `algorithm` is unknown, or a matrix has not two dimensions.
        """
        for part in [param_group] if "algorithm" in param_group else self._split(param_group):
            if part["algorithm"] not in self._rules:
                raise ValueError(f"Muon: algorithm={part['algorithm']!r} is unknown; allowed: {sorted(self._rules)}.")
            super().add_param_group(part)
            self._complete(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the loss that ``closure`` returns, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, rule in self._rules.items():
            # Linked anew in every step: load_state_dict and wrappers replace the lists and the state.
            rule.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            rule.state = self.state
            rule.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by a Muon with the same split.

        Raises:
            ValueError: if the groups' algorithms differ.
        """
        saved = [group.get("algorithm") for group in state_dict["param_groups"]]
        owned = [group["algorithm"] for group in self.param_groups]
        if saved != owned:
            raise ValueError(f"Muon: the checkpoint's groups are {saved}, not {owned}; resume with the same optimizer.")
        super().load_state_dict(state_dict)

    def _split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The muon part and the adamw part of a group, without the empty ones."""
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        scale = group["lr"] / self._lr if "lr" in group and self._lr else 1.0
        rates = {"muon": self._lr, "adamw": self._rest_lr}
        matrices = {id(matrix) for matrix in self._matrices}
        parts = []
        for algorithm, rate in rates.items():
            chosen = [param for param in params if (id(param) in matrices) == (algorithm == "muon")]
            if chosen or not params:
                parts.append({**group, "params": chosen, "lr": rate * scale, "algorithm": algorithm})
        return parts

    def _complete(self, group: dict[str, Any]) -> None:
        """Check a new group and give it its rule's defaults."""
        is_muon = group["algorithm"] == "muon"
        for param in group["params"] if is_muon else ():
            if param.ndim != 2:
                raise ValueError(
                    f"Muon: a matrix of shape {tuple(param.shape)} has not two dimensions; leave it out of `matrices`."
                )
        if not is_muon:  # the fused kernel where all can take it
            group.setdefault(
                "fused", all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"])
            )
        for name, default in self._rules[group["algorithm"]].defaults.items():
            group.setdefault(name, default)
        if is_muon and not group["nesterov"] and any(p.dtype == torch.bfloat16 for p in group["params"]):
            # torch 2.9-2.13 normalises the bf16 momentum buffer itself in place.
            raise ValueError(
                "Muon: nesterov=False with bfloat16 parameters is wrong in torch's Muon; use nesterov=True, or fp32."
            )


def _check(lr: float, rest_lr: float, momentum: float, ns_steps: int) -> None:
    for name, value in (("lr", lr), ("rest_lr", rest_lr)):
        if not value >= 0:
            raise ValueError(f"Muon: {name}={value!r} must be 0 or more.")
    if not 0 <= momentum < 1:
        raise ValueError(f"Muon: momentum={momentum!r} must lie in [0, 1).")
    if not 1 <= ns_steps < 100:
        raise ValueError(f"Muon: ns_steps={ns_steps!r} must lie in [1, 99].")

"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer (Jordan 2024).

    Muon    B ← μB + (1-μ)G     O = polar((1-μ)G + μB), about UVᵀ      W ← (1-ηκ)W - η √max(1, rows/columns) O
    AdamW   as in torch, with its own rate `rest_lr`

Each given group is split in two, marked `algorithm: "muon"` and `"adamw"`; torch's AdamW steps the latter as they are,
and both share one state. So schedulers, GradScaler, checkpoints, and whoever replaces `group["params"]`, see one
ordinary optimizer.

Deviation: torch.optim.Muon iterates in bf16 on every device. Here it is the dtype that suits the device
(`polar.iteration_dtype`), at least as accurate, and on a CPU without units for bf16 25 to 50 times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_soo.engine.optimizer import inner_step
from hf_soo.engine.strategy import mend_steps
from hf_soo.optimizers.polar import DTYPES, iteration_dtype, polar_factor, schedule
from hf_soo.optimizers.ranges import check_arguments

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
        ns_coefficients: str = "jordan",
        ns_dtype: str = "auto",
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
            nesterov: whether the polar factor is that of (1-μ)G + μB rather than B.
            ns_steps: iterations towards the polar factor.
            ns_coefficients: "jordan" or "polar_express"; see `polar`.
            ns_dtype: "float32", "bfloat16" or "float16", what iterations run in (float64 parameters keep theirs with
                "float32"); "auto" takes what suits the device. Each group, and so a checkpoint, keeps what was chosen:
                name one for runs that must agree between machines.
            rest_betas: AdamW's moment decays.
            rest_eps: AdamW's ε.

        Raises:
            ValueError: if a value is outside its range, a matrix has not two dimensions, or no parameter is a matrix.
        """
        self._lr = lr
        self._rest_lr = lr if rest_lr is None else rest_lr
        own: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        own |= {"ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype}
        given = {"lr": lr, "rest_lr": rest_lr, "weight_decay": weight_decay, **own}
        check_arguments(Muon, {**given, "rest_betas": rest_betas, "rest_eps": rest_eps})
        self._matrices = list(matrices)
        if ns_dtype == "auto" and self._matrices:
            own["ns_dtype"] = iteration_dtype(self._matrices[0].device)
        # AdamW gets its groups in step(); a placeholder lets torch validate the values and tell the defaults.
        self._adamw = torch.optim.AdamW(
            [torch.zeros(1)], lr=self._rest_lr, betas=rest_betas, eps=rest_eps, weight_decay=weight_decay
        )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own})
        if not any(group["algorithm"] == "muon" for group in self.param_groups):
            raise ValueError(
                "Muon: none of the parameters is among `matrices`; pass the hidden layers' weights, or use AdamW."
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_lr", "_rest_lr", "_matrices", "_adamw")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bring a state up to date that an older version has written."""
        super().__setstate__(state)
        mend_steps(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by algorithm unless it names its own.

        Raises:
            ValueError: if `algorithm` is unknown, or a matrix has not two dimensions.
        """
        for part in [param_group] if "algorithm" in param_group else self._split(param_group):
            if part["algorithm"] not in ("muon", "adamw"):
                raise ValueError(f"Muon: algorithm={part['algorithm']!r} is unknown; allowed: 'adamw', 'muon'.")
            check_arguments(Muon, {key: value for key, value in part.items() if key != "params"})
            super().add_param_group(part)
            self._complete(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the loss that ``closure`` returns, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.groups_by("muon"):
            for param in group["params"]:
                if param.grad is not None:
                    self.move(param, group, self.direction(param, group))
        inner_step(self.rest())
        return loss

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """B ← μB + (1-μ)G of a matrix with a gradient; (1-μ)G + μB, or B without Nesterov's, [n, m]."""
        assert param.grad is not None
        state, mu = self.state[param], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param.grad, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(param.grad, 1 - mu)
        return param.grad.lerp(buffer, mu) if group["nesterov"] else buffer

    def orthogonalised(self, direction: Tensor, group: dict[str, Any]) -> Tensor:
        """O = polar(direction), [n, m], in the dtype that the group iterates in."""
        dtype = DTYPES[group["ns_dtype"]]
        if dtype == torch.float32:
            dtype = torch.promote_types(dtype, direction.dtype)
        return polar_factor(direction, schedule(group["ns_coefficients"], group["ns_steps"], dtype), dtype)

    def move(self, param: Tensor, group: dict[str, Any], direction: Tensor) -> None:
        """W ← (1-ηκ)W - η √max(1, rows/columns) polar(direction)."""
        self.move_along(param, group, self.orthogonalised(direction, group))

    def move_along(self, param: Tensor, group: dict[str, Any], factor: Tensor) -> None:
        """W ← (1-ηκ)W - η √max(1, rows/columns) · factor."""
        rows, columns = param.shape
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(factor.to(param.dtype), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def groups_by(self, algorithm: str) -> list[dict[str, Any]]:
        """The groups of "muon" or "adamw"."""
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    def rest(self) -> torch.optim.AdamW:
        """AdamW over its groups; linked anew each time: load_state_dict and wrappers replace lists and state."""
        self._adamw.param_groups, self._adamw.state = self.groups_by("adamw"), self.state
        return self._adamw

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by a Muon with the same split, also one that was saved before groups had all settings.

        Raises:
            ValueError: if the groups' algorithms differ.
        """
        saved = [group.get("algorithm") for group in state_dict["param_groups"]]
        owned = [group["algorithm"] for group in self.param_groups]
        if saved != owned:
            raise ValueError(f"Muon: the checkpoint's groups are {saved}, not {owned}; resume with the same optimizer.")
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            group |= {key: value for key, value in own.items() if key not in group}

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
        """Check a new group of matrices; give one of the rest AdamW's defaults, with the fused kernel if it can."""
        if group["algorithm"] == "adamw":
            group.setdefault(
                "fused", all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"])
            )
            for name, default in self._adamw.defaults.items():
                group.setdefault(name, default)
            return
        for param in group["params"]:
            if param.ndim != 2:
                raise ValueError(
                    f"Muon: a matrix of shape {tuple(param.shape)} has not two dimensions; leave it out of `matrices`."
                )

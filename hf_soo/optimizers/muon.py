"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer (Jordan 2024).

    Muon    B ← μB + (1-μ)G     O = polar((1-μ)G + μB), about UVᵀ      W ← (1-ηκ)W - η √max(1, rows/columns) O
    AdamW   as in torch, with its own rate `rest_lr`

Each given group is split in two, marked `algorithm: "muon"` and `"adamw"`; torch's AdamW steps the latter as they are,
and both share one state. So schedulers, GradScaler, checkpoints, and whoever replaces `group["params"]`, see one
ordinary optimizer.

Wherever matrices lie, the momentum stays there, and the polar factor of a whole one is taken at one rank (`matrices`).

Deviations: torch.optim.Muon iterates in bf16 on every device; here it is the dtype that suits the device
(`polar.iteration_dtype`), at least as accurate, and on a CPU without units for bf16 25 to 50 times as fast. A matrix
whose momentum is not finite moves by its decay alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_soo.engine.comm import Communicator
from hf_soo.engine.dtensors import full_shape, local
from hf_soo.engine.flops import BaseWork
from hf_soo.engine.optimizer import inner_step
from hf_soo.engine.strategy import FlatPartition, LocalGradient, mend_steps
from hf_soo.optimizers.matrices import Matrices, Piece, matrix_shape
from hf_soo.optimizers.orthogonal import Orthogonaliser, scale_of
from hf_soo.optimizers.polar import Coefficients, iteration_dtype
from hf_soo.optimizers.ranges import check_arguments

FUSED_DEVICES = ("cpu", "cuda")

_MOST_KNOWN = 64
"""Sets of tensors whose owners are remembered."""


class Muon(Optimizer):
    """Muon on the given matrices, AdamW on the rest."""

    partition: FlatPartition | None = None
    """What the parameters are pieces of, if they are flat partitions; copies of the optimizer do not keep it."""

    comm: Communicator | None = None
    """Joins the ranks that share a global batch; None: this process is alone, unless its parameters are DTensors."""

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
        ns_coefficients: str | Sequence[Coefficients] = "jordan",
        ns_dtype: str = "auto",
        adjust_lr_fn: str = "original",
        row_beta: float | None = None,
        share: bool = True,
        rest_betas: tuple[float, float] = (0.9, 0.999),
        rest_eps: float = 1e-8,
    ) -> None:
        """Split the groups and build the two rules.

        Args:
            params: parameters or groups. A group's own `lr` scales the rates of both its parts by `group["lr"] / lr`;
                its own `weight_decay` holds for both. A group that names its `algorithm` is taken as it is.
            lr: step size of the matrices.
            matrices: parameters that are the weights of hidden layers: [n, m], stacks of experts [E, n, m], and
                convolutions [out, in, h, w], which count as [out, in·h·w]; those in no group are ignored. Embeddings,
                the vocabulary decoder and heads do not belong here.
            rest_lr: AdamW's step size for everything else; None takes `lr`. Tune it: no value matters more.
            weight_decay: κ, decoupled, for both.
            momentum: μ.
            nesterov: whether the polar factor is that of (1-μ)G + μB rather than B.
            ns_steps: iterations towards the polar factor.
            ns_coefficients: "jordan" or "polar_express", see `polar`; or three numbers for each iteration, the last of
                which stand for all that follow.
            ns_dtype: "float32", "bfloat16" or "float16", what iterations run in (float64 parameters keep theirs with
                "float32"); "auto" takes what suits the device. Each group, and so a checkpoint, keeps what was chosen:
                name one for runs that must agree between machines.
            adjust_lr_fn: the factor s on a matrix's step. "original": √max(1, rows/columns); "match_rms_adamw":
                .2 √max(rows, columns), so that AdamW's rate and decay carry over (Liu et al. 2025); "none": 1.
            row_beta: β₂ of NorMuon (Li et al. 2025), .95 there: each row of O is divided by the root of a running mean
                of its squares, and O takes its norm back; one number a row. None: Muon. Not under ZeRO-1, 2 and 3.
            share: whether the ranks of a data-parallel run, which all have every matrix, each iterate on some and send
                the others the results; False: each iterates on all. Nothing else differs.
            rest_betas: AdamW's moment decays.
            rest_eps: AdamW's ε.

        Raises:
            ValueError: if a value is outside its range, a matrix has not two to four dimensions, or no parameter is
                one.
        """
        self._lr = lr
        self._rest_lr = lr if rest_lr is None else rest_lr
        own: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        own |= {"ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype}
        own |= {"adjust_lr_fn": adjust_lr_fn, "row_beta": row_beta}
        given = {"lr": lr, "rest_lr": rest_lr, "weight_decay": weight_decay, **own}
        check_arguments(Muon, {**given, "rest_betas": rest_betas, "rest_eps": rest_eps, "share": share})
        self._chosen = list(matrices)
        if ns_dtype == "auto" and self._chosen:
            own["ns_dtype"] = iteration_dtype(self._chosen[0].device)
        self.share = share
        self._known: dict[tuple[object, ...], Matrices] = {}
        self._nonfinite: dict[torch.device, Tensor] = {}
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
        own = {name: getattr(self, name) for name in ("_lr", "_rest_lr", "_chosen", "_adamw", "share")}
        return {**super().__getstate__(), **own, "_known": {}, "_nonfinite": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bring a state up to date that an older version has written."""
        super().__setstate__(state)
        mend_steps(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by algorithm unless it names its own.

        Raises:
            ValueError: an unknown `algorithm`, no coefficients, or a matrix that has not two to four dimensions.
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
            self.turn(group, lambda piece, group=group: self.direction(piece.gradient(group)))  # type: ignore[misc]
        inner_step(self.rest())
        return loss

    def direction(self, piece: LocalGradient) -> Tensor:
        """B ← μB + (1-μ)G of a piece of a matrix; (1-μ)G + μB, or B without Nesterov's, in the shape of the piece."""
        state, mu = self.state[piece.param], piece.group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(piece.param, memory_format=torch.preserve_format)
        buffer = piece.of(state["momentum_buffer"])
        grad = (piece.grad if piece.scale == 1.0 else piece.grad / piece.scale).to(buffer.dtype).view_as(buffer)
        buffer.lerp_(grad, 1 - mu)
        return grad.lerp(buffer, mu) if piece.group["nesterov"] else buffer

    def turn(self, group: dict[str, Any], direction: Callable[[Piece], Tensor]) -> None:
        """W ← (1-ηκ)W - η s polar(direction) of a group's matrices, wherever they lie."""
        for piece, factor in self.orthogonalised(group, direction):
            self.move_along(piece, group, factor)

    def orthogonalised(
        self, group: dict[str, Any], direction: Callable[[Piece], Tensor], params: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[Piece, Tensor]]:
        """This rank's pieces of O = polar(direction) of a group's matrices, each made whole at one rank.

        Args:
            group: of "muon"; every rank that holds pieces must go through all.
            direction: a piece -> its direction, asked for when it is needed.
            params: the group's that have a gradient; None: look.

        Yields:
            (a piece, its O, in any shape).
        """
        for alike in _alike(self._stepped(group) if params is None else params):
            rule = self._rule(group, alike[0])
            known = self._matrices(alike, rule)
            if rule.row_beta is None:
                yield from known.through(direction, rule, rule.prototype)
                continue
            yield from self._with_rows(known, direction, rule)

    def _with_rows(
        self, known: Matrices, direction: Callable[[Piece], Tensor], rule: Orthogonaliser
    ) -> Iterator[tuple[Piece, Tensor]]:
        """``orthogonalised`` with the rows' mean squares as one more column, to the owner and back."""

        def widened(piece: Piece) -> Tensor:
            rows = direction(piece).reshape(-1, piece.cut.shape[-1])
            return torch.cat([rows, self._row_squares(piece).to(rows.dtype)], 1)

        for piece, result in known.through(widened, rule, rule.prototype):
            rows = result.reshape(-1, piece.cut.shape[-1] + 1)
            self._row_squares(piece).copy_(rows[:, -1:])
            yield piece, rows[:, :-1]

    def _row_squares(self, piece: Piece) -> Tensor:
        """The running mean square of each row of a piece, [rows, 1]."""
        state = self.state[piece.param]
        if "row_squares" not in state:
            lead = 1 if piece.param.ndim != 3 else 2
            first = (slice(None),) * lead + (slice(0, 1),) * (piece.param.ndim - lead)
            state["row_squares"] = torch.zeros_like(
                piece.param.detach()[first], dtype=torch.promote_types(piece.param.dtype, torch.float32)
            )
        return local(state["row_squares"]).view(-1, 1)

    def pieces(self, group: dict[str, Any]) -> list[Piece]:
        """This rank's pieces of a group's matrices."""
        found = _alike(self._stepped(group))
        return [piece for alike in found for piece in self._matrices(alike, self._rule(group, alike[0])).pieces]

    def _rule(self, group: dict[str, Any], like: Tensor) -> Orthogonaliser:
        if like.device not in self._nonfinite:
            self._nonfinite[like.device] = torch.zeros((), device=like.device)
        return Orthogonaliser.of(group, like, self._nonfinite[like.device])

    def _stepped(self, group: dict[str, Any]) -> list[Tensor]:
        """The tensors of a group that are stepped on; flat ones all are."""
        return [param for param in group["params"] if self.partition is not None or param.grad is not None]

    def move_along(self, piece: Piece, group: dict[str, Any], factor: Tensor) -> None:
        """W ← (1-ηκ)W - η s · factor, of a piece of a matrix."""
        weight, shape = piece.weight, piece.cut.shape
        factor = factor.to(weight.dtype).view_as(weight)
        decay, step = 1 - group["lr"] * group["weight_decay"], -group["lr"] * scale_of(group["adjust_lr_fn"], shape)
        weight.mul_(decay).add_(factor, alpha=step)

    def _matrices(self, params: list[Tensor], rule: Orthogonaliser) -> Matrices:
        """Pieces and owners; known as long as the tensors that are stepped on, and the settings, are the same."""
        key = (rule.dtype, rule.row_beta is None, *rule.coefficients, *map(id, params))
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            share, comm = self.share and self.comm is not None, self.comm or Communicator()
            columns = int(rule.row_beta is not None)
            self._known[key] = Matrices(params, self.partition, comm, share, rule.cost, columns)
        return self._known[key]

    def health(self) -> dict[str, float]:
        """How often a matrix of this rank was not finite, as ``nonfinite_matrices``; nothing if never."""
        count = sum(int(each) for each in self._nonfinite.values())
        return {"nonfinite_matrices": float(count)} if count else {}

    def minimal_work(self, param: Tensor, group: dict[str, Any]) -> BaseWork:
        """Of the whole matrix; nothing besides a pass for AdamW's parameters."""
        if group["algorithm"] != "muon":
            return BaseWork()
        return self._rule(group, param).work(matrix_shape(full_shape(param)))

    def groups_by(self, algorithm: str) -> list[dict[str, Any]]:
        """The groups of "muon" or "adamw"."""
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    def rest(self) -> torch.optim.AdamW:
        """AdamW over its groups; linked anew each time: load_state_dict and wrappers replace lists and state."""
        self._adamw.param_groups, self._adamw.state = self.groups_by("adamw"), self.state
        return self._adamw

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by a Muon with the same split.

        Also one that was saved before groups had all settings, or by torch's Muon, which has matrices alone; what is
        not in it stays as it is here.

        Raises:
            ValueError: if the groups' algorithms differ.
        """
        groups = [_from_torch(group) if "algorithm" not in group else group for group in state_dict["param_groups"]]
        state_dict = {**state_dict, "param_groups": groups}
        saved = [group.get("algorithm") for group in groups]
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
        matrices = {id(matrix) for matrix in self._chosen}
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
        if not (given := group["ns_coefficients"]):
            raise ValueError(f"Muon: ns_coefficients={given!r} is not allowed; give three numbers for each iteration.")
        for shape in map(full_shape, group["params"]):
            if not 2 <= len(shape) <= 4:
                raise ValueError(
                    f"Muon: a matrix of shape {shape} has not two to four dimensions; leave it out of `matrices`."
                )


def _alike(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those of one dtype and device together."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in params:
        found.setdefault((param.dtype, param.device), []).append(param)
    return list(found.values())


def _from_torch(group: dict[str, Any]) -> dict[str, Any]:
    """A group of torch.optim.Muon as one of ours; another one as it is."""
    if not {"ns_coefficients", "ns_steps", "eps", "adjust_lr_fn"} <= group.keys():
        return group
    kept = {key: value for key, value in group.items() if key != "eps"}
    return {**kept, "algorithm": "muon", "adjust_lr_fn": group["adjust_lr_fn"] or "original"}

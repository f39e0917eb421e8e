"""What a step must move and multiply is what its operations do, counted as they run; the rates are those measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

import hf_soo
from hf_soo.bench.measure import run
from hf_soo.bench.report import roofline
from hf_soo.bench.roofline import Rates, _load_of, limit, pass_flops
from hf_soo.bench.step_kinds import Kind, StepKinds
from hf_soo.bench.workload import BenchConfig, Clock, Workload, model_size
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.ranks.distributed import run_ranks

PLAIN, UPDATE = Kind(False, False), Kind(True, False)
OFTEN = {"update_period": 1000, "warmup_updates": 1}
SPARSELY = OFTEN | {"inverse_period": 1000}


def stepped(name: str, base: str | None = None, **settings: Any) -> PreconditionedOptimizer:
    """After two steps, with the gradients of a third pass; without biases, whose few numbers are not the point."""
    model = nn.Sequential(nn.Linear(192, 128, bias=False), nn.Tanh(), nn.Linear(128, 320, bias=False))
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-3, base=base, weight_decay=0.01, **settings)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(64, 192)).square().mean().backward()
        if step < 2:
            optimizer.step()
    return optimizer


class Sweeps(TorchDispatchMode):
    """Bytes that a step reads and writes if whatever needs no number over whole tensors were one pass over memory.

    A value is of a sweep: those of before are of sweep 0, a result is of its arguments' latest, and one that is much
    smaller than they are (a norm, a product with few rows) of the next. In a sweep each tensor is read once, unless it
    was made in it, and written once, if it was there before or a later sweep reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, dict[tuple[int, int], int]] = {}  # storage -> what was written of it -> the sweep
        self.fresh: set[int] = set()  # storages of temporaries
        self.reads: dict[tuple[tuple[int, int, int], int], int] = {}
        self.writes: dict[tuple[tuple[int, int, int], int], int] = {}
        self.alive: list[Tensor] = []  # no storage's address is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.alive += given + made
        schema = func._schema
        if made and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return result  # a view
        into = [
            leaf
            for argument, value in [*zip(schema.arguments, args, strict=False)]
            if argument.alias_info is not None and argument.alias_info.is_write and not self._only_scaled(argument.name)
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        known = {id(t) for t in given}
        self.fresh |= {t.untyped_storage().data_ptr() for t in made if id(t) not in known}
        overwrites = func._schema.name.split("::")[1] in ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
        self._count([t for t in given if not (overwrites and any(t is i for i in into))], into or made)
        return result

    @staticmethod
    def _only_scaled(argument: str) -> bool:
        """Fused kernels write into the gradients only where they unscale them, which is not asked of them here."""
        return argument == "grads"

    def _count(self, given: list[Tensor], written: list[Tensor]) -> None:
        sweep = max(map(self._sweep, given), default=0)
        for t in given:
            if self._sweep(t, -1) != sweep:
                self.reads[key(t), sweep] = t.nbytes
        for t in written:
            small = 2 * t.numel() < max((g.numel() for g in given), default=0)
            storage, start, end = key(t)
            known = self.made.setdefault(storage, {})
            for covered in [(a, b) for a, b in known if start <= a and b <= end]:
                del known[covered]
            known[start, end] = sweep + small
            self.writes[key(t), sweep] = t.nbytes

    def _sweep(self, t: Tensor, before: int = 0) -> int:
        """In which the latest part of a tensor was made; those of before the step have ``before``."""
        storage, start, end = key(t)
        parts = self.made.get(storage, {}).items()
        return max((sweep for (a, b), sweep in parts if a < end and start < b), default=before)

    @property
    def bytes(self) -> int:
        last = {}  # of each storage, when it was read last
        for (storage, _, _), sweep in self.reads:
            last[storage] = max(sweep, last.get(storage, 0))
        kept = [
            n
            for ((storage, _, _), s), n in self.writes.items()
            if storage not in self.fresh or last.get(storage, -1) > s
        ]
        return sum(self.reads.values()) + sum(kept)


def key(t: Tensor) -> tuple[int, int, int]:
    """Where a tensor lies: its storage, and from which number of it to which."""
    start = t.storage_offset()
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.untyped_storage().data_ptr(), start, start + length


BYTES: dict[str, tuple[Callable[[], PreconditionedOptimizer], Kind, float]] = {
    "adamw": (lambda: stepped("adamw"), PLAIN, 1.0),
    "sgd": (lambda: stepped("sgd"), PLAIN, 1.0),
    "rmsprop": (lambda: stepped("rmsprop"), PLAIN, 1.0),
    "lamb": (lambda: stepped("lamb"), PLAIN, 1.7),
    "muon": (lambda: stepped("muon"), PLAIN, 2.0),
    "mkor": (lambda: stepped("mkor", "adamw", history=2, **OFTEN), PLAIN, 1.5),
    "eva": (lambda: stepped("eva", "sgd", update_period=1000), PLAIN, 1.5),
    "eva_f": (lambda: stepped("eva_f", "sgd", update_period=1000), PLAIN, 1.7),
    "eva_s": (lambda: stepped("eva_s", "sgd", update_period=1000), PLAIN, 1.5),
    "rf_rmsprop": (lambda: stepped("rf_rmsprop", "sgd", batch_size=4), UPDATE, 2.0),
}
"""How to make it, what kind of step it takes then, and how often the least bytes its operations may move."""


@pytest.mark.parametrize("name", BYTES)
def test_no_step_moves_less_than_the_least_bytes(name: str) -> None:
    """And none of these moves far more, with whatever can be fused counted as fused: the formula is no loose bound."""
    make, kind, most = BYTES[name]
    optimizer = make()
    with Sweeps() as counter:
        optimizer.step()
    assert 1 - 1e-3 <= counter.bytes / _load_of(optimizer, kind).bytes <= most * (1 + 1e-3)


def test_bytes_of_the_bases_are_those_of_the_formula() -> None:
    """In numbers of the parameters' size: AdamW 7 (28 bytes), SGD 5, LAMB 7 and a pass for |g|, 3 for |u|."""
    numbers = 128 * 192 + 320 * 128
    for name, each in {"adamw": 7, "sgd": 5, "rmsprop": 5, "lamb": 11}.items():
        assert _load_of(stepped(name), PLAIN).bytes == pytest.approx(4 * numbers * each, rel=1e-4)
    assert _load_of(stepped("lamb", max_grad_norm=None), PLAIN).bytes == pytest.approx(4 * numbers * 10, rel=1e-4)
    own = _load_of(stepped("mkor", "adamw", history=2, **OFTEN), PLAIN).bytes / 4 - 7 * numbers
    assert own == pytest.approx(2 * numbers + 2 * (128 + 192 + 320 + 128), rel=1e-3)  # |G| and X, |P|; and C


PRODUCTS: dict[str, Callable[[], PreconditionedOptimizer]] = {
    "mkor": lambda: stepped("mkor", "adamw", history=4, **OFTEN),
    "kfac_expand": lambda: stepped("kfac_expand", **SPARSELY),
    "foof": lambda: stepped("foof", **SPARSELY),
    "kaisa": lambda: stepped("kaisa", inverse="eigen", **SPARSELY),
    "if_shampoo": lambda: stepped("if_shampoo", batch_size=4, update_period=1000),
    "muon": lambda: stepped("muon"),  # one matrix in each form of the iteration
    "muon six times": lambda: stepped("muon", ns_steps=6, ns_coefficients="polar_express"),
}


def in_place(into: Sequence[int], left: Sequence[int], right: Sequence[int], *rest: Any, **kwargs: Any) -> int:
    """2mkn for each of a stack: torch's counter knows these operations out of place alone."""
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.addmm_: in_place, torch.ops.aten.baddbmm_: in_place}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_that_a_step_does(name: str) -> None:
    optimizer = PRODUCTS[name]()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        optimizer.step()
    # MKOR takes |P|² from Gram matrices of its thin products, which it need not
    rel = 0.04 if name == "mkor" else 0.02
    assert counter.get_total_flops() == pytest.approx(sum(_load_of(optimizer, PLAIN).operations.values()), rel=rel)


def test_the_passes_flops_are_those_that_torch_counts() -> None:
    work = Workload(config := BenchConfig(preset="toy", batch_size=2, seq_length=32))
    with FlopCounterMode(display=False) as counter:
        work.forward_backward(work.model)
    # the inputs of the first layer, embeddings, take no gradient of theirs; the classifiers are small
    assert counter.get_total_flops() == pytest.approx(pass_flops(work.size, (2, 32, 5)), rel=0.02), config


def test_pass_flops_of_bert_large() -> None:
    """6 N for each token: 302 M weights in the blocks."""
    size: BertConfig = model_size(BenchConfig(preset="bert-large"))
    blocks = pass_flops(size, (1, 512, 0)) - 6 * (1024**2 + 2048)
    assert blocks == 512 * 24 * (6 * 12 * 1024**2 + 12 * 512 * 1024)


class Ticks:
    """A clock on which each call takes so many seconds as it is told."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        return self.seconds


def test_a_limit_is_the_larger_part_of_each_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepped("foof", **SPARSELY)
    rates = Rates(torch.device("cpu"), Ticks(0.5), 1 << 20)  # type: ignore[arg-type]
    assert rates.bytes_per_second() == 2 * 4 * (1 << 20) / 0.5
    assert rates.operations_per_second("float32") == 2 * 1024**3 / 0.5
    assert rates.operations_per_second("cholesky_inverse") == 512**3 / 0.5
    rates.found = {"bytes": 1e6, "float32": 1e9, "cholesky_inverse": 1e9}
    refresh = Kind(True, True)
    found = limit(optimizer, StepKinds((refresh, PLAIN, PLAIN, PLAIN)), rates)
    loads = {kind: _load_of(optimizer, kind) for kind in (refresh, PLAIN)}
    memory = {kind: load.bytes / 1e6 for kind, load in loads.items()}
    products = 2 * (128 * 192**2 + 320 * 128**2)
    assert loads[PLAIN].operations == {"float32": products}
    assert loads[refresh].operations == {"float32": products, "cholesky_inverse": 192**3 + 128**3}
    arithmetic = {PLAIN: products / 1e9, refresh: (products + 192**3 + 128**3) / 1e9}
    assert found["limit_seconds"] == pytest.approx(
        sum(n * max(memory[k], arithmetic[k]) for k, n in ((refresh, 1), (PLAIN, 3))) / 4
    )
    assert found["memory_seconds"] == pytest.approx((memory[refresh] + 3 * memory[PLAIN]) / 4)
    assert found["bound"] == "memory"
    rates.found["bytes"] = 1e12
    assert limit(optimizer, StepKinds((PLAIN,)), rates)["bound"] == "arithmetic"


def test_rates_are_measured() -> None:
    rates = Rates(torch.device("cpu"), Clock(torch.device("cpu")), 0)
    assert 1e8 < rates.bytes_per_second() < 1e13 and 1e8 < rates.operations_per_second("float32") < 1e14
    assert set(rates.found) == {"bytes", "float32"}


def test_the_report_shows_the_limits() -> None:
    limit = {"bytes": 28e6, "operations": {"float32": 3e9, "eigh": 1e9}, "memory_ratio": 0.3, "arithmetic_ratio": 0.25}
    limit |= {"bound": "memory", "step_to_limit_ratio": 2.0}
    row = {"optimizer": "mkor", "base": "lamb", "step_ratio": 0.6, "roofline": limit}
    *_, head, _rule, line = roofline({"rows": [row, {"optimizer": "old"}]}).splitlines()
    cells = dict(zip(map(str.strip, head.split("|")), map(str.strip, line.split("|")), strict=True))
    del cells[""]
    assert cells == {
        "optimizer": "mkor+lamb",
        "MB moved": "28.00",
        "GFLOP": "4.00",
        "memory limit": "0.30",
        "arithmetic limit": "0.25",
        "bound by": "memory",
        "step": "0.60",
        "step/limit": "2.00",
    }
    assert roofline({"rows": [{"optimizer": "old"}]}) == ""


def timed(rank: int, world: int) -> dict[str, Any]:
    config = BenchConfig(preset="toy", batch_size=2, seq_length=16, rounds=1, steps=1, ranks=world, optim="mkor+sgd")
    work = Workload(config)
    work.forward_backward(work.model)
    mean = torch.cat([p.grad.flatten() for p in work.parameters if p.grad is not None])
    return {"results": run(config, lambda results: None), "mean": mean, "ids": work.batch["input_ids"]}


def test_ranks_share_a_step() -> None:
    """Each has a batch of its own, the gradients are their mean, and no memory is measured."""
    first, second = run_ranks(2, timed)
    assert not torch.equal(first["ids"], second["ids"]) and torch.equal(first["mean"], second["mean"])
    row = first["results"]["rows"][0]
    assert first["results"]["settings"]["ranks"] == 2 and row["peak_memory_ratio"] is None
    assert row["tokens_per_second"] * row["train_step_seconds"] == pytest.approx(2 * 2 * 16)

"""FSDP2: an optimizer over ``fully_shard``-ed parameters does what it does over whole ones, and sends little."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.pytorch_utils import Conv1D

import hf_soo
from hf_soo import PreconditionedOptimizer
from tests.oracles.core import assert_close_report
from tests.ranks.distributed import run_ranks

STEPS, HALF, ROWS, LENGTH, VOCABULARY = 6, 3, 8, 3, 7
WORLDS = (2, 4)


class Odd(nn.Module):
    """Sizes that no world divides: the middle layer has fewer rows than four ranks; one layer is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.transposed = Conv1D(7, 5)
        self.wide = nn.Linear(7, 11)
        self.narrow = nn.Linear(11, 3, bias=False)
        self.middle = nn.Linear(3, 13)
        self.norm = nn.LayerNorm(13)
        self.last = nn.Linear(13, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.transposed(self.embedding(ids)))
        x = torch.tanh(self.narrow(torch.tanh(self.wide(x))))
        return self.last(self.norm(torch.tanh(self.middle(x))))


LAYERS = ["transposed", "wide", "narrow", "middle", "last"]

# name, settings, base
PERIODS = {"warmup_updates": 2, "update_period": 2}
Case = tuple[str, dict[str, Any], str]
CASES: dict[str, Case] = {
    "mkor": ("mkor", PERIODS, "adamw"),
    "mkor input": ("mkor", PERIODS | {"sides": "input"}, "sgd"),
    "mkor output": ("mkor", PERIODS | {"sides": "output"}, "sgd"),
    "mkor rank 2": ("mkor", PERIODS | {"rank": 2}, "adamw"),
    "mkor dense": ("mkor", PERIODS | {"representation": "dense"}, "adamw"),
    "mkor exponent": ("mkor", PERIODS | {"exponent": 0.25}, "adamw"),
    "mkor gate": ("mkor", PERIODS | {"gate": True}, "sgd"),
    "mkor short history": ("mkor", PERIODS | {"history": 2}, "sgd"),
    "eva": ("eva", {}, "sgd"),
    "eva unit": ("eva", {"kv_scale": "unit", "kl_clip": None}, "sgd"),
    "eva_f": ("eva_f", {}, "sgd"),
    "eva_s joint": ("eva_s", {"form": "joint"}, "sgd"),
    "eva_s separable": ("eva_s", {"form": "separable"}, "sgd"),
    "rf_rmsprop": ("rf_rmsprop", {"batch_size": ROWS}, "sgd"),
    "foof cholesky": ("foof", PERIODS | {"inverse_period": 4}, "adamw"),
    "foof eigen": ("foof", PERIODS | {"inverse_period": 4, "inverse": "eigen"}, "sgd"),
    "newton_muon": ("newton_muon", {"update_period": 2, "inverse_period": 4, "input_blocks": 2}, "adamw"),
    "kfac_expand": ("kfac_expand", PERIODS | {"inverse_period": 4}, "sgd"),
    "kfac_expand eigen": ("kfac_expand", PERIODS | {"inverse_period": 4, "inverse": "eigen"}, "adamw"),
    "if_shampoo": ("if_shampoo", {"batch_size": ROWS}, "sgd"),
    "shampoo": ("shampoo", {"inverse_period": 2}, "sgd"),
    "soap": ("soap", {"inverse_period": 2, "ties": 1e-2, "eps": 1e-3}, "adamw"),
}
LR = {"rf_rmsprop": 1e-1, "if_shampoo": 1e-2, "eva": 1e-2, "eva unit": 5e-3, "eva_f": 1e-2}
# sums over groups or halves of rows in the order in which they come: another split of the batch is another method
SPLIT_DEPENDENT = ["mkor rank 2", "mkor gate"]
# Built before the parameters are sharded and given the new ones afterwards, as accelerate does it.
BUILT_FIRST = ["mkor", "eva", "rf_rmsprop", "kfac_expand", "shampoo"]
STATELESS_BASE = "torch.optim:SGD"  # a run can go on from the weights and the factors


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd().double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator),
            torch.randint(6, (ROWS, LENGTH), generator=generator),
        )
        for _ in range(STEPS)
    ]


def build(case: str, model: nn.Module, base: str | None = None) -> PreconditionedOptimizer:
    name, settings, own_base = CASES[case]
    return hf_soo.build_optimizer(
        name, model, lr=LR.get(case, 2e-2), base=base or own_base, weight_decay=0.01, **settings
    )


def shard(model: nn.Module, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for module in model.children():
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) and p.device_mesh.size() == world for p in model.parameters())


def sharded(case: str, world: int, base: str | None = None, *, built_first: bool = False) -> Any:
    """Model and optimizer."""
    model = odd()
    if not built_first:
        shard(model, world)
        return model, build(case, model, base)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = build(case, model, base)
    shard(model, world)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[p]) for p in group["params"]]
    return model, optimizer


def advance(
    model: nn.Module, optimizer: PreconditionedOptimizer, rank: int = 0, world: int = 1, steps: range = range(STEPS)
) -> dict[str, Tensor]:
    """Train; the gradients that the base optimizer saw in the first of the steps."""
    assert not optimizer.layers or {layer.name.split(".")[0] for layer in optimizer.layers} >= set(LAYERS)
    first: dict[str, Tensor] = {}
    for ids, labels in data()[steps.start : steps.stop]:
        optimizer.zero_grad()
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        loss = F.cross_entropy(model(ids[mine]).flatten(0, 1), labels[mine].flatten())
        loss.backward()
        optimizer.step()
        first = first or {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}
    return first


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def single(case: str) -> dict[str, Any]:
    model = odd()
    first = advance(model, build(case, model))
    again = odd()
    return {"first": first, "weights": weights(model), **halves(case, again, build(case, again, STATELESS_BASE))}


def halves(case: str, model: nn.Module, optimizer: Any, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Over a base without state: weights and factors in the middle and at the end."""
    advance(model, optimizer, rank, world, range(HALF))
    middle = {"weights": weights(model), "state": copy.deepcopy(optimizer.second_order_state())}
    advance(model, optimizer, rank, world, range(HALF, STEPS))
    return {"middle": middle, "end": {"weights": weights(model), "state": optimizer.second_order_state()}}


def go_on(case: str, model: nn.Module, optimizer: PreconditionedOptimizer, middle: Any, *ranks: int) -> dict[str, Any]:
    """From the saved middle of a run to its end."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            new = middle["weights"][name]
            p.copy_(distribute_tensor(new, p.device_mesh, p.placements) if isinstance(p, DTensor) else new)
    optimizer.load_second_order_state(middle["state"])
    advance(model, optimizer, *ranks, steps=range(HALF, STEPS))
    return {"weights": weights(model), "state": optimizer.second_order_state()}


def go_on_alone(case: str, middle: Any) -> dict[str, Any]:
    model = odd()
    return go_on(case, model, build(case, model, STATELESS_BASE), middle)


def two_ranks(rank: int, world: int) -> dict[str, Any]:
    """Every case, whole and in halves; the means over groups of rows also under DistributedDataParallel."""
    results: dict[str, Any] = {}
    for case in CASES:
        result = whole_run(case, rank, world) | halves(case, *sharded(case, world, STATELESS_BASE), rank, world)
        if case in BUILT_FIRST:
            model, optimizer = sharded(case, world, built_first=True)
            advance(model, optimizer, rank, world)
            result["built first"] = weights(model)
        if case in SPLIT_DEPENDENT:
            model = DistributedDataParallel(odd())
            result["ddp"] = {"first": advance(model, build(case, model), rank, world), "weights": weights(model)}
        results[case] = result
    return results | {"counts": counts()}


def four_ranks(rank: int, world: int, middles: dict[str, Any]) -> dict[str, Any]:
    """Every case, whole, and from the middle of the runs of two ranks; then the bytes."""
    results: dict[str, Any] = {}
    for case in CASES:
        results[case] = whole_run(case, rank, world)
        results[case]["end"] = go_on(case, *sharded(case, world, STATELESS_BASE), middles[case], rank, world)
    return results | {"bytes": {name: moved_bytes(name, rank, world) for name in LOW_RANK}}


def whole_run(case: str, rank: int, world: int) -> dict[str, Any]:
    model, optimizer = sharded(case, world)
    return {"first": advance(model, optimizer, rank, world), "weights": weights(model)}


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    """World -> what each rank returned; the four ranks go on from where the two were in the middle."""
    two = run_ranks(2, two_ranks)
    return {2: two, 4: run_ranks(4, four_ranks, {case: two[0][case]["middle"] for case in CASES})}


@pytest.fixture(scope="module")
def singles() -> dict[str, dict[str, Any]]:
    return {case: single(case) for case in CASES}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, what: str) -> None:
    """Layer by layer, weight and bias together: the bias is a column of the matrix."""
    assert list(actual) == list(expected)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in expected):
        both = (torch.cat([t.flatten() for n, t in x.items() if n.startswith(layer + ".")]) for x in (actual, expected))
        assert_close_report(*both, rtol, f"{what}, {layer}")


@pytest.mark.parametrize(
    ("case", "world"), [(c, w) for c in CASES for w in WORLDS if w == 2 or c not in SPLIT_DEPENDENT]
)
def test_shards_train_as_one_process(case: str, world: int, runs: Any, singles: Any) -> None:
    result = runs[world][0][case]
    expected = result["ddp"] if case in SPLIT_DEPENDENT else singles[case]
    for other in runs[world][1:]:
        assert all(torch.equal(other[case]["weights"][n], p) for n, p in result["weights"].items()), "ranks differ"
    # float64: sums in another order; a root of a factor without full rank, and what six steps make of it
    assert_same(result["first"], expected["first"], 1e-10 if case == "shampoo" else 1e-12, "gradient of the first step")
    assert_same(result["weights"], expected["weights"], 1e-10, "weights")
    start = odd().state_dict()
    assert all((p - start[n]).abs().max() > 1e-4 for n, p in result["weights"].items()), "something did not train"


@pytest.mark.parametrize("case", BUILT_FIRST)
def test_parameters_may_be_sharded_after_the_optimizer_is_built(case: str, runs: Any, singles: Any) -> None:
    assert_same(runs[2][0][case]["built first"], singles[case]["weights"], 1e-10, "weights")


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a nested state, with their paths."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, state


def assert_same_state(actual: Any, expected: Any) -> None:
    actual, expected = dict(leaves(actual)), dict(leaves(expected))
    assert list(actual) == list(expected)
    actual, expected = without_bases(actual), without_bases(expected)
    for path, value in expected.items():
        if isinstance(value, Tensor):
            assert type(actual[path]) is Tensor and actual[path].dtype == value.dtype, path
            assert_close_report(actual[path], value, 1e-10, path)
        else:
            assert actual[path] == value, path


def without_bases(state: dict[str, Any]) -> dict[str, Any]:
    """Eigenvectors of close eigenvalues may be turned: V Λ Vᵀ in their place."""
    vectors = [path for path in state if path.endswith("vectors")]
    values = {path: state[path.removesuffix("vectors") + "values"] for path in vectors}
    return state | {path: state[path] * values[path] @ state[path].mT for path in vectors}


WHOLE_BATCH = [case for case in CASES if case not in SPLIT_DEPENDENT]


@pytest.mark.parametrize("case", WHOLE_BATCH)
def test_saved_state_is_that_of_one_process(case: str, runs: Any, singles: Any) -> None:
    for result in runs[2]:
        assert_same_state(result[case]["middle"]["state"], singles[case]["middle"]["state"])
        assert_same_state(result[case]["end"]["state"], singles[case]["end"]["state"])


@pytest.mark.parametrize("case", WHOLE_BATCH)
def test_a_sharded_run_goes_on_elsewhere(case: str, runs: Any, singles: Any) -> None:
    expected = singles[case]["end"]
    alone = go_on_alone(case, runs[2][0][case]["middle"])
    for what, end in (("two", runs[2][0][case]["end"]), ("four", runs[4][0][case]["end"]), ("one", alone)):
        assert_same(end["weights"], expected["weights"], 1e-10, f"{what} ranks")
        assert_same_state(end["state"], expected["state"])


# ------------------------------------------------------------------------------------------------------------ bytes

SIZE, WARMUP, MEASURED = 768, 10, 10  # BERT-Base's width
LOW_RANK = ("mkor", "eva_f")


def large() -> nn.Module:
    torch.manual_seed(0)
    sizes = [SIZE, SIZE, SIZE, 2 * SIZE]
    return nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))


class Bytes(TorchDispatchMode):
    """Counts what collectives move through a rank: twice the tensor for an all-reduce, once for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sides = [sum(t.nbytes for t in tree_flatten(arg)[0] if isinstance(t, Tensor)) for arg in args]
            self.count += max(sides, default=0) * (2 if "allreduce" in func.name().replace("_", "") else 1)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[int]]:
    result: list[int] = []
    with Bytes() as mode:
        yield result
    result.append(mode.count)


def moved_bytes(name: str, rank: int, world: int) -> tuple[int, list[int]]:
    """Bytes of all gradients of the layers, and what ``optimizer.step`` moves in each step."""
    model = large()
    shard(model, world)
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-3, base="adamw", update_period=10, warmup_updates=WARMUP)
    assert len(optimizer.layers) == 3
    steps = []
    generator = torch.Generator().manual_seed(rank)
    for _ in range(WARMUP + MEASURED):
        optimizer.zero_grad()
        model(torch.randn(4, SIZE, generator=generator)).square().mean().backward()
        with counted() as bytes_:
            optimizer.step()
        steps += bytes_
    return sum(p.numel() * p.element_size() for p in model.parameters()), steps


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_methods_move_a_tenth_of_the_gradients(name: str, runs: Any) -> None:
    gradients, steps = runs[4][0]["bytes"][name]
    average, whole_run = sum(steps[WARMUP:]) / MEASURED, sum(steps) / len(steps)
    print(f"{name}: {average / gradients:.4f} of the gradients' bytes a step, {whole_run / gradients:.4f} with warm-up")
    assert 0 < average <= gradients / 10


def test_the_count_counts(runs: Any) -> None:
    """An all-gather of n bytes counts n, an all-reduce 2n."""
    assert [result["counts"] for result in runs[2]] == [(4096, 8192)] * 2


def counts() -> tuple[int, int]:
    whole_, shard_ = torch.empty(1024), torch.zeros(512)
    with counted() as gather:
        torch.distributed.all_gather_into_tensor(whole_, shard_)
    with counted() as reduce:
        torch.distributed.all_reduce(whole_)
    return gather[0], reduce[0]

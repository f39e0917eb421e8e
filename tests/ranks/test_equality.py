"""One training run, however it is spread over processes: the weights are those of a single process."""

from __future__ import annotations

import functools
import json

import pytest

from tests.ranks import equality
from tests.ranks.cells import (
    BF16,
    BY_HALVES,
    CONTROL,
    METHODS,
    OTHER_WAYS,
    PLAIN,
    SINGLE,
    SOME,
    STRATEGIES,
    SUMS_IN_FP32,
    TOLERANCE,
    Cell,
    Result,
    Strategy,
    cells_of,
    run,
    same,
)
from tests.ranks.equality import Row, differences, distance

# (strategy, method, way) -> what the refusal says
REFUSALS: dict[tuple[str, str, str], str] = {}
APART = 1e-4  # what is not the same run differs by more than this

HALVES = (BY_HALVES.name, "resume")
OF_HALVES = ("DDP x 2", "FSDP2 x 2", "ZeRO-2 x 2")
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


@functools.cache
def single() -> dict[Cell, Result]:
    return run(SINGLE, PLAIN + OTHER_WAYS)


@functools.cache
def results(name: str) -> dict[Cell, Result]:
    """All cells of a row, and what depends on how many ranks there are."""
    strategy = BY_NAME[name]
    return run(strategy, cells_of(strategy) + [HALVES] * (name in OF_HALVES))


@functools.cache
def attempt(name: str) -> Row | Exception:
    """A row of the table; what went wrong is kept too, so that no row is run twice."""
    try:
        found = results(name)
        return differences(single(), {cell: found[cell] for cell in cells_of(BY_NAME[name])})
    except Exception as error:
        return error


def row(name: str) -> Row:
    result = attempt(name)
    if isinstance(result, Exception):
        raise result
    return result


@pytest.mark.parametrize("name", BY_NAME)
def test_the_run_is_that_of_a_single_process(name: str) -> None:
    wrong = {}
    for (method, way), value in row(name).items():
        expected = REFUSALS.get((name, method, way))
        right = value <= TOLERANCE if isinstance(value, float) else expected is not None and expected in value
        if not right or (isinstance(value, float) and expected is not None):
            wrong[method, way] = value
    assert not wrong


def test_halves_of_the_batch_are_those_of_ddp() -> None:
    """Resumed in the middle, too; the same halves of the same batches under every strategy of two ranks."""
    ddp, *others = (results(name)[HALVES] for name in OF_HALVES)
    assert max(distance(other, ddp) for other in others) <= TOLERANCE
    assert distance(ddp, single()["mkor", "plain"]) > APART


def test_the_table_is_printed() -> None:
    table = {name: row(name) for name in BY_NAME}
    print("\n" + equality.markdown(table))
    rows = equality.report(table)["rows"]
    assert len(rows) == sum(len(cells_of(strategy)) for strategy in STRATEGIES) == len(json.loads(json.dumps(rows)))


def test_the_columns_are_different_runs() -> None:
    """Every preconditioner moves the weights elsewhere than its base alone does, and than the others."""
    names = [*METHODS, CONTROL.name]
    pairs = {(a, b): distance(single()[a, "plain"], single()[b, "plain"]) for a in names for b in names if a < b}
    assert pairs.pop(("mkor", "mkor dense")) <= TOLERANCE  # two forms of one factor, while it has few columns
    assert {pair: value for pair, value in pairs.items() if value < APART} == {}


@pytest.mark.parametrize("method", [method for method, way in OTHER_WAYS if way == "clip"])
def test_clipping_acts(method: str) -> None:
    assert distance(single()[method, "clip"], single()[method, "plain"]) > APART


@pytest.mark.parametrize(("method", "way"), [cell for cell in OTHER_WAYS if cell[1] != "clip"])
def test_a_single_process_does_not_depend_on_the_way(method: str, way: str) -> None:
    assert distance(single()[method, way], single()[method, "plain"]) <= TOLERANCE


def test_a_rank_with_other_data_shows() -> None:
    """The comparison can fail: one rank's sentences in another order, and Trainer still averages over both."""
    result = run(BY_NAME["DDP x 2"], [("mkor", "plain")], other_on=1)
    assert distance(result["mkor", "plain"], single()["mkor", "plain"]) > APART


@functools.cache
def bf16(strategy_name: str) -> dict[Cell, Result]:
    strategies: list[Strategy] = [*STRATEGIES, SUMS_IN_FP32]
    return run(next(s for s in strategies if s.name == strategy_name), BF16)


@pytest.mark.parametrize("method", SOME)
def test_bf16_is_the_same_under_zero_1_and_2(method: str) -> None:
    one, two, sums = (bf16(name)[method, "bf16"] for name in ("ZeRO-1 x 2", "ZeRO-2 x 2", SUMS_IN_FP32.name))
    assert same(one, two), distance(one, two)
    # there P is written in fp32, here rounded to bf16: a rounding of a weight near 1 is 2^-8
    assert distance(one, sums) <= 2**-8
    assert distance(sums, bf16(SUMS_IN_FP32.name)[CONTROL.name, "bf16"]) > APART, "nothing was preconditioned"
    assert distance(one, bf16("ZeRO-1 x 2")[CONTROL.name, "bf16"]) > APART, "nothing was preconditioned"

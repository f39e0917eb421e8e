"""Trainer's runs, spread over processes: the equality table's cells, and another version's checkpoints resumed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from tests.ranks import cells, distributed
from tests.ranks.cells import (
    BF16,
    METHODS,
    OTHER_WAYS,
    PLAIN,
    RESUME_AT,
    SINGLE,
    STRATEGIES,
    SUMS_IN_FP32,
    Cell,
    Strategy,
)

Weights = dict[str, Tensor]
Result = Weights | str

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "checkpoints"
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
"""The sizes of the fixtures' model."""
KEPT = ("mkor over lamb",)
"""The fixtures' methods."""
RESUMED = (*KEPT, "kfac_expand", "mkor dense", "mkor_h", "eva", "if_shampoo", "rf_rmsprop")
UNDER = [strategy for strategy in (SINGLE, *STRATEGIES) if strategy.world <= 2]


def table() -> list[tuple[Strategy, list[Cell]]]:
    """Each strategy, and the cells that the equality table and its tests run under it."""
    rows = [(SINGLE, PLAIN + OTHER_WAYS), *((strategy, cells.cells_of(strategy)) for strategy in STRATEGIES)]
    with_bf16 = ("ZeRO-1 x 2", "ZeRO-2 x 2")
    rows = [(strategy, found + BF16 * (strategy.name in with_bf16)) for strategy, found in rows]
    return [*rows, (SUMS_IN_FP32, BF16)]


def results(chosen: Callable[[str], bool], checkpoints: Path, fixtures: Path) -> Iterator[tuple[str, Result]]:
    """Row -> how it ended, for the rows that are asked for; those under one strategy share their processes.

    Args:
        chosen: whether a row is asked for.
        checkpoints: where those of the older version lie; they are written where there is none.
        fixtures: the same for those that are kept.
    """
    distributed.TIMEOUT = 3000.0  # two versions run beside each other, and a machine may have few cores
    for strategy, found in table():
        wanted = [cell for cell in found if chosen(equality_row(strategy, cell))]
        if wanted:
            ended = attempt(lambda strategy=strategy, wanted=wanted: cells.run(strategy, wanted), wanted)
            yield from ((equality_row(strategy, cell), named(result)) for cell, result in ended.items())
    for part, methods, folder, sizes in (("resume", RESUMED, checkpoints, {}), ("fixtures", KEPT, fixtures, SMALL)):
        for strategy in UNDER:
            names = [method for method in methods if chosen(f"{part}/{strategy.name}/{method}")]
            if names:
                ended = attempt(lambda s=strategy, n=names, f=folder, z=sizes: resume(s, n, f, z), names)
                yield from ((f"{part}/{strategy.name}/{m}", named(r, **sizes)) for m, r in ended.items())


def equality_row(strategy: Strategy, cell: Cell) -> str:
    """The row of a cell."""
    return "/".join(("equality", strategy.name, *cell))


def attempt(function: Callable[[], dict], keys: Sequence) -> dict:
    """What it returns, or its error for each key: no other strategy shall suffer."""
    try:
        return function()
    except Exception as error:
        return dict.fromkeys(keys, f"{type(error).__name__}: {error}")


def named(result: Tensor | str, **sizes: int) -> Result:
    """The flat weights by the names of their parameters; the words of a refusal as those of an error."""
    if isinstance(result, str):
        return result if re.match(r"\w+(Error|Exception): ", result) else f"NotImplementedError: {result}"
    parameters = sorted(cells.tiny_bert(**sizes).named_parameters())
    parts = result.split([parameter.numel() for _, parameter in parameters])
    return {name: part for (name, _), part in zip(parameters, parts, strict=True)}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def place(folder: Path, strategy: str, method: str) -> Path:
    """Where the checkpoint of a run lies."""
    return folder / re.sub(r"\W+", "_", strategy).lower() / re.sub(r"\W+", "_", method)


def resume(strategy: Strategy, methods: Sequence[str], folder: Path, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Method -> the final weights of a run that goes on from a checkpoint; see `resume_on_rank`."""
    with tempfile.TemporaryDirectory() as output:
        args = (strategy, methods, str(folder), sizes, output)
        return (
            resume_on_rank(0, 1, *args) if strategy.world == 1 else distributed.run_ranks(2, resume_on_rank, *args)[0]
        )


def resume_on_rank(
    rank: int, world: int, strategy: Strategy, methods: Sequence[str], folder: str, sizes: dict[str, int], output: str
) -> dict[str, Tensor]:
    """On one rank: each method goes on from the checkpoint in its place, which is written first if there is none.

    Args:
        rank: this one.
        world: how many there are.
        strategy: how the run is spread.
        methods: of ``METHODS``.
        folder: where the checkpoints' places are.
        sizes: of the model.
        output: for what the runs write.
    """
    if strategy.kind == "zero":
        cells.stay_on_gloo()
    data, found = cells.Sentences(), {}
    for method in methods:
        here = place(Path(folder), strategy.name, method)
        if not here.exists():
            cells.make_trainer(strategy, METHODS[method], "resume", here, data, **sizes).train()
        there = place(Path(output), strategy.name, method)
        trainer = cells.make_trainer(strategy, METHODS[method], "resume", there, data, **sizes)
        trainer.train(resume_from_checkpoint=str(here / f"checkpoint-{RESUME_AT}"))
        assert trainer.state.global_step == cells.STEPS
        cells.assert_spread(strategy, trainer)
        found[method] = cells.whole_weights(trainer)
    cells.forget(SINGLE)
    return found

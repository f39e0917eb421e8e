"""One side of the comparison: runs the rows with the hf_soo that it is given, and writes their final weights."""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import hf_soo
from tests.compare import contract, spread

Result = dict[str, torch.Tensor] | str  # weights by name, or the type and words of what was raised


def chosen(row: str, parts: list[str], names: list[str]) -> bool:
    """Whether a row is asked for: by its part, and by any of these regular expressions."""
    return (not parts or row.partition("/")[0] in parts) and (not names or any(re.search(name, row) for name in names))


def attempt(function: Callable[[], dict[str, torch.Tensor]]) -> Result:
    """What it returns, or its error: words may change between versions, but whether a set-up is refused may not."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def results(parts: list[str], names: list[str], checkpoints: Path, fixtures: Path) -> Iterator[tuple[str, Result]]:
    """Row -> how it ended."""
    for row, function in contract.rows(checkpoints):
        if chosen(row, parts, names):
            yield row, attempt(function)
    yield from spread.results(lambda row: chosen(row, parts, names), checkpoints, fixtures)


def main() -> None:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    assert hf_soo.__file__ is not None and Path(hf_soo.__file__).is_relative_to(options.package), hf_soo.__file__
    torch.set_num_threads(1)
    logging.getLogger("hf_soo").setLevel(logging.ERROR)  # layers without statistics are meant
    start = time.monotonic()
    found = dict(results(options.only, options.names, options.checkpoints, options.fixtures))
    torch.save(found, options.out.with_suffix(".partial"))
    os.replace(options.out.with_suffix(".partial"), options.out)
    print(f"{len(found)} rows in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

"""The comparison of two versions: it covers what the other tables have, and it can fail."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hf_soo.registry import METHODS
from tests.compare import contract, spread
from tests.compare.__main__ import ROOT, difference, differences
from tests.methods.toy import CASES
from tests.ranks import cells


def test_the_rows_cover_the_contract() -> None:
    """Every name; and of the methods that both versions have every form of the contract's table, and every setting."""
    rows = contract.cases()
    assert METHODS.keys() <= rows.keys()

    def plain(name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return name, {key: value for key, value in settings.items() if key != "batch_size"}  # which both tables give

    covered = [plain(*row) for row in rows.values()]
    for case, (name, settings) in CASES.items():
        known = name in contract.SETTINGS or METHODS[name].config is None  # a new one has nothing to be compared with
        assert not known or plain(name, settings) in covered, case
    for name in contract.SETTINGS:
        fields = {field.name for field in dataclasses.fields(METHODS[name].config)}
        changed = contract.SETTINGS[name] + (contract.SETTINGS["mkor"] if name == "mkor_h" else [])
        assert fields == {key for settings in changed for key in settings}, name


def test_the_rows_cover_the_equality_table() -> None:
    found = {strategy.name: set(rows) for strategy, rows in spread.table()}
    assert found.keys() == {strategy.name for strategy in (cells.SINGLE, *cells.STRATEGIES, cells.SUMS_IN_FP32)}
    assert all(set(cells.cells_of(strategy)) <= found[strategy.name] for strategy in cells.STRATEGIES)
    assert {way for rows in found.values() for _, way in rows} == cells.WAYS.keys()
    assert {method for rows in found.values() for method, _ in rows} == {*cells.METHODS, cells.CONTROL.name}
    assert {strategy.kind for strategy in spread.UNDER} == {"single", "ddp", "fsdp2", "zero"}


def test_a_difference_of_one_bit_is_found() -> None:
    one = {"a": torch.ones(3), "b": torch.tensor([0.0, float("nan")])}
    other = {"a": torch.ones(3), "b": torch.tensor([0.0, float("nan")])}
    assert difference(one, other) == ""
    other["a"][1] = torch.nextafter(other["a"][1], torch.tensor(2.0))
    assert difference(one, other) == "|dW| = 1.2e-07, first in a"
    assert difference(one, other | {"c": torch.ones(1)}) == "parameters ['c'] are on one side alone"
    assert difference("ValueError: lr", "ValueError: rate") == ""  # words may change
    assert differences({"row": one}, {"row": "ValueError: lr"}) == {"row": "weights -> ValueError: lr"}
    assert differences({}, {"row": one}) == {}  # of a method that the older version has not got
    assert differences({"row": one}, {}) == {"row": "weights -> no such row"}


def compare(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.compare", "--old", ".", "--new", ".", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_version_is_equal_to_itself(tmp_path: Path) -> None:
    rows = ("^contract/mkor/toy", "^resume/loop/shampoo-adam", "^fixtures/single")
    done = compare("--json", str(tmp_path / "report.json"), "--", *rows)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 of 4 rows differ (0 are refused by .)"
    assert '"differences": {}' in (tmp_path / "report.json").read_text()

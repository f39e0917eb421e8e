"""The command hf-soo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo import cli
from hf_soo.bench.bench import state_bytes
from hf_soo.engine.capture import GradientRecorder
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.sums import SumRecorder
from tests.scripts.test_report import runs


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The rows of `hf-soo list`, cut where the columns of its head begin."""
    assert cli.main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    titles = re.split(r"  +", head)
    starts = [head.index(title) for title in titles]
    ends = [*starts[1:], None]
    return [{title: row[a:b].strip() for title, a, b in zip(titles, starts, ends, strict=True)} for row in rows]


def test_list_says_base_needs_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys)
    assert {row["name"]: row["what it is"] for row in rows} == hf_soo.available()
    of = {row["name"]: [row[key] for key in ("default base", "needs", "state B/param")] for row in rows}
    assert of["mkor"] == ["lamb", "input and output means", "8.3"]  # 2 · 32 columns of 1024: 0.25
    assert of["eva"] == ["sgd", "input and output means", "4.0"]
    assert of["eva_f"] == ["sgd", "input mean", "4.0"]
    assert of["lamb"] == ["", "nothing", "8.0"]
    assert [of[name][2] for name in ("adamw", "sgd", "rmsprop", "muon")] == ["8.0", "4.0", "4.0", "4.0"]


@pytest.mark.parametrize("name", ["mkor", "eva", "eva_f", "lamb", "adamw", "sgd", "rmsprop", "muon"])
def test_the_memory_listed_is_what_an_optimizer_holds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-3, weight_decay=0.01)
    model(torch.randn(2, 1024)).square().sum().backward()
    optimizer.step()
    held = state_bytes(optimizer) / sum(p.numel() for p in model.parameters())
    (row,) = (row for row in listed(capsys) if row["name"] == name)
    assert float(row["state B/param"]) == pytest.approx(held, abs=0.051)  # printed with one decimal


def test_recorders_say_what_they_need() -> None:
    def sums(inputs: bool, outputs: bool) -> str:
        return SumRecorder(inputs=inputs, outputs=outputs).needs

    assert [sums(True, True), sums(True, False), sums(False, True), sums(False, False)] == [
        "input and output means",
        "input mean",
        "output mean",
        "nothing",
    ]
    factors = [FactorRecorder(outputs, False, "grad", None, False).needs for outputs in (True, False)]
    assert factors == ["Kronecker factors", "input factor"]
    assert GradientRecorder().needs == "gradients only"


def test_report_writes_table_picture_and_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "wiki"
    for record in runs():
        record.write(folder)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:wiki -->\n<!-- /results -->\n")
    table, picture = tmp_path / "table.md", tmp_path / "curves.png"
    flags = ["--table", str(table), "--picture", str(picture), "--readme", str(readme), "--title", "t"]
    assert cli.main(["report", str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    assert "| mkor | lamb | 0.02 | 6.000 | 67 |" in printed
    assert table.read_text() == printed
    assert printed.strip() in readme.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-soo: error: No folder ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["plant"], []])
def test_unknown_or_no_command_is_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "report" in capsys.readouterr().out

"""The command hf-soo."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report import runs

import hf_soo
from hf_soo import cli


def test_list_names_every_optimizer_with_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "default", "base", "what", "it", "is"]
    assert [row.split()[0] for row in rows] == list(hf_soo.available())
    assert next(row for row in rows if row.startswith("mkor ")).split()[1] == "lamb"
    for row, title in zip(rows, hf_soo.available().values(), strict=True):
        assert row.endswith(f"  {title}")


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

"""The table of a benchmark, from files of this version and of older ones."""

from __future__ import annotations

from pathlib import Path

from hf_soo.bench.report import COLUMNS, _table, line
from hf_soo.cli import report_of

ROOT = Path(__file__).resolve().parents[2]
ROW = {"optimizer": "mkor", "base": "lamb", "step_ratio": 1.224, "refresh_step_ratio": None, "step_to_bare_ratio": 1.5}


def test_what_was_not_measured_is_an_empty_cell() -> None:
    """By an older version (no key), or because the method has no such step (null)."""
    name, *cells = (cell.strip() for cell in line(ROW).strip("|").split("|"))
    assert name == "mkor+lamb"
    assert {title: cell for title, cell in zip(COLUMNS, cells, strict=True) if cell} == {
        "step": "1.22",
        "step/bare": "1.50",
    }


def test_variants_of_a_method_are_told_apart() -> None:
    assert line({**ROW, "set": {"history": 64, "rank": 2}}).startswith("| mkor:history=64:rank=2+lamb | ")
    assert line({**ROW, "base": "mkor"}).startswith("| mkor             | ")


def test_rows_are_as_wide_as_the_head() -> None:
    reference = {"adamw_foreach_seconds": 0.2, "adamw_fused_ratio": 0.5}
    results = {"preset": "tiny", "parameters": 1, "device": "cpu", "reference": reference, "rows": [ROW]}
    *_, head, rule, row = _table(results).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == len(COLUMNS) + 2


def test_readme_shows_the_benchmarks_table() -> None:
    _, text = report_of(ROOT / "results" / "bench")
    readme = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert f"<!-- results:bench -->\n{text.strip()}\n<!-- /results -->" in readme

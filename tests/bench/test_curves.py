"""Cost curves from the JSONs of a suite: tables and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_soo.bench import report as bench_report
from hf_soo.bench.curves import curves_of
from hf_soo.cli import main, report_of


def bench(over: str, at: int, **ratios: float) -> dict[str, Any]:
    rows = [
        {"optimizer": "mkor", "base": "lamb", "set": {}, "step_ratio": ratios["mkor"], "train_step_ratio": 1.04},
        {"optimizer": "lamb", "base": "lamb", "step_ratio": 0.6, "train_step_ratio": 1.0},
    ]
    reference = {"adamw_foreach_seconds": 0.1, "adamw_fused_ratio": 0.2}
    curve = {"over": over, "at": at}
    about = {"kind": "bench", "preset": "mini", "parameters": 10, "device": "d", "reference": reference}
    return {**about, "curve": curve, "rows": rows}


def plan(gpus: int, step: float) -> dict[str, Any]:
    seconds = {"adamw": 2.0, "mkor+lamb": step}
    methods = [{"method": name, "predicted_seconds": {"step": each}} for name, each in seconds.items()]
    return {"layout": {}, "config": {"gpus": gpus}, "methods": methods}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = [bench("width", 512, mkor=1.2), bench("width", 256, mkor=1.5), bench("ranks", 2, mkor=1.1)]
    for number, document in enumerate([*documents, plan(64, 3.0), plan(1, 2.5), {"kind": "suite"}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(document))
    return tmp_path


def test_points_are_in_order() -> None:
    found = curves_of([bench("width", 512, mkor=1.2), bench("width", 256, mkor=1.5), plan(64, 3.0)])
    assert found == {
        "width": {"mkor+lamb": [(256, 1.5, 1.04), (512, 1.2, 1.04)], "lamb": [(256, 0.6, 1.0), (512, 0.6, 1.0)]},
        "gpus": {"mkor+lamb": [(64, None, 1.5)]},
    }


def test_the_report_has_a_table_of_each_curve(folder: Path) -> None:
    _, text = report_of(folder)
    assert "| width | 256 | 512 |" in text and "| mkor+lamb | 1.50; 1.04 | 1.20; 1.04 |" in text
    assert "| GPUs (predicted) | 1 | 64 |" in text and "| mkor+lamb | -; 1.25 | -; 1.50 |" in text
    assert "AdamW(foreach) 100" not in text  # no table of a point's own


def test_the_picture_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--picture", str(folder / "c.png"), "--title", "Cost"]) == 0
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG")


def test_without_benchmarks_nothing_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"kind": "bench"}))
    assert main(["report", str(tmp_path), "--picture", str(tmp_path / "c.png")]) == 1
    assert "holds nothing that can be drawn; leave it out." in capsys.readouterr().err


def test_a_benchmark_on_no_curve_has_marks(tmp_path: Path) -> None:
    whole = bench("width", 512, mkor=1.2)
    del whole["curve"]
    whole["rows"].append({"optimizer": "eva", "base": "sgd", "step_ratio": 0.3, "train_step_ratio": None})
    (tmp_path / "a.json").write_text(json.dumps(whole))
    (tmp_path / "b.json").write_text(json.dumps(whole | {"rows": [{**whole["rows"][1], "step_ratio": 0.7}]}))
    (figure,) = bench_report.figures(tmp_path, "Cost")
    step, train = figure.axes[0].get_lines()
    assert [list(line.get_xdata()) for line in (step, train)] == [[0, 1, 2, 1], [0, 1, 1]]
    assert list(step.get_ydata()) == [1.2, 0.6, 0.3, 0.7] and figure.get_suptitle() == "Cost"
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["mkor+lamb", "lamb", "eva+sgd"]

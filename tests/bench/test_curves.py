"""Cost curves from the JSONs of a suite: tables and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_soo.bench.curves import curves_of, picture
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


def test_no_curve_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"kind": "suite"}))
    with pytest.raises(ValueError, match="no benchmark that lies on a curve"):
        picture(tmp_path, str(tmp_path / "c.png"))

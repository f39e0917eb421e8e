"""All workloads of a search on one page: what each says, what was not run, and what a step costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_soo import cli
from hf_soo.runs.record import RunRecord
from hf_soo.search.cost import benchmarks, step_time
from tests.search.test_claims import MUON, RATES
from tests.search.test_comparison import tables
from tests.search.trials import chosen, confirmed, write

BETTER, WORSE = ([loss + sign * (0.03 + 0.001 * n) for n, loss in enumerate(MUON)] for sign in (-1, 1))


def workload(name: str, batch: int | None, **losses: Sequence[float]) -> list[RunRecord]:
    """The trials of a workload: each method tuned alike, and confirmed with these losses, or with none."""
    runs: list[RunRecord] = []
    for method, of_seeds in losses.items():
        more: dict[str, Any] = {"search": {"study": name}, "config": {"per_device_train_batch_size": batch}}
        if method.endswith("_momentum"):
            more["config"] |= {"optim_args": {"apply_to": "momentum"}}
        runs += [*chosen(method, RATES, **more), *confirmed(method, of_seeds, **more)]
    for run in runs:
        run.base = run.search["space"].split("_")[-1].replace("momentum", "muon")
        run.optimizer = run.optimizer.replace("newton", "newton_muon")
    return runs


def bench(folder: Path, name: str, batch: int, rows: dict[tuple[str, str], float], **more: Any) -> None:
    """A benchmark as `hf-soo bench` writes it, of what is read here."""
    config = {"update_period": 10, "kv_target": 0.3, "apply_to": "gradient"}
    document = {
        "kind": "bench", "preset": name, "parameters": 1, "workload": {"batch_size": batch, "seq_length": 64} | more,
        "rows": [
            {"optimizer": ours, "base": base, "config": {} if ours == base else config, "train_step_ratio": ratio}
            for (ours, base), ratio in rows.items()
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document))


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """Three workloads, two of which differ in the batch, and benchmarks beside them."""
    folder = tmp_path / "evidence"
    for name, runs in {
        "gpt": workload("gpt", 64, muon=MUON, mkor_muon=BETTER, mkor_muon_momentum=WORSE, adamw=[2.6, 2.7, 2.6, 2.71]),
        "gpt_256": workload("gpt_256", 256, muon=MUON, mkor_muon=WORSE, adamw=[]),
        "vit": workload("vit", None, muon=[]),
    }.items():
        write(runs, folder / name)
    bench(tmp_path / "bench", "small", 2, {("muon", "muon"): 2.0, ("mkor", "muon"): 3.0})
    bench(tmp_path / "bench", "large", 32, {("muon", "muon"): 2.0, ("mkor", "muon"): 2.1})
    bench(tmp_path / "bench", "ranks", 99, {("muon", "muon"): 1.0, ("mkor", "muon"): 9.0}, ranks=2)
    return folder


def test_one_table_over_all_workloads(evidence: Path) -> None:
    _, text = cli.report_of(evidence)
    first, *_, costs = tables(text)
    found = {line["method"]: line for line in first}
    gpt, large = "gpt: 300 steps", "gpt_256: 300 steps"
    assert list(first[0]) == ["method", gpt, large, "vit"]
    assert found["muon"] == {"method": "muon", gpt: "baseline", large: "baseline", "vit": "tuned, not confirmed"}
    assert found["mkor_muon"][gpt].startswith("**-") and found["mkor_muon"][large].startswith("+")
    assert found["mkor_muon_momentum"][gpt].startswith("+") and found["mkor_muon_momentum"][large] == "not run"
    assert found["adamw"][gpt].endswith("(not tested)") and found["adamw"][large] == "tuned, not confirmed"
    assert {line["vit"] for line in first} == {"tuned, not confirmed", "not run"}
    by_method = {line["method"]: line for line in costs}
    assert by_method["mkor_muon"]["over muon"] == "1.05 (large, 32 x 64 tokens)"
    assert by_method["mkor_muon"]["over adamw"] == "2.10 (large, 32 x 64 tokens)", "all are timed beside AdamW"
    assert by_method["mkor_muon_momentum"]["over muon"] == "-", "it was timed on the gradient alone"
    for part in ("gpt: 300 steps, held-out set 'claim'", "gpt_256: 300 steps, held-out set 'choose': sensitivity"):
        assert f"### {part}" in text


def test_a_step_is_of_the_settings_that_were_timed(evidence: Path) -> None:
    documents, (ours, base) = (
        benchmarks(evidence / "gpt"),
        (confirmed(name, [1.0])[0] for name in ("mkor_muon", "muon")),
    )
    assert [document["preset"] for document in documents] == ["large", "small"]
    for args, known in (({}, True), ({"kv_target": 3.0}, True), ({"update_period": 1}, False), ({"gone": 1}, False)):
        ours.config["optim_args"] = args
        assert (step_time(documents, ours, base) is not None) == known, args
    ours.config["optim_args"] = {}
    for args, known in (({"rest_lr": 0.005, "ns_dtype": "float32"}, True), ({"ns_steps": 8}, False)):
        ours.config["base_optim_args"] = args
        assert (step_time(documents, ours, base) is not None) == known, args
    assert step_time(documents, base, confirmed("lamb", [1.0])[0]) is None and benchmarks(evidence.parent) == []


def test_the_picture_has_gain_over_batch_and_over_cost(evidence: Path) -> None:
    pytest.importorskip("matplotlib")
    (figures, parts), _ = cli.report_of(evidence)
    (drawn,) = figures("All")
    shown = {axes.get_title(): axes for axes in drawn.axes if axes.axison}
    assert len(shown) == len([axes for axes in drawn.axes if axes.axison]) - 2, "two curves of a workload share a title"
    over_time = [axes for axes in drawn.axes if axes.get_xlabel().startswith("time in steps of the strongest plain")]
    ends = [{line.get_label(): line.get_xdata()[-1] for line in axes.lines} for axes in over_time]
    assert ends == [{"muon": 300, "mkor_muon": 315, "adamw": 150}, {"muon": 300, "mkor_muon": 315}]
    assert "not timed: mkor_muon_momentum" in " ".join(over_time[0].get_xlabel().split())
    batches, costs = (
        shown["gpt, gpt_256: gain over batch"],
        shown[next(name for name in shown if "gain over cost" in name)],
    )
    lines = {line.get_label(): line for line in batches.lines}
    assert list(lines["muon"].get_ydata()) == [1.0, 1.0] and list(lines["mkor_muon"].get_xdata()) == [64, 256]
    assert lines["mkor_muon"].get_ydata()[0] < 1 < lines["mkor_muon"].get_ydata()[1]
    points = [line for line in costs.lines if line.get_label() == "mkor_muon"]
    assert [line.get_xdata()[0] for line in points] == [1.05, 1.05] and "3 timed, 1 not" in costs.get_title()
    assert set(parts()) == {
        f"{name}: 300 steps, held-out set '{held_out}': {stages}"
        for name in ("gpt", "gpt_256", "vit")
        for held_out, stages in (("claim", "confirm"), ("choose", "wide and narrow"))
    } - {"vit: 300 steps, held-out set 'claim': confirm"}  # fmt: skip


def test_a_folder_of_other_folders_is_refused_as_before(tmp_path: Path) -> None:
    write(workload("gpt", 64, muon=MUON), tmp_path / ".search" / "gpt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text('{"kind": "plan"}')
    with pytest.raises(ValueError, match="holds no"):
        cli.report_of(tmp_path)

"""The comparison of a folder as text and picture, and the command that prints it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_soo import cli
from hf_soo.runs.record import RunRecord, kind_of, read_documents, read_runs
from hf_soo.search.comparison import text_of
from tests.search.test_claims import MKOR, MUON, RATES, claims_of, fair, reached, row
from tests.search.trials import BUDGET, chosen, confirmed, laboratory, trial, write

GOLDEN = Path(__file__).parent / "comparison.md"
ADAMW, OVER_ADAMW = [2.60, 2.70, 2.64, 2.711], [2.40, 2.41, 2.46, 2.721]


def small() -> list[RunRecord]:
    """Two plain methods and MKOR over each; one run that chose diverged, one was stopped, one best is at the edge."""
    rates: dict[float, float | str] = {0.01: 1.95, 0.02: 1.8, 0.04: "diverged"}
    edge: dict[float, float | str] = {0.001: "stopped", 0.002: 2.7, 0.004: 2.6}
    rest = {"search": {"params": {"learning_rate": 0.02, "base_optim_args.rest_lr": 0.005}}}
    return [
        *chosen("muon", rates), *chosen("mkor_muon", RATES), *chosen("adamw", edge), *chosen("mkor_adamw", RATES),
        *confirmed("muon", MUON), *confirmed("mkor_muon", MKOR, **rest),
        *confirmed("adamw", ADAMW, rate=0.004), *confirmed("mkor_adamw", OVER_ADAMW),
    ]  # fmt: skip


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of each table, by column."""
    found: list[list[dict[str, str]]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|--"):
            head = [cell.strip() for cell in lines[number - 1].split("|")[1:-1]]
            rows = iter(lines[number + 1 :])
            found.append([])
            while (row := next(rows, "")).startswith("|"):
                found[-1].append(dict(zip(head, [cell.strip() for cell in row.split("|")[1:-1]], strict=True)))
    return found


def test_the_text_is_as_it_was(tmp_path: Path) -> None:
    assert text_of(write(small(), tmp_path)) == GOLDEN.read_text(encoding="utf-8")


def test_each_number_of_the_text_is_a_direct_computation() -> None:
    main, own, rates = tables(GOLDEN.read_text(encoding="utf-8"))
    losses = {"muon": MUON, "mkor_muon": MKOR, "adamw": ADAMW, "mkor_adamw": OVER_ADAMW}
    tests = [("mkor_muon", "muon"), ("mkor_adamw", "muon"), ("mkor_adamw", "adamw")]
    p = {pair: stats.ttest_rel(*(losses[name] for name in pair), alternative="less").pvalue for pair in tests}
    order = sorted(tests, key=lambda pair: p[pair])
    scaled = np.minimum(1, np.maximum.accumulate([p[pair] * (3 - n) for n, pair in enumerate(order)]))
    adjusted = dict(zip(order, scaled, strict=True))
    assert [line["method"] for line in main] == ["mkor_muon", "muon", "mkor_adamw", "adamw"]
    assert [line["method"] for line in own] == ["mkor_adamw"]
    for line, base in [*((line, "muon") for line in main), (own[0], "adamw")]:
        name = line["method"]
        steps = [reached(ours, target) for ours, target in zip(losses[name], losses[base], strict=True)]
        got = [step for step, ours, target in zip(steps, losses[name], losses[base], strict=True) if ours <= target]
        share = "" if len(got) == 4 else f" ({len(got)} of 4)"
        assert line["steps to target"] == ((f"{np.mean(got):.0f}" if got else "") + share).strip()
        assert line["steps ratio"] == (f"{np.mean(got) / BUDGET:.3f}" if len(got) == 4 else "")
        if name != base:
            difference = np.subtract(losses[name], losses[base])
            cell = f"{difference.mean():+.4f} ± {difference.std(ddof=1) / 2:.4f}"
            assert line.get(f"minus {base} 0.02", line.get("minus own base")) == cell
        tested = (name, base) in p
        assert line["p"] == (f"{p[name, base]:.4f}" if tested else "")
        assert line["p (Holm)"] == (f"{adjusted[name, base]:.4f}" if tested else "")
        assert line["seeds"] == "4" and line["why not ranked"] == ""
    for rank, line in enumerate(main, start=1):
        assert line["rank"] == str(rank)
        assert line["final loss"] == line[f"loss at {BUDGET}"] == f"{np.mean(losses[line['method']]):.3f}"
        assert line["trials"] == "3 + 0"
    found = {line["method"]: line for line in rates}
    assert found["muon"]["loss by rate"] == "0.01: 1.950, 0.02: **1.800**, 0.04: diverged"
    assert found["muon"]["the best is"] == "inside" and found["muon"]["diverged"] == "1"
    assert found["adamw"]["loss by rate"] == "0.001: stopped at 100, 0.002: 2.700, 0.004: **2.600**"
    assert found["adamw"]["the best is"] == "at the edge (upper): widen" and found["adamw"]["stopped"] == "1"


def test_departures_from_the_protocol_are_named(tmp_path: Path) -> None:
    trials = small()
    confirmed_muon = [run for run in trials if run.search["space"] == "muon" and run.search["stage"] == "confirm"]
    confirmed_muon[0].arithmetic = {"ns_dtype": "float32"}
    for run in trials:
        if run.search["space"] == "lamb" or run.search["stage"] == "wide":
            run.code = "older"
            run.config["data"] = {"held_out": "claim"}
    text = text_of(write([*trials, trial("muon", "confirm", 0, 1.8), trial("mkor_muon", "confirm", 0, 1.7)], tmp_path))
    assert "Not new: settings were chosen with seed 0 too." in text
    assert "Settings were chosen on the held-out set that the claims are made on (claim)." in text
    assert "Settings chosen under other code than c0de: adamw, mkor_adamw, mkor_muon, muon." in text
    assert "the best rate is at the edge of what was tried: adamw." in text
    assert "Seeds of muon 0.02 differ in arithmetic: {'ns_dtype': 'float32'}, {}." in text
    few = [run for run in trials if run.search["stage"] == "wide" or run.seed < 4]
    assert "Few seeds: 2; a claim needs 4 at least." in text_of(write(few, tmp_path / "few"))


def test_no_run_is_left_out_silently(tmp_path: Path) -> None:
    trials = fair()
    interrupted = trial("muon", "wide", 0, 2.0, rate=0.08, status="stopped", search={"stopped_at": None})
    plain = trial("muon", "wide", 0, 2.0, rate=0.5)
    plain.search = {}
    interrupted.name, plain.name = "z-interrupted", "z-plain"
    write(trials, tmp_path)
    interrupted.write(tmp_path), plain.write(tmp_path)
    text = text_of(tmp_path)
    assert "a search makes one again): z-interrupted." in text
    assert "Of no search, and passed over: z-plain." in text
    assert row(claims_of([*trials, interrupted]), "mkor_muon").reasons == ()


def test_loss_by_rate_is_the_best_of_the_settings_there(tmp_path: Path) -> None:
    trials = chosen("muon", RATES)
    for seed, loss in ((0, 1.7), (1, 1.72)):
        params = {"learning_rate": 0.04, "base_optim_args.rest_lr": 0.01}
        trials.append(trial("muon", "narrow", seed, loss, rate=0.04, search={"params": params, "trials": 2}))
    ((line,),) = tables(text_of(write(trials, tmp_path)))
    assert line["loss by rate"] == "0.01: 1.900, 0.02: 1.800, 0.04: **1.710** (best of 2)"
    assert (line["best rate"], line["loss"], line["other settings"]) == ("0.04", "1.710", "rest_lr 0.01")
    assert line["the best is"] == "at the edge (upper): widen; rest_lr the only one tried" and line["runs"] == "5"


def test_runs_to_come_are_counted(tmp_path: Path) -> None:
    trials = chosen("muon", RATES, search={"trials": 6})
    ((line,),) = tables(text_of(write(trials, tmp_path)))
    assert line["runs"] == "3 of 6"


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    ((line,),) = tables(text_of(write(chosen("muon", {0.1: "diverged", 0.2: "diverged"}), tmp_path)))
    assert (line["best rate"], line["diverged"], line["the best is"]) == ("", "2", "none: no run was completed")


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = write(laboratory(), tmp_path / "runs")
    assert {kind_of(each) for each in read_documents(folder).values()} == {"search"}
    assert {run.kind for run in read_runs(folder)} == {"run"}, "what it is of stays"
    table, image = tmp_path / "table.md", tmp_path / "new" / "picture.png"
    assert cli.main(["report", str(folder), "--table", str(table), "--picture", str(image), "--title", "Bytes"]) == 0
    text = capsys.readouterr().out
    assert text == table.read_text(encoding="utf-8") == text_of(folder)
    assert text.count("| mkor_muon |") == 3 and image.read_bytes().startswith(b"\x89PNG")
    assert image.stat().st_size > 50_000


def test_the_picture_marks_best_edge_and_lost_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: seen.append(self))
    cli.main(["report", str(write(small(), tmp_path)), "--picture", str(tmp_path / "picture.png")])
    rates, curves, bars, _ = seen[0].axes
    assert rates.get_xscale() == "log" and len(curves.lines) == len(curves.collections) == 4
    stars = {line.get_xdata()[0]: line.get_markerfacecolor() for line in rates.lines if line.get_marker() == "*"}
    assert {rate for rate, face in stars.items() if face == "white"} == {0.004}, "adamw's best is at the edge"
    lost = {line.get_marker(): line.get_xdata()[0] for line in rates.lines if line.get_marker() in ("x", "2")}
    assert lost == {"x": 0.04, "2": 0.001}
    middle = next(line for line in curves.lines if line.get_ydata()[-1] == pytest.approx(np.mean(MKOR)))
    assert middle.get_xdata()[-1] == BUDGET
    heights = {
        text.get_text(): bar.get_height() for text, bar in zip(bars.get_xticklabels(), bars.patches, strict=True)
    }
    steps = float(np.mean([reached(ours, base) for ours, base in zip(MKOR, MUON, strict=True)]))
    assert heights == {"mkor_muon": pytest.approx(steps), "muon": BUDGET, "mkor_adamw": BUDGET, "adamw": BUDGET}
    assert [bool(bar.get_hatch()) for bar in bars.patches] == [False, False, True, True], "no seed reaches it"


def test_thirty_methods_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: seen.append(self))
    trials = [trial(f"muon{n}", "wide", 0, 1.8 + n / 100) for n in range(30)]
    cli.main(["report", str(write(trials, tmp_path)), "--picture", str(tmp_path / "picture.png")])
    (axis,) = seen[0].axes
    assert len({(line.get_color(), line.get_marker()) for line in axis.lines if line.get_marker() != "*"}) == 30

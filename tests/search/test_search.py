"""Spaces, stages, the stopping rule, and what the command says and refuses."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_soo.search
from hf_soo import cli, machine, progress
from hf_soo.runs.record import RunRecord
from hf_soo.search.evidence import Evidence
from hf_soo.search.queue import read_queue
from hf_soo.search.spaces import Range, Space
from hf_soo.search.stages import Stage, Trial
from hf_soo.search.study import Study, open_storage
from hf_soo.search.worker import Place, Worker
from tests.search.cases import QUEUE, SPACE, STAND_IN, files, runs, stage, starts
from tests.search.stand_in import loss_at

FULL = """
optim: mkor
base_optim_args: {rest_lr: 0.005}
space:
  learning_rate: {log_uniform: [0.01, 0.16], grid: [0.02, 0.04]}
  base_optim_args.rest_lr: {log_uniform: [0.001, 0.02]}
  base_optim_args.momentum: {uniform: [0.9, 1.0]}
  optim_args.betas: {choices: [[0.9, 0.99], [0.9, 0.999]]}
"""


def space(folder: Path, text: str = FULL) -> Space:
    (folder / "mkor.yaml").write_text(text)
    return Space.read(folder / "mkor.yaml")


def record(results: Path, stage: Stage, trial: Trial, losses: dict[int, float], status: str = "completed") -> None:
    made = RunRecord(stage.run_name(trial), "sgd", "sgd", {}, trial.seed, status=status, code=machine.code(), seconds=1)
    made.curve = [
        {"step": step, "seconds": 0.0, "train_loss": None, "eval_loss": loss} for step, loss in losses.items()
    ]
    made.search = {
        "study": stage.study, "space": stage.space.name, "stage": stage.name, "number": trial.number, "trials": 6,
        "params": trial.params, "stopped_at": None,
    }  # fmt: skip
    made.write(results / stage.study)


def study(folder: Path, stage: Stage) -> Study:
    place = Place.of(folder / "results")
    return Study(stage, Evidence(place.results / "toy"), open_storage(place.storage), place.state)


def test_wide_settings_are_a_grid_then_a_sequence_and_more_only_adds(tmp_path: Path) -> None:
    searched = space(tmp_path)
    found = searched.wide(10)
    assert found[:2] == [{"learning_rate": 0.02}, {"learning_rate": 0.04}]
    assert found == searched.wide(18)[:10] and len(found) == 10
    for params in found[2:]:
        assert 0.01 <= params["learning_rate"] <= 0.16 and 0.9 <= params["base_optim_args.momentum"] <= 1
        assert params["optim_args.betas"] in ([0.9, 0.99], [0.9, 0.999])
    rates = sorted(math.log(params["learning_rate"] / 0.01) / math.log(16) for params in found[2:])
    assert all(k / 8 - 1e-3 <= rate <= (k + 1) / 8 + 1e-3 for k, rate in enumerate(rates)), "one in each eighth"
    assert searched.settings(found[2])["base_optim_args"].keys() == {"rest_lr", "momentum"}


def test_a_narrow_range_is_a_third_around_the_best(tmp_path: Path) -> None:
    best = {"learning_rate": 0.16, "base_optim_args.momentum": 0.99}
    for params in space(tmp_path).narrow(8, best):
        assert 0.16 / 16 ** (1 / 6) <= params["learning_rate"] <= 0.1601 * 16 ** (1 / 6)
        assert 0.973 <= params["base_optim_args.momentum"] <= 1
        assert 0.005 / 20 ** (1 / 6) - 1e-5 <= params["base_optim_args.rest_lr"] <= 0.00501 * 20 ** (1 / 6)


def test_flags_say_everything(tmp_path: Path) -> None:
    files(tmp_path)
    confirmed = Stage(tmp_path / "workloads" / "toy.yaml", space(tmp_path), "confirm")
    flags = confirmed.flags(Trial(0, {"learning_rate": 1e-05, "optim_args.betas": [0.9, 0.99]}, 3))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert float(given["--learning_rate"]) == 1e-5 and given["--seed"] == "3" and given["--held_out"] == "claim"
    assert json.loads(given["--base_optim_args"]) == {"rest_lr": 0.005}
    assert json.loads(given["--optim_args"]) == {"betas": [0.9, 0.99]}
    wide = Stage(tmp_path / "workloads" / "toy.yaml", space(tmp_path))
    assert "--held_out" not in wide.flags(Trial(0, {}, 0))
    assert wide.command(Trial(0, {}, 0)).startswith("hf-soo pretrain --config toy.yaml --optim mkor")


def test_later_stages_follow_the_best(tmp_path: Path) -> None:
    results = files(tmp_path)
    wide, evidence = stage(tmp_path), Evidence(results / "toy")
    for name in ("narrow", "confirm"):
        with pytest.raises(ValueError, match=r"no trial of wide.* came to its end"):
            stage(tmp_path, name).plan(evidence)
    for trial in wide.plan(evidence):
        rate = trial.params["learning_rate"]
        record(results, wide, trial, {8: loss_at(rate, 0, 8)}, "diverged" if rate > 0.1 else "completed")
    evidence.look()
    assert wide.open_trials(evidence) == 0
    narrow = stage(tmp_path, "narrow", 4).plan(evidence)
    assert [trial.number for trial in narrow] == [0, 1, 2, 3]
    assert all(0.01 < trial.params["learning_rate"] < 0.04 for trial in narrow)
    confirm = stage(tmp_path, "confirm", 2, seeds=(1, 2)).plan(evidence)
    assert [(trial.params["learning_rate"], trial.seed) for trial in confirm[:2]] == [(0.02, 1), (0.02, 2)]
    record(results, stage(tmp_path, "confirm"), confirm[2], {8: 2.0})
    evidence.look()
    assert stage(tmp_path, "confirm", 2, seeds=(1, 2)).plan(evidence) == confirm


def test_a_best_at_an_end_is_said(tmp_path: Path) -> None:
    results = files(tmp_path)
    wide = stage(tmp_path)
    record(results, wide, Trial(4, {"learning_rate": 0.005}, 0), {8: 1.5})
    said = wide.best_line(Evidence(results / "toy").trials())
    assert said == "best 1.5000 at learning_rate=0.005 (at an end of learning_rate: widen it)"


def test_halving_stops_the_worse_at_a_quarter_and_at_half(tmp_path: Path) -> None:
    files(tmp_path)
    first, second, third = (study(tmp_path, stage(tmp_path)).claim() for _ in range(3))
    assert first and second and third
    assert not first.report(1, 9.0)  # before the quarter
    assert not first.report(2, 2.0) and second.report(2, 2.5)
    assert not third.report(2, 1.5)
    assert not first.report(4, 1.0) and third.report(4, 1.2)
    assert not first.report(6, 99.0)  # nothing is stopped after half


def test_a_stage_of_whole_runs_stops_none_and_counts(tmp_path: Path) -> None:
    files(tmp_path)
    first = study(tmp_path, stage(tmp_path, whole=True)).claim()
    second = study(tmp_path, stage(tmp_path, whole=True)).claim()
    third = study(tmp_path, stage(tmp_path)).claim()
    assert first and second and third
    assert not first.report(2, 2.0) and not second.report(2, 2.5) and third.report(2, 2.2)


def test_the_stopping_rule_remembers_trials_of_a_lost_storage(tmp_path: Path) -> None:
    """What is made from a JSON is what Optuna itself had kept."""
    results = files(tmp_path)
    opened = study(tmp_path, stage(tmp_path))
    claim = opened.claim()
    assert claim
    losses = {step: 3.0 - 0.1 * step for step in range(1, 9)}
    for step, loss in losses.items():
        claim.report(step, loss)
    record(results, claim.stage, claim.trial, losses)
    opened.finish(claim)
    kept = opened._study.get_trials()[0]
    (results / ".search" / "storage.jsonl").unlink()
    again = study(tmp_path, stage(tmp_path))
    next_one = again.claim()
    assert next_one and next_one.trial.number == 1
    made = again._study.get_trials()[0]
    assert (made.state, made.value, made.user_attrs) == (kept.state, kept.value, kept.user_attrs)
    rungs = {key: value for key, value in kept.system_attrs.items() if key.startswith("completed_rung")}
    assert made.system_attrs == rungs and len(rungs) == 2


def test_a_worker_keeps_every_end_and_says_how_it_goes(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    results = files(tmp_path)
    queue = read_queue(tmp_path / "search" / "all.queue.yaml")[:1]
    assert Worker(queue, Place.of(results), command=STAND_IN).run() == 0
    found = runs(results)
    assert [run.status for run in found.values()] == ["completed"] * 5 + ["diverged"]
    assert [point["eval_loss"] for point in found["sgd-wide-002-seed0"].curve] == [
        loss_at(0.01, 0, step) for step in range(1, 9)
    ]
    assert found["sgd-wide-002-seed0"].search["params"] == {"learning_rate": 0.01}
    assert found["sgd-wide-002-seed0"].search | {"command": "", "params": {}} == {
        "study": "toy", "space": "sgd", "stage": "wide", "number": 2, "trials": 6, "params": {}, "command": "",
        "stopped_at": None,
    }  # fmt: skip
    said, bar = capfd.readouterr()
    assert re.search(r"6 of 6 trials done; best 2\.1250 at learning_rate=0\.02; 0 s left", said)
    assert re.search(r"search: 5/6 \[.*, step \d, loss ", bar) and "search: 6/6 [" in bar
    assert not list((results / ".search").rglob("runs/*/*")) and not list((results / ".search").rglob("*.log"))
    assert Worker(queue, Place.of(results), command=STAND_IN).run() == 0
    assert set(starts(results).values()) == {1}


def test_trials_of_other_code_are_not_mixed(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = files(tmp_path)
    wide, code = stage(tmp_path), machine.code()
    record(results, wide, wide.plan(Evidence(results / "toy"))[0], {8: 2.0})
    monkeypatch.setattr(machine, "code", lambda: "0123456789ab")
    assert Worker([wide], Place.of(results), command=STAND_IN).run() == 1
    said = capsys.readouterr()
    assert "ran with other code" in said.err and len(runs(results)) == 1
    assert f"toy: 1 trials are of other code ({code}, here 0123456789ab)" in said.out


def test_a_stage_that_cannot_run_is_passed_over(tmp_path: Path, capsys: Any) -> None:
    jobs = "jobs:\n  - {workload: toy, space: broken}\n" + QUEUE.split("\n", 2)[2]
    results = files(tmp_path, queue=jobs)
    (tmp_path / "search" / "broken.yaml").write_text(SPACE.replace("sgd", "broken"))
    assert (
        Worker(read_queue(tmp_path / "search" / "all.queue.yaml")[:2], Place.of(results), command=STAND_IN).run() == 1
    )
    assert "error: toy/broken/wide: no such optimizer." in capsys.readouterr().err
    assert len(runs(results)) == 6


def test_nothing_is_begun_that_does_not_fit_the_time(tmp_path: Path, capsys: Any) -> None:
    results = files(tmp_path)
    (tmp_path / "workloads" / "toy.yaml").write_text("# Cost: about 100 seconds on one core.\nmax_steps: 8\n")
    assert Worker([stage(tmp_path)], Place.of(results), until=time.time() + 60, command=STAND_IN).run() == 0
    assert "no trial fits the time; 6 trials are left" in capsys.readouterr().out


def command(*flags: str) -> int:
    return cli.main(["search", *flags])


def test_a_dry_run_says_space_number_and_cost(tmp_path: Path, capsys: Any) -> None:
    files(tmp_path)
    (tmp_path / "workloads" / "toy.yaml").write_text("# Cost: about 100 seconds on one core.\nmax_steps: 8\n")
    flags = (str(tmp_path / "search" / "sgd.yaml"), "--workload", str(tmp_path / "workloads" / "toy.yaml"))
    assert command(*flags, "--results", str(tmp_path / "none"), "--trials", "18", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "toy/sgd/wide: 18 trials, 18 left" in said and "learning_rate: log_uniform [0.005, 0.16]" in said
    assert "100 s a run, 30 min at most" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{log_uniform: [0.1, 0.01]}", r"log_uniform=\[0.1, 0.01\] must be \[low, high\] with low below high"),
        ("{log_uniform: [0, 0.01]}", "must be above 0"),
        ("{log_uniform: [1, .inf]}", "inf is no number"),
        ("{uniform: [.nan, 1]}", "nan is no number"),
        ("{uniform: [true, 2]}", "True is no number"),
        ("{log_uniform: [1e-4, 0.01]}", "'1e-4' is no number; YAML wants 1.0e-4"),
        ("{log_unifrom: [0.1, 0.2]}", "'log_unifrom' is no key. Did you mean 'log_uniform'"),
        ("{choices: [1, 1]}", "names one twice"),
        ("{choices: []}", "is no range"),
        ("0.1", "is no range"),
    ],
)
def test_ranges_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Range.read(yaml.safe_load(text), "sgd.yaml: learning_rate")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "Give a SPACE.yaml with --workload, or --queue FILE."),
        (("{search}/sgd.yaml",), "No --workload"),
        (
            ("{search}/sdg.yaml", "--workload", "x.yaml"),
            "No file '{search}/sdg.yaml', and no recipe of that name; did you mean 'sgd'?",
        ),
        (
            ("{search}/sgd.yaml", "--workload", "{workloads}/toi.yaml"),
            "No file '{workloads}/toi.yaml', and no recipe of that name; did you mean 'toy'?",
        ),
        (("{search}/sgd.yaml", "--workload", "{workloads}/toy.yaml", "--trials", "4"), "the grid has 6 points"),
        (("{search}/sgd.yaml", "--workload", "{workloads}/toy.yaml", "--seed", "1", "1"), "seeds=[1, 1]"),
        (("--queue", "{search}/none.queue.yaml"), "No file '{search}/none.queue.yaml', and no recipe"),
        (("--queue", "{search}/all.queue.yaml", "--until", "25:00"), "--until 25:00 is no time of a day"),
        (("{search}/sgd.yaml", "--workload", "{workloads}/toy.yaml", "--stage", "wild"), "invalid choice: 'wild'"),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], message: str, tmp_path: Path, capsys: Any) -> None:
    files(tmp_path)
    names = {"search": str(tmp_path / "search"), "workloads": str(tmp_path / "workloads")}
    (tmp_path / "workloads" / "toy.yaml").write_text("max_steps: 8\n")
    assert command(*(flag.format(**names) for flag in flags), "--results", str(tmp_path / "results")) == 1
    assert message.format(**names) in capsys.readouterr().err


def test_without_optuna_help_is_there_and_a_search_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_soo.search."):  # imported anew below, and put back
            monkeypatch.setattr(hf_soo.search, name.rpartition(".")[2], module)
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["search", "muon", "--workload", "byte_gpt", "--dry_run"]) == 1
    assert capsys.readouterr().err == (
        "error: a search needs Optuna, which is not installed; pip install 'hf-soo[search]'.\n"
    )
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["search", "--help"])
    assert capsys.readouterr().out.startswith("usage: hf-soo search SPACE.yaml ")


def test_an_unknown_flag_of_a_space_is_named_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    results = files(tmp_path, SPACE.replace("learning_rate", "learning_rat"))
    (tmp_path / "workloads" / "toy.yaml").write_text("max_steps: 8\n")
    flags = (str(tmp_path / "search" / "sgd.yaml"), "--workload", str(tmp_path / "workloads" / "toy.yaml"))
    assert command(*flags, "--results", str(results)) == 1
    assert "did you mean '--learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("{workload: toy, space: sgd, stge: wide}", "job 1: unknown key 'stge'; did you mean 'stage'?"),
        ("{workload: toy}", "job 1: no space."),
        ("{workload: toy, space: sgd, stage: last}", "stage='last' is none of wide, narrow, confirm"),
        ("{workload: toy, space: sgd, seeds: 3}", "job 1: seeds=3 is not allowed; give a list, of a whole number in"),
        ("{workload: toy, space: sgd, seeds: [1, -1]}", "job 1: seeds=[1, -1] is not allowed"),
        ("{workload: toy, space: sgd, seeds: [1, 2.5]}", "job 1: seeds=[1, 2.5] is not allowed"),
        ("{workload: toy, space: sgd, trials: true}", "job 1: trials=True is not allowed; give a whole number >= 1"),
        ("{workload: toy, space: sgd, trials: 0}", "job 1: trials=0 is not allowed"),
        ("{workload: toy, space: sgd, whole: 'false'}", "job 1: whole='false' is not allowed; give True or False."),
    ],
)
def test_jobs_that_cannot_be(job: str, message: str, tmp_path: Path) -> None:
    files(tmp_path, queue=f"jobs:\n  - {job}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_queue(tmp_path / "search" / "all.queue.yaml")

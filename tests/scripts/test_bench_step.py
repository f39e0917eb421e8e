"""The benchmark times what it says: steps that update, steps that do not, on the gradients of a real pass."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_soo.bench.measure import Pair, _adamw, _peak_memory, _peak_memory_apart, _state_bytes, parse_pairs, run
from hf_soo.bench.rounds import Stepper, ratios
from hf_soo.bench.step_kinds import Kind
from hf_soo.bench.workload import BenchConfig, Workload
from hf_soo.cli import main, report_of
from hf_soo.engine.flops import Factorisation, MinimalWork, Product
from hf_soo.engine.optimizer import PreconditionedOptimizer
from tests.scripts.script_runs import ROOT

ROW_KEYS = {
    "optimizer",
    "base",
    "config",
    "step_ratio",
    "step_ratio_min",
    "step_ratio_max",
    "plain_step_ratio",
    "update_step_ratio",
    "refresh_step_ratio",
    "bare_products_ratio",
    "step_to_bare_ratio",
    "capture_ratio",
    "train_step_ratio",
    "state_bytes_per_parameter",
    "peak_memory_ratio",
}


def tiny(**values: Any) -> BenchConfig:
    return BenchConfig(
        **{"preset": "toy", "batch_size": 2, "seq_length": 16, "rounds": 2, "steps": 3, "memory": False, **values}
    )


def test_pairs_are_read_with_base_and_settings() -> None:
    assert parse_pairs("mkor, lamb,eva+sgd,mkor:history=64:kv_scale=sum+muon", "adamw") == [
        Pair("mkor", "adamw"),
        Pair("lamb"),
        Pair("eva", "sgd"),
        Pair("mkor", "muon", (("history", 64), ("kv_scale", "sum"))),
    ]
    with pytest.raises(ValueError, match="'mkr' is unknown"):
        parse_pairs("mkr")
    with pytest.raises(ValueError, match="NAME:key=value"):
        parse_pairs("mkor:64")


PLAIN, UPDATE, BOTH = Kind(False, False), Kind(True, False), Kind(True, True)


@dataclass
class Seen:
    """What each step of an optimizer found."""

    kind: Kind
    steps: int
    same_gradients: bool
    rows: float  # of the statistics in the first layer's buffers


def watch(work: Workload, optimizer: PreconditionedOptimizer) -> list[Seen]:
    seen: list[Seen] = []
    step = optimizer.step

    def spy() -> None:
        same = all(
            torch.equal(p.grad, g) for p, g in zip(work.parameters, work.gradients, strict=True) if p.grad is not None
        )
        kind = Kind(optimizer._updating, optimizer.preconditioner.refreshes_at(optimizer.steps))
        rows = [float(buffers[0].sum()) for buffers in optimizer.stages.capture.buffers.values()]
        seen.append(Seen(kind, optimizer.steps, same, rows[0] if rows else 0.0))
        step()

    optimizer.step = spy  # type: ignore[method-assign, assignment]
    return seen


@pytest.mark.parametrize(
    ("period", "kinds"),
    [(1, [UPDATE] * 3), (2, [UPDATE, PLAIN] * 3), (10, [UPDATE, PLAIN] * 3), (None, [PLAIN] * 3)],
)
def test_update_steps_update_and_plain_steps_do_not(period: int | None, kinds: list[Kind]) -> None:
    work = Workload(tiny())
    pair = Pair("lamb") if period is None else Pair("mkor", "lamb", (("update_period", period),))
    optimizer = pair.build(work.model)
    stepper, seen = Stepper(work, optimizer), watch(work, optimizer)
    for _ in range(2):
        times = stepper.round(_adamw(work.twin, foreach=True), 3)
    assert [each.kind for each in seen] == kinds * 2
    assert all(each.kind.updates == (period is not None and each.steps % period == 0) for each in seen)
    assert all(each.same_gradients and each.rows == (2 * 16 if each.kind.updates else 0) for each in seen)
    assert list(times.steps) == kinds[: len(set(kinds))]
    assert (times.capturing is None, times.idle is None) == (period is None, period in (None, 1))
    optimizer.remove_hooks()


def test_a_refresh_is_taken_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(tiny())
    optimizer = Pair("mkor", "sgd", (("update_period", 2), ("representation", "dense"))).build(work.model)
    method = optimizer.preconditioner
    monkeypatch.setattr(method, "refreshes_at", lambda step: step % 6 == 0)
    monkeypatch.setattr(method, "refresh", lambda state: (state, torch.zeros(1, 2, dtype=torch.int64)))
    work_of_a_layer = MinimalWork([Product(2, 3, 4)], [Product(4, 3, 2)], [Factorisation("eigh", 3)])
    monkeypatch.setattr(method, "minimal_products", lambda layer: work_of_a_layer)
    stepper, seen, parts = Stepper(work, optimizer), watch(work, optimizer), []
    run_part = stepper.minimal.run
    monkeypatch.setattr(stepper.minimal, "run", lambda part: (parts.append(part), run_part(part)))
    times = stepper.round(_adamw(work.twin, foreach=True), 3)
    assert [each.kind for each in seen] == [BOTH, UPDATE, PLAIN, UPDATE, PLAIN, UPDATE, PLAIN]
    assert parts == ["every", "update", "refresh", "every", "update", "every", "update"]
    assert set(times.minimal) == {"every", "update", "refresh"}
    assert stepper.kinds.counts == {"steps": 6, "updates": 3, "refreshes": 1}
    row = ratios([times], stepper.kinds)
    assert row["step_ratio"] == pytest.approx(
        (3 * row["plain_step_ratio"] + 2 * row["update_step_ratio"] + row["refresh_step_ratio"]) / 6, rel=1e-12
    )
    optimizer.remove_hooks()


def test_mkor_h_stays_mkor_in_a_benchmark() -> None:
    """Whatever its patience: a row must not time the base alone."""
    work = Workload(tiny())
    eager = (("patience", 1), ("min_steps", 0), ("update_period", 1), ("rate_fraction", 1e6))
    optimizer = Pair("mkor_h", "lamb", eager).build(work.model)
    stepper, reference = Stepper(work, optimizer), _adamw(work.twin, foreach=True)
    for _ in range(3):
        stepper.round(reference, 3)
    assert not optimizer.switched and optimizer.stages.states


def test_the_twin_shares_parameters_and_not_hooks() -> None:
    work = Workload(tiny())
    optimizer = Pair("mkor", "lamb").build(work.model)
    assert optimizer.stages.capture.collecting
    work.forward_backward(work.twin)
    assert all(float(buffer.abs().sum()) == 0 for b in optimizer.stages.capture.buffers.values() for buffer in b)
    assert all(a is b for a, b in zip(work.model.parameters(), work.twin.parameters(), strict=True))
    work.forward_backward(work.model)
    assert any(float(b[0].sum()) == 2 * 16 for b in optimizer.stages.capture.buffers.values())
    optimizer.remove_hooks()


def test_state_bytes_counts_the_bases_state() -> None:
    work = Workload(tiny())
    optimizer = Pair("lamb").build(work.model)
    work.forward_backward(work.model)
    optimizer.step()
    assert _state_bytes(optimizer) == 8 * sum(p.numel() for p in work.parameters) + 4 * len(work.parameters)


def test_peak_memory_holds_parameters_gradients_and_state() -> None:
    """A model of 11M parameters: at least 16 bytes each."""
    config = tiny(preset="mini")
    work = Workload(config)
    floor = 16 * sum(p.numel() for p in work.parameters)
    assert floor < _peak_memory(config, None) < 4 * floor
    apart = _peak_memory_apart(tiny(preset="mini", memory=True), Pair("sgd"))
    assert apart is not None and 0.75 * floor < apart < 4 * floor
    assert _peak_memory_apart(config, None) is None


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"preset": "huge"}, "preset='huge' is not allowed"),
        ({"rounds": 0}, "rounds=0"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "device='gpu' is not allowed; give cpu or cuda"),
        ({"device": "cuda:x"}, "device='cuda:x' is not allowed"),
    ],
)
def test_bad_values_are_named(bad: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=match):
        tiny(**bad)


def test_a_bad_setting_shows_before_anything_is_timed() -> None:
    with pytest.raises(ValueError, match="histroy"):
        run(tiny(optim="lamb,mkor:histroy=4"), lambda results: pytest.fail("something was measured first"))


def test_the_command_writes_the_fixed_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = shlex.split("--preset toy --batch_size 2 --seq_length 16 --rounds 2 --steps 2 --memory false")
    optimizers = shlex.split("--optim mkor,sgd,mkor:representation=dense --base adamw --autocast true")
    assert main(["bench", *size, *optimizers, "--json", str(tmp_path / "new" / "b.json")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "b.json").read_text())
    assert {"device", "versions", "preset", "parameters", "reference", "rows"} <= set(results)
    assert set(results["reference"]) == {"adamw_foreach_seconds", "adamw_fused_ratio"}
    assert [(row["optimizer"], row["base"], list(row["cycle"].values())) for row in results["rows"]] == [
        ("mkor", "adamw", [10, 1, 0]),
        ("sgd", "sgd", [1, 0, 0]),
        ("mkor", "adamw", [10, 1, 0]),
    ]
    for row in results["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["step_ratio_min"] <= row["step_ratio"] <= row["step_ratio_max"]
        assert row["refresh_step_ratio"] is None
    mkor, sgd, dense = results["rows"]
    for row in (mkor, sgd):
        assert row["bare_products_ratio"] is None and row["step_to_bare_ratio"] is None
    assert 0 < dense["bare_products_ratio"] < dense["step_ratio"] and dense["step_to_bare_ratio"] > 1
    assert mkor["state_bytes_per_parameter"] > 8 and sgd["state_bytes_per_parameter"] == 4
    assert mkor["peak_memory_ratio"] is None and sgd["capture_ratio"] is None
    assert "| mkor:representation=dense+adamw " in said and "| sgd " in said
    _, table = report_of(tmp_path / "new")  # `hf-soo report` makes the same table of the JSON
    assert table == said


def test_the_script_fails_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--preset", "huge"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "bench_step.py"), run_name="__main__")
    assert stop.value.code == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "invalid choice: 'huge' (choose from" in error

"""The benchmark times what it says: steps that update, steps that do not, on the gradients of a real pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_soo.experiments.bench import Pair, adamw, parse_pairs, peak_memory, peak_memory_apart, run, state_bytes
from hf_soo.experiments.report import report
from hf_soo.experiments.rounds import Round, Stepper, ratios
from hf_soo.experiments.workload import BenchConfig, Workload

ROOT = Path(__file__).resolve().parent.parent
ROW_KEYS = {
    "optimizer",
    "base",
    "config",
    "step_ratio",
    "step_ratio_min",
    "step_ratio_max",
    "plain_step_ratio",
    "update_step_ratio",
    "capture_ratio",
    "train_step_ratio",
    "state_bytes_per_parameter",
    "peak_memory_ratio",
}


def tiny(**values: Any) -> BenchConfig:
    return BenchConfig(
        **{"preset": "tiny", "batch_size": 2, "seq_length": 16, "rounds": 2, "steps": 3, "memory": False, **values}
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


def test_ratios_average_over_a_period() -> None:
    rounds = [
        Round(reference=2.0, forward_backward=10.0, plain=1.0, update=6.0, capturing=12.0, idle=11.0),
        Round(reference=1.0, forward_backward=10.0, plain=1.0, update=6.0, capturing=14.0, idle=10.0),
        Round(reference=4.0, forward_backward=10.0, plain=1.0, update=6.0, capturing=13.0, idle=10.0),
    ]
    row = ratios(rounds, 5)  # an amortised step is (6 + 4 · 1) / 5 = 2
    assert [row[f"step_ratio{end}"] for end in ("", "_min", "_max")] == [1.0, 0.5, 2.0]
    assert (row["plain_step_ratio"], row["update_step_ratio"], row["capture_ratio"]) == (0.5, 3.0, 1.3)
    first, second, third = (12 + 44) / 5 + 2, (14 + 40) / 5 + 2, (13 + 40) / 5 + 2
    assert row["train_step_ratio"] == sorted([first / 12, second / 11, third / 14])[1]
    every_step = ratios([Round(2.0, 10.0, None, 3.0, 11.0, None)], 1)
    assert (every_step["step_ratio"], every_step["plain_step_ratio"], every_step["train_step_ratio"]) == (
        1.5,
        None,
        14 / 12,
    )
    never = ratios([Round(2.0, 10.0, 1.0, None, None, None)], None)
    assert (never["step_ratio"], never["capture_ratio"], never["train_step_ratio"]) == (0.5, None, 11 / 12)


@pytest.mark.parametrize(("period", "plain"), [(1, 0), (2, 1), (10, 3), (None, 3)])
def test_update_steps_update_and_plain_steps_do_not(period: int | None, plain: int) -> None:
    work = Workload(tiny())
    pair = Pair("lamb") if period is None else Pair("mkor", "lamb", (("update_period", period),))
    optimizer = pair.build(work.model)
    stepper = Stepper(work, optimizer)
    assert stepper.period == period
    seen: list[tuple[int, bool, bool]] = []
    step = optimizer.step

    def spy() -> None:
        same = all(
            torch.equal(p.grad, g) for p, g in zip(work.parameters, work.gradients, strict=True) if p.grad is not None
        )
        seen.append((optimizer.steps, optimizer.capture.collecting, same))
        step()

    optimizer.step = spy  # type: ignore[method-assign, assignment]
    for _ in range(2):
        stepper.round(adamw(work.twin, foreach=True), 3)
    if period is None:
        assert [(c, same) for _, c, same in seen] == [(False, True)] * 6
        return
    assert all(collecting == (steps % period == 0) and same for steps, collecting, same in seen)
    assert [collecting for _, collecting, _ in seen] == ([True] + [False] * plain) * 2


def test_the_twin_shares_parameters_and_not_hooks() -> None:
    work = Workload(tiny())
    optimizer = Pair("mkor", "lamb").build(work.model)
    assert optimizer.capture.collecting
    work.forward_backward(work.twin)
    assert all(float(buffer.abs().sum()) == 0 for b in optimizer.capture.buffers.values() for buffer in b.tensors())
    assert all(a is b for a, b in zip(work.model.parameters(), work.twin.parameters(), strict=True))
    work.forward_backward(work.model)
    assert any(float(b.rows.sum()) == 2 * 16 for b in optimizer.capture.buffers.values())
    optimizer.remove_hooks()


def test_state_bytes_counts_the_bases_state() -> None:
    work = Workload(tiny())
    optimizer = Pair("lamb").build(work.model)
    work.forward_backward(work.model)
    optimizer.step()
    assert state_bytes(optimizer) == 8 * sum(p.numel() for p in work.parameters) + 4 * len(work.parameters)


def test_peak_memory_holds_parameters_gradients_and_state() -> None:
    """A model of 11M parameters: at least 16 bytes each."""
    config = tiny(preset="mini")
    work = Workload(config)
    floor = 16 * sum(p.numel() for p in work.parameters)
    assert floor < peak_memory(config, None) < 4 * floor
    apart = peak_memory_apart(tiny(preset="mini", memory=True), Pair("sgd"))
    assert apart is not None and 0.75 * floor < apart < 4 * floor
    assert peak_memory_apart(config, None) is None


@pytest.mark.parametrize(
    ("bad", "match"),
    [({"preset": "huge"}, "'huge' is unknown"), ({"rounds": 0}, "rounds=0"), ({"device": "cuda:99"}, "cuda:99")],
)
def test_bad_values_are_named(bad: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=match):
        tiny(**bad)


def test_a_bad_setting_shows_before_anything_is_timed() -> None:
    with pytest.raises(ValueError, match="histroy"):
        run(tiny(optim="lamb,mkor:histroy=4"), lambda results: pytest.fail("something was measured first"))


def bench_step(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_step.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_script_writes_the_fixed_keys(tmp_path: Path) -> None:
    size = [
        "--preset",
        "tiny",
        "--batch_size",
        "2",
        "--seq_length",
        "16",
        "--rounds",
        "2",
        "--steps",
        "2",
        "--memory",
        "false",
    ]
    done = bench_step(
        *size,
        "--optim",
        "mkor,sgd",
        "--base",
        "adamw",
        "--autocast",
        "true",
        "--json",
        str(tmp_path / "new" / "b.json"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "new" / "b.json").read_text())
    assert {"device", "versions", "preset", "parameters", "reference", "rows"} <= set(results)
    assert set(results["reference"]) == {"adamw_foreach_seconds", "adamw_fused_ratio"}
    assert [(row["optimizer"], row["base"], row["update_period"]) for row in results["rows"]] == [
        ("mkor", "adamw", 10),
        ("sgd", "sgd", None),
    ]
    for row in results["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["step_ratio_min"] <= row["step_ratio"] <= row["step_ratio_max"]
    mkor, sgd = results["rows"]
    assert mkor["state_bytes_per_parameter"] > 8 and sgd["state_bytes_per_parameter"] == 4
    assert mkor["peak_memory_ratio"] is None and sgd["capture_ratio"] is None
    assert "| mkor+adamw " in done.stdout and "| sgd " in done.stdout
    runs, table = report(tmp_path / "new")  # `hf-soo report` makes the same table of the JSON
    assert runs == [] and table == done.stdout


def test_the_script_fails_in_one_line() -> None:
    done = bench_step("--preset", "huge")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: preset='huge' is unknown; use one of tiny, mini")
    assert "Traceback" not in done.stderr

"""scripts/reproduce.sh: its stages' commands, what it refuses at once, and the table out of run JSONs."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hf_soo.bert.data.prepare import PrepareConfig
from hf_soo.bert.inputs import DataArguments, ModelArguments
from hf_soo.cli import report_of
from hf_soo.glue.sweep import _SeedArguments
from hf_soo.glue.task import DOMAIN as GLUE
from hf_soo.reproduce import table as reproduce_table
from hf_soo.reproduce.command import ReproduceArguments, _stages, main
from hf_soo.runs import arguments
from hf_soo.runs.pretrained import PretrainedArguments
from hf_soo.runs.record import RunRecord
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.squad.inputs import QaDataArguments
from tests.scripts.script_runs import ROOT, check_error

FLAGS = {
    "prepare": (PrepareConfig,),
    "pretrain": (ModelArguments, DataArguments, RunArguments, RunTrainingArguments),
    "squad": (PretrainedArguments, QaDataArguments, RunArguments, RunTrainingArguments),
    "glue": (*GLUE.classes, _SeedArguments, RunArguments, RunTrainingArguments),
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies where the command is given."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, str]:
    """Local data that need not be read."""
    for name in ("vocab.txt", "train.json", "dev.json"):
        (tmp_path / name).touch()
    files = {"vocab": "vocab.txt", "squad_train": "train.json", "squad_dev": "dev.json"}
    return {key: str(tmp_path / name) for key, name in files.items()} | {"glue_dir": str(tmp_path), "text": "embedded"}


@pytest.mark.parametrize("scale", ["mini", "small", "base", "large"])
def test_every_command_is_understood(scale: Any, local: dict[str, str]) -> None:
    of = ReproduceArguments(scale=scale, output="out/here", seeds=[0, 1], **local)  # type: ignore[arg-type]
    for stage in _stages(of):
        command, *flags = stage.whole[stage.whole.index("hf_soo.cli") + 1 :]
        *_, last = arguments.parse(FLAGS[command], [*flags, *(["--use_cpu", "true"] if "--config" in flags else [])])
        assert Path(getattr(last, "output_dir", None) or last.output).parts[:2] == ("out", "here")


def test_the_stages_follow_from_each_other(local: dict[str, str]) -> None:
    found = {stage.name: stage for stage in _stages(ReproduceArguments(optimizers=["lamb", "mkor"], **local))}  # type: ignore[arg-type]
    assert list(found) == [
        "prepare_phase1", "prepare_phase2", "phase1", "phase2_lamb", "phase2_mkor",
        "squad_lamb", "glue_lamb", "squad_mkor", "glue_mkor",
    ]  # fmt: skip
    assert found["phase2_mkor"].needs == ("phase1",) and found["phase1"].alone
    assert found["squad_mkor"].needs == found["glue_mkor"].needs == ("phase2_mkor",)
    phase_2 = shlex.join(found["phase2_mkor"].command)
    assert "--previous_phase out/reproduce_mini/phase1" in phase_2 and "pretrain/mkor.yaml" in phase_2
    assert "--model_name_or_path out/reproduce_mini/phase2_mkor" in shlex.join(found["squad_mkor"].command)
    assert found["prepare_phase1"].product == Path("out/reproduce_mini/data/phase1/manifest.json")


def test_from_the_hub_without_local_files() -> None:
    commands = {stage.name: shlex.join(stage.command) for stage in _stages(ReproduceArguments(optimizers=["lamb"]))}
    assert "--source wikimedia/wikipedia:20231101.en" in commands["prepare_phase1"]
    assert "--vocab" not in commands["prepare_phase1"]
    assert "--vocab out/reproduce_mini/data/phase1/vocab.txt" in commands["prepare_phase2"]
    assert "--dataset_name squad" in commands["squad_lamb"] and "--data_dir" not in commands["glue_lamb"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "0"], "jobs=0 is not allowed; give a whole number >= 1"),
        (["--configs", "none"], "configs='none' does not exist; give an existing path"),
        (["--squad_train", "{folder}"], "give both or neither"),
        (["--vocab", "{folder}/none.txt"], "does not exist; give an existing path"),
        (["--optimizers", "lamb", "adam"], "optimizers has 'adam'; allowed are adamw, eva, kaisa, lamb"),
        (["--launch", "acelerate launch"], "launch='acelerate launch' names no program on the PATH"),
        (["--launch", ""], "launch='' names no program on the PATH"),
        (["--glue_tasks", "rtee"], "rtee"),
        (["--text", "{folder}/none.txt"], "none.txt"),
        (["--squad_train", "{folder}/bad.json", "--squad_dev", "{folder}/bad.json"], "bad.json"),
        (["--glue_dir", "{folder}"], "RTE"),
        (["--scales", "mini"], "unknown flag '--scales'; did you mean '--scale'?"),
    ],
)
def test_refused_at_once(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{")
    given = [flag.format(folder=tmp_path) for flag in flags]
    text = [] if "--text" in given else ["--text", "embedded"]
    assert main([*text, "--launch", "false", *given]) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_is_named_and_its_dependents_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`false` in place of the launcher: the text is prepared, and nothing can be trained."""
    data = tmp_path / "out" / "reproduce_mini" / "data"
    for phase in ("phase1", "phase2"):  # as if prepared
        (data / phase).mkdir(parents=True)
        (data / phase / "manifest.json").touch()
    assert main(["--text", "embedded", "--launch", "false", "--optimizers", "lamb"]) == 1
    check_error(capsys, "4 of 6 stages did not end well: phase1, phase2_lamb, squad_lamb, glue_lamb.")


def record(
    name: str, steps: int, config: dict[str, Any], final: dict[str, float], losses: tuple[float, ...] = ()
) -> RunRecord:
    curve = [
        {"step": steps * (i + 1) // len(losses), "seconds": float(i), "train_loss": None, "eval_loss": loss}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    run = RunRecord(name, name, "lamb", config, seed=0, status="completed", steps=steps, seconds=2.0 * steps)
    run.curve, run.final, run.parameters = list(curve), dict(final), 11_000_000
    return run


def test_table(tmp_path: Path) -> None:
    before = {"data": {"seq_length": 512}, "global_batch_size": 8, "learning_rate": 0.003, "max_steps": 20}
    lamb = record("lamb", 20, before, {"eval_loss": 7.0, "mlm_accuracy": 0.1, "nsp_accuracy": 0.5}, (7.4, 7.0))
    mkor = record("mkor", 10, before | {"max_steps": 10}, {"eval_loss": 6.8, "mlm_accuracy": 0.2}, (7.2, 6.8))
    for run in (lamb, mkor):
        run.write(tmp_path / "phase2")
    record("lamb", 40, before | {"data": {"seq_length": 128}}, {"eval_loss": 7.5}).write(tmp_path / "phase1")
    tuned = {
        "data": {"train_examples": 4370, "eval_examples": 3000},
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "processes": 2,
    }
    asked = {"data": {"train": {"questions": 4370}, "eval": {"questions": 3000}}}  # as run_squad.py writes it
    record("mkor", 500, tuned | asked, {"exact_match": 3.25, "f1": 9.5}).write(tmp_path / "squad")
    model = {"model": {"name": "phase2_mkor"}}
    for seed, f1 in ((0, 0.8), (1, 0.6), (2, 0.7)):
        run = record("adamw", 100, tuned | model | {"task": "mrpc"}, {"accuracy": 0.7, "f1": f1})
        run.name, run.seed = f"mrpc-{seed}", seed
        run.write(tmp_path / "glue" / "mkor")
    text = reproduce_table.write(tmp_path, "mini")
    header, _, first, second, *rest = text.splitlines()
    assert [cell.strip() for cell in header.split("|")[1:5]] == ["phase 2", "steps", "eval loss", "masked acc."]
    # LAMB's 7.000 lies between MKOR's 7.2 at 5 steps and 6.8 at 10
    assert first == "| mkor | 10 | 6.800 | 0.200 |  | 8 | 2.00 | 3.25 | 9.50 | 70.0/70.0 | 70.0 | 1,000 | 90.50 |"
    assert second == "| lamb | 20 | 7.000 | 0.100 | 0.500 | 20 | 2.00 |  |  |  |  | 1,563 | 90.44 |"
    said = " ".join(rest)
    assert "Phase 1: 40 steps of 8 x 128 tokens, final eval loss 7.500." in said
    assert "SQuAD v1.1: 4,370 training and 3,000 dev examples, 500 steps of 16, mkor at 0.0003." in said
    assert (tmp_path / "table.md").read_text() == text == report_of(tmp_path)[1]
    assert (tmp_path / "phase2.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_prints_the_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scale", "base", "--optimizers", "eva", "--num_proc", "3", "--dry_run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and "configs/pretrain/bert_base_phase2.yaml" in printed[3]
    assert printed[0].endswith("--num_proc 3") and list(tmp_path.iterdir()) == []


def test_the_shell_script_passes_its_flags_on(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor each in "$@"; do echo "$each"; done\n')
    stub.chmod(0o755)
    command = [str(ROOT / "scripts" / "reproduce.sh"), "--scale", "base", "--text", "two words"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}
    ).stdout
    places = ["--configs", str(ROOT / "configs")]
    assert printed.splitlines() == ["-m", "hf_soo.cli", "reproduce", *places, "--scale", "base", "--text", "two words"]

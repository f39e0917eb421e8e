"""The command hf-soo."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_soo
from hf_soo import cli
from hf_soo.bench.measure import _state_bytes
from hf_soo.engine.capture import GradientRecorder
from hf_soo.engine.factors import FactorRecorder
from hf_soo.engine.sums import SumRecorder
from hf_soo.outputs import folder_to_write
from tests.scripts.script_runs import load_script
from tests.scripts.test_report import runs


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The rows of `hf-soo list`, cut where the columns of its head begin."""
    assert cli.main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    titles = re.split(r"  +", head)
    starts = [head.index(title) for title in titles]
    ends = [*starts[1:], None]
    return [{title: row[a:b].strip() for title, a, b in zip(titles, starts, ends, strict=True)} for row in rows]


def test_list_says_base_needs_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys)
    assert {row["name"]: row["what it is"] for row in rows} == hf_soo.available()
    of = {row["name"]: [row[key] for key in ("default base", "needs", "state B/param")] for row in rows}
    assert of["mkor"] == ["lamb", "input and output means", "8.3"]  # 2 · 32 columns of 1024: 0.25
    assert of["eva"] == ["sgd", "input and output means", "4.0"]
    assert of["eva_f"] == ["sgd", "input mean", "4.0"]
    assert of["lamb"] == ["", "nothing", "8.0"]
    assert [of[name][2] for name in ("adamw", "sgd", "rmsprop", "muon")] == ["8.0", "4.0", "4.0", "4.0"]


@pytest.mark.parametrize("name", ["mkor", "eva", "eva_f", "lamb", "adamw", "sgd", "rmsprop", "muon"])
def test_the_memory_listed_is_what_an_optimizer_holds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    optimizer = hf_soo.build_optimizer(name, model, lr=1e-3, weight_decay=0.01)
    model(torch.randn(2, 1024)).square().sum().backward()
    optimizer.step()
    held = _state_bytes(optimizer) / sum(p.numel() for p in model.parameters())
    (row,) = (row for row in listed(capsys) if row["name"] == name)
    assert float(row["state B/param"]) == pytest.approx(held, abs=0.051)  # printed with one decimal


def test_recorders_say_what_they_need() -> None:
    def sums(inputs: bool, outputs: bool) -> str:
        return SumRecorder(inputs=inputs, outputs=outputs).needs

    assert [sums(True, True), sums(True, False), sums(False, True), sums(False, False)] == [
        "input and output means",
        "input mean",
        "output mean",
        "nothing",
    ]
    factors = [FactorRecorder(outputs, False, "grad", None, False).needs for outputs in (True, False)]
    assert factors == ["Kronecker factors", "input factor"]
    assert GradientRecorder().needs == "gradients only"


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
    (tmp_path / "out" / "runs").mkdir(parents=True)
    assert cli.main(["report", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith(f" the run JSONs, '{tmp_path}/out/runs' for example.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["report", "runs", flag] for flag in ("--table", "--picture", "--html")),
        ["doctor", "--json"],
        ["plan", "--json"],
        ["bench", "--preset", "toy", "--json"],
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_refused_at_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for module, name in (("doctor", "examine"), ("plan.command", "build_model"), ("bench.command", "run")):
        monkeypatch.setattr(f"hf_soo.{module}.{name}", lambda *given: pytest.fail("it works first"))
    for record in runs():
        record.write(tmp_path / "runs")
    (tmp_path / "file").touch()
    flag = arguments[-1]
    for given, why in {
        ".": "is a folder; give the name of a file, such as 'report'.",
        "file/x": "cannot be written to: 'file' is a file; give another folder.",
    }.items():
        assert cli.main([*arguments, given]) == 1
        told = capsys.readouterr().err.removeprefix("hf-soo: ")
        assert told == f"error: {flag}={given!r} {why}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runs"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    assert folder_to_write("f", tmp_path / "there" / "a" / "b") == tmp_path / "there" / "a" / "b"
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(
        ValueError, match=r"^f='.*/there/a' cannot be written to: '.*/there' is read-only; give another"
    ):
        folder_to_write("f", tmp_path / "there" / "a")
    assert not (tmp_path / "there" / "a").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--config", "smoke/mkor", "--output_dir", "file/x"],
        ["pretrain", "--config", "smoke/mkor", "--results_dir", "file/x"],
        ["prepare", "--source", "embedded", "--output", "file/x"],
        ["reproduce", "--text", "embedded", "--output", "file/x"],
        ["search", "muon", "--workload", "byte_gpt", "--results", "file/x"],
        ["recipes", "--copy", "file/x"],
    ],
    ids=" ".join,
)
def test_no_work_is_done_for_a_folder_that_cannot_be_written(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(arguments) == 1
    flag = arguments[-2].removeprefix("--")
    assert f"{flag}='file/x' cannot be written to: 'file' is a file; give another folder.\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plant"], "hf-soo: error: 'plant' is no command. Did you mean 'plan'? Valid: list, doctor, plan, report, "),
        (["doctor", "--jsn"], "hf-soo: error: unrecognized arguments: --jsn; --help says more."),
        (["list", "--x"], "hf-soo: error: unrecognized arguments: --x; --help says more."),
        (["report"], "hf-soo report: error: the following arguments are required: FOLDER; --help says more."),
        (["plan", "--gpus", "many"], "hf-soo plan: error: argument --gpus: invalid int value: 'many'; --help says"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_alone_it_shows_what_one_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Six things on a screen of 24 lines of 100 columns or more; those that need no data are done here."""
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert len(cli.EXAMPLES) == 6 and len(shown.splitlines()) < 24
    assert max(map(len, shown.splitlines())) <= 110
    for what, command in cli.EXAMPLES.items():
        assert f"  {what}\n    {command}\n" in shown
    for name in ("plan", "search"):
        (command,) = (each for each in cli.EXAMPLES.values() if each.startswith(f"hf-soo {name} "))
        assert cli.main(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().out
    assert "64 ranks, ddp" in said and "byte_gpt/muon/wide: 24 trials" in said


SCRIPTS = {
    "prepare": "prepare_pretraining",
    "pretrain": "pretrain_bert",
    "glue": "run_glue",
    "squad": "run_squad",
    "vision": "run_vision",
    "bench": "bench_step",
}
# Of each command a flag that --help lists, a wrong use, and what is said of it.
USES = {
    "prepare": ("--short_seq_prob", ["--source", "x", "--output", "y", "--nm_proc", "2"], "did you mean '--num_proc'?"),
    "pretrain": ("--previous_phase", ["--optmi", "mkor"], "unknown flag '--optmi'; did you mean '--optim'?"),
    "glue": ("--task_name", ["--taks_name", "rte"], "unknown flag '--taks_name'; did you mean '--task_name'?"),
    "squad": ("--doc_stride", ["--score", "x"], "the following arguments are required: --validation_file"),
    "vision": ("--image_size", ["--optim_args", "update_perod=1", "--optim", "mkor"], "Did you mean 'update_period'?"),
    "bench": ("--rounds", ["--rounds", "0"], "rounds=0 is not allowed; give a whole number >= 1"),
    "search": ("--dry_run", ["--trails", "3"], "unrecognized arguments: --trails; --help lists every flag."),
    "reproduce": ("--glue_tasks", ["--scale", "huge"], "argument --scale: invalid choice: 'huge'"),
}


def test_every_run_has_its_script_and_its_test() -> None:
    # "run" has the help and the errors of the script that it runs
    assert set(USES) == set(cli.RUNS) - {"run"} == {*SCRIPTS, "search", "reproduce"}
    for command, script in SCRIPTS.items():
        assert load_script(script).main is importlib.import_module(cli.RUNS[command][0]).main
    for command, (module, _) in cli.RUNS.items():  # python -m hf_soo.COMMAND
        started = importlib.import_module(f"hf_soo.{command}")
        started = importlib.import_module(f"hf_soo.{command}.__main__") if hasattr(started, "__path__") else started
        assert started.main is importlib.import_module(module).main


@pytest.mark.parametrize("command", USES)
def test_runs_have_help_and_refuse_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, wrong, message = USES[command]
    monkeypatch.setattr("sys.argv", ["/bin/hf-soo", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    what = "SPACE.yaml --workload FILE.yaml" if command == "search" else "[--config FILE.yaml]"
    assert shown.startswith(f"usage: hf-soo {command} {what} [--flag value ...]\n") and flag in shown
    assert cli.main([command, *wrong]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["plan", "--help"], ["doctor", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert {"plan": "--micro_batch", "report": "--picture", "doctor": "--json"}.get(arguments[0], "reproduce") in shown

"""Run JSONs: keys, statuses, atomic writing, what a path or a number that is not finite becomes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import hf_soo
from hf_soo import machine
from hf_soo.files import jsonable
from hf_soo.runs.arguments import parse
from hf_soo.runs.record import (
    RunRecord,
    check_same,
    differing,
    file_name,
    is_file_name,
    kind_of,
    reach,
    read_documents,
    read_run,
    read_runs,
    recording,
    status_of,
)
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.training import Job

# DESIGN's result files: more keys may be added, none may go.
KEYS = {
    "name", "kind", "workload", "method", "status", "optimizer", "base", "config", "seed", "device", "versions",
    "commit", "parameters", "steps", "seconds", "curve", "final", "target", "peak_memory_bytes", "health",
    "code", "search", "arithmetic", "routing",
}  # fmt: skip


def make_record(name: str = "r") -> RunRecord:
    return RunRecord(name=name, optimizer="mkor", base="lamb", config={"learning_rate": 0.02}, seed=3, steps=1)


def test_json_has_the_fixed_keys_and_reads_back(tmp_path: Path) -> None:
    record = make_record()
    record.status = "completed"
    record.curve = [{"step": 5, "seconds": 1.5, "train_loss": None, "eval_loss": 2.25}]
    path = record.write(tmp_path)
    assert path == tmp_path / "r.json"
    assert set(json.loads(path.read_text())) == KEYS
    assert read_run(path) == record


def test_a_record_says_what_it_is(tmp_path: Path) -> None:
    config = {"model": {"hidden_size": 8}, "max_steps": 4, "learning_rate": 0.1, "optim_args": {"rank": 2}}
    record = RunRecord("r", "mkor", "lamb", config, seed=3, status="completed", kind="pretraining")
    written = json.loads(record.write(tmp_path).read_text())
    assert written["kind"] == "pretraining"
    assert written["workload"] == {"model": {"hidden_size": 8}, "max_steps": 4, "seed": 3}
    assert written["method"] == {"optimizer": "mkor", "base": "lamb", "learning_rate": 0.1, "optim_args": {"rank": 2}}
    assert record.settings == written["workload"] | written["method"]


def test_older_and_newer_records_read(tmp_path: Path) -> None:
    """Fewer keys are derived or empty, further ones are passed over."""
    made = RunRecord("r", "sgd", "sgd", {"data": {"dataset": "digits"}}, 0, status="completed", kind="vision")
    written = json.loads(made.write(tmp_path).read_text())
    for key in ("kind", "workload", "method", "health", "curve", "target"):
        del written[key]
    (tmp_path / "r.json").write_text(json.dumps({**written, "weather": "fair"}))
    assert read_run(tmp_path / "r.json") == made


def test_the_code_of_a_run_is_that_of_the_numerical_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(hf_soo.__file__).parent, tmp_path / "hf_soo", ignore=shutil.ignore_patterns("__pycache__"))
    digest = machine.code.__wrapped__
    assert re.fullmatch(r"[0-9a-f]{12}", digest())
    here = digest()
    monkeypatch.setattr(hf_soo, "__file__", str(tmp_path / "hf_soo" / "__init__.py"))
    assert digest() == here
    (tmp_path / "hf_soo" / "runs" / "record.py").write_text("")
    assert digest() == here
    (tmp_path / "hf_soo" / "optimizers" / "lamb.py").write_text("")
    assert digest() != here


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("smoke", "pretraining"),
        ("bert_mini_wiki", "pretraining"),
        ("reproduce_mini/phase2", "pretraining"),
        ("reproduce_mini/glue/mkor", "glue"),
        ("glue_minilm", "glue"),
        ("squad_minilm", "squad"),
        ("vit_digits", "vision"),
        ("bench", "bench"),
        ("plan", "plan"),
        ("prepare", "prepare"),
        ("equality", "equality"),
    ],
)
def test_the_kind_of_jsons_that_do_not_say_it(folder: str, kind: str) -> None:
    documents = read_documents(Path(__file__).resolve().parents[2] / "results" / folder).values()
    said = ("kind", "workload", "method")
    mine = [each for each in documents if each.get("kind", kind) == kind]  # a suite has its plans beside its benchmarks
    assert {kind_of({key: value for key, value in each.items() if key not in said}) for each in mine} == {kind}


@pytest.mark.parametrize("name", ["a", "mkor-lamb-lr0.02", "größe", "名前", "a b", ".hidden", "x" * 210, "é" * 105])
def test_what_a_run_may_be_called(name: str, tmp_path: Path) -> None:
    assert is_file_name(name)
    assert make_record(name).write(tmp_path).parent == tmp_path and read_run(tmp_path / f"{name}.json").name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "../../x", "a/b", "/x", "a\\b", "a\nb", "\0", "\ud800", "x" * 211, "é" * 106]
)
def test_what_no_run_is_called(name: str) -> None:
    assert not is_file_name(name)
    with pytest.raises(ValueError, match=r"^name=.* is not allowed; give a file's name of at most 210 bytes"):
        RunArguments(name=name)


@pytest.mark.parametrize("text", ["a" * 210, "a" * 211, "a" * 5000, "é" * 300, "名" * 71, "a/b" * 100, "\ud800" * 300])
def test_a_long_name_ends_with_a_digest(text: str, tmp_path: Path) -> None:
    """Unlike any other's, and the same every time; one that fits stays as it is."""
    name = file_name(text)
    assert is_file_name(name) and name == file_name(text) and name != file_name(text + "b")
    make_record(name).write(tmp_path)
    assert (name == text) == (len(text.encode(errors="replace")) <= 210 and "/" not in text and text.isprintable())


def test_the_name_of_a_run_with_many_settings(tmp_path: Path) -> None:
    settings = "update_period=11,warmup_updates=3,factor_decay=0.9,clip_value=10.5,kv_target=1.5,rank=2"
    more = "min_steps=10,patience=5,rate_decay=0.99,rate_fraction=0.25,sides=input,update_rule=blend,history=16"
    base = "eps=0.000001,max_grad_norm=2.5,always_adapt=true"
    names = []
    for decay in ("0.9", "0.91"):
        flags = [
            "--optim",
            "mkor_h",
            "--optim_args",
            f"{settings},{more}".replace("0.9,", f"{decay},"),
            "--use_cpu",
            "true",
        ]
        flags += ["--base_optim_args", base, "--output_dir", str(tmp_path)]
        names.append(Job(*parse((RunArguments, RunTrainingArguments), flags)).name)
    assert names[0] != names[1] and all(len(name.encode()) == 210 and is_file_name(name) for name in names)
    assert names[0].startswith("mkor_h-lamb-lr5e-05-update_period11-warmup_updates3-")


def test_what_differs() -> None:
    assert differing({"b": 1, "a": [2], "c": None}, {"b": 2, "a": [3]}) == ["a", "b"]  # not c: None is not there
    assert differing({"a": 1}, {"a": 1, "b": 0}, {"a": 1, "c": 1}, free={"c"}) == ["b"]
    check_same({"a": 1, "b": 2}, {"a": 1, "b": 3}, "", "", free={"b"})
    with pytest.raises(ValueError, match=r"^x.json is of a run with b=2, now None; go away\.$"):
        check_same({"b": 2, "c": 3}, {}, "x.json is", "go away")


def test_not_finite_is_null_and_an_absolute_path_its_last_part(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5, True, None], "c": tmp_path / "wiki128", "d": "data/x", 3: "y"}
    assert jsonable(value) == {"a": None, "b": [None, 1.5, True, None], "c": "wiki128", "d": "data/x", "3": "y"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (RuntimeError("shapes differ"), "failed"),
        (ValueError("out of memory"), "failed"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_an_exception_becomes_a_status_and_goes_on(tmp_path: Path, error: BaseException, status: str) -> None:
    assert status_of(error) == status
    with pytest.raises(type(error)), recording(make_record(), tmp_path):
        raise error
    assert read_run(tmp_path / "r.json").status == status


def test_a_block_that_ends_is_completed_unless_it_diverged(tmp_path: Path) -> None:
    with recording(make_record("a"), tmp_path):
        pass
    with recording(make_record("b"), tmp_path) as record:
        record.status = "diverged"
    assert [run.status for run in read_runs(tmp_path)] == ["completed", "diverged"]


def test_refused_settings_are_no_run(tmp_path: Path) -> None:
    record = make_record()
    record.steps = 0
    with pytest.raises(ValueError, match="no such key"), recording(record, tmp_path):
        raise ValueError("no such key")
    assert list(tmp_path.iterdir()) == []


def test_no_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with recording(make_record(), None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record()
    path = record.write(tmp_path)
    before = path.read_text()
    record.steps = 99
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        record.write(tmp_path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "not a run"), ('{"name": "x"}', "not a run, it lacks base")]
)
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json: {message}"):
        read_runs(tmp_path)


def test_no_folder_and_no_runs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No folder"):
        read_runs(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no \*\.json"):
        read_runs(tmp_path)


def test_unknown_status_is_refused(tmp_path: Path) -> None:
    record = make_record()
    record.status = "fine"
    with pytest.raises(ValueError, match="'fine' is unknown; use one of completed"):
        record.write(tmp_path)


CURVE = [
    {"step": 0, "seconds": 0.0, "train_loss": None, "eval_loss": 10.0},
    {"step": 5, "seconds": 4.0, "train_loss": 9.0, "eval_loss": None},
    {"step": 10, "seconds": 10.0, "train_loss": 8.0, "eval_loss": 6.0},
    {"step": 20, "seconds": 18.0, "train_loss": 7.0, "eval_loss": 5.0},
]


@pytest.mark.parametrize(
    ("loss", "steps", "seconds"),
    [(8.0, 5.0, 5.0), (6.0, 10.0, 10.0), (5.5, 15.0, 14.0), (5.0, 20.0, 18.0), (11.0, 0.0, 0.0), (4.0, None, None)],
)
def test_reach_interpolates_between_evaluations(loss: float, steps: float | None, seconds: float | None) -> None:
    assert reach(CURVE, loss) == {"eval_loss": loss, "steps": steps, "seconds": seconds}


def test_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if head.returncode:
        assert machine.commit() is None
    else:
        assert machine.commit() in (head.stdout.strip(), f"{head.stdout.strip()}-dirty")


def test_commit_of_someone_elses_repository_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    inside = tmp_path / "lib" / "hf_soo" / "machine.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(inside))
    assert machine.commit() is None


def test_peak_memory_is_of_this_process() -> None:
    cpu = torch.device("cpu")
    machine.reset_peak_memory(cpu)
    block = torch.ones(16 * 1024 * 1024)  # 64 MiB
    assert machine.peak_memory_bytes(cpu) > block.nbytes


def test_machine_names_device_and_versions() -> None:
    assert machine.device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")
    assert {"python", "hf-soo", "torch", "transformers"} <= set(machine.versions())

"""scripts/run_glue.py: runs, tables of runs, resume, predictions, configs, and every way to be refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
)

import hf_soo
from hf_soo.glue import sweep as glue_runs
from hf_soo.glue.tasks import TASKS
from hf_soo.integrations.arguments import parse_settings
from hf_soo.runs.recipes import read_recipe
from tests.scripts.launch_runs import run_script
from tests.scripts.script_runs import ROOT, check_error, load_script, only_run
from tests.scripts.test_configs import check_header
from tests.tasks.glue_cases import make_model, write_archive, write_tests

CONFIGS = sorted((ROOT / "configs" / "glue").glob("*.yaml"))
OPTIMIZER_KEYS = {
    "optim", "optim_args", "base_optim", "base_optim_args", "precondition_exclude", "learning_rate", "output_dir",
}  # fmt: skip
COMMON = """
optim: mkor
base_optim: adamw
learning_rate: 0.01
max_seq_length: 24
max_steps: 6
per_device_train_batch_size: 16
per_device_eval_batch_size: 32
logging_steps: 2
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
seed: 3
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("run_glue")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_model(root / "tiny")
    write_tests(write_archive(root / "glue"))
    (root / "run.yaml").write_text(COMMON)
    return root


@pytest.fixture
def flags(world: Path, tmp_path: Path) -> list[str]:
    places = ["--model_name_or_path", str(world / "tiny"), "--data_dir", str(world / "glue")]
    return ["--config", str(world / "run.yaml"), *places, "--output_dir", str(tmp_path / "out")]


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def test_a_run_from_the_shell(flags: list[str], tmp_path: Path) -> None:
    """YAML and flags over it; one JSON with the official metrics, a table of it, no path of this machine."""
    more = ["--task_name", "MRPC", "--eval_strategy", "steps", "--eval_steps", "20", "--max_steps", "40"]
    done = run_script("scripts/run_glue.py", *flags, *more)
    run = only_run(tmp_path / "out" / "runs")
    assert (run["name"], run["status"], run["seed"], run["steps"]) == (
        "mrpc-mkor-adamw-lr0.01-seed3", "completed", 3, 40,
    )  # fmt: skip
    assert run["final"].keys() == {"train_loss", "eval_loss", "accuracy", "f1", "combined_score"}
    assert run["final"]["accuracy"] >= 0.9 and run["final"]["f1"] >= 0.9  # the first word says it: chance is 0.5
    config = run["config"]
    assert len(config["data"].pop("digest")) == 12
    assert config["data"] == {
        "source": "MRPC/train.tsv, MRPC/dev.tsv", "train_examples": 48, "eval_examples": 20, "train_subset": True,
        "dev_subset": True,
    }  # fmt: skip
    assert (config["task"], config["max_seq_length"]) == ("mrpc", 24)
    assert (config["model"]["name"], config["model"]["hidden_size"]) == ("tiny", 16)
    assert str(tmp_path) not in json.dumps(run)
    cell = f"{100 * run['final']['accuracy']:.1f}/{100 * run['final']['f1']:.1f}"
    row = f"| tiny | mkor | adamw | 0.01 | {cell}\\*† | {100 * run['final']['combined_score']:.1f} (1 task) |"
    assert row in done.stdout and row in (tmp_path / "out" / "runs" / "table.md").read_text()


def test_all_tasks(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    """Each has its official metrics, by their names."""
    assert script.main([*flags, "--task_name", "all", "--max_steps", "1"]) == 0
    found = runs(tmp_path / "out" / "runs")
    assert len(found) == 9
    for run in found.values():
        assert run["status"] == "completed"
        measured = set(run["final"]) - {"train_loss", "eval_loss"}
        assert measured == set(TASKS[run["config"]["task"]].metrics)
    table = (tmp_path / "out" / "runs" / "table.md").read_text()
    assert "| CoLA Matthews | SST-2 acc | MRPC acc/F1 | STS-B Pearson/Spearman | QQP acc/F1 | MNLI m/mm acc |" in table
    assert "(9 tasks)" in table


def test_seeds_make_a_table_and_an_interrupted_one_goes_on(
    script: ModuleType, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    out = tmp_path / "out"
    more = ["--task_name", "stsb", "--seeds", "0", "1", "2", "--save_strategy", "steps", "--save_steps", "4"]
    more += ["--max_train_samples", "16", "--max_steps", "6", "--lr_scheduler_type", "constant"]
    assert script.main([*flags, *more]) == 0
    first = runs(out / "runs")
    assert list(first) == [f"stsb-mkor-adamw-lr0.01-seed{seed}" for seed in range(3)]
    assert len({run["config"]["initial_weights"] for run in first.values()}) == 3  # a head of its own for each seed
    values = sorted(run["final"]["pearson"] for run in first.values())
    printed = capsys.readouterr().out
    low, middle, high = (f"{100 * value:.1f}" for value in values)
    assert f"| STS-B | pearson | {middle} | {low} | {high} | 0 1 2 |" in printed

    shutil.rmtree(out / "stsb" / "seed1" / "checkpoint-6")  # killed between steps 4 and 6
    (out / "runs" / "stsb-mkor-adamw-lr0.01-seed1.json").unlink()
    (out / "runs" / "stsb-mkor-adamw-lr0.01-seed2.json").unlink()  # killed between the last step and the JSON
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    assert script.main([*flags, *more]) == 0
    again = runs(out / "runs")
    for name, run in again.items():
        assert run["final"] == first[name]["final"], name
        assert [point["train_loss"] for point in run["curve"]] == [p["train_loss"] for p in first[name]["curve"]]
    assert {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json") if path.name in kept} == kept
    assert capsys.readouterr().out.endswith(printed[printed.index("| model |") :])

    assert script.main([*flags, *more, "--max_train_samples", "8"]) == 1
    check_error(capsys, "is of a run with data={'source'")
    assert runs(out / "runs") == again
    assert script.main([*flags, *more, "--seeds", "0", "--max_train_samples", "8", "--restart"]) == 0
    assert runs(out / "runs")[next(iter(first))]["config"]["data"]["train_examples"] == 8


def test_predictions_are_the_servers(
    script: ModuleType, flags: list[str], tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained folder is evaluated and predicts; both agree, and its training run's JSON stays."""
    out = tmp_path / "out"
    assert script.main([*flags, "--task_name", "rte", "--save_strategy", "epoch", "--max_steps", "40"]) == 0
    trained = only_run(out / "runs")
    again = [*flags, "--task_name", "rte", "--model_name_or_path", str(out)]
    assert script.main([*again, "--do_eval"]) == 0
    assert f"rte-evaluation-seed3: eval_loss {trained['final']['eval_loss']}, accuracy" in capsys.readouterr().out
    evaluated = runs(out / "runs").pop("rte-evaluation-seed3")
    keys = ("eval_loss", "accuracy")
    assert [evaluated["final"][key] for key in keys] == [trained["final"][key] for key in keys]
    assert evaluated["steps"] == 0

    dev = world / "glue" / "RTE" / "dev.tsv"
    own = [*flags[:4], *flags[6:], "--task_name", "rte", "--model_name_or_path", str(out), "--do_predict"]
    own += ["--train_sampling_strategy", "group_by_length", "--dataloader_drop_last", "true"]  # of training alone
    own += ["--per_device_eval_batch_size", "3"]
    assert script.main([*own, "--test_file", str(dev)]) == 0
    header, *rows = (out / "predictions" / "RTE.tsv").read_text().splitlines()
    truth = [line.split("\t")[3] for line in dev.read_text().splitlines()[1:]]
    said = [row.split("\t") for row in rows]
    assert header == "index\tprediction" and [index for index, _ in said] == [str(i) for i in range(20)]
    right = [word == label for (_, word), label in zip(said, truth, strict=True)]
    assert sum(right) / 20 == trained["final"]["accuracy"] and sum(right) / 20 > 0.5
    assert runs(out / "runs")[trained["name"]] == trained
    assert "evaluation" not in (out / "runs" / "table.md").read_text()


def test_mnli_has_two_files_and_scores_are_clipped(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    """--do_train --do_eval --do_predict in one: MNLI's three test parts, and STS-B between 0 and 5."""
    one = ["--do_train", "--do_eval", "--do_predict", "--max_predict_samples", "4"]
    assert script.main([*flags, *one, "--task_name", "mnli,stsb", "--learning_rate", "0.3"]) == 0
    out = tmp_path / "out"
    for name in ("MNLI-m", "MNLI-mm", "AX"):
        rows = (out / f"mnli/seed3/predictions/{name}.tsv").read_text().splitlines()
        assert len(rows) == 5 and {row.split("\t")[1] for row in rows[1:]} <= set(TASKS["mnli"].labels)
    values = [row.split("\t")[1] for row in (out / "stsb/seed3/predictions/STS-B.tsv").read_text().splitlines()[1:]]
    assert len(values) == 4 and all(re.fullmatch(r"\d\.\d{3}", value) and float(value) <= 5 for value in values)
    assert runs(out / "runs")["mnli-mkor-adamw-lr0.3-seed3"]["final"].keys() >= {"accuracy", "accuracy_mm"}


def test_the_best_checkpoint_is_what_is_reported(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    """Here the one with the highest loss, which is not the last."""
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    often = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
    assert script.main([*flags, *best, *often, "--task_name", "sst2", "--max_steps", "10"]) == 0
    run = only_run(tmp_path / "out" / "runs")
    losses = {point["step"]: point["eval_loss"] for point in run["curve"]}
    step = max(losses, key=lambda step: losses[step])
    assert step < 10 and run["final"]["eval_loss"] == pytest.approx(losses[step], rel=1e-6)
    (accuracy,) = (point["accuracy"] for point in run["curve"] if point["step"] == step)
    assert run["final"]["accuracy"] == accuracy


def test_comparison(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    assert script.main([*flags, "--task_name", "mrpc", "--compare_with", "adamw"]) == 0
    found = runs(tmp_path / "out" / "runs")
    assert list(found) == ["adamw-lr0.01", "mkor-adamw-lr0.01"]
    first, second = found.values()
    assert first["config"]["initial_weights"] == second["config"]["initial_weights"]
    assert first["final"]["eval_loss"] != second["final"]["eval_loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "task_name is missing; give one of cola, sst2"),
        (["--task_name", "mprc"], "task_name='mprc' is no task of GLUE; did you mean 'mrpc'?"),
        (["--task_name", "rte", "--max_seq_length", "64"], "max_seq_length=64, but"),
        (["--task_name", "rte", "--data_dir", "absent"], "data_dir='absent' is no folder"),
        (["--task_name", "rte,qnli", "--do_predict"], "has no test.tsv"),
        (["--task_name", "rte", "--model_name_or_path", "/absent/model"], "model_name_or_path='/absent/model' is no"),
        (["--task_name", "rte", "--model_name_or_path", "owner/absent"], "nor a model of the hub that can be read"),
        (["--task_name", "rte", "--model_name_or_path", "{world}/glue"], "is a folder without config.json"),
        (["--task_name", "rte", "--model_name_or_path", "{world}/vit"], "of the kind 'vit', which does not classify"),
        (["--task_name", "rte", "--tokenizer_name", "{world}/other"], "vocabulary has 15 entries but the model's"),
        (["--task_name", "rte", "--seeds", "1", "1"], "seeds=[1, 1] has one twice"),
        (["--task_name", "rte", "--seeds", "1", "2", "--compare_with", "sgd"], "is for one run, and there are 1 tasks"),
        (["--task_name", "rte,mrpc", "--resume_from_checkpoint", "x"], "resume_from_checkpoint='x' is for one run"),
        (["--task_name", "rte", "--results_dir", "{world}/results"], "bad.json: not JSON"),
        (["--task_name", "rte", "--results_dir", "{world}/run.yaml/runs"], "run.yaml' is a file; give another folder."),
        (["--task_name", "rte", "--tasks", "x"], "unknown flag '--tasks'; did you mean '--task'?"),
        (["--task_name", "rte", "--optim", "mkr"], "mkr"),
        (["--task_name", "rte", "--eval_do_concat_batches", "false"], "leave no logits to score"),
        (["--task_name", "rte,cola", "--metric_for_best_model", "accuracy"], "use loss, matthews_correlation."),
    ],
)
def test_bad_input_is_one_line_and_no_run(
    script: ModuleType,
    flags: list[str],
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    if not (world / "other").is_dir():
        make_model(world / "other", words=10)
        ViTConfig().save_pretrained(world / "vit")
        (world / "results").mkdir()
        (world / "results" / "bad.json").write_text("{")
    assert script.main([*flags, *(word.format(world=world) for word in more)]) == 1
    check_error(capsys, message)
    assert not list(tmp_path.rglob("*.json"))


def test_missing_packages_show_before_any_data_is_read(
    script: ModuleType, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("GLUE's metrics need SciPy; pip install 'hf-soo[eval]'.")

    monkeypatch.setattr(glue_runs, "check_installed", missing)
    assert script.main([*flags, "--task_name", "rte", "--data_dir", "absent"]) == 1
    check_error(capsys, "GLUE's metrics need SciPy")


def test_help_is_grouped(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:") for group in ("model", "data", "seeds", "run")]
    assert places == sorted(places)


def ids(path: Path) -> str:
    return path.stem


def test_the_configs_are_there() -> None:
    pairs = {f"{model}_{method}" for model in ("bert_base", "bert_large", "minilm") for method in ("adamw", "mkor")}
    assert {path.stem for path in CONFIGS} == {*pairs, "bert_mini_adamw", "bert_small_adamw"}  # for reproduce.sh


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_configs_parse_build_their_optimizer_and_have_a_header(path: Path) -> None:
    flags = ["--config", str(path), "--use_cpu", "true", "--bf16", "false"]
    *parsed, training = glue_runs.DOMAIN.settings(flags)
    for key, value in read_recipe([path]).items():
        (owner,) = (each for each in (*parsed, training) if hasattr(each, key))
        if isinstance(value, int | float) and key != "bf16":
            assert getattr(owner, key) == value, key
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    optimizer = hf_soo.build_optimizer(
        training.optim,
        BertForSequenceClassification(config),
        lr=training.learning_rate,
        base=training.base_optim,
        weight_decay=training.weight_decay,
        **parse_settings("optim_args", training.optim_args),
    )
    assert {group["lr"] for group in optimizer.param_groups} == {training.learning_rate}
    check_header(path)


@pytest.mark.parametrize("model", ["bert_base", "bert_large", "minilm"])
def test_siblings_differ_in_optimizer_keys_alone(model: str) -> None:
    first, other = (read_recipe([ROOT / f"configs/glue/{model}_{name}.yaml"]) for name in ("adamw", "mkor"))
    assert {key for key in {*first, *other} if first.get(key) != other.get(key)} <= OPTIMIZER_KEYS

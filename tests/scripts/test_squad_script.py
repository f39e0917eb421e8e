"""scripts/run_squad.py: it learns, writes what it answers, and refuses what could not end well; the configs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.runs import arguments
from hf_soo.runs.pretrained import PretrainedArguments
from hf_soo.runs.recipes import read_recipe
from hf_soo.runs.record import read_run
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.training import Job, train
from hf_soo.squad.inputs import QaDataArguments
from hf_soo.squad.task import SquadTask
from tests.data.squad_data import PIECES, colour_questions, nested, paragraph, qa, save_model, tokenizer, write
from tests.ranks.distributed import run_ranks
from tests.scripts.script_runs import ROOT, check_error, load_script, only_run
from tests.scripts.test_configs import OPTIMIZER_KEYS, check_header, check_optimizer, check_values, ids

CONFIGS = sorted((ROOT / "configs" / "squad").glob("*.yaml"))
CLASSES = (PretrainedArguments, QaDataArguments, RunArguments, RunTrainingArguments)
CONFIG = """
optim: adamw
learning_rate: 0.01
max_seq_length: 24
doc_stride: 4
max_query_length: 8
per_device_train_batch_size: 16
per_device_eval_batch_size: 16
max_steps: 2
lr_scheduler_type: constant
logging_steps: 20
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("run_squad")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, and questions to train and evaluate on."""
    folder = tmp_path_factory.mktemp("squad")
    return {
        "model": save_model(folder / "model"),
        "train": write(folder / "train.json", colour_questions(192, seed=0, words=24)),
        "dev": write(folder / "dev.json", colour_questions(37, seed=1, words=24)),
        "train2": write(folder / "train2.json", colour_questions(192, seed=2, words=14, impossible=3)),
        "dev2": write(folder / "dev2.json", colour_questions(36, seed=3, words=14, impossible=3)),
    }


@pytest.fixture
def flags(files: dict[str, str], tmp_path: Path) -> list[str]:
    write(tmp_path / "run.yaml", CONFIG)
    given = {"config": str(tmp_path / "run.yaml"), "output_dir": str(tmp_path / "out")}
    given |= {"model_name_or_path": files["model"], "train_file": files["train"], "validation_file": files["dev"]}
    return [part for key, value in given.items() for part in (f"--{key}", value)]


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def score(script: ModuleType, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, float]:
    capsys.readouterr()
    assert script.main(["--score", *more]) == 0
    scores: dict[str, float] = json.loads(capsys.readouterr().out)
    return scores


def test_it_learns_and_its_files_score_as_its_record_says(
    script: ModuleType, flags: list[str], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contexts are longer than a window; without training nothing is right, after 40 steps all is."""
    more = ["--max_steps", "40", "--eval_strategy", "steps", "--eval_steps", "20", "--save_strategy", "steps"]
    assert script.main([*flags, *more, "--save_steps", "40"]) == 0
    out = tmp_path / "out"
    run = only_run(out / "runs")
    assert (run["name"], run["status"], run["steps"]) == ("adamw-lr0.01", "completed", 40)
    assert run["final"]["exact_match"] == run["final"]["f1"] == 100.0 and run["final"]["eval_loss"] < 0.05
    assert [point["step"] for point in run["curve"] if point["eval_loss"] is not None] == [20, 40]
    data = run["config"]["data"]
    assert (data["train"]["questions"], data["eval"]["questions"], data["version_2"]) == (192, 37, False)
    assert data["eval"]["windows"] > 37 and data["train"]["answers_wrong"] == 0
    assert "| exact_match | f1 |" in capsys.readouterr().out
    assert read(out / "predictions.json") == {
        f"q1-{i}": answers[0]["text"] for i, answers in enumerate(_answers(read(Path(files["dev"]))))
    }
    assert len(read(out / "nbest_predictions.json")["q1-0"]) == 20 and not (out / "null_odds.json").exists()
    scores = score(script, capsys, str(out / "predictions.json"), "--validation_file", files["dev"])
    assert scores == {"exact_match": 100.0, "f1": 100.0}
    # the folder is a model: it evaluates itself, and answers a file without answers
    test = read(Path(files["dev"]))
    for each in test["data"][0]["paragraphs"]:
        each["qas"][0]["answers"] = []
    alone = ["--model_name_or_path", str(out), "--do_eval", "--do_predict", "--train_sampling_strategy"]
    alone += [
        "group_by_length",
        "--dataloader_drop_last",
        "true",
        "--test_file",
        write(tmp_path / "test.json", test),
        "--max_predict_samples",
        "5",
    ]
    assert script.main([*flags, *alone]) == 0
    evaluated = read_run(out / "runs" / "adamw-lr0.01-eval.json")
    assert (evaluated.final["exact_match"], evaluated.steps) == (100.0, 0)
    assert evaluated.final["eval_loss"] == pytest.approx(run["final"]["eval_loss"], rel=1e-4)
    assert "test_f1" not in evaluated.final and only_five(out) == 5


def only_five(out: Path) -> int:
    """Predictions of the test file, which are those of the evaluation."""
    test, dev = (read(out / f"{prefix}predictions.json") for prefix in ("test_", ""))
    assert all(dev[key] == text for key, text in test.items())
    return len(test)


def _answers(content: Any) -> list[Any]:
    return [qa["answers"] for each in content["data"][0]["paragraphs"] for qa in each["qas"]]


def test_v2_learns_when_there_is_no_answer(
    script: ModuleType, flags: list[str], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--train_file", files["train2"], "--validation_file", files["dev2"], "--max_steps", "40", "--optim", "mkor"]
    test = ["--do_train", "--do_eval", "--do_predict", "--test_file", files["dev2"]]
    assert script.main([*flags, *more, *test, "--base_optim", "adamw"]) == 0
    out = tmp_path / "out"
    run = only_run(out / "runs")
    final = run["final"]
    assert final["HasAns_exact"] > 90 and final["NoAns_exact"] > 90 and run["config"]["data"]["version_2"]
    assert final["test_f1"] == final["f1"] and final["test_NoAns_f1"] == final["NoAns_f1"]
    odds = read(out / "null_odds.json")
    assert {key for key, text in read(out / "predictions.json").items() if text} == {
        key for key, value in odds.items() if value <= 0
    }
    given = [str(out / "predictions.json"), "--validation_file", files["dev2"]]
    scores = score(script, capsys, *given, "--na_prob_file", str(out / "null_odds.json"))
    assert {f"{key}": final[key] for key in scores} == pytest.approx(scores)


def test_a_threshold_decides_when_nothing_is_answered(
    script: ModuleType, flags: list[str], files: dict[str, str], tmp_path: Path
) -> None:
    more = ["--do_eval", "--version_2_with_negative", "--null_score_diff_threshold"]
    for threshold, empty in (("1000", 0), ("-1000", 37)):
        assert script.main([*flags, *more, threshold]) == 0
        texts = read(tmp_path / "out" / "predictions.json")
        assert sum(text == "" for text in texts.values()) == empty


def test_every_setting_of_the_answers_matters(
    script: ModuleType, flags: list[str], files: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = ["--do_eval", "--n_best_size", "3", "--max_answer_length", "2", "--max_eval_samples", "6"]
    more += ["--max_query_length", "2"]
    assert script.main([*flags, *more, "--pad_to_max_length", "--max_seq_length", "20", "--doc_stride", "2"]) == 0
    candidates = read(out / "nbest_predictions.json")
    assert len(candidates) == 6 and max(len(each) for each in candidates.values()) == 3
    assert {len(entry["text"].split()) for each in candidates.values() for entry in each} <= {1, 2}
    data = only_run(out / "runs")["config"]["data"]
    assert (data["pad_to_max_length"], data["max_seq_length"], data["doc_stride"]) == (True, 20, 2)
    assert data["eval"]["windows"] == 6 * 2  # 24 tokens of context, 15 at a time, 2 shared
    assert data["eval"]["questions_cut"] == 6


def on_a_rank(rank: int, world: int, flags: list[str]) -> dict[str, float | None]:
    """The script's run on one of several processes, whose group stays; what its record says at the end."""
    model, data, kept, training = arguments.parse(CLASSES, flags)
    assert training.world_size == world
    (record,) = train(Job(kept, training), SquadTask(model, data, training))
    return record.final


def test_two_processes_answer_as_one(flags: list[str], script: ModuleType, tmp_path: Path) -> None:
    """37 questions do not divide by 2 x 16; the files are written once, with the questions in their order."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = [*flags, "--do_eval", "--output_dir"]
    assert script.main([*more, str(one)]) == 0
    first, second = run_ranks(2, on_a_rank, [*more, str(two)])
    assert first == second and len(read(one / "predictions.json")) == 37
    assert list(read(two / "predictions.json").items()) == list(read(one / "predictions.json").items())
    assert only_run(two / "runs")["final"] == pytest.approx(only_run(one / "runs")["final"], rel=1e-2)


def test_a_pretraining_folder_and_other_optimizers(
    script: ModuleType, flags: list[str], files: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    torch.manual_seed(1)
    shape = BertConfig.from_pretrained(files["model"])
    pretrained = GatheredBertForPreTraining(shape)
    pretrained.save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    for optimizer in (["--optim", "mkor", "--base_optim", "adamw"], ["--optim", "adamw_torch"]):
        more = ["--model_name_or_path", str(folder), "--restart", "--save_strategy", "steps", *optimizer]
        assert script.main([*flags, *more, "--learning_rate", "0"]) == 0
        trained = BertForQuestionAnswering.from_pretrained(tmp_path / "out").state_dict()
        for key, value in pretrained.bert.embeddings.state_dict().items():
            assert torch.equal(trained[f"bert.embeddings.{key}"], value)
    run = read_run(tmp_path / "out" / "runs" / "mkor-adamw-lr0.json")
    assert run.steps == 2 and run.config["model"]["start"] == "pretrained" and run.health
    (folder / "config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()
    more = ["--model_name_or_path", str(folder), "--tokenizer_name", files["model"], "--config_name", files["model"]]
    assert script.main([*flags, *more, "--restart"]) == 0


def test_questions_of_the_hub(
    script: ModuleType, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = "w1 red w2"
    rows = [
        {"id": name, "context": context, "question": "which ?", "answers": {"text": ["red"], "answer_start": [3]}}
        for name in ("a", "b", "c")
    ]
    asked: list[tuple[Any, ...]] = []

    def load(path: str, cache_dir: str | None) -> Any:
        asked.append((path, cache_dir))
        return datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part in ("train", "validation")})

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = [*flags[:6], "--dataset_name", "squad", "--cache_dir", str(tmp_path / "cache"), "--max_train_samples", "2"]
    assert script.main(hub) == 0
    assert set(asked) == {("rajpurkar/squad", str(tmp_path / "cache"))}
    data = only_run(tmp_path / "out" / "runs")["config"]["data"]
    assert (data["train"]["questions"], data["eval"]["questions"]) == (2, 3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": []})
    assert script.main([*hub, "--restart"]) == 1


def test_questions_whose_answer_is_elsewhere_are_left_out(
    script: ModuleType, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = colour_questions(8, seed=4)
    qas = [each["qas"][0] for each in content["data"][0]["paragraphs"]]
    for damaged in (2, 5):
        for each in qas[:damaged]:
            each["answers"][0]["answer_start"] = 1
        file = write(tmp_path / "damaged.json", content)
        more = ["--train_file", file, "--validation_file", file, "--do_train", "--restart"]
        assert script.main([*flags, *more]) == (damaged > 4)
    check_error(capsys, "5 of 8 answers are not in their context at 'answer_start' (the first is of question 'q4-0')")
    train = only_run(tmp_path / "out" / "runs")["config"]["data"]["train"]
    assert (train["questions"], train["answers_wrong"], train["windows"]) == (8, 2, 6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_seq_length", "65"], "has 64 positions; give 64."),
        (
            ["--doc_stride", "18"],
            "doc_stride=18 leaves no step: with max_seq_length=24 only 18 tokens of a context fit",
        ),
        (["--doc_stride", "-1"], "doc_stride=-1 is not allowed"),
        (["--n_best_size", "0"], "n_best_size=0 is not allowed; give a whole number >= 1"),
        (["--max_eval_samples", "0"], "max_eval_samples=0 is not allowed; give a whole number >= 1"),
        (["--train_file", "absent.json"], "absent.json: cannot be read"),
        (["--model_name_or_path", "./absent"], "model_name_or_path='./absent' is no folder"),
        (["--tokenizer_name", "./absent"], "tokenizer_name='./absent' is no folder"),
        (["--config_name", "./absent"], "config_name='./absent' is no folder"),
        (["--do_predict"], "there are no questions to predict; give --test_file"),
        (["--prediction_loss_only", "true"], "leave no logits to score"),
        (["--metric_for_best_model", "accuracy"], "'accuracy' is not measured; use loss, exact_match or f1"),
        (["--max_query_len", "3"], "unknown flag '--max_query_len'; did you mean '--max_query_length'?"),
    ],
)
def test_bad_settings_are_one_line_and_no_run(
    script: ModuleType,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert script.main([*flags, *more]) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out" / "runs").exists()


def test_bad_data_and_models(
    script: ModuleType,
    flags: list[str],
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    none = write(tmp_path / "none.json", nested(paragraph("w1 w2", qa("n1", "w1 w2"))))
    other = Path(save_model(tmp_path / "other", vocab_size=len(PIECES) + 3))
    classifier = Path(save_model(tmp_path / "classifier"))
    (classifier / "config.json").write_text('{"model_type": "vit"}')
    bare = Path(save_model(tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    junk = Path(save_model(tmp_path / "junk"))
    (junk / "model.safetensors").write_bytes(b"junk")
    wide = Path(save_model(tmp_path / "wide"))
    (wide / "config.json").write_text(
        (wide / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 48')
    )
    deep = Path(save_model(tmp_path / "deep"))
    text = (deep / "config.json").read_text()
    (deep / "config.json").write_text(text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    empty = tmp_path / "empty"
    empty.mkdir()
    for more, message in (
        (["--train_file", none], "none.json: question 'n1' has no answer span"),
        (["--validation_file", none], "none.json: question 'n1' has no answer span"),
        (
            ["--model_name_or_path", str(other)],
            f"The tokenizer of '{other}' does not fit the model: the vocab",
        ),
        (["--model_name_or_path", str(classifier)], "of the kind 'vit', which does not answer questions"),
        (["--model_name_or_path", str(bare)], f"model_name_or_path='{bare}' is no folder of a model"),
        (["--model_name_or_path", str(junk)], f"model_name_or_path='{junk}' is no folder of a model"),
        (["--model_name_or_path", str(wide)], f"model_name_or_path='{wide}' is no folder of a model"),
        (
            ["--model_name_or_path", str(deep)],
            "lack 16 of the tensors of a bert (the first is bert.encoder.layer.1.",
        ),
        (["--model_name_or_path", str(empty)], f"model_name_or_path='{empty}' is a folder without config.json"),
    ):
        assert script.main([*flags, *more]) == 1
        check_error(capsys, message)
    for missing, message in (
        ("--train_file", "no questions to train on; give --train_file or --dataset_name squad"),
        ("--validation_file", "no questions to evaluate on"),
        ("--model_name_or_path", "model_name_or_path is missing"),
    ):
        place = flags.index(missing)
        assert script.main(flags[:place] + flags[place + 2 :]) == 1
        check_error(capsys, message)
    hub = ["--dataset_name", "owner/absent"]
    assert script.main([*flags[:6], *hub]) == 1
    check_error(capsys, "dataset_name='owner/absent' cannot be loaded from the hub")
    assert not (tmp_path / "out" / "runs").exists()


# configs


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_config_parses_and_builds_its_optimizer(path: Path) -> None:
    parsed = arguments.parse(CLASSES, ["--config", str(path), "--use_cpu", "true"])
    check_values(path, *parsed)
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    check_optimizer(parsed[-1], BertForQuestionAnswering(shape))


SIZES = ("bert_base", "bert_large", "minilm")


def test_configs_are_there_and_siblings_differ_in_optimizer_keys_alone() -> None:
    by_name = {path.stem: path for path in CONFIGS}
    pairs = [[by_name.pop(f"{size}_{name}") for name in ("adamw", "mkor")] for size in SIZES]
    assert set(by_name) == {"bert_mini_adamw", "bert_small_adamw"}  # for reproduce.sh
    for one, two in pairs:
        first, second = (read_recipe([path]) for path in (one, two))
        assert {key for key in {*first, *second} if first.get(key) != second.get(key)} <= OPTIMIZER_KEYS
        assert (first["num_train_epochs"], first["max_seq_length"], first["doc_stride"]) == (2, 384, 128)


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_config_header(path: Path) -> None:
    check_header(path, "yes" if path.stem.startswith(("bert_mini", "minilm")) else "no")

"""scripts/pretrain_bert.py on a small corpus of its own: runs, comparisons, resume, and every way to be refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

from hf_soo.bert import inputs as pretraining_inputs
from hf_soo.bert.inputs import DataArguments, ModelArguments, PretrainingData, make_model
from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.bert.task import _PretrainingTrainer
from hf_soo.optimizers.polar import iteration_dtype
from hf_soo.runs import arguments
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.script import check
from hf_soo.runs.training import Job, _weights_hash
from tests.scripts.launch_runs import run_script
from tests.scripts.script_runs import check_error, load_script, only_run, prepare_corpus

MODEL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--dropout", "0"]
STEPS = ["--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "2"]
OTHER = ["--learning_rate", "0.02", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true"]
QUIET = ["--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--save_strategy", "no", "--max_grad_norm", "0"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_bert")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Path:
    """The text that it was prepared from."""
    return prepared.parent / "text.txt"


@pytest.fixture
def flags(prepared: Path, tmp_path: Path) -> list[str]:
    out = ["--output_dir", str(tmp_path / "out"), "--data_dir", str(prepared)]
    return [*out, *MODEL, *STEPS, *OTHER, *QUIET, "--optim", "mkor"]


def losses(run: dict[str, Any]) -> list[tuple[int, float | None, float | None]]:
    return [(point["step"], point["train_loss"], point["eval_loss"]) for point in run["curve"]]


def test_comparison(script: ModuleType, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["--eval_on_start", "true", "--compare_with", "lamb", "--compare_learning_rate", "0.01"]
    assert script.main([*flags, *compare]) == 0
    runs = tmp_path / "out" / "runs"
    mkor, lamb = (json.loads((runs / f"{name}.json").read_text()) for name in ("mkor-lamb-lr0.02", "lamb-lr0.01"))
    for run in (mkor, lamb):
        assert (run["status"], run["steps"], [step for step, *_ in losses(run)]) == ("completed", 6, [0, 2, 4, 6])
        assert run["final"]["eval_loss"] == losses(run)[-1][2]
        assert run["seconds"] > 0 and run["peak_memory_bytes"] > 0
        assert str(tmp_path) not in json.dumps(run)
    # the same weights, batches and evaluation: equal before the first step, near chance, and different after it
    assert mkor["config"]["initial_weights"] == lamb["config"]["initial_weights"]
    assert losses(mkor)[0] == losses(lamb)[0]
    vocabulary = mkor["config"]["model"]["vocab_size"]
    assert losses(mkor)[0][2] == pytest.approx(math.log(vocabulary) + math.log(2), rel=0.05)
    assert losses(mkor)[1] != losses(lamb)[1]
    assert lamb["target"] == {"eval_loss": lamb["final"]["eval_loss"], "steps": 6.0, "seconds": lamb["seconds"]}
    assert set(mkor["health"]) >= {"cos_median", "cos_min", "fallback_layers"}
    printed = capsys.readouterr().out
    assert "| mkor | lamb | 0.02 |" in printed and "| lamb |  | 0.01 |" in printed
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_compare_settings_go_to_the_second_run_alone(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    first = ["--max_steps", "2", "--optim_args", "update_period=3", "--precondition_exclude", "pooler"]
    second = ["--compare_with", "mkor", "--compare_base_optim", "muon", "--compare_base_optim_args", "rest_lr=0.003"]
    assert script.main([*flags, *first, *second, "--compare_optim_args", "history=8"]) == 0
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert [file.stem for file in files] == [
        "mkor-lamb-lr0.02-update_period3",
        "mkor-muon-lr0.02-history8-rest_lr0.003",
    ]
    one, two = (json.loads(file.read_text()) for file in files)
    assert one["arithmetic"] == {} and two["arithmetic"] == {"ns_dtype": iteration_dtype(torch.device("cpu"))}
    assert one["config"]["optim_args"] == {"update_period": 3} and two["config"]["optim_args"] == {"history": 8}
    assert one["config"]["base_optim_args"] == {} and two["config"]["base_optim_args"] == {"rest_lr": 0.003}
    assert one["config"]["precondition_exclude"] == two["config"]["precondition_exclude"] == ["pooler"]


def test_resume_is_exact_and_keeps_the_whole_curve(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    saving = [*flags, "--save_strategy", "steps", "--save_steps", "4", "--num_train_epochs", "1"]
    assert script.main(saving) == 0
    out = tmp_path / "out"
    whole = only_run(out / "runs")
    shutil.rmtree(out / "checkpoint-6")  # as if it had been killed between 4 and 6
    (out / "checkpoint-5").mkdir()  # and had begun to write another
    shutil.rmtree(out / "runs")
    assert script.main(saving) == 0
    resumed = only_run(out / "runs")
    assert losses(resumed) == losses(whole)
    assert resumed["curve"][1]["seconds"] == whole["curve"][1]["seconds"]
    assert (resumed["status"], resumed["steps"]) == ("completed", 6)
    assert script.main(saving) == 0  # finished: nothing is trained, and the JSON stays as it is
    assert only_run(out / "runs") == resumed
    weights = (out / "checkpoint-6" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights and (out / "tokenizer.json").is_file()
    (file,) = (out / "runs").iterdir()
    failed = json.dumps(resumed | {"status": "failed", "final": {}})  # what is done after the last checkpoint was not
    for left in ("", failed):
        file.unlink()  # as if it had been killed after its last checkpoint
        if left:
            file.write_text(left)
        (out / "model.safetensors").unlink()
        assert script.main(saving) == 0
        last = only_run(out / "runs")
        assert (losses(last), last["final"], last["status"]) == (losses(resumed), resumed["final"], "completed")
        assert (out / "model.safetensors").read_bytes() == weights


def test_a_finished_run_without_its_json_keeps_its_best_model(
    script: ModuleType, flags: list[str], tmp_path: Path
) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "true", "--learning_rate"]
    assert script.main([*flags, *saving, "2.0"]) == 0
    out = tmp_path / "out"
    best = (out / "model.safetensors").read_bytes()
    assert best != (out / "checkpoint-6" / "model.safetensors").read_bytes()  # 2.0 is too high
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "runs")
    assert script.main([*flags, *saving, "2.0"]) == 0
    assert (out / "model.safetensors").read_bytes() == best


def test_another_runs_checkpoints_are_refused_and_kept(
    script: ModuleType, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = [*flags, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2"]
    assert script.main(saving) == 0
    kept = tmp_path / "out" / "checkpoint-2"
    assert script.main([*saving, "--learning_rate", "0.5"]) == 1
    assert "checkpoints of a run with learning_rate=0.02, now 0.5; give --restart" in capsys.readouterr().err
    assert script.main([*saving, "--restart", "--optim_args", "update_perod=1"]) == 1  # refused before it deletes
    assert kept.is_dir()
    assert script.main([*saving, "--restart", "--learning_rate", "0.5", "--max_steps", "1"]) == 0
    assert not kept.is_dir()


def test_prolonging_a_run_is_no_other_run(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    saving = [*flags, "--save_strategy", "steps", "--save_steps", "2"]
    assert script.main([*saving, "--max_steps", "2"]) == 0
    assert script.main([*saving, "--max_steps", "4"]) == 0
    assert [step for step, *_ in losses(only_run(tmp_path / "out" / "runs"))] == [2, 4]


def test_a_diverged_run_stops_and_says_so(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    assert script.main([*flags, "--optim", "sgd", "--learning_rate", "1e30", "--name", "wild"]) == 0
    run = only_run(tmp_path / "out" / "runs")
    assert (run["name"], run["status"], run["steps"]) == ("wild", "diverged", 2)
    assert run["curve"][-1]["train_loss"] is None or run["curve"][-1]["eval_loss"] is None


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [(torch.cuda.OutOfMemoryError("CUDA out of memory"), 1, "oom"), (KeyboardInterrupt(), 130, "stopped")],
)
def test_a_run_that_ends_early_leaves_its_json(
    script: ModuleType,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    status: str,
) -> None:
    forward, calls = GatheredBertForPreTraining.forward, []

    def failing(self: Any, *inputs: Any, **named: Any) -> Any:
        calls.append(1)
        if self.training and len(calls) > 3:
            raise error
        return forward(self, *inputs, **named)

    monkeypatch.setattr(GatheredBertForPreTraining, "forward", failing)
    assert script.main([*flags, "--eval_strategy", "no"]) == code
    run = only_run(tmp_path / "out" / "runs")
    assert (run["status"], run["steps"], run["curve"][0]["step"]) == (status, 3, 2)


def test_without_evaluations_there_is_one_at_the_end(script: ModuleType, flags: list[str], tmp_path: Path) -> None:
    assert script.main([*flags, "--eval_strategy", "no", "--max_steps", "3"]) == 0
    run = only_run(tmp_path / "out" / "runs")
    assert [(step, loss is not None) for step, _, loss in losses(run)] == [(2, False), (3, True)]
    assert run["target"] is None


def test_yaml_first_flags_over_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "optim: mkor\nlearning_rate: 4e-2\noptim_args: {update_period: 5}\nprecondition_exclude: ['a', 'b']\n"
        "bf16: false\nname: null\nlr_scheduler_type: poly_warmup\nuse_cpu: true\nsave_strategy: 'no'\n"
    )
    classes = (RunArguments, RunTrainingArguments)
    run, training = arguments.parse(classes, ["--config", str(file), "--learning_rate", "0.5"])
    assert (training.optim, training.learning_rate, training.optim_args) == ("mkor", 0.5, '{"update_period": 5}')
    assert (training.precondition_exclude, training.lr_scheduler_type, run.name) == (["a", "b"], "poly_warmup", None)
    _, training = arguments.parse(
        classes, ["--learning_rate=0.5", "--config", str(file), "--precondition_exclude", "c"]
    )
    assert (training.learning_rate, training.precondition_exclude) == (0.5, ["c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("max_steps: [1, 2]", "max_steps=[1, 2] is not allowed; give a whole number"),
        ("- a", "holds a list, not 'key: value' lines"),
        ("a: [", "while parsing a flow node"),
        ("preset: huge", "invalid choice: 'huge'"),
    ],
)
def test_a_bad_yaml_is_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert script.main(["--config", str(file)]) == 1
    check_error(capsys, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lerning_rate", "1"], "unknown flag '--lerning_rate'; did you mean '--learning_rate'?"),
        (["--max_steps", "two"], "invalid int value: 'two'"),
        (["--config", "absent.yaml"], "No file 'absent.yaml', and no recipe of that name"),
        (["--config"], "--config: expected one argument"),
        (["--optim", "mkr"], "mkr"),
        (["--optim_args", "update_perod=1"], "Did you mean 'update_period'?"),
        (["--corpus", "embedded"], "give one: a prepared folder, or a corpus"),
        (["--data_dir", "absent"], "'absent' is no finished data set"),
        (["--compare_learning_rate", "1"], "compare_learning_rate=1.0 without compare_with"),
        (["--target_eval_loss", "5", "--eval_strategy", "no"], "target_eval_loss=5.0 and nothing is evaluated while"),
        (["--compare_with", "mkor"], "both runs are 'mkor-lamb-lr0.02'"),
        (["--hidden_size", "15"], "hidden size (15) is not a multiple"),
        (["--output_dir", str(Path(__file__))], "test_pretrain_script.py' is a file; give another folder."),
    ],
)
def test_bad_input_is_one_line_and_no_run(
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
    with pytest.raises((ValueError, OSError)):
        script.main([*flags, *more, "--traceback"])


def test_processes_that_would_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(RunArguments(), RunTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes, the Trainer sees 1; .* --use_cpu true"):
        check(job, lambda: None)


def parse(*flags: str) -> tuple[ModelArguments, DataArguments, RunTrainingArguments]:
    model, data, args = arguments.parse((ModelArguments, DataArguments, RunTrainingArguments), flags)
    return model, data, args


def test_model_flags(prepared: Path, tmp_path: Path) -> None:
    common = ("--data_dir", str(prepared), "--output_dir", str(tmp_path), "--use_cpu", "true")
    model, data, args = parse(
        *common, "--preset", "tiny", "--intermediate_size", "48", "--attn_implementation", "eager"
    )
    loaded = PretrainingData.load(data, args)
    bert = make_model(model, loaded, seed=0)
    shape = (bert.config.hidden_size, bert.config.num_hidden_layers, bert.config.num_attention_heads)
    assert (shape, bert.config.intermediate_size, bert.config.hidden_dropout_prob) == ((128, 2, 2), 48, 0.1)
    assert bert.config.vocab_size == loaded.ids.size and bert.config._attn_implementation == "eager"
    assert (
        _weights_hash(bert)
        == _weights_hash(make_model(model, loaded, seed=0))
        != _weights_hash(make_model(model, loaded, seed=1))
    )

    bert.bfloat16().save_pretrained(tmp_path / "phase1")
    model, *_ = parse(*common, "--model_name_or_path", str(tmp_path / "phase1"), "--dropout", "0.2")
    started = make_model(model, loaded, seed=1)
    assert {parameter.dtype for parameter in started.parameters()} == {torch.float32}
    assert _weights_hash(started) == _weights_hash(bert.float())
    assert started.config.hidden_dropout_prob == 0.2
    bert.bfloat16().save_pretrained(tmp_path / "phase1")  # as under DeepSpeed: it goes on with weights in fp32
    assert {parameter.dtype for parameter in make_model(model, loaded, seed=1).parameters()} == {torch.float32}

    words = Path(loaded.vocab_file).read_text().split()
    BertTokenizer(vocab={word: i for i, word in enumerate([*words[:-2], *words[:-3:-1]])}).save_pretrained(
        tmp_path / "phase1"
    )
    with pytest.raises(ValueError, match=r"2 of the data's 120 words are others in the vocabulary of .*phase1"):
        make_model(model, loaded, seed=1)


@pytest.mark.parametrize(
    ("change", "message"), [({"vocab_size": 64}, "vocab"), ({"max_position_embeddings": 16}, "16 positions")]
)
def test_a_pretrained_model_that_does_not_fit_the_data(
    prepared: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    model, data, args = parse("--data_dir", str(prepared), "--output_dir", str(tmp_path), "--use_cpu", "true", *MODEL)
    loaded = PretrainingData.load(data, args)
    config = pretraining_inputs._config(model, loaded.ids.size, loaded.ids.pad, loaded.seq_length)
    for key, value in change.items():
        setattr(config, key, value)
    GatheredBertForPreTraining(config).save_pretrained(tmp_path / "other")
    model, *_ = parse("--model_name_or_path", str(tmp_path / "other"), "--use_cpu", "true")
    with pytest.raises(ValueError, match=message):
        make_model(model, loaded, seed=0)


def test_data_flags_and_a_corpus_that_is_prepared_once(corpus: Path, tmp_path: Path) -> None:
    size = ("--seq_length", "24", "--vocab_size", "110", "--eval_documents", "0.25")
    common = ("--corpus", str(corpus), "--output_dir", str(tmp_path), "--use_cpu", "true", *size)
    _, data, args = parse(*common)
    loaded = PretrainingData.load(data, args)
    assert (loaded.seq_length, loaded.ids.size) == (24, 110)
    assert max(map(len, loaded.train["input_ids"])) <= 24
    manifest = tmp_path / "data" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    masked = ("--masking", "bernoulli", "--mask_prob", "0.3", "--max_predictions", "7")
    _, data, args = parse(*common, "--max_train_samples", "5", "--max_eval_samples", "3", *masked)
    less = PretrainingData.load(data, args)
    assert manifest.stat().st_mtime_ns == written
    assert (len(less.train), len(less.eval)) == (5, 3)
    assert less.train["example_id"] == loaded.train["example_id"][:5]
    expected = {"train_examples": 5, "eval_examples": 3, "masking": "bernoulli", "mask_prob": 0.3, "max_predictions": 7}
    assert loaded.description != less.description == {**loaded.description, **expected}
    _, data, args = parse(*common, "--vocab_size", "111")
    with pytest.raises(ValueError, match="prepared with vocab_size=110, now 111"):
        PretrainingData.load(data, args)


def test_masks_are_new_each_epoch_and_fixed_in_evaluation(
    script: ModuleType, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate = _PretrainingTrainer.evaluate

    def spy(self: _PretrainingTrainer, *inputs: Any, **named: Any) -> dict[str, float]:
        seen.append((self.data_collator.epoch, self.eval_collator.epoch))
        return evaluate(self, *inputs, **named)

    monkeypatch.setattr(_PretrainingTrainer, "evaluate", spy)
    assert script.main([*flags, "--max_train_samples", "8", "--seed", "5"]) == 0  # two steps an epoch
    assert seen == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.slow
def test_two_processes_write_one_run(flags: list[str], tmp_path: Path) -> None:
    launcher = ["--config_file", "configs/accelerate/cpu.yaml"]
    done = run_script("scripts/pretrain_bert.py", *flags, "--max_steps", "2", launcher=launcher)
    run = only_run(tmp_path / "out" / "runs")
    assert (run["status"], run["steps"], run["config"]["processes"]) == ("completed", 2, 2)
    assert done.stdout.count("| mkor | lamb |") == 1

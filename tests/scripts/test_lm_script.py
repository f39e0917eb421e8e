"""`hf-soo pretrain` with ``task: lm``: small GPTs and BERTs over bytes; the same command gives the same losses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_soo import cli
from hf_soo.lm.data import IGNORE, TextArguments
from hf_soo.lm.model import LanguageModelArguments
from hf_soo.lm.task import DOMAIN, LanguageModelling
from tests.scripts.script_runs import check_error, only_run, write_corpus

SHAPE = ["--task", "lm", "--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2"]
STEPS = ["--per_device_train_batch_size", "8", "--max_eval_samples", "16", "--logging_steps", "1", "--save_steps", "3"]
QUIET = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
EVALUATE = ["--lr_scheduler_type", "constant", "--eval_strategy", "steps", "--eval_steps", "2"]
MKOR = ["--optim", "mkor", "--base_optim", "lamb", "--learning_rate", "0.01", "--weight_decay", "0.01"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("lm"))


def pretrain(corpus: Path, out: Path, *flags: str, steps: int = 6) -> dict[str, Any]:
    where = ["--source", str(corpus), "--window", "24", "--output_dir", str(out), "--results_dir", str(out / "runs")]
    given = [*SHAPE, *where, *STEPS, *QUIET, *EVALUATE, *MKOR, "--max_steps", str(steps), *flags]
    assert cli.main(["pretrain", *given]) == 0
    return only_run(out / "runs")


def losses(run: dict[str, Any]) -> list[tuple[float | None, float | None]]:
    return [(point["train_loss"], point["eval_loss"]) for point in run["curve"]]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_same_command_gives_the_same_losses_also_after_a_resume(
    objective: str, corpus: Path, tmp_path: Path
) -> None:
    """To the last bit."""
    flags = ["--objective", objective]
    first = pretrain(corpus, tmp_path / "first", *flags)
    assert losses(pretrain(corpus, tmp_path / "again", *flags)) == losses(first)
    pretrain(corpus, tmp_path / "resumed", *flags, steps=4)
    assert losses(pretrain(corpus, tmp_path / "resumed", *flags)) == losses(first)
    assert (first["status"], first["kind"], first["steps"]) == ("completed", "lm", 6)
    assert len({loss for loss, _ in losses(first)}) == 6  # no window, and no mask, twice


def test_a_resume_in_the_second_epoch_draws_its_windows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{count} is a number, as is {count + 1}." for count in range(40)))
    flags = ["--num_train_epochs", "3", "--save_steps", "5", "--objective", "masked"]
    first = pretrain(tmp_path / "text.txt", tmp_path / "first", *flags, steps=-1)
    assert first["steps"] > 12  # 3 epochs of some 39 windows
    pretrain(tmp_path / "text.txt", tmp_path / "resumed", *flags, steps=10)
    assert losses(pretrain(tmp_path / "text.txt", tmp_path / "resumed", *flags, steps=first["steps"])) == losses(first)


def test_what_the_record_says(corpus: Path, tmp_path: Path) -> None:
    run = pretrain(corpus, tmp_path, "--held_out", "claim", steps=2)
    data = run["config"]["data"]
    assert (data["source"], data["window"], data["held_out"], data["symbols"]) == ("text.txt", 24, "claim", 256)
    assert len(data["digest"]) == 16 and 2.0 < data["unigram_entropy"] < 3.0
    assert run["config"]["model"] == {
        "type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 88,
        "vocab_size": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    assert run["curve"][0]["train_loss"] == pytest.approx(math.log(256), abs=0.2)
    assert set(run["workload"]["data"]) == set(data) and "held_out" in run["workload"]["data"]


def make_task(corpus: Path, **text: Any) -> LanguageModelling:
    arguments = TextArguments(source=str(corpus), **{"window": 24, **text})
    return LanguageModelling(LanguageModelArguments(hidden_size=32, num_hidden_layers=1), arguments, None)  # type: ignore[arg-type]


def test_evaluation_masks_do_not_depend_on_the_seed(corpus: Path, tmp_path: Path) -> None:
    task, found = make_task(corpus, objective="masked"), []
    for seed in ("1", "2"):
        given = [*SHAPE, *QUIET, "--output_dir", str(tmp_path), "--seed", seed, "--source", str(corpus)]
        job, _ = DOMAIN.parse(given)
        trainer = task.make_trainer(task.make_model(0), job.training, [])
        batches = (trainer.get_train_dataloader(), trainer.get_eval_dataloader())
        found.append([next(iter(batch))["input_ids"] for batch in batches])
    (train_1, eval_1), (train_2, eval_2) = found
    assert torch.equal(eval_1, eval_2) and not torch.equal(train_1, train_2)
    assert bool((eval_1 == 256).any()) and int(eval_1.max()) == 256


def test_a_comparison_looks_at_both_folders_first(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would stop the second run is said before the first is trained."""
    where = ["--source", str(corpus), "--window", "24", "--output_dir", str(tmp_path), "--max_steps", "3"]
    given = ["pretrain", *SHAPE, *where, *STEPS, *QUIET, *MKOR, "--compare_with", "lamb", "--compare_learning_rate"]
    assert cli.main([*given, "0.01"]) == 0
    shutil.rmtree(tmp_path / "1-mkor")
    capsys.readouterr()
    assert cli.main([*given, "0.02"]) == 1
    check_error(capsys, "2-lamb holds checkpoints of a run with learning_rate=0.01, now 0.02; give --restart")
    (tmp_path / "file").write_text("")
    assert cli.main([*given, "0.01", "--results_dir", str(tmp_path / "file")]) == 1
    check_error(capsys, str(tmp_path / "file"))
    assert not (tmp_path / "1-mkor").exists()


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_smoothed_labels(objective: str, corpus: Path, tmp_path: Path) -> None:
    """As torch's cross entropy smooths them, over the predicted bytes."""
    task, given = make_task(corpus, objective=objective), [*SHAPE, *QUIET, "--output_dir", str(tmp_path)]
    given += ["--source", str(corpus), "--objective", objective, "--label_smoothing_factor", "0.2"]
    trainer = task.make_trainer(task.make_model(0), DOMAIN.parse(given)[0].training, [])
    examples = [trainer.train_dataset[number] for number in range(4)]
    tokens, labels = (torch.stack([each[key] for each in examples]) for key in ("input_ids", "labels"))
    loss = trainer.compute_loss(trainer.model.eval(), {"input_ids": tokens, "labels": labels})
    logits = trainer.model(input_ids=tokens).logits
    if objective == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, label_smoothing=0.2
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("objective", "places"), [("causal", 23), ("masked", 4)])
def test_the_loss_is_the_mean_over_predicted_bytes(objective: str, places: int, corpus: Path, tmp_path: Path) -> None:
    """Whatever the batches: 13 windows in batches of 8."""
    task = make_task(corpus, objective=objective, max_eval_samples=13)
    given = [*SHAPE, *QUIET, "--output_dir", str(tmp_path), "--source", str(corpus), "--objective", objective]
    trainer = task.make_trainer(task.make_model(0), DOMAIN.parse(given)[0].training, [])
    examples = [trainer.eval_dataset[number] for number in range(13)]
    tokens, labels = (torch.stack([each[key] for each in examples]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=tokens).logits
    if objective == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    predicted = labels != IGNORE
    assert int(predicted.sum()) == 13 * places
    expected = -logits.log_softmax(-1)[predicted].gather(-1, labels[predicted][:, None]).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)  # fp32


def test_the_models(corpus: Path) -> None:
    """A decoder without biases and positions, its output matrix its own; an encoder with both, and one matrix."""
    decoder, encoder = (make_task(corpus, objective=each).make_model(0) for each in ("causal", "masked"))
    assert not [name for name, _ in decoder.named_parameters() if "bias" in name or "position" in name]
    assert decoder.lm_head.weight is not decoder.model.embed_tokens.weight
    assert encoder.bert.embeddings.position_embeddings.weight.shape == (24, 32)
    assert encoder.cls.predictions.decoder.weight is encoder.bert.embeddings.word_embeddings.weight
    assert encoder.bert.embeddings.word_embeddings.weight.shape == (257, 32)
    assert encoder.bert.encoder.layer[0].output.dense.bias is not None
    again = make_task(corpus).make_model(0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "bert", "roformer"])
def test_the_families_of_decoders(family: str, corpus: Path) -> None:
    """A decoder sees no later byte, and the loss is of the next one; bert alone has learnt positions."""
    task = make_task(corpus)
    task.model.family = family  # type: ignore[assignment]
    model = task.make_model(0).eval()
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 12:] = 7
    found = model(input_ids=ids, labels=ids)
    assert torch.equal(found.logits[:, :12], model(input_ids=changed).logits[:, :12])
    wanted = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(found.loss, wanted)
    tables = [name for name, _ in model.named_parameters() if "position_embeddings" in name]
    assert model.config.model_type == family and bool(tables) == (family == "bert")


def test_an_encoder_with_rotary_positions(corpus: Path) -> None:
    task = make_task(corpus, objective="masked")
    task.model.family = "roformer"
    encoder, bert = task.make_model(0), make_task(corpus, objective="masked").make_model(0)
    count = {
        each.config.model_type: sum(p.numel() for p in each.parameters() if p.requires_grad)
        for each in (encoder, bert)
    }  # fmt: skip
    assert count["bert"] - count["roformer"] == 24 * 32
    assert encoder.get_output_embeddings().weight is encoder.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dropout", "0.1"], "dropout=0.1 with family=llama"),
        (["--family", "llama", "--objective", "masked"], "family=llama with objective=masked"),
        (["--num_attention_heads", "5"], "hidden_size=32 is no even number for each of num_attention_heads=5"),
        (["--seq_length", "5"], "unknown flag '--seq_length'"),
        (["--window", "5000"], "give more text or a smaller window"),
        (["--task", "bert"], "unknown flag '--source'"),
    ],
)
def test_refusals(
    flags: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*SHAPE, "--source", str(corpus), "--output_dir", str(tmp_path), *QUIET, *flags]
    assert cli.main(["pretrain", *given]) == 1
    check_error(capsys, message)


def test_a_bert_recipe_is_trained_by_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "bert.yaml"
    recipe.write_text(json.dumps({"task": "bert", "output_dir": str(tmp_path / "out")}))
    assert cli.main(["pretrain", "--config", str(recipe), "--use_cpu", "true"]) == 1
    check_error(capsys, "data_dir is None and corpus is None; give one")

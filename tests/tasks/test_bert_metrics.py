"""mlm_loss, mlm_accuracy and nsp_accuracy of an evaluation against transformers' own model on every example at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining, EvalPrediction, Trainer

from hf_soo.bert.data.folder import load_prepared
from hf_soo.bert.data.wordpiece import SpecialIds
from hf_soo.bert.masking import PretrainingCollator
from hf_soo.bert.metrics import METRICS, prediction_sums, pretraining_metrics
from hf_soo.bert.task import PretrainingTask
from hf_soo.runs import arguments
from hf_soo.runs.training import Job, train
from tests.ranks.distributed import run_ranks
from tests.scripts.launch_runs import CLASSES
from tests.scripts.script_runs import prepare_corpus

SHAPE = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"]
# 2 steps at a high rate: predictions that are no longer all of one kind
RUN = ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--optim", "mkor", "--learning_rate", "0.1"]
QUIET = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("text"), eval_documents=0.3)


def evaluate(rank: int, world: int, folder: Path, flags: list[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The run's final metrics, and its weights."""
    kept: list[Trainer] = []
    backend = ["--ddp_backend", "gloo"] if world > 1 else []
    model, data, run, training = arguments.parse(
        CLASSES, ["--data_dir", str(folder), *SHAPE, *RUN, *QUIET, *flags, *backend]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingTask, "finish", lambda task, trainer: kept.append(trainer) or {})
        (record,) = train(Job(run, training), PretrainingTask(model, data, training))
    for key in METRICS:
        assert record.curve[-1][key] == record.final[key] == kept[0].state.log_history[-2][f"eval_{key}"]
    return record.final, kept[0].accelerator.unwrap_model(kept[0].model).state_dict()


def directly(folder: Path, weights: dict[str, torch.Tensor], masking: str, count: int) -> dict[str, float]:
    """The metrics of the first examples in one batch, from logits at every position."""
    data = load_prepared(folder)
    collator = PretrainingCollator(SpecialIds.of(data["vocab_file"]), masking=masking, seed=0)
    batch = collator([data["eval"][i] for i in range(count)])
    words, next_sentence = batch.pop("labels"), batch.pop("next_sentence_label")
    config = BertConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForPreTraining(config).eval()
    model.load_state_dict({**weights, "cls.predictions.bias": weights["cls.predictions.decoder.bias"]})
    positions = batch.pop("masked_positions", None)
    with torch.no_grad():
        output = model(**batch)
    logits = output.prediction_logits
    if positions is not None:
        logits = logits[torch.arange(count)[:, None], positions]
    logits, words = logits[words != -100], words[words != -100]
    return {
        "mlm_loss": F.cross_entropy(logits, words).item(),
        "mlm_accuracy": (logits.argmax(-1) == words).double().mean().item(),
        "nsp_accuracy": (output.seq_relationship_logits.argmax(-1) == next_sentence).double().mean().item(),
    }


# fp32, sums in another order
CLOSE = 1e-5


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_metrics_are_those_of_all_examples_at_once(prepared: Path, tmp_path: Path, masking: str) -> None:
    flags = ["--masking", masking, "--max_eval_samples", "21", "--per_device_eval_batch_size", "8"]
    final, weights = evaluate(0, 1, prepared, [*flags, "--output_dir", str(tmp_path)])
    expected = directly(prepared, weights, masking, 21)
    assert {key: final[key] for key in METRICS} == pytest.approx(expected, rel=CLOSE)
    assert 0 < expected["mlm_accuracy"] < 1 and 0 < expected["nsp_accuracy"] < 1


def evaluate_both(rank: int, world: int, folder: Path, flags: dict[str, list[str]]) -> dict[str, Any]:
    return {masking: evaluate(rank, world, folder, given) for masking, given in flags.items()}


def test_two_processes_count_each_example_once(prepared: Path, tmp_path: Path) -> None:
    """21 examples in batches of 4 on 2 processes: the last batches repeat some."""
    common = ["--output_dir", str(tmp_path), "--max_eval_samples", "21", "--per_device_eval_batch_size", "4"]
    flags = {masking: [*common, "--masking", masking] for masking in ("exact", "bernoulli")}
    first, second = run_ranks(2, evaluate_both, prepared, flags)
    for masking in flags:
        final, weights = first[masking]
        assert {key: final[key] for key in METRICS} == {key: second[masking][0][key] for key in METRICS}
        expected = directly(prepared, weights, masking, 21)
        assert {key: final[key] for key in METRICS} == pytest.approx(expected, rel=CLOSE)


def test_sums_of_both_layouts_are_one(prepared: Path) -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100], [2, 3], [-100, -100]])
    judged, truth = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 0, 1])
    sums = prediction_sums(logits, judged, labels, truth)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, prediction_sums(logits[labels != -100], judged, labels, truth))
    first, second, third = (-logits[i, j].log_softmax(-1)[w].item() for i, j, w in ((0, 0, 1), (1, 0, 2), (1, 1, 3)))
    assert sums[:, 0].tolist() == [1, 2, 0] and sums[:, 3].tolist() == [1, 0, 0]
    assert sums[:, 1].tolist() == pytest.approx([first, second + third, 0])
    metrics = pretraining_metrics(EvalPrediction(predictions=sums.numpy(), label_ids=np.zeros(3)))
    assert metrics["mlm_loss"] == pytest.approx((first + second + third) / 3)
    assert metrics["nsp_accuracy"] == pytest.approx(1 / 3)


def test_without_masked_tokens_there_is_no_mean() -> None:
    sums = np.array([[0.0, 0.0, 0.0, 1.0]], dtype=np.float32)
    metrics = pretraining_metrics(EvalPrediction(predictions=sums, label_ids=np.zeros(1)))
    assert math.isnan(metrics["mlm_loss"]) and math.isnan(metrics["mlm_accuracy"]) and metrics["nsp_accuracy"] == 1.0

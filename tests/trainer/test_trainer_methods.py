"""What single methods need of the Trainer: the loss (MKOR-H), labels drawn from the model and every rank (K-FAC)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)

from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.engine.fisher import sampled_cross_entropy, sampled_squared_error
from hf_soo.integrations.mc_fisher import sampled_loss
from hf_soo.integrations.trainer import SecondOrderTrainer
from tests.oracles.core import assert_close_report
from tests.ranks.distributed import run_ranks
from tests.trainer.test_trainer import Examples, arguments, bert, final_weights, logged, run_trainer


def test_the_routing_is_printed_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_trainer(str(tmp_path), max_steps=2, precondition_exclude=["pooler"])
    printed = capsys.readouterr().out
    assert "mkor: which rule moves which parameters" in printed
    assert "Lamb: exclude='pooler': bert.pooler.dense.weight, bert.pooler.dense.bias\n" in printed
    assert "mkor -> Lamb: bert.encoder.layer.0.attention.self.query.weight" in printed
    run_trainer(str(tmp_path), max_steps=1, optim="adamw_torch", lr_scheduler_type="linear")
    assert "which rule" not in capsys.readouterr().out


def test_mkor_h_is_told_the_loss_of_the_whole_window(tmp_path: Path) -> None:
    """It switches in the Trainer, and sees the mean loss whatever the number of micro-batches."""
    seen: dict[int, list[float]] = {}
    for accumulation in (1, 4):
        trainer = SecondOrderTrainer(
            model=bert(),
            args=arguments(
                str(tmp_path), optim="mkor_h", optim_args="patience=1,min_steps=2,rate_fraction=100",
                per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
            ),
            train_dataset=Examples(),
        )  # fmt: skip
        seen[accumulation] = []
        optimizer: Any = trainer.create_optimizer()
        observe = optimizer.preconditioner.observe

        def spy(
            loss: torch.Tensor, step: int, observe: Any = observe, record: list[float] = seen[accumulation]
        ) -> bool:
            record.append(loss.item())
            return observe(loss, step)

        optimizer.preconditioner.observe = spy
        trainer.train()
        assert optimizer.switched and optimizer.steps == 6 and not optimizer.stages.states
        assert seen[accumulation] == pytest.approx(logged(trainer, "loss")[: len(seen[accumulation])], abs=1e-4)
    assert seen[1] == pytest.approx(seen[4], rel=1e-4)


def test_a_switched_run_resumes_exactly(tmp_path: Path) -> None:
    settings = {
        "optim": "mkor_h", "optim_args": "patience=1,min_steps=2,rate_fraction=100", "save_strategy": "steps",
        "save_steps": 4,
    }  # fmt: skip
    whole = run_trainer(str(tmp_path), **settings)
    resumed = run_trainer(str(tmp_path), resume=str(tmp_path / "checkpoint-4"), **settings)
    assert whole.second_order is not None and whole.second_order.switched
    assert resumed.second_order is not None and resumed.second_order.switched and resumed.second_order.steps == 6
    assert torch.equal(final_weights(whole), final_weights(resumed))


@pytest.mark.parametrize("head", [BertForPreTraining, GatheredBertForPreTraining, BertForMaskedLM])
def test_the_sampled_fisher_in_the_trainer(head: type[nn.Module], tmp_path: Path) -> None:
    settings = {"optim": "kfac_expand", "learning_rate": 0.05, "max_steps": 3}
    runs = {
        fisher: run_trainer(str(tmp_path / fisher), bert(head), optim_args=f"fisher={fisher}", **settings)
        for fisher in ("mc", "empirical")
    }
    layer = "bert.encoder.layer.0.output.dense"
    factors = {fisher: run.second_order.stages.states[layer]["output"]["factor"] for fisher, run in runs.items()}  # type: ignore[union-attr]
    inputs = {fisher: run.second_order.stages.states[layer]["input"]["factor"] for fisher, run in runs.items()}  # type: ignore[union-attr]
    ratio = factors["mc"].trace() / factors["empirical"].trace()
    # Near the start the model is undecided, so drawn and real labels give gradients of one size, in other directions.
    assert 0.3 < ratio < 3 and not torch.allclose(factors["mc"], factors["empirical"], rtol=0.1)
    # The inputs of the first step are the same; those of the next two see weights that moved apart.
    assert_close_report(inputs["mc"], inputs["empirical"], 0.05, "input factor")


def outputs_of(model: nn.Module, **inputs: torch.Tensor) -> tuple[dict[str, Any], Any]:
    return inputs, model(**inputs)


def test_what_is_drawn_for_which_head() -> None:
    ids = torch.randint(5, 100, (3, 8))
    labels = torch.where(torch.rand(3, 8) < 0.5, ids, -100)
    for head, inputs in (
        (BertForMaskedLM, {"labels": labels}),
        (BertForSequenceClassification, {"labels": torch.tensor([0, 1, 0])}),
    ):
        model = bert(head)
        torch.manual_seed(1)
        drawn = sampled_loss(model, *outputs_of(model, input_ids=ids, **inputs))
        torch.manual_seed(1)
        logits = model(input_ids=ids).logits
        assert torch.equal(drawn, sampled_cross_entropy(logits, inputs["labels"]))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100, n_positions=8)).eval()
    torch.manual_seed(1)
    drawn = sampled_loss(gpt2, *outputs_of(gpt2, input_ids=ids, labels=labels))
    torch.manual_seed(1)
    assert torch.equal(drawn, sampled_cross_entropy(gpt2(input_ids=ids).logits[:, :-1], labels[:, 1:]))
    regression = bert(BertForSequenceClassification, num_labels=1)
    torch.manual_seed(1)
    drawn = sampled_loss(regression, *outputs_of(regression, input_ids=ids, labels=torch.tensor([0.1, 0.5, 0.9])))
    torch.manual_seed(1)
    assert torch.equal(drawn, sampled_squared_error(regression(input_ids=ids).logits))
    answers = bert(BertForQuestionAnswering)
    spans = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])}
    with pytest.raises(NotImplementedError, match="cannot draw labels for BertForQuestionAnswering"):
        sampled_loss(answers, *outputs_of(answers, input_ids=ids, **spans))


def test_without_a_sampled_loss_a_plain_loop_is_told(tmp_path: Path) -> None:
    """The stock Trainer draws no labels."""
    from transformers import TrainingArguments

    from hf_soo.integrations.trainer import optimizer_factory

    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    factory = optimizer_factory("kfac_expand", lr=0.1, fisher="mc")
    with pytest.raises(RuntimeError, match=r"fisher='mc' got no sampled loss.*backward_sampled"):
        Trainer(
            model=bert(BertForMaskedLM), args=args, train_dataset=Examples(), optimizer_cls_and_kwargs=factory
        ).train()


KAISA: dict[str, Any] = {
    "optim": "kaisa", "optim_args": "grad_workers=1,inverse=cholesky", "save_strategy": "steps", "save_steps": 3,
}  # fmt: skip


def kaisa_rank(rank: int, world: int, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A run with saves, and one resumed from its checkpoint."""
    whole = run_trainer(f"{folder}/{world}", per_device_train_batch_size=4, **KAISA)
    checkpoint = f"{folder}/{world}/checkpoint-3"
    resumed = run_trainer(f"{folder}/{world}", per_device_train_batch_size=4, resume=checkpoint, **KAISA)
    assert whole.second_order is not None and whole.second_order.stages.placement.world == world
    return final_weights(whole), final_weights(resumed)


def test_factors_of_many_ranks_are_saved_whole(tmp_path: Path) -> None:
    ranks = run_ranks(2, kaisa_rank, str(tmp_path))
    for whole, resumed in ranks:
        assert torch.equal(whole, resumed) and torch.equal(whole, ranks[0][0])
    saved = torch.load(tmp_path / "2" / "checkpoint-3" / "preconditioner.pt", weights_only=True)
    assert all(tensors["input.updates"] == 3 for tensors in saved["layers"].values())
    one = run_trainer(
        str(tmp_path / "2"), per_device_train_batch_size=8, resume=str(tmp_path / "2" / "checkpoint-3"), **KAISA
    )
    # fp32 sums in another order, through LAMB's square roots and three steps
    assert_close_report(final_weights(one), ranks[0][0], 2e-5, "resumed on one rank")

"""Trainer and Accelerate: ``--optim mkor`` and nothing else changes."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_soo
from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.integrations.accelerate import bind, unwrap_optimizer
from hf_soo.integrations.arguments import parse_settings
from hf_soo.integrations.checkpoints import last_whole_checkpoint, load_renamed_weights
from hf_soo.integrations.trainer import (
    SecondOrderTrainer,
    SecondOrderTrainingArguments,
    ignores_loss_kwargs,
    optimizer_factory,
)
from tests.oracles.core import assert_close_report

LENGTH = 12


class Examples(Dataset[dict[str, torch.Tensor]]):
    """Random sequences with three masked words each, so that every micro-batch's mean has the same weight."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 100, (LENGTH,), generator=generator)
        labels = torch.full((LENGTH,), -100)
        masked = torch.randperm(LENGTH, generator=generator)[:3]
        labels[masked] = ids[masked]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "next_sentence_label": torch.tensor(index % 2),
        }


def bert(cls: type[nn.Module] = GatheredBertForPreTraining, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(
        BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config,
        )
    )  # fmt: skip


def arguments(folder: str, **overrides: Any) -> SecondOrderTrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": folder, "optim": "mkor", "max_steps": 6, "per_device_train_batch_size": 8,
        "learning_rate": 0.01, "weight_decay": 0.01, "lr_scheduler_type": "poly_warmup", "warmup_steps": 2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "max_grad_norm": 0.0,
    }  # fmt: skip
    return SecondOrderTrainingArguments(**{**settings, **overrides})


def run_trainer(folder: str, model: Any = None, resume: Any = None, **overrides: Any) -> SecondOrderTrainer:
    trainer = SecondOrderTrainer(model=model or bert(), args=arguments(folder, **overrides), train_dataset=Examples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def final_weights(trainer: Trainer) -> torch.Tensor:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


HEADS = [BertForPreTraining, GatheredBertForPreTraining, BertForMaskedLM]


@pytest.mark.parametrize("head", HEADS)
def test_accumulation_gives_the_loss_and_gradient_of_one_batch(head: type[nn.Module], tmp_path: Path) -> None:
    """Trainer multiplies the loss of these heads by the accumulation steps unless told that they ignore the count."""
    one = run_trainer(str(tmp_path / "1"), bert(head), max_grad_norm=100.0)
    four = run_trainer(
        str(tmp_path / "4"), bert(head), max_grad_norm=100.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    for key in ("loss", "grad_norm"):
        # fp32 sums in another order; six steps of LAMB amplify them
        assert_close_report(torch.tensor(logged(four, key)), torch.tensor(logged(one, key)), 1e-4, key)
    assert_close_report(final_weights(four), final_weights(one), 1e-4, "weights")


def test_which_models_ignore_the_count() -> None:
    from transformers import BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel

    ignoring = [BertForPreTraining, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification]
    assert all(ignores_loss_kwargs(bert(head)) for head in (*ignoring, GatheredBertForPreTraining))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    assert not ignores_loss_kwargs(gpt2) and not ignores_loss_kwargs(nn.Linear(2, 2))
    assert ignores_loss_kwargs(bert(BertForQuestionAnswering))  # its Trainer batches have no "labels": no harm


def test_image_models_and_the_loss() -> None:
    """ViT gives **kwargs to its loss function, ResNet takes them and calls the loss function without."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    assert not ignores_loss_kwargs(ViTForImageClassification(small))
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    assert ignores_loss_kwargs(ResNetForImageClassification(resnet))


def test_weights_that_are_saved_under_other_names(tmp_path: Path) -> None:
    """transformers writes a ViT with the names of its hub checkpoints, and its Trainer would not find them again."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    saved, model = ViTForImageClassification(config), ViTForImageClassification(config)
    saved.save_pretrained(tmp_path)
    args = SecondOrderTrainingArguments(output_dir=str(tmp_path), optim="sgd", report_to="none", use_cpu=True)
    trainer = SecondOrderTrainer(model=model, args=args)
    for load in (trainer._load_from_checkpoint, trainer._load_best_model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(3.0)
        trainer.state.best_model_checkpoint = str(tmp_path)
        load(*([str(tmp_path)] if load == trainer._load_from_checkpoint else []))
        assert torch.equal(final_weights(trainer), torch.cat([p.detach().flatten() for p in saved.parameters()]))
    saved_bert = bert(BertForPreTraining)
    saved_bert.save_pretrained(tmp_path / "bert")  # its decoder's weight is tied, and written once
    assert not load_renamed_weights(tmp_path / "bert", bert(BertForPreTraining))


OPTIMIZERS = {
    "mkor": {},
    "mkor-dense": {"optim": "mkor", "optim_args": "representation=dense,kv_scale=sum"},
    "mkor+muon": {"optim": "mkor", "base_optim": "muon", "base_optim_args": "rest_lr=0.003"},
    "muon_mkor": {"optim": "muon_mkor", "base_optim_args": "rest_lr=0.003"},
    "mkor_h": {"optim": "mkor_h", "optim_args": "patience=1,min_steps=2,rate_fraction=100"},
    "kfac_expand": {"optim": "kfac_expand", "optim_args": "warmup_updates=2,update_period=2,inverse_period=4"},
    "kfac_reduce": {"optim": "kfac_reduce", "base_optim": "adamw", "optim_args": "rescale=norm", "learning_rate": 1e-3},
    "kaisa": {"optim": "kaisa"},
    "foof": {"optim": "foof", "learning_rate": 0.05},
    "newton_muon": {
        "optim": "newton_muon",
        "optim_args": "update_period=2,inverse_period=2",
        "base_optim_args": "rest_lr=0.003",
    },
    "eva": {"optim": "eva", "learning_rate": 0.05},
    "eva_f": {"optim": "eva_f", "learning_rate": 0.05},
    "eva_s": {"optim": "eva_s", "learning_rate": 0.05},
    "if_shampoo": {"optim": "if_shampoo", "learning_rate": 0.01},
    "rf_rmsprop": {"optim": "rf_rmsprop", "learning_rate": 0.1},
    "shampoo": {"optim": "shampoo", "learning_rate": 0.003, "optim_args": "grafting=adam,inverse_period=2"},
    "soap": {"optim": "soap", "learning_rate": 0.003, "optim_args": "inverse_period=2"},
    "lamb": {"optim": "lamb"},
    "adamw": {"optim": "adamw", "optim_args": '{"betas": [0.9, 0.95]}'},
    "sgd": {"optim": "sgd"},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 0.001},
    "muon": {"optim": "muon", "optim_args": "rest_lr=0.003"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    settings = OPTIMIZERS[name] | {"save_strategy": "steps", "save_steps": 3}
    whole = run_trainer(str(tmp_path), **settings)
    resumed = run_trainer(str(tmp_path), resume=str(tmp_path / "checkpoint-3"), **settings)
    assert torch.equal(final_weights(whole), final_weights(resumed))
    assert logged(whole, "loss")[3:] == logged(resumed, "loss")[3:]
    assert "second_order" not in torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert torch.load(tmp_path / "checkpoint-3" / "preconditioner.pt", weights_only=True)["steps"] == 3


def test_the_global_batch_is_filled_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def built(**overrides: Any) -> hf_soo.PreconditionedOptimizer:
        args = arguments(str(tmp_path), optim="rf_rmsprop", gradient_accumulation_steps=3, **overrides)
        trainer = SecondOrderTrainer(model=bert(), args=args, train_dataset=Examples())
        trainer.create_optimizer()
        assert trainer.second_order is not None
        return trainer.second_order

    assert built().config["batch_size"] == 8 * 3
    assert built(optim_args="batch_size=7").config["batch_size"] == 7
    with pytest.raises(ValueError, match="auto_find_batch_size=True changes the global batch"):
        built(auto_find_batch_size=True)
    assert built(auto_find_batch_size=True, optim_args="batch_size=24").config["batch_size"] == 24
    assert "max_grad_norm" not in caplog.text
    built(max_grad_norm=1.0)
    assert "rf_rmsprop with max_grad_norm=1.0" in caplog.text


def test_a_second_train_goes_on(tmp_path: Path) -> None:
    trainer = run_trainer(str(tmp_path), max_steps=3)
    optimizer = trainer.second_order
    assert optimizer is not None and optimizer.steps == 3
    trainer.args.max_steps = 5
    trainer.train()
    assert trainer.second_order is optimizer and optimizer.steps == 3 + 5
    hooks = [len(layer.module._forward_hooks) for layer in optimizer.layers]
    assert set(hooks) == {1}, "hooks installed twice"
    assert optimizer.stages.capture.buffers["bert.pooler.dense"][0].item() == 0


def test_a_base_with_two_sets_of_weights_is_told_of_evaluations(tmp_path: Path) -> None:
    """As schedule-free ones have: they refuse to step where the model is evaluated."""
    told: list[bool] = []

    class Told(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.append(unwrap_optimizer(kwargs["optimizer"]).base.training)

    args = arguments(
        str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2,
        base_optim="tests.optimizers.test_like_any_other:Averaging",
    )  # fmt: skip
    trainer = SecondOrderTrainer(
        model=bert(), args=args, train_dataset=Examples(), eval_dataset=Examples(8), callbacks=[Told()]
    )
    trainer.train()
    assert told == [False, False] and trainer.state.global_step == 4


def test_health_is_logged(tmp_path: Path) -> None:
    trainer = run_trainer(str(tmp_path))
    for key in ("soo/cos_median", "soo/cos_min", "soo/fallback_layers", "soo/noise_layers"):
        assert len(logged(trainer, key)) == 6, key
    pairs = zip(logged(trainer, "soo/cos_min"), logged(trainer, "soo/cos_median"), strict=True)
    assert all(0 < lowest <= median < 1 for lowest, median in pairs)
    assert logged(trainer, "soo/fallback_layers") == [0.0] * 6


def assert_decays_as_trainer(optimizer: torch.optim.Optimizer, trainer: Trainer) -> None:
    """The parameters with weight decay are those that Trainer would choose for its model."""
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == set(trainer.get_decay_parameter_names(trainer.model)) & set(names.values())


def test_groups_and_routing_are_trainers(tmp_path: Path) -> None:
    trainer = run_trainer(str(tmp_path), max_steps=2, precondition_exclude=[r"pooler"])
    optimizer = trainer.second_order
    assert optimizer is not None
    assert_decays_as_trainer(optimizer, trainer)
    routing = optimizer.routing()
    assert routing["bert.pooler.dense.weight"] == "Lamb: exclude='pooler'"
    assert routing["bert.embeddings.word_embeddings.weight"] == "Lamb: embedding"
    assert routing["bert.encoder.layer.0.attention.self.query.weight"] == "mkor -> Lamb"


def test_plain_groups_are_trainers(tmp_path: Path) -> None:
    """build_optimizer in a plain loop decays the same parameters as Trainer."""
    model = bert()
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.01, weight_decay=0.01)
    assert_decays_as_trainer(optimizer, trainer)


def test_poly_warmup_is_the_schedule(tmp_path: Path) -> None:
    trainer = run_trainer(str(tmp_path), max_steps=10, warmup_steps=0.2)
    # p = (t+1)/10 in step t; lr p/0.2 while p < 0.2, then lr sqrt(1-p)
    expected = [0.01 * (p / 0.2 if p < 0.2 else (1 - p) ** 0.5) for p in (t / 10 for t in range(1, 11))]
    assert logged(trainer, "learning_rate") == pytest.approx(expected, abs=1e-9)


VARIANTS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_and_compile_change_nothing(variant: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = run_trainer(str(tmp_path / "plain"), max_steps=3)
    other = run_trainer(str(tmp_path / "other"), max_steps=3, **VARIANTS[variant])
    assert_close_report(final_weights(other), final_weights(plain), 1e-6, variant)


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    fp32, bf16 = run_trainer(str(tmp_path / "32")), run_trainer(str(tmp_path / "16"), bf16=True)
    # bf16 activations, 2^-9 each; the losses of six steps average over them
    assert_close_report(torch.tensor(logged(bf16, "loss")), torch.tensor(logged(fp32, "loss")), 5e-3, "losses")
    assert logged(bf16, "soo/fallback_layers") == [0.0] * 6


def test_lora(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(BertForMaskedLM), LoraConfig(target_modules=["query", "value"], r=4))
    frozen = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
    trainer = run_trainer(str(tmp_path), model)
    optimizer = trainer.second_order
    assert optimizer is not None and len(optimizer.layers) == 2 * 2 * 2
    assert all(".lora_" in layer.name for layer in optimizer.layers)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in frozen.items())
    # B starts at zero, so after six steps each B that a rule moved is not, and its layer's direction was changed
    assert all(layer.weight.any() for layer in optimizer.layers)
    assert all(float(row["cos"]) < 0.999 for row in optimizer.diagnostics().values()), optimizer.diagnostics()


def test_stock_trainer_with_the_factory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(resume: str | None = None) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, save_steps=3, report_to="none",
            disable_tqdm=True, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        factory = optimizer_factory("mkor", lr=0.01, weight_decay=0.01, base="adamw")
        trainer = Trainer(model=bert(), args=args, train_dataset=Examples(), optimizer_cls_and_kwargs=factory)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    assert unwrap_optimizer(whole.optimizer).steps == 6  # type: ignore[union-attr]
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert torch.equal(final_weights(whole), final_weights(resumed))
    assert not caplog.text.count("ignores num_items_in_batch")  # our head says so itself
    with caplog.at_level(logging.WARNING):
        cls, kwargs = optimizer_factory("mkor", lr=0.01)
        cls()(bert(BertForPreTraining), **kwargs)
    assert "accepts_loss_kwargs = False" in caplog.text
    with pytest.raises(ValueError, match="lr="):
        optimizer_factory("mkor")


def test_command_line_json_and_yaml(tmp_path: Path) -> None:
    parser = HfArgumentParser(SecondOrderTrainingArguments)  # type: ignore[arg-type]
    flags = f"--output_dir {tmp_path} --optim mkor --lr_scheduler_type poly_warmup --report_to none".split()
    (args,) = parser.parse_args_into_dataclasses([*flags, "--precondition_exclude", "a", "b"])
    assert args.optim == "mkor" and args.lr_scheduler_type == "poly_warmup" and args.precondition_exclude == ["a", "b"]
    written = tmp_path / "args.json"
    written.write_text(json.dumps(args.to_dict()))
    assert json.loads(written.read_text())["optim"] == "mkor"
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).optim == "mkor"
    yaml = tmp_path / "args.yaml"
    yaml.write_text(f"output_dir: {tmp_path}\noptim: eva_f\nlearning_rate: 0.1\nreport_to: none\n")
    (from_yaml,) = parser.parse_yaml_file(str(yaml))
    assert from_yaml.optim == "eva_f" and from_yaml.learning_rate == 0.1


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_transformers_own_optimizers_still_work(optim: str, tmp_path: Path) -> None:
    trainer = run_trainer(str(tmp_path), optim=optim, lr_scheduler_type="cosine", max_steps=2)
    assert trainer.second_order is None and len(logged(trainer, "loss")) == 2


BAD_ARGUMENTS = [
    ({"optim": "mkro"}, "Did you mean .mkor.. Valid: mkor, muon_mkor, mkor_h"),
    ({"optim_args": "update_period"}, "'update_period' is no 'key=value'"),
    ({"optim_args": "update_perid=3"}, "Did you mean 'update_period'"),
    ({"optim_args": "update_period=0"}, "update_period=0"),
    ({"optim_args": '{"update_period": '}, "optim_args=.*: Expecting value"),
    ({"optim": "adamw_torch", "base_optim": "lamb"}, "base_optim='lamb' has no effect"),
    ({"optim": "adamw_torch", "precondition_exclude": ["x"]}, "has no effect"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_ARGUMENTS)
def test_bad_arguments(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(str(tmp_path), **settings)


def test_bad_settings_stop_before_training(tmp_path: Path) -> None:
    for settings, message in (
        ({"precondition_include": ["nowhere"]}, "no layer selected"),
        ({"base_optim": "adafactor"}, "base='adafactor'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_trainer(str(tmp_path), **settings)


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    trainer = SecondOrderTrainer(model=bert(), args=arguments(str(tmp_path)), train_dataset=Examples())
    trainer.args._n_gpu = 2
    with pytest.raises(NotImplementedError, match="torchrun"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    "kind, version, name, message",
    [
        (DistributedType.MEGATRON_LM, 0, "mkor", "mkor under Megatron-LM"),
        (DistributedType.FSDP, 1, "lamb", "lamb under FSDP version 1"),
    ],
)
def test_shards_that_are_refused(kind: DistributedType, version: int, name: str, message: str) -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    accelerator: Any = SimpleNamespace(distributed_type=kind, scaler=None, state=state)
    optimizer = hf_soo.build_optimizer(name, nn.Sequential(nn.Linear(3, 2)), lr=0.01, weight_decay=0.01)
    with pytest.raises(NotImplementedError, match=message):
        bind(accelerator, optimizer)


def test_fp16_tells_the_optimizer_its_loss_scale() -> None:
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.NO, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**5)
    )
    accelerator.scaler.scale(torch.ones(()))  # the scale starts with the first use
    optimizer = hf_soo.build_optimizer("mkor", nn.Linear(3, 2), lr=0.01, weight_decay=0.01)
    bind(accelerator, optimizer)
    assert optimizer.loss_scale() == 32.0


def test_settings_text() -> None:
    read = parse_settings("x", "a=1, b=1e-3,c=none,d=dense,e=true")
    assert read == {"a": 1, "b": 1e-3, "c": None, "d": "dense", "e": True}
    assert parse_settings("x", '{"betas": [0.9, 0.99]}') == {"betas": [0.9, 0.99]}
    assert parse_settings("x", None) == {}


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    keep = {"save_strategy": "steps", "save_steps": 3}
    run_trainer(str(tmp_path / "lamb"), optim="lamb", **keep)
    with pytest.raises(ValueError, match="written with optimizer 'lamb', this run has 'mkor'"):
        run_trainer(str(tmp_path / "mkor"), resume=str(tmp_path / "lamb" / "checkpoint-3"))
    run_trainer(str(tmp_path / "theirs"), optim="adamw_torch", **keep)
    with pytest.raises(ValueError, match="no state of 'mkor'"):
        run_trainer(str(tmp_path / "mkor"), resume=str(tmp_path / "theirs" / "checkpoint-3"))


def test_an_unfinished_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep = {"save_strategy": "steps", "save_steps": 2}
    whole = run_trainer(str(tmp_path), **keep)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 0.')  # cut off in the last file
    os.remove(tmp_path / "checkpoint-4" / "trainer_state.json")  # cut off before it
    resumed = run_trainer(str(tmp_path), resume=True, **keep)
    assert "checkpoint-6 is passed over: it was not written to its end" in caplog.text
    assert torch.equal(final_weights(whole), final_weights(resumed))
    damaged = tmp_path / "checkpoint-2" / "preconditioner.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"preconditioner\.pt has 1000 bytes, but"):
        run_trainer(str(tmp_path), resume=str(tmp_path / "checkpoint-2"), **keep)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        run_trainer(str(tmp_path / "empty"), resume=True)


@pytest.mark.parametrize("writer", ["model", "optimizer"])
def test_a_full_disk_is_one_clear_error(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        if writer == "model":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(Trainer, "save_model" if writer == "model" else "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"step 2 .* could not be written"):
        run_trainer(str(tmp_path), save_strategy="steps", save_steps=2)
    assert last_whole_checkpoint(tmp_path) is None


def test_a_checkpoint_without_optimizer_starts_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_trainer(str(tmp_path), save_strategy="steps", save_steps=3, save_only_model=True)
    resumed = run_trainer(str(tmp_path), resume=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6 and resumed.second_order.steps == 3  # type: ignore[union-attr]
    assert "starts fresh" in caplog.text


def test_arguments_beside_another_librarys() -> None:
    """The other library's class first: its defaults win, ours add the fields."""

    @dataclass
    class Config(TrainingArguments):
        learning_rate: float = 2e-5

        def __post_init__(self) -> None:
            super().__post_init__()  # type: ignore[no-untyped-call]

    @dataclass
    class Both(Config, SecondOrderTrainingArguments):
        pass

    both = Both(output_dir="out", optim="mkor", base_optim="adamw", report_to="none")
    assert both.optim == "mkor" and both.learning_rate == 2e-5 and both.base_optim == "adamw"


def test_no_decay_names_are_trainers_for_other_models(tmp_path: Path) -> None:
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

    config = RobertaPreLayerNormConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = RobertaPreLayerNormForMaskedLM(config)
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    optimizer = hf_soo.build_optimizer("lamb", model, lr=0.01, weight_decay=0.1)
    assert_decays_as_trainer(optimizer, trainer)


def test_a_window_cut_off_by_an_error_leaves_nothing(tmp_path: Path) -> None:
    """An exception in mid-window (out of memory, say) must not add its statistics to the next window."""

    class FailOnce(TrainerCallback):
        def __init__(self) -> None:
            self.done = False

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.done:
                self.done = True
                raise MemoryError

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    clean = run_trainer(str(tmp_path / "clean"), **settings)
    trainer = SecondOrderTrainer(
        model=bert(), args=arguments(str(tmp_path / "x"), **settings), train_dataset=Examples()
    )
    trainer.add_callback(FailOnce())
    with pytest.raises(MemoryError):
        trainer.train()
    trainer.model.zero_grad()
    trainer.train()
    assert torch.equal(final_weights(clean), final_weights(trainer))


def test_accelerate_loop_equals_the_plain_loop() -> None:
    data = DataLoader(Examples(32), batch_size=8)  # type: ignore[var-annotated]

    def run(accelerator: Accelerator | None) -> torch.Tensor:
        model: Any = bert()
        optimizer: Any = hf_soo.build_optimizer("mkor", model, lr=0.01, weight_decay=0.01)
        batches: Any = data
        if accelerator is not None:
            model, optimizer, batches = accelerator.prepare(model, optimizer, data)
            bind(accelerator, optimizer)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(None), run(Accelerator(cpu=True)))

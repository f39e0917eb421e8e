"""What the Trainer's arguments, its subclasses and its users make of settings, groups and the optimizer reaches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import hf_soo
from hf_soo.integrations.trainer import (
    SecondOrderTrainer,
    SecondOrderTrainerMixin,
    SecondOrderTrainingArguments,
    optimizer_factory,
)
from hf_soo.registry import METHODS
from tests.oracles.core import assert_close_report
from tests.ranks.distributed import run_ranks
from tests.trainer.test_trainer import Examples, arguments, bert, logged

HEAD = "seq_relationship"


def made(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """The first group of the optimizer that the Trainer makes, which holds all settings of a base."""
    trainer = SecondOrderTrainer(model=bert(), args=arguments(str(tmp_path), **settings), train_dataset=Examples())
    return trainer.create_optimizer().param_groups[0]


BOTH = {"adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-4}
TOLD = {"betas": (0.8, 0.98), "eps": 1e-4}
REACHED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"optim": "adamw"}, BOTH, TOLD),
    ({"optim": "lamb"}, BOTH, TOLD),
    ({"optim": "mkor"}, BOTH, TOLD),
    ({"optim": "shampoo"}, BOTH, TOLD),
    ({"optim": "eva", "base_optim": "adamw"}, BOTH, TOLD),
    ({"optim": "kaisa", "base_optim": "torch.optim:NAdam"}, BOTH, TOLD),
    ({"optim": "foof", "base_optim": "torch.optim:Adamax"}, BOTH, TOLD),
    ({"optim": "mkor"}, {}, {"betas": (0.9, 0.999), "eps": 1e-6}),  # LAMB's own epsilon
    ({"optim": "mkor", "base_optim": "adamw"}, {}, {"betas": (0.9, 0.999), "eps": 1e-8}),
    ({"optim": "mkor"}, {"adam_beta1": 0.8}, {"betas": (0.8, 0.999), "eps": 1e-6}),
    ({"optim": "mkor"}, {"adam_beta2": 0.98}, {"betas": (0.9, 0.98), "eps": 1e-6}),
    ({"optim": "mkor"}, {"adam_beta1": 0.0}, {"betas": (0.0, 0.999)}),
    ({"optim": "mkor", "base_optim_args": '{"betas": [0.7, 0.9]}'}, BOTH, {"betas": [0.7, 0.9], "eps": 1e-4}),
    ({"optim": "adamw", "optim_args": "eps=1e-3"}, BOTH, {"betas": (0.8, 0.98), "eps": 1e-3}),
    ({"optim": "rmsprop"}, {"adam_epsilon": 1e-4}, {"eps": 1e-4}),
    ({"optim": "eva_f", "base_optim": "torch.optim:Adagrad"}, {"adam_epsilon": 1e-4}, {"eps": 1e-4}),
]


@pytest.mark.parametrize(("settings", "fields", "expected"), REACHED, ids=lambda value: str(value)[:60])
def test_the_fields_for_adam_reach_the_base(
    settings: dict[str, Any], fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    group = made(tmp_path, **settings, **fields)
    assert {key: group[key] for key in expected} == expected


def test_the_fields_for_adam_reach_muons_adamw(tmp_path: Path) -> None:
    for settings in ({"optim": "muon"}, {"optim": "mkor", "base_optim": "muon"}):
        args = arguments(str(tmp_path), **settings, **BOTH)
        trainer = SecondOrderTrainer(model=bert(), args=args, train_dataset=Examples())
        trainer.create_optimizer()
        rest = [group for group in trainer.optimizer.param_groups if group["algorithm"] == "adamw"]  # type: ignore[union-attr]
        assert rest and all(group["betas"] == (0.8, 0.98) and group["eps"] == 1e-4 for group in rest)


UNUSED: list[tuple[dict[str, Any], str]] = [
    ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1=0.8 has no effect with base optimizer SGD.*'betas'"),
    ({"optim": "eva", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06 has no effect with base optimizer SGD.*'eps'"),
    ({"optim": "rmsprop", "adam_beta2": 0.9}, "adam_beta2=0.9 has no effect with base optimizer RMSprop"),
    ({"optim": "mkor", "base_optim": "torch.optim:Adafactor", "adam_epsilon": 1e-6}, "no effect .*Adafactor"),
    ({"optim": "mkor", "adam_beta1": 1.0}, r"adam_beta1=1.0 is not allowed; give a number in \[0, 1\)"),
    ({"optim": "mkor", "adam_beta2": float("nan")}, "adam_beta2=nan is not allowed"),
    ({"optim": "adamw", "adam_epsilon": -1e-8}, "adam_epsilon=-1e-08 is not allowed"),
    ({"optim": "mkor", "optim_target_modules": "all-linear"}, "optim_target_modules='all-linear' has no effect"),
]


@pytest.mark.parametrize(("settings", "message"), UNUSED, ids=lambda value: str(value)[:50])
def test_a_field_that_cannot_be_used_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(str(tmp_path), **settings)


def test_the_trainers_own_optimizers_read_them_as_ever(tmp_path: Path) -> None:
    group = made(tmp_path, optim="adamw_torch", lr_scheduler_type="linear", **BOTH)
    assert group["betas"] == (0.8, 0.98) and group["eps"] == 1e-4
    args = arguments(str(tmp_path), optim="mkor", adam_beta1=0.8)
    args.adam_beta1 = 0.7  # a search over hyperparameters
    assert args.parsed.base_optim_args == {"betas": (0.7, 0.999)}


@pytest.mark.parametrize("name", METHODS)
def test_the_default_rate_is_warned_of(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def built(**settings: Any) -> str:
        caplog.clear()
        made(
            tmp_path,
            optim=name,
            optim_args="batch_size=8" if name in {"if_shampoo", "rf_rmsprop"} else None,
            **settings,
        )
        return caplog.text

    assert "learning_rate" not in built(learning_rate=4e-5)
    default = SecondOrderTrainingArguments.learning_rate
    told = built(learning_rate=default)
    assert "learning_rate=5e-05 is the default of SecondOrderTrainingArguments" in told
    settings = arguments(str(tmp_path), optim=name).parsed.optimizer
    assert settings is not None and settings.rates is not None and settings.rates[0] < settings.rates[1]
    assert f"starts from {settings.rates[0]:g} to {settings.rates[1]:g}" in told
    if METHODS[name].config is not None and METHODS[name].apply_to == "gradient":  # RAdam's step is not known in two
        assert "starts from a rate of its own" in built(learning_rate=default, base_optim="torch.optim:RAdam")


def split(model: nn.Module) -> list[dict[str, Any]]:
    """Rates by layer, as forums have them."""
    head = [p for n, p in model.named_parameters() if HEAD in n]
    rest = [p for n, p in model.named_parameters() if HEAD not in n]
    return [{"params": head, "lr": 0.05, "weight_decay": 0.0}, {"params": rest, "lr": 0.002, "weight_decay": 0.02}]


class Dictionary(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        found, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return found, kwargs | {"optimizer_dict": split(self.model)}  # type: ignore[arg-type]


class Params(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        found, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return found, kwargs | {"params": split(model)}


class Rate(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        found, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return found, kwargs | {"lr": 2 * kwargs["lr"]}


class Decay(Trainer):
    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if HEAD in name]


class ByItself(Trainer):
    def create_optimizer(self) -> Any:  # type: ignore[override]
        found, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = found(split(self.model), **kwargs)  # type: ignore[arg-type]
        return self.optimizer


class Afterwards(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.003
        return optimizer


class Built(Trainer):
    def create_optimizer(self) -> Any:  # type: ignore[override]
        if self.optimizer is None:
            self.optimizer = hf_soo.build_optimizer("mkor", self.model, lr=0.1, params=split(self.model))  # type: ignore[arg-type]
        return self.optimizer


class Plain(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.AdamW(split(self.model))  # type: ignore[arg-type]
        return self.optimizer


class Guarded(Plain):
    def create_optimizer(self, model: Any = None) -> Any:
        return self.optimizer if self.optimizer is not None else super().create_optimizer()


class OlderSignature(Trainer):
    def create_optimizer(self) -> Any:  # type: ignore[override]
        self.optimizer = torch.optim.AdamW(split(self.model))  # type: ignore[arg-type]
        return self.optimizer


class OtherClass(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        return torch.optim.SGD, {"lr": 0.1}


class OtherArguments(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        found, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return found, kwargs | {"betas": (0.5, 0.5)}


def with_mixin(cls: type[Trainer], *, below: bool = True) -> Any:
    """The class with the mixin before it; or, not ``below``, its overrides before SecondOrderTrainer."""
    if below:
        return type("Mine", (SecondOrderTrainerMixin, cls), {})
    body = {name: value for name, value in vars(cls).items() if name.startswith(("get_", "create_"))}
    return type("Mine", (SecondOrderTrainer,), body)


def trained(cls: Any, tmp_path: Path, model: Any = None, **given: Any) -> Any:
    settings = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "max_steps": 2} | given.pop("settings", {})
    trainer = cls(model=model or bert(), args=arguments(str(tmp_path), **settings), train_dataset=Examples(), **given)
    trainer.train()
    return trainer


def rates_of(trainer: Any) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


SPLIT = {True: (0.05, 0.0), False: (0.002, 0.02)}
TAKEN: dict[str, tuple[Any, Callable[[str, set[str]], tuple[float, float]]]] = {
    "dictionary": (with_mixin(Dictionary), lambda name, _: SPLIT[HEAD in name]),
    "static": (with_mixin(Params), lambda name, _: SPLIT[HEAD in name]),
    "by itself": (with_mixin(ByItself), lambda name, _: SPLIT[HEAD in name]),
    "by itself, above": (with_mixin(ByItself, below=False), lambda name, _: SPLIT[HEAD in name]),
    "built": (with_mixin(Built), lambda name, _: SPLIT[HEAD in name]),
    "built, above": (with_mixin(Built, below=False), lambda name, _: SPLIT[HEAD in name]),
    "rate": (with_mixin(Rate), lambda name, decayed: (0.02, 0.01 if name in decayed else 0.0)),
    "decay": (with_mixin(Decay), lambda name, _: (0.01, 0.01 if HEAD in name else 0.0)),
    "afterwards": (with_mixin(Afterwards), lambda name, decayed: (0.003, 0.01 if name in decayed else 0.0)),
    "nothing": (SecondOrderTrainer, lambda name, decayed: (0.01, 0.01 if name in decayed else 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAKEN)
def test_groups_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    cls, expected = TAKEN[kind]
    trainer = trained(cls, tmp_path)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert rates_of(trainer) == {n: expected(n, decayed) for n, _ in trainer.model.named_parameters()}
    assert trainer.second_order.name == "mkor" and trainer.second_order.steps == 2
    assert len(logged(trainer, "soo/cos_min")) == 2


@dataclass
class Seq2SeqArguments(Seq2SeqTrainingArguments, SecondOrderTrainingArguments):
    """Another library's class first."""


def test_the_sequence_to_sequence_trainer(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes))
    data = [{"input_ids": torch.arange(2, 8), "labels": torch.arange(3, 9)}] * 8
    args = Seq2SeqArguments(
        output_dir=str(tmp_path), optim="mkor", base_optim="adamw", max_steps=2, learning_rate=0.01, adam_beta2=0.98,
        predict_with_generate=True, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = with_mixin(Seq2SeqTrainer)(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.second_order.steps == 2 and trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    assert trainer.second_order.routing()["decoder.block.0.layer.1.EncDecAttention.k.weight"] == "mkor -> AdamW"
    assert len(trainer.predict(data).predictions) == 8


ANOTHER: dict[str, tuple[Any, dict[str, Any], str]] = {
    "plain": (with_mixin(Plain), {}, "optim='mkor', but the optimizer is 'AdamW'"),
    "plain, above": (with_mixin(Plain, below=False), {}, "optim='mkor', but the optimizer is 'AdamW'"),
    "guarded": (with_mixin(Guarded), {}, "optim='mkor', but the optimizer is 'AdamW'"),
    "older signature": (with_mixin(OlderSignature), {}, "optim='mkor', but the optimizer is 'AdamW'"),
    "class": (with_mixin(OtherClass), {}, r"returns SGD with arguments of its own \(\['betas', 'eps'\]\)"),
    "class, above": (with_mixin(OtherClass, below=False), {}, "optim='mkor', but the optimizer is 'SGD'"),
    "arguments": (with_mixin(OtherArguments), {}, r"returns AdamW with arguments of its own \(\['betas'\]\)"),
    "pair": (
        SecondOrderTrainer, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        "optim='mkor', but the optimizer is 'SGD'",
    ),
    "factory": (
        SecondOrderTrainer, {"optimizer_cls_and_kwargs": optimizer_factory("eva", lr=0.1)},
        "optim='mkor', but the optimizer is 'eva'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANOTHER)
def test_another_optimizer_than_the_one_named_is_an_error(kind: str, tmp_path: Path) -> None:
    cls, given, message = ANOTHER[kind]
    with pytest.raises(ValueError, match=message):
        trained(cls, tmp_path, **given)


def test_an_optimizer_that_is_handed_over(tmp_path: Path) -> None:
    model = bert()
    ours = hf_soo.build_optimizer("mkor", model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5)
    trainer = trained(SecondOrderTrainer, tmp_path, model, optimizers=(ours, schedule))
    assert (
        trainer.second_order is ours and ours.steps == 2 and {rate for rate, _ in rates_of(trainer).values()} == {0.005}
    )
    # and where optim names one of transformers' own, which it leaves unread
    trainer = trained(SecondOrderTrainer, tmp_path, model, optimizers=(ours, None), settings={"optim": "adamw_torch"})
    assert trainer.second_order is ours and ours.steps == 4
    model = bert()
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="the optimizer is 'AdamW'"):
        trained(SecondOrderTrainer, tmp_path, model, optimizers=(other, None))
    trained(SecondOrderTrainer, tmp_path, model, optimizers=(other, None), settings={"optim": "adamw_torch"})


def test_a_parameter_in_no_group_is_an_error(tmp_path: Path) -> None:
    class Some(Trainer):
        def create_optimizer(self) -> Any:  # type: ignore[override]
            self.optimizer = hf_soo.build_optimizer("mkor", self.model, lr=0.1, params=split(self.model)[1:])  # type: ignore[arg-type]
            return self.optimizer

    cls, model = with_mixin(Some), bert()
    with pytest.raises(ValueError, match=rf"2 trainable parameters are in no group .*: cls.{HEAD}.weight, cls.{HEAD}"):
        trained(cls, tmp_path, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(HEAD not in name)
    assert trained(cls, tmp_path, model).second_order.steps == 2


def test_an_adapter_that_is_added_later(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["query"], r=2)
    model = get_peft_model(bert(BertForMaskedLM), config)
    args = arguments(str(tmp_path), learning_rate=0.01, max_steps=1, warmup_steps=0)
    trainer = SecondOrderTrainer(model=model, args=args, train_dataset=Examples())
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    trainer.train()  # the optimizer is made now
    assert len(trainer.second_order.layers) == 2 * 2 * 2  # type: ignore[union-attr]
    model.add_adapter("third", config)
    model.base_model.set_adapter(["default", "second", "third"])
    with pytest.raises(ValueError, match=r"4 trainable parameters are in no group .*third"):
        trainer.train()


def test_modules_to_save_are_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2)
    model = get_peft_model(bert(BertForSequenceClassification), config)
    data = [{"input_ids": torch.arange(5, 13), "labels": torch.tensor(i % 2)} for i in range(16)]
    args = arguments(str(tmp_path), learning_rate=0.01, max_steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SecondOrderTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad} and len(moved) == 2 * 2 + 2
    routing = trainer.second_order.routing()  # type: ignore[union-attr]
    assert routing["base_model.model.classifier.modules_to_save.default.weight"] == "mkor -> Lamb"


class WithLoss(Trainer):
    """A loss with parameters that no group has, as a subclass of Trainer may keep it."""

    def __init__(self, *args: Any, loss: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.my_losses = loss

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        losses = self.my_losses.values() if isinstance(self.my_losses, dict) else [self.my_losses]
        return loss + sum(loss(inputs["input_ids"][:, :3] / 100).square().mean() for loss in losses)


class GroupsOfLoss(WithLoss):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        found, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        losses = nn.ModuleList(self.my_losses.values() if isinstance(self.my_losses, dict) else [self.my_losses])
        return found, kwargs | {"params": [*split(model), {"params": list(losses.parameters()), "lr": 0.5}]}


@pytest.mark.parametrize("several", [False, True])
def test_the_parameters_of_a_loss(several: bool, tmp_path: Path) -> None:
    loss: Any = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 1)} if several else nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"trainable parameters are in no group .*: my_losses\.(a\.)?weight"):
        trained(with_mixin(WithLoss), tmp_path, loss=loss)
    parts = list(loss.values()) if several else [loss]
    before = [p.detach().clone() for part in parts for p in part.parameters()]
    trainer = trained(with_mixin(GroupsOfLoss), tmp_path, loss=loss)
    after = [p for part in parts for p in part.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    routing = trainer.second_order.routing()
    assert routing["my_losses.a.weight" if several else "my_losses.weight"] == "Lamb"
    assert all("(unnamed)" not in name for name in routing)


def a_loss_on_ranks(rank: int, world: int, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    loss = nn.Linear(3, 2)
    given = {"per_device_train_batch_size": 8 // world, "max_steps": 3}
    trainer = trained(with_mixin(GroupsOfLoss), Path(folder), loss=loss, settings=given)
    return loss.weight.detach(), torch.cat([p.detach().flatten() for p in trainer._bare().parameters()])


def test_the_parameters_of_a_loss_on_many_ranks(tmp_path: Path) -> None:
    """DistributedDataParallel knows the model alone; each rank's loss would go its own way."""
    first, second = run_ranks(2, a_loss_on_ranks, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    one = a_loss_on_ranks(0, 1, str(tmp_path))
    for got, expected in zip(first, one, strict=True):
        assert_close_report(got, expected, 2e-5, "two ranks against one")  # sums in another order, three steps


class Narrow(Trainer):
    """Overrides that take no more than Trainer itself hands them."""

    def compute_loss(
        self, model: Any, inputs: Any, *, num_items_in_batch: Any = None, return_outputs: bool = False
    ) -> Any:  # type: ignore[override]
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        return super().compute_loss(model, inputs, **given)  # type: ignore[arg-type]

    def create_scheduler(self, *, num_training_steps: int) -> Any:  # type: ignore[override]
        return super().create_scheduler(num_training_steps)

    def create_optimizer(self) -> Any:  # type: ignore[override]
        return super().create_optimizer()

    def _load_from_checkpoint(self, path: str) -> None:  # type: ignore[override]
        super()._load_from_checkpoint(path)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(model, inputs, num_items_in_batch)

    def train(self, resume_from_checkpoint: Any = None) -> Any:  # type: ignore[override]
        return super().train(resume_from_checkpoint)


def test_what_transformers_calls_no_more_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Older(Trainer):
        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            raise AssertionError

    trained(with_mixin(Older), tmp_path)
    assert "never calls create_optimizer_and_scheduler; override create_optimizer" in caplog.text


class NoReturn(Narrow):
    """And return nothing where Trainer looks at its attributes alone."""

    def create_optimizer(self) -> None:  # type: ignore[override]
        super().create_optimizer()

    def create_scheduler(self, *, num_training_steps: int) -> None:  # type: ignore[override]
        super().create_scheduler(num_training_steps=num_training_steps)


@pytest.mark.parametrize("cls", [Narrow, NoReturn])
@pytest.mark.parametrize("optim", ["mkor", "kfac_expand", "adamw_torch"])
def test_overrides_get_what_they_take(cls: type[Trainer], optim: str, tmp_path: Path) -> None:
    sampled = {"optim_args": "fisher=mc"} if optim == "kfac_expand" else {}
    args = arguments(
        str(tmp_path), optim=optim, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=0.001,
        lr_scheduler_type="linear", **sampled,
    )  # fmt: skip
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = with_mixin(cls)(model=bert(), args=args, train_dataset=Examples(), eval_dataset=Examples(8))
        trainer.train(resume)
        assert "eval_loss" in trainer.evaluate()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)

"""The optimizer's settings are read once, checked before any data are read, and used by everyone after that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_soo import registry
from hf_soo.integrations import arguments
from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments
from hf_soo.runs.arguments import parse
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.script import check
from hf_soo.runs.training import Job, Task, describe

FLAGS = ["--optim", "mkor", "--report_to", "none", "--use_cpu", "true", "--max_steps", "4"]


class OneLayer(Task):
    """As little as can be trained."""

    title = "one layer"

    def make_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2))

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {}

    def make_trainer(self, model: nn.Module, args: RunTrainingArguments, callbacks: list[Any]) -> Trainer:
        return SecondOrderTrainer(model=model, args=args, callbacks=callbacks)


def parsed(tmp_path: Path, *flags: str) -> Job:
    given = parse((RunArguments, RunTrainingArguments), [*FLAGS, "--output_dir", str(tmp_path), *flags])
    return Job(*given)


@pytest.mark.parametrize(("deepspeed", "flag"), [("false", "--use_cpu true"), ("true", "--ddp_backend gloo")])
def test_processes_that_would_each_train_alone_are_refused(
    deepspeed: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, task = parsed(tmp_path), OneLayer()
    trainer = task.make_trainer(task.make_model(0), job.training, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", deepspeed)
    for refused in (lambda: check(job, lambda: None), trainer.train):
        with pytest.raises(ValueError, match=rf"started 2 processes, the Trainer sees 1; without GPUs add {flag}\.$"):
            refused()
    assert not list(tmp_path.iterdir())


def test_each_text_is_read_once_from_the_command_line_to_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(what: str, *args: Any) -> Any:
            calls.append(f"{name}({what})")
            return real(what, *args)

        monkeypatch.setattr(module, name, call)

    counted(arguments, "parse_settings")
    counted(registry, "make_config")
    texts = ["--optim_args", "history=8", "--base_optim_args", '{"betas": [0.8, 0.9]}']
    schedule = ["--lr_scheduler_type", "poly_warmup", "--lr_scheduler_kwargs", '{"degree": 0.25}']
    job, task = parsed(tmp_path, *texts, *schedule), OneLayer()
    check(job, lambda: task.make_model(0))
    model = task.make_model(0)
    record = describe(job, task, model)
    trainer = task.make_trainer(model, job.training, [])
    trainer.create_optimizer_and_scheduler(4)
    optimizer: Any = trainer.optimizer
    assert optimizer.config["history"] == 8 and optimizer.param_groups[0]["betas"] == [0.8, 0.9]
    assert record.config["optim_args"] == {"history": 8}
    assert record.config["base_optim_args"] == {"betas": [0.8, 0.9]}
    assert trainer.lr_scheduler.lr_lambdas[0].keywords["degree"] == 0.25
    assert job.name.startswith("mkor-lamb-lr5e-05-history8-betas")
    texts = ("optim_args", "base_optim_args", "lr_scheduler_kwargs")
    assert sorted(calls) == sorted(["make_config(mkor)", *(f"parse_settings({what})" for what in texts)])


REFUSED = [
    (["--optim_args", "history=0"], "history=0"),
    (["--base_optim_args", "beta=3"], "'beta' is no argument of base optimizer Lamb. Did you mean 'betas'"),
    (["--base_optim_args", "eps=-1"], "eps=-1"),
    (["--base_optim_args", '{"betas": [0.9]}'], "betas"),
    (["--base_optim", "adafactor"], "base='adafactor'"),
    (["--base_optim", "muon", "--base_optim_args", "ns_steps=0"], "ns_steps=0"),
    (["--base_optim", "torch.optim:SGD", "--base_optim_args", "momentum=-1"], "momentum"),
    (["--optim", "lamb", "--optim_args", "eps=-1"], "eps=-1"),
    (["--optim", "lamb", "--precondition_exclude", "a"], "exclude=\\['a'\\] has no effect with 'lamb'"),
    (["--precondition_exclude", "(a"], "exclude='\\(a' is no regular expression"),
    (["--learning_rate", "-1"], "learning_rate=-1.0"),
    (["--lr_scheduler_type", "poly_warmup", "--lr_scheduler_kwargs", '{"degre": 1}'], "Did you mean 'degree'"),
    (["--lr_scheduler_type", "poly_warmup", "--lr_scheduler_kwargs", '{"degree": 0}'], "degree=0"),
    (["--compare_with", "lamb", "--compare_optim_args", "eps=-1"], "eps=-1"),
    (["--compare_with", "lamb", "--compare_optim_args", "beta=1"], "compare_with='lamb': 'beta' is no argument"),
    (["--compare_with", "lamp"], "compare_with='lamp': 'lamp' is no optimizer"),
    (["--compare_with", "eva", "--compare_base_optim", "adamw:"], "compare_with='eva': base='adamw:' cannot be"),
    (["--compare_with", "eva", "--compare_learning_rate", "nan"], "compare_learning_rate=nan is not allowed"),
    (["--compare_with", "lamb", "--target_eval_loss", "-1"], "target_eval_loss=-1.0 is not allowed"),
    (["--name", "../../x"], "name='../../x' is not allowed"),
    (["--name", "x" * 211], "of at most 210 bytes"),
    (["--optim_args", "history=8,history=9"], "'history' stands twice"),
    (["--optim_args", '{"history": 8, "history": 9}'], "'history' stands twice"),
    (["--accelerator_config", "{"], "accelerator_config='{': "),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type='cosine_with_min_lr' with .*=None, 0 of 4"),
    (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"pow": 2}'], "unexpected keyword argument 'pow'"),
    (["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": "x"}'], "lr_scheduler_type='cosine'"),
    (["--lr_scheduler_type", "poly_warmup", "--warmup_steps", "9"], "num_warmup_steps=9 must lie in"),
    (["--report_to", "paper"], r"report_to=\['paper'\]: paper is not supported, only"),
    # what only the model can tell
    (["--precondition_include", "nothing"], "no layer selected: include="),
    (["--optim_args", "max_dim=1", "--optim", "kfac_expand"], "no layer selected"),
    (["--compare_with", "eva", "--precondition_exclude", "0"], "no layer selected"),
    (["--base_optim", "torch.optim:Rprop", "--weight_decay", "0.1"], "weight_decay=0.1 has no effect with Rprop"),
    (["--optim", "kaisa", "--optim_args", "grad_workers=3"], "grad_workers=3 does not divide the world size 1"),
    (["--optim", "adamw", "--compare_with", "mkor", "--precondition_include", "a"], "include=.* has no effect"),
    (["--compare_with", "mkor"], "both runs are 'mkor-lamb-lr5e-05'"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_setting_shows_before_there_are_data(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check(parsed(tmp_path, *flags), lambda: OneLayer().make_model(0))


def test_right_settings_are_no_error(tmp_path: Path) -> None:
    for flags in (
        ["--optim", "adamw", "--optim_args", "fused=true"],
        ["--optim", "adamw", "--optim_args", "amsgrad=true,foreach=true"],
        ["--base_optim", "muon", "--base_optim_args", "rest_lr=0.003"],
        ["--base_optim", "torch.optim:NAdam", "--base_optim_args", "momentum_decay=0.1"],
        ["--optim", "if_shampoo"],  # its batch size is filled in later
        ["--optim", "adamw_torch", "--optim_args", "a=b"],  # transformers' own reads them
    ):
        check(parsed(tmp_path, *flags), lambda: OneLayer().make_model(0))


def test_a_setting_that_is_set_later_is_read_then(tmp_path: Path) -> None:
    """A search over hyperparameters sets attributes of the arguments."""
    args = SecondOrderTrainingArguments(str(tmp_path), optim="mkor", optim_args="history=8", report_to="none")
    first = args.parsed
    assert first is args.parsed and first.optimizer is not None and first.optimizer.config.history == 8
    args.optim_args = "history=16"
    assert args.parsed.optimizer is not None and args.parsed.optimizer.config.history == 16
    args.precondition_exclude = ["a"]
    assert args.parsed.optimizer.exclude == ["a"]
    args.optim_args = "history=0"
    with pytest.raises(ValueError, match="history=0"):
        args.parsed  # noqa: B018

"""`hf_soo.domains`: which domain a recipe is for, and that a command refuses those of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_soo import cli, domains
from hf_soo.domains import DOMAINS, domain_of
from hf_soo.runs.script import COMMANDS
from hf_soo.runs.training import Job
from tests.scripts.script_runs import ROOT, check_error
from tests.tasks.glue_cases import make_model


def recipe(folder: Path, text: str, name: str = "recipe") -> list[str]:
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return ["--config", str(file)]


def test_every_domain_is_found_by_its_name(tmp_path: Path) -> None:
    for name in DOMAINS:
        assert domain_of(recipe(tmp_path, f"task: {name}")).name == name
    assert set(DOMAINS) <= set(COMMANDS) and set(COMMANDS.values()) <= set(cli.RUNS)


def test_where_a_task_is_read(tmp_path: Path) -> None:
    """In the flags, the last recipe that says one, and what that extends; without any it is BERT."""
    first, silent = recipe(tmp_path, "task: squad", "first"), recipe(tmp_path, "seed: 1", "silent")
    below = recipe(tmp_path, "extends: first.yaml", "below")
    assert domain_of([]).name == domain_of(silent).name == "bert"
    assert domain_of([*first, *silent]).name == domain_of(below).name == "squad"
    assert domain_of([*first, *recipe(tmp_path, "task: vision")]).name == "vision"
    assert domain_of([*first, "--task", "glue"]).name == "glue"
    with pytest.raises(ValueError, match=r"task='visoin' is none of bert, "):
        domain_of(recipe(tmp_path, "task: visoin"))


def test_parse_gives_a_job_and_what_makes_its_task(tmp_path: Path) -> None:
    flags = ["--config", str(ROOT / "configs" / "vision" / "vit_digits_adamw.yaml"), "--use_cpu", "true"]
    job, make_task = domain_of(["--task", "vision"]).parse([*flags, "--output_dir", str(tmp_path)])
    assert isinstance(job, Job) and job.training.folder == tmp_path
    assert (task := make_task()).kind == "vision" and task.make_model(0) is not None


@pytest.mark.parametrize(("command", "task"), [("vision", "lm"), ("glue", "bert"), ("squad", "vision")])
def test_a_command_refuses_another_ones_recipe(
    command: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it looks at the recipe's keys, which it does not know."""
    flags = recipe(tmp_path, f"{{task: {task}, window: 24, output_dir: {tmp_path}}}")
    assert cli.main([command, *flags]) == 1
    check_error(capsys, f"task='{task}', and this trains '{command}'; give these recipes to hf-soo {COMMANDS[task]}.")


def test_pretrain_refuses_what_it_does_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert domains.main(recipe(tmp_path, "{task: glue, task_name: mrpc}")) == 1
    check_error(capsys, "task='glue', and this trains 'bert'; give these recipes to hf-soo glue.")


def test_a_task_of_glue_is_no_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["glue", "--task", "mrpc", "--output_dir", str(tmp_path)]) == 1
    check_error(capsys, "task='mrpc' is none of bert, lm, glue, squad, vision; a task of GLUE is named by task_name.")


def test_a_single_run_of_glue_has_one_task(tmp_path: Path) -> None:
    flags = ["--task_name", "mrpc,stsb", "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path)]
    _, make_task = domain_of(["--task", "glue"]).parse([*flags, "--use_cpu", "true"])
    with pytest.raises(ValueError, match=r"task_name=mrpc,stsb names 2 tasks, and this is one run; give one\."):
        make_task()


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """A command line of each domain whose data are not there."""
    folder = tmp_path_factory.mktemp("nowhere")
    make_model(folder / "tiny")
    pretrained, usual = (
        ["--model_name_or_path", str(folder / "tiny")],
        ["--use_cpu", "true", "--output_dir", str(folder)],
    )
    return {
        "bert": [*usual, "--preset", "tiny", "--corpus", str(folder / "no.txt")],
        "lm": [*usual, "--source", str(folder / "no.txt"), "--hidden_size", "16"],
        "vision": [*usual, "--dataset", str(folder / "none")],
        "glue": [*usual, *pretrained, "--task_name", "mrpc", "--data_dir", str(folder / "none")],
        "squad": [*usual, *pretrained, "--train_file", str(folder / "no.json")],
    }


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (["--optim", "mkor", "--precondition_include", "nothing"], "no layer selected: include=['nothing']"),
        (
            ["--optim", "lamb", "--compare_with", "eva", "--compare_optim_args", "damping=-1"],
            "damping=-1 is not allowed",
        ),
        (["--optim", "kaisa", "--optim_args", "grad_workers=3"], "grad_workers=3 does not divide the world size 1"),
        (["--optim", "kfac_expand", "--optim_args", "max_dim=1"], "no layer selected"),
    ],
)
@pytest.mark.parametrize("name", DOMAINS)
def test_an_optimizer_that_cannot_be_built_shows_before_data_are_read(
    name: str, optimizer: list[str], message: str, nowhere: dict[str, list[str]]
) -> None:
    domain = domain_of(["--task", name])
    domain.parse([*nowhere[name], "--optim", "mkor"])
    with pytest.raises(ValueError, match=re.escape(message)):
        domain.parse([*nowhere[name], *optimizer])


@pytest.mark.parametrize("name", DOMAINS)
def test_smoothed_labels_are_served_or_refused_by_name(name: str, nowhere: dict[str, list[str]]) -> None:
    """Masked words at gathered places and answer spans are no classes of `labels`."""
    flags = [*nowhere[name], "--label_smoothing_factor", "0.1"]
    if name in {"lm", "vision", "glue"}:
        assert domain_of(["--task", name]).parse(flags)[0].training.label_smoothing_factor == 0.1
        return
    with pytest.raises(ValueError, match=rf"label_smoothing_factor=0.1: the loss of '{name}' smooths none"):
        domain_of(["--task", name]).parse(flags)

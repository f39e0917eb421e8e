"""`hf_soo.runs.shipped`: recipes by name in every command that takes one; what `hf-soo recipes` lists and copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_soo import cli
from hf_soo.domains import domain_of
from hf_soo.glue.task import DOMAIN as GLUE
from hf_soo.runs import shipped
from hf_soo.runs.arguments import task_of
from hf_soo.search.queue import make_stage, read_queue
from tests.scripts.script_runs import ROOT, check_error

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("names", "place", "files"),
    [
        ("bert_large_phase2 mkor", "pretrain", "pretrain/bert_large_phase2 pretrain/mkor"),
        ("bert_large_phase2.yaml pretrain/mkor.yaml", "", "pretrain/bert_large_phase2 pretrain/mkor"),
        ("configs/smoke/mkor.yaml lamb", "pretrain", "smoke/mkor smoke/lamb"),  # beside the one before
        ("smoke/mkor adamw", "pretrain", "smoke/mkor pretrain/adamw"),  # nothing beside it: the command's
        ("mkor", "pretrain", "pretrain/mkor"),
        ("minilm_adamw", "squad", "squad/minilm_adamw"),
        ("minilm_adamw", "glue", "glue/minilm_adamw"),
        ("byte_gpt muon", "pretrain", "workloads/byte_gpt pretrain/muon"),
        ("muon", "search", "search/muon"),
        ("search/muon pretrain/muon", "", "search/muon pretrain/muon"),
        ("first_table.queue", "search", "search/first_table.queue"),
        ("cpu", "", "accelerate/cpu"),
    ],
)
def test_names_are_found(names: str, place: str, files: str) -> None:
    assert shipped.find(names.split(), place) == [CONFIGS / f"{file}.yaml" for file in files.split()]


def test_a_path_that_exists_wins_and_so_does_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("bert_large_phase2", "mine/work.yaml", "mine/mkor.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    (tmp_path / "lamb").mkdir()  # a folder is no recipe
    assert shipped.find(["bert_large_phase2"]) == [Path("bert_large_phase2")]
    assert shipped.find(["mine/work.yaml", "mkor"], "pretrain")[1] == Path("mine/mkor.yaml")
    assert shipped.find(["lamb"], "pretrain") == [CONFIGS / "pretrain" / "lamb.yaml"]


@pytest.mark.parametrize(
    ("names", "place", "message"),
    [
        ("mkor", "", "'mkor' is the name of pretrain/mkor and smoke/mkor; give it with its folder."),
        ("minilm_adamw", "pretrain", "'minilm_adamw' is the name of glue/minilm_adamw and squad/minilm_adamw; give it"),
        (
            "bert_large_phase3",
            "pretrain",
            "No file 'bert_large_phase3', and no recipe of that name; did you mean 'bert_l",
        ),
        (
            "configs/none.yaml",
            "",
            "No file 'configs/none.yaml', and no recipe of that name; `hf-soo recipes` lists them.",
        ),
        ("soap", "pretrain", "No file 'soap', and no recipe"),  # that of search is a space
        ("byte_gpt", "search", "No file 'byte_gpt', and no recipe"),
        ("/pretrain/mkor", "", "No file '/pretrain/mkor', and no recipe"),
        ("smok", "", "No file 'smok', and no recipe of that name; did you mean 'smoke'?"),
        ("kor", "", "No file 'kor', and no recipe of that name; did you mean 'mkor'?"),
    ],
)
def test_names_that_are_none_or_several(names: str, place: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        shipped.find(names.split(), place)


def test_a_command_takes_the_recipes_of_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_dir", "out", "--use_cpu", "true"]
    *_, training = domain_of([]).settings(
        ["--config", "bert_large_phase1", "--config", "mkor", *flags, "--bf16", "false"]
    )
    assert (training.optim, training.learning_rate, training.max_steps) == ("mkor", 0.006, 7038)
    *_, training = GLUE.settings(["--config=minilm_mkor", *flags])
    assert (training.optim, training.output_dir) == ("mkor", "out")
    assert task_of(["--config", "byte_gpt"]) == "lm" and domain_of(["--config", "byte_bert"]).name == "lm"
    assert cli.main(["pretrain", "--config", "bert_larg_phase1"]) == 1
    check_error(capsys, "No file 'bert_larg_phase1', and no recipe of that name; did you mean 'bert_large_phase1'?")


def test_spaces_workloads_and_queues_have_names(tmp_path: Path) -> None:
    stage = make_stage("byte_gpt", "muon", "wide", None, None, False)
    assert (stage.workload, stage.space.file) == (CONFIGS / "workloads/byte_gpt.yaml", CONFIGS / "search/muon.yaml")
    assert read_queue("first_table.queue")[0].title == "byte_gpt/muon/wide"
    (tmp_path / "mine.yaml").write_text("jobs: [{workload: byte_bert, space: lamb}]")
    (mine,) = read_queue("mine.yaml")
    assert mine.title == "byte_bert/lamb/wide"
    (trial, *_) = mine.space.wide(6)
    assert mine.space.settings(trial)["optim"] == "lamb"


def said(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert cli.main(["recipes", *flags]) == 0
    return capsys.readouterr().out


def test_the_list_says_what_is_published_and_what_was_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    names = re.findall(r"^(\S+)", text, re.MULTILINE)
    files = [file for file in CONFIGS.rglob("*") if file.is_file()]
    assert sorted(names) == sorted(map(shipped.title, files)) and len(text.splitlines()) > 2 * len(names)
    assert max(map(len, text.splitlines())) <= 120
    of = {name: part for name, part in re.findall(r"^(\S+)((?:.*\n(?!\S))*.*\n)", text, re.MULTILINE)}
    large = " ".join(of["pretrain/bert_large_phase2"].split())
    assert large.startswith("BERT-Large (24 x 1024, 336 M parameters), phase 2 of 2, sequence length 512")
    assert "Paper table: MKOR (NeurIPS 2023), BERT-Large phase 2" in large and large.endswith("reproduced here: no.")
    assert "reproduced here: yes." in of["smoke/mkor"] and "over gloo" in of["accelerate/cpu"]
    assert re.findall(r"^(\S+)", said(capsys, "smoke"), re.MULTILINE) == ["smoke/lamb", "smoke/mkor"]


def test_a_recipe_is_printed_located_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = CONFIGS / "accelerate" / "cpu.yaml"
    assert said(capsys, "cpu") == file.read_text() and said(capsys, "cpu", "--path") == f"{file}\n"
    assert said(capsys, "--path") == f"{CONFIGS}\n" and said(capsys, "zero1") != said(capsys, "zero1_8")
    assert said(capsys, "--copy", "configs") == "wrote configs\n"
    copied = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert copied == {path.relative_to(ROOT): path.read_bytes() for path in CONFIGS.rglob("*") if path.is_file()}
    assert shipped.find(["configs/smoke/mkor.yaml"]) == [Path("configs/smoke/mkor.yaml")]
    assert cli.main(["recipes", "--copy", "configs"]) == 1
    assert capsys.readouterr().err == (
        "hf-soo: error: --copy configs exists; give a folder that is not there yet, configs for example.\n"
    )
    assert cli.main(["recipes", "mkro"]) == 1 and "did you mean 'mkor'?" in capsys.readouterr().err

"""`hf_soo.runs.recipes`: files over files, what depends on the optimizer, and what is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hf_soo.runs.recipes import optimizer_names, read_recipe

FILES = {
    "base": "{seed: 1, max_steps: 5, for: {mkor: {learning_rate: 0.1, max_steps: 7}, lamb: {learning_rate: 0.3}}}",
    "work": "{extends: base.yaml, seed: 2, output_dir: 'out/{optimizer}', for: {mkor: {learning_rate: 0.2}}}",
    "mkor": "{optim: mkor}",
    "lamb": "{optim: lamb}",
    "mine": "{optim: sgd, learning_rate: 1}",
    "last": "{learning_rate: 9, seed: null}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def read(folder: Path, names: str, *flags: str) -> dict[str, Any]:
    return read_recipe([folder / f"{name}.yaml" for name in names.split()], flags=flags)


def test_a_file_over_the_one_that_it_extends(folder: Path) -> None:
    """Settings and those for each optimizer alike; the more special wins over the workload's own."""
    mkor = {"seed": 2, "max_steps": 7, "output_dir": "out/mkor", "learning_rate": 0.2, "optim": "mkor"}
    assert read(folder, "work mkor") == read(folder, "mkor work") == mkor
    lamb = {"seed": 2, "max_steps": 5, "output_dir": "out/lamb", "learning_rate": 0.3, "optim": "lamb"}
    assert read(folder, "work lamb") == lamb
    assert optimizer_names(folder / "work.yaml") == ["lamb", "mkor"] and optimizer_names(folder / "mine.yaml") == []


def test_a_later_file_wins_over_what_was_for_the_optimizer(folder: Path) -> None:
    assert read(folder, "work mkor last")["learning_rate"] == 9 and read(folder, "work mkor last")["seed"] is None
    assert read(folder, "last work mkor")["learning_rate"] == 0.2
    assert read(folder, "work last mkor")["learning_rate"] == 0.2  # what is for MKOR comes with its file


def test_an_optimizer_of_ones_own_says_what_the_workload_would(folder: Path) -> None:
    message = r"mine.yaml: no output_dir without an optimizer's file; give --config lamb.mkor.yaml as well, or these by"
    with pytest.raises(ValueError, match=message):
        read(folder, "work mine")
    settings = read(folder, "work mine", "output_dir")
    assert (settings["optim"], settings["learning_rate"], settings["max_steps"]) == ("sgd", 1, 5)
    with pytest.raises(ValueError, match=r"work.yaml: no learning_rate and no output_dir without"):
        read(folder, "work")
    assert "learning_rate" not in read(folder, "work", "learning_rate", "output_dir")  # the command line has them


KNOWN = {
    "seed": int, "optim": str, "learning_rate": float, "max_steps": int, "layers": list[str] | None,
    "args": dict[str, Any] | str | None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{extends: absent.yaml}", "absent.yaml: [Errno 2] No such file"),
        ("{extends: bad.yaml}", "extends itself: {bad} -> {bad}."),
        ("{extends: [base.yaml]}", "extends=['base.yaml'] must be the name of one file."),
        ("{seed: 1, seed: 2}", "key 'seed' stands twice in"),
        ("{for: {mkor: {seed: 1, seed: 2}}}", "key 'seed' stands twice in"),
        ("{for: {mkr: {seed: 1}}}", "'for' has 'mkr', an unknown optimizer; there is no "),
        ("{for: {mkor: 0.1}}", "'for' must hold 'optimizer: {{key: value}}' lines."),
        ("{for: mkor}", "'for' must hold 'optimizer: {{key: value}}' lines."),
        ("{for: {mkor: {sed: 1}}}", "unknown key 'sed'; did you mean 'seed'?"),
        ("[seed]", "holds a list, not 'key: value' lines."),
        (
            "{layers: [pooler, '--restart', 'true']}",
            "layers=['pooler', '--restart', 'true'] is not allowed; give a list, of text each or None, no item of "
            "which begins with '-'.",
        ),
        ("{layers: [[a]]}", "layers=[['a']] is not allowed; give a list, of text each"),
        ("{layers: [true]}", "layers=[True] is not allowed; give a list, of text each"),
        ("{for: {mkor: {layers: [null]}}}", "layers=[None] is not allowed; give a list, of text each"),
        ("{layers: {a: 1}}", "layers={{'a': 1}} is not allowed; give a list, of text each"),
        ("{seed: [1, 2]}", "seed=[1, 2] is not allowed; give a whole number, no item"),
        ("{seed: {a: 1}}", "seed={{'a': 1}} is not allowed; give a whole number."),
        ("{seed: true}", "seed=True is not allowed; give a whole number."),
        ("{optim: no}", "optim=False is not allowed; give text."),
        ("{optim: 2024-01-31}", "optim=datetime.date(2024, 1, 31) is not allowed; give text."),
        ("{optim: !!binary eA==}", "optim=b'x' is not allowed; give text."),
        ("{args: {a: {1: 2}}}", "args={{'a': {{1: 2}}}} is not allowed; give a mapping or text or None."),
        ("{args: {a: 2024-01-31}}", "is not allowed; give a mapping or text or None."),
        ("{args: {a: 1, a: 2}}", "key 'a' stands twice in"),
        ("{seed: &x 1, max_steps: *x}", "aliases (*name) are not read; write the value out"),
        ("{args: &x {a: *x}}", "aliases (*name) are not read; write the value out"),
        ("{<<: {seed: 1}}", "could not determine a constructor for the tag 'tag:yaml.org,2002:merge'"),
        ("{optim: !!python/name:os.system x}", "could not determine a constructor"),
        ("{optim: 2024-13-01}", "month must be in 1..12"),
        (f"{{seed: {'9' * 5000}}}", "Exceeds the limit"),
        ('{optim: "\\0", optim: x', "while"),
    ],
)
def test_a_file_that_is_refused(text: str, message: str, folder: Path) -> None:
    bad = folder / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message.format(bad=bad))) as error:
        read_recipe([bad], known=KNOWN)
    assert str(error.value).startswith("--config ") and "\n" not in str(error.value)


def test_two_optimizers_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--config mkor and --config lamb are two optimizers; give one."):
        read(folder, "work mkor lamb")


def test_files_that_extend_each_other(folder: Path) -> None:
    (folder / "base.yaml").write_text("{extends: work.yaml}")
    with pytest.raises(ValueError, match=r"extends itself: .*work.yaml -> .*base.yaml -> .*work.yaml\."):
        read(folder, "work mkor")

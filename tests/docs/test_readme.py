"""The README's snippets run, and its commands name files and flags that exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from hf_soo.cli import report_of
from tests.ranks.distributed import run_ranks
from tests.ranks.equality import markdown, stay_on_gloo, table_of
from tests.trainer.test_trainer import Examples, bert

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TABLES = sorted(set(re.findall(r"<!-- results:(\S+) -->", README)) - {"equality"})  # it has a table of another kind
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_there_are_snippets_and_commands() -> None:
    assert len(SNIPPETS) == 5 and len(COMMANDS) == 21


def snippet_rank(rank: int, world: int, index: int) -> None:
    """In a process of its own: DeepSpeed keeps what it has started."""
    stay_on_gloo()
    model = bert()
    names: dict[str, Any] = {"model": model, "loader": DataLoader(Examples(16), batch_size=4)}
    before = model.bert.pooler.dense.weight.detach().clone()
    exec(SNIPPETS[index], names)
    assert not before.equal(model.bert.pooler.dense.weight) and names["optimizer"].steps == 4


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if "deepspeed" in SNIPPETS[index]:
        run_ranks(1, snippet_rank, index)
        return
    model = bert()
    before = model.bert.pooler.dense.weight.detach().clone()
    loader = DataLoader(Examples(16), batch_size=4)
    names: dict[str, Any] = {"model": model, "train_dataset": Examples(), "loader": loader}
    exec("import hf_soo\n" + SNIPPETS[index].replace('report_to="none"', 'report_to="none", use_cpu=True'), names)
    assert not before.equal(model.bert.pooler.dense.weight)
    if "routing()" in SNIPPETS[index]:
        assert "'bert.pooler.dense.weight': 'mkor -> Lamb'" in capsys.readouterr().out


@cache
def help_of(script: str) -> str:
    """What a script says of its flags; starting one takes seconds."""
    command = [str(ROOT / script), "--help"]
    command = command if script.endswith(".sh") else [sys.executable, *command]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_commands_name_files_and_flags_that_exist() -> None:
    for command in COMMANDS:
        words = shlex.split(command)
        for script in (word for word in words if word.startswith("scripts/")):
            help_text = help_of(script)
            for flag in (word for word in words[words.index(script) :] if word.startswith("--")):
                assert flag in help_text, (script, flag)
        for config in (word for word in words if word.startswith("configs/")):
            assert (ROOT / config).is_file(), config


def test_the_second_command_is_what_ci_runs() -> None:
    """The same packages in the same order, then pytest; CI says "python -m pip install --quiet" for "pip install"."""
    command = next(line for line in COMMANDS if "pytest" in line)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("${TORCH_VERSION:-2.13.0}", "2.13.0")
    words = ("python -m pip", "python -m pytest", "DS_ACCELERATOR=cpu python -m pip")
    steps = [line for line in ci.splitlines() if line.startswith(words)]
    plain = [line.replace("python -m pip", "pip").replace(" --quiet", "") for line in steps]
    assert [shlex.split(step) for step in plain] == [shlex.split(step) for step in command.split(" && ")]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_their_run_jsons(name: str) -> None:
    """Records of every script, as they were really written, are read."""
    _, table = report_of(ROOT / "results" / name)
    assert f"<!-- results:{name} -->\n{table.strip()}\n<!-- /results -->" in README
    kept = ROOT / "results" / name / "table.md"
    assert not kept.exists() or kept.read_text(encoding="utf-8").strip() == table.strip()


def test_the_support_table_is_that_of_the_results() -> None:
    written = json.loads((ROOT / "results" / "equality" / "equality.json").read_text(encoding="utf-8"))
    text = markdown(table_of(written)).strip()
    assert f"<!-- results:equality -->\n{text}\n<!-- /results -->" in README

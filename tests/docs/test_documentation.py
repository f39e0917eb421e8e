"""README and docs/ say what is so: snippets run, commands name what exists, tables are those of their JSONs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.utils.data import DataLoader

from hf_soo import cli
from hf_soo.runs import shipped
from hf_soo.runs.record import read_runs
from tests.ranks.cells import stay_on_gloo
from tests.ranks.distributed import run_ranks
from tests.ranks.equality import markdown, table_of
from tests.trainer.test_trainer import Examples, bert
from tests.unmodified.measure import markdown as unmodified_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
SNIPPETS = [
    pytest.param(snippet, id=f"{page}:{number}")
    for page, text in PAGES.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
COMMANDS = [
    line
    for text in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SCRIPTS = {
    "prepare_pretraining.py": "prepare", "pretrain_bert.py": "pretrain", "run_glue.py": "glue", "run_squad.py": "squad",
    "run_vision.py": "vision", "bench_step.py": "bench", "reproduce.sh": "reproduce",
}  # fmt: skip


def snippet_rank(rank: int, world: int, snippet: str) -> None:
    """In a process of its own: DeepSpeed keeps what it has started."""
    stay_on_gloo()
    model = bert()
    names: dict[str, Any] = {"model": model, "loader": DataLoader(Examples(16), batch_size=4)}
    before = model.bert.pooler.dense.weight.detach().clone()
    exec(snippet, names)
    assert not before.equal(model.bert.pooler.dense.weight) and names["optimizer"].steps == 4


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if "deepspeed" in snippet:
        run_ranks(1, snippet_rank, snippet)
        return
    model = bert()
    before = model.bert.pooler.dense.weight.detach().clone()
    loader = DataLoader(Examples(16), batch_size=4)
    names: dict[str, Any] = {"model": model, "train_dataset": Examples(), "loader": loader}
    exec("import hf_soo\n" + snippet.replace('report_to="none"', 'report_to="none", use_cpu=True'), names)
    assert not before.equal(model.bert.pooler.dense.weight)
    if "routing()" in snippet:
        assert "'bert.pooler.dense.weight': 'mkor -> Lamb'" in capsys.readouterr().out


def commands_in(words: list[str]) -> list[tuple[str, list[str]]]:
    """(command of hf-soo, the words after it) of a shell line, whichever way it is started."""
    found = []
    for i, word in enumerate(words):
        if word.startswith("scripts/"):
            found.append((SCRIPTS[Path(word).name], words[i + 1 :]))
        elif word in ("hf-soo", "hf_soo.cli"):
            found.append((words[i + 1], words[i + 2 :]))
        elif word.removeprefix("hf_soo.") in cli.RUNS and words[i - 1] == "-m":
            found.append((word.removeprefix("hf_soo."), words[i + 1 :]))
    return found


@cache
def help_of(command: str, *task: str) -> str:
    """What a command says of its flags, which are those of a task (`--task lm`) where one is named."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([command, *task, "--help"])
    return text.getvalue()


def test_commands_name_files_and_flags_that_exist() -> None:
    known = {name for name in cli.RUNS} | {"list", "doctor", "report", "plan", "recipes"}
    checked = 0
    for line in [*COMMANDS, *cli.EXAMPLES.values()]:
        words = shlex.split(line)
        for command, rest in commands_in(words):
            assert command in known, line
            task = rest[rest.index("--task") :][:2] if "--task" in rest else []
            if command == "run":  # the flags are those of the script
                task = [str(ROOT / "tests" / "unmodified" / "classify.py")]
            for flag in (word for word in rest if word.startswith("--")):
                assert re.search(rf"{flag}\b", help_of(command, *task)), (command, flag)
                checked += 1
            shipped.find([after for flag, after in pairwise(rest) if flag == "--config"], command)
        for file in (word for word in words if word.startswith(("configs/", "scripts/", "examples/"))):
            assert (ROOT / file).is_file(), file
    assert checked, "no command was found at all"


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def messages() -> set[str]:
    """What the package raises or warns of, "…" for a value."""
    found = set()
    for path in (ROOT / "hf_soo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warning"
            if isinstance(call, ast.Call) and call.args and (warns or isinstance(node, ast.Raise)):
                found.add(re.sub(r"%[.\d]*[sdf]", "…", words_of(call.args[0])).replace("%%", "%"))
    return found


def words_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def test_troubleshooting_quotes_what_is_said() -> None:
    quoted = re.findall(r"^> (.+)$", PAGES["docs/guides/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 20
    assert not (gone := set(quoted) - messages()), gone


def test_readme_is_short() -> None:
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 250 and len(readme.split()) <= 2500


def test_the_second_command_is_what_ci_runs() -> None:
    """The same packages in the same order, then pytest; CI says "python -m pip install --quiet" for "pip install"."""
    command = next(line for line in COMMANDS if "pytest" in line)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("${TORCH_VERSION:-2.13.0}", "2.13.0")
    words = ("python -m pip", "python -m pytest", "DS_ACCELERATOR=cpu python -m pip")
    steps = [line for line in ci.splitlines() if line.startswith(words)]
    plain = [line.replace("python -m pip", "pip").replace(" --quiet", "") for line in steps]
    assert [shlex.split(step) for step in plain] == [shlex.split(step) for step in command.split(" && ")]


def tables() -> list[tuple[str, str]]:
    """(page, name) of each table between markers; the one of the strategies is of another kind."""
    found = [(page, name) for page, text in PAGES.items() for name in re.findall(r"<!-- results:(\S+) -->", text)]
    return [(page, name) for page, name in found if name != "equality"]


@pytest.mark.parametrize(("page", "name"), tables())
def test_tables_are_those_of_their_run_jsons(page: str, name: str) -> None:
    """Records of every script, as they were really written, are read."""
    _, table = cli.report_of(ROOT / "results" / name)
    assert f"<!-- results:{name} -->\n{table.strip()}\n<!-- /results -->" in PAGES[page]
    kept = ROOT / "results" / name / "table.md"
    assert not kept.exists() or kept.read_text(encoding="utf-8").strip() == table.strip()


def test_the_table_of_strategies_is_that_of_the_results() -> None:
    written = json.loads((ROOT / "results" / "equality" / "equality.json").read_text(encoding="utf-8"))
    text = markdown(table_of(written)).strip()
    assert f"<!-- results:equality -->\n{text}\n<!-- /results -->" in PAGES["docs/guides/many_processes.md"]


def test_the_table_of_unmodified_scripts_is_that_of_the_results() -> None:
    written = json.loads((ROOT / "results" / "unmodified_scripts" / "runs.json").read_text(encoding="utf-8"))
    text = unmodified_table(written).strip()
    assert f"<!-- unmodified -->\n{text}\n<!-- /unmodified -->" in PAGES["docs/guides/your_own_trainer.md"]


def bench_row(file: str, optimizer: str, base: str, **settings: int) -> dict[str, Any]:
    rows = json.loads((ROOT / "results" / "bench" / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    (row,) = (row for row in rows if (row["optimizer"], row["base"], row["set"]) == (optimizer, base, settings))
    found: dict[str, Any] = row
    return found


def test_costs_are_those_of_the_benchmarks() -> None:
    """The figures in sentences: of whole train steps, of memory, of steps."""
    pages = {
        page: " ".join(PAGES[page].split())
        for page in ("docs/guides/cost.md", "README.md", "docs/guides/when_it_does_not_help.md")
    }
    cost, readme, where_not = pages.values()
    at = {
        name: tuple(f"{bench_row(f'batch_{n}', name, base)['train_step_ratio']:.2f}" for n in (2, 8, 32))
        for name, base in (("mkor", "adamw"), ("muon", "muon"))
    }
    assert "with MKOR costs {} of AdamW's at 2 sequences, {} at 8 and {} at 32;".format(*at["mkor"]) in cost
    assert "; with Muon {}, {} and {}. ".format(*at["muon"]) in cost
    for file, optimizer, base, said in (
        ("", "adamw", "adamw", "AdamW and LAMB"), ("", "lamb", "lamb", "AdamW and LAMB"),
        ("mkor", "mkor", "adamw", "MKOR over either"), ("mkor", "mkor", "lamb", "MKOR over either"),
        ("eva", "eva", "sgd", "Eva over SGD"), ("muon", "muon", "muon", "Muon"),
        ("muon", "mkor", "muon", "MKOR over Muon"), ("kfac", "foof", "sgd", "FOOF over SGD"),
        ("shampoo", "shampoo", "adamw", "Shampoo over AdamW"), ("kfac", "kfac_expand", "sgd", "K-FAC over SGD"),
        ("shampoo", "soap", "adamw", "SOAP over AdamW"), ("kaisa", "kaisa", "lamb", "KAISA over LAMB"),
    ):  # fmt: skip
        held = bench_row(f"large2_{file}".rstrip("_"), optimizer, base)["state_bytes_per_parameter"]
        assert re.search(rf"[:,] {said} {held:.2g}(,| \(one rank\))", cost), f"{said} {held:.2g}"
    assert max(bench_row("large2_mkor", "mkor", base)["peak_memory_ratio"] for base in ("adamw", "lamb")) <= 1.04
    ratio = {
        "mkor": bench_row("large2_mkor", "mkor", "adamw"),
        "16": bench_row("large2_mkor16", "mkor", "adamw", history=16),
        "muon": bench_row("large2_muon", "muon", "muon"), "kfac": bench_row("large2_kfac", "kfac_expand", "sgd"),
        "kaisa": bench_row("large2_kaisa", "kaisa", "lamb"),
    }  # fmt: skip
    step = {name: row["step_ratio"] for name, row in ratio.items()}
    assert f"16 instead of 32 takes {step['16']:.1f} of AdamW(foreach)'s step instead of {step['mkor']:.1f})" in cost
    assert f"costs {step['mkor']:.2f} of `AdamW(foreach=True)` (`history=16`: {step['16']:.2f}), of Muon " in readme
    assert f"of Muon {step['muon']:.0f}, of K-FAC {step['kfac']:.0f}, of KAISA {step['kaisa']:.0f} (two " in readme
    assert f"K-FAC costs {step['kfac']:.0f} of AdamW's and one of KAISA {step['kaisa']:.0f}, on two" in where_not


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_pages_and_tables_are_those_of_the_registry() -> None:
    """Each has a page, and its line in the navigation."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path, text in hooks().written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: run python docs/hooks.py"
        page = path.relative_to(ROOT / "docs").as_posix() if path.is_relative_to(ROOT / "docs") else None
        assert page is None or page in navigation, f"{page} is not in mkdocs.yml"


def test_the_picture_of_the_runs_is_of_all_of_them() -> None:
    """A picture differs from machine to machine; what it was drawn of does not."""
    made = hooks()
    answers, runs = made.evidence()
    assert answers.digest_in(made.PICTURE) == answers.digest(runs), "it is stale: run python docs/hooks.py"


def test_what_is_said_of_rates_is_of_the_runs() -> None:
    runs = [run for run in read_runs(ROOT / "results" / "evidence" / "byte_gpt") if run.search["stage"] == "wide"]
    loss = {(run.search["space"], run.search["params"]["learning_rate"]): run.final["eval_loss"] for run in runs}
    rates = [("muon", rate) for rate in (0.02, 0.04, 0.01, 0.16)] + [("mkor_muon", rate) for rate in (0.02, 0.01)]
    text = (
        "Muon ends at {:.3f} with 0.02, {:.3f} with twice and {:.3f} with half of that, {:.3f} with eight times; "
        "MKOR before it at {:.3f} with 0.02 and {:.3f} with half."
    )
    assert text.format(*(loss[rate] for rate in rates)) in " ".join(PAGES["docs/methods/index.md"].split())


POSITIONS = (
    "muon-lr0.04-rest_lr0.005-ns_dtypefloat32", "mkor-muon-lr0.04-apply_tomomentum-rest_lr0.005-ns_dtypefloat32",
    "muon_mkor-muon-lr0.04-rest_lr0.005-ns_dtypefloat32", "mkor-adamw-lr0.004",
    "mkor-adamw-lr0.004-queries_and_keysFalse",
)  # fmt: skip
LOOKED_AT = {
    "Llama, decoder (`byte_gpt`)": (
        "evidence/byte_gpt/muon-wide-000-seed0", "evidence/byte_gpt/mkor_muon_momentum-wide-000-seed0",
        "queries_and_keys_gpt/without", "evidence/byte_gpt/mkor_adamw-wide-000-seed0",
        "queries_and_keys_gpt/mkor_over_adamw_without",
    ),
    "RoFormer, decoder": [f"positions_decoder_rotary/{name}" for name in POSITIONS],
    "RoFormer, encoder": [f"positions_encoder_rotary/{name}" for name in POSITIONS],
    "BERT, decoder": [f"positions_decoder_learnt/{name}" for name in POSITIONS],
    "BERT, encoder (`byte_bert`)": (
        "evidence/byte_bert/muon-wide-001-seed0", "evidence/byte_bert/mkor_muon_momentum-wide-001-seed0",
        "queries_and_keys_bert/without", "queries_and_keys_bert/mkor_over_adamw",
        "queries_and_keys_bert/mkor_over_adamw_without",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", LOOKED_AT)
def test_what_is_said_of_positions_is_of_the_runs(model: str) -> None:
    """The figures, the better ones in bold: with rotary positions MKOR without queries and keys, over both bases."""
    read = [json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in LOOKED_AT[model]]
    losses = [run["final"]["eval_loss"] for run in read]
    over_muon, over_adamw = losses[:3], losses[3:]
    better = (min(over_muon), min(over_adamw))
    rotary = read[0]["config"]["model"]["type"] in ("llama", "roformer")
    cells = [f"**{loss:.3f}**" if loss in better else f"{loss:.3f}" for loss in losses]
    assert f"| {' | '.join([model, 'rotary' if rotary else 'learnt', *cells])} |" in PAGES["docs/results.md"]
    assert (better == (losses[2], losses[4])) == rotary and (losses[3] < losses[4]) != rotary

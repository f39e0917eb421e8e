"""Reports of runs with any names and settings, of older runs, and of folders that hold damaged files."""

from __future__ import annotations

import html
import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_soo.bench import report as bench_report
from hf_soo.cli import report_of
from hf_soo.glue import table as glue_table
from hf_soo.reproduce import table as reproduce_table
from hf_soo.runs import report
from hf_soo.runs.markdown import plain
from hf_soo.runs.record import RunRecord, read_runs
from hf_soo.search import comparison
from tests.scripts.test_glue_table import record
from tests.scripts.test_report import run
from tests.search.trials import chosen, confirmed

TEXTS = (
    r"\.(decoder|pooler)$", "a|b", r"a\|b", r"a\\|b", "<b>bold</b>", "<!-- results:x -->", "<script>", "two\nlines",
    "\r\n| --- |\r\n", "`code|x`", "*star* **bold**", "__init__", "_x_", "[a](http://b.c)", "![a](b)", "a &lt; b & c",
    "a\\", "$x$|$y$", r"encoder\.layer\.\d+\.attention", "\u2028next", "{}{0}%s", "é|ü", "\t| x", "~~x~~", "|", "||",
)  # fmt: skip


def cells(row: str) -> list[str]:
    """The cells of a table's row as GitHub splits it: at each pipe that no backslash escapes."""
    found, place = [""], 0
    while place < len(row):
        step = 2 if row[place] == "\\" and row[place + 1 : place + 2] in string.punctuation else 1
        if row[place] == "|":
            found.append("")
        else:
            found[-1] += row[place : place + step]
        place += step
    return [cell.strip() for cell in found[1:-1]]


def rendered(cell: str) -> str:
    """The letters that a cell shows, if it has no markup."""
    return re.sub(r"\\([!-/:-@\[-`{-~])|(&\w+;)", lambda match: match[1] or html.unescape(match[2]), cell)


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_is_one_cell_and_shows_its_letters(text: str) -> None:
    (cell,) = cells(f"| {plain(text)} |")
    assert rendered(cell) == " ".join(text.split()) and not re.search(r"[<>]|(?<!\\)[*`]", cell)


@given(st.text(alphabet=st.sampled_from("ab\\|<>&;*_`[]($)\n\r #!~{}.ltgamp"), max_size=30) | st.text(max_size=30))
def test_any_text_is_one_cell(text: str) -> None:
    assert [rendered(cell) for cell in cells(f"| {plain(text)} | x |")] == [" ".join(text.split()), "x"]


def check_tables(text: str) -> None:
    """Every row of every table has as many cells as its head."""
    lines, tables = text.split("\n"), 0
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|[-:|]+\|", line):
            width, tables = line.count("|") - 1, tables + 1
            rows = [lines[number - 1]]
            while lines[number + len(rows)].startswith("|"):
                rows.append(lines[number + len(rows)])
            assert len(rows) > 1 and all(len(cells(row)) == width for row in rows), rows
    assert tables and not re.search("<(?!!?0|-| 0.0001)", text)
    assert len(lines) == len(text.splitlines()) + 1


def of_runs(text: str, folder: Path) -> str:
    settings = {"optim_args": {text: text}, "precondition_exclude": [text], "base_optim_args": {"betas": [0.9, 0.99]}}
    first, second = run("lamb", text, 0.1, [3.0, 2.0]), run(text, "lamb", 0.1, [3.0, 1.0], config=settings)
    first.final |= {text: 0.5}
    found = [first, second, run(text, "lamb", 0.2, [3.0, 2.5], config=settings)]
    report.save(report.figure(found, text), folder / "a.png")
    return report.table(found)


def of_glue(text: str, _: Path) -> str:
    model = {"name": text, "hidden_size": 16}
    return glue_table.table([
        *(record("rte", {"accuracy": 0.6}, text, seed, model=model, optim_args={text: text}) for seed in (0, 1)),
        record("rte", {"accuracy": 0.7}, text, model=model, num_train_epochs=text),
    ])  # fmt: skip


def of_reproduction(text: str, folder: Path) -> str:
    made = run("lamb", "lamb", 0.1, [3.0, 2.0])
    made.name, made.optimizer, made.config["global_batch_size"] = text, text, text
    for part in ("phase1", "phase2", "squad"):
        (folder / part).mkdir(parents=True)
        (folder / part / "x.json").write_text(json.dumps(stored(made)))
    return reproduce_table.text_of(folder)


def of_search(text: str, folder: Path) -> str:
    more: dict[str, Any] = {"search": {"study": text}, "config": {"per_device_train_batch_size": text}}
    params = {"learning_rate": 0.02, "optim_args.x": text}
    runs = [*chosen("muon", {0.01: 2.0, 0.02: 1.9, 0.04: 2.1}, **more), *confirmed("muon", [1.9, 1.8], **more)]
    for method in (text, f"{text}_muon"):
        runs += chosen("mkor_muon", {0.02: 1.9}, **{**more, "search": {"study": text, "space": method}})
        runs += confirmed("mkor_muon", [1.7, 1.75], device=text, **{**more, "search": {"study": text, "space": method,
                                                                               "params": params}})  # fmt: skip
    for number, each in enumerate(runs):
        (folder / f"{number}.json").write_text(json.dumps(stored(each)))
    (folder / "z.json").write_text(json.dumps(stored(run("lamb", text, 0.1, [3.0]))))
    report.save(comparison.figures(folder, text)[0], folder / "a.png")
    return comparison.text_of(folder)


def of_bench(text: str, _: Path) -> str:
    reference = {"adamw_foreach_seconds": 0.2, "adamw_fused_ratio": 0.5}
    row = {"optimizer": text, "base": "lamb", "set": {text: text}, "step_ratio": 1.0}
    results = {"preset": text, "parameters": 1, "device": text, "reference": reference, "rows": [row]}
    return bench_report._table(results)


def stored(made: RunRecord) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(made)


REPORTS: dict[str, Callable[[str, Path], str]] = {
    "runs": of_runs, "glue": of_glue, "reproduction": of_reproduction, "search": of_search, "bench": of_bench
}  # fmt: skip


@pytest.mark.parametrize("kind", REPORTS)
@pytest.mark.parametrize("text", [TEXTS[0], "<b>|\n| --- |\n</b>", "$a$|\\", "_x_*y*[a](b)`c`"])
def test_no_name_breaks_a_table(tmp_path: Path, kind: str, text: str) -> None:
    check_tables(REPORTS[kind](text, tmp_path))


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut": lambda run: json.dumps(run)[:200],
    "empty": lambda run: "",
    "nested": lambda run: "[" * 200_000,
    "digits": lambda run: json.dumps(run).replace('"seed": 0', '"seed": ' + "1" * 5000),
    "twice": lambda run: json.dumps(run).replace("{", '{"seed": 1, ', 1),
    "list": lambda run: json.dumps([run]),
    "bytes": lambda run: json.dumps(run).encode().replace(b"completed", b"comple\xffed"),
    "status": lambda run: json.dumps(run | {"status": "complxted"}),
    **{f"{key} is {value!r}": lambda run, key=key, value=value: json.dumps(run | {key: value})  # type: ignore[misc]
       for key in ("name", "optimizer", "base", "config", "seed", "seconds", "curve", "final", "search", "health")
       for value in ([1], 1.5 if key != "seconds" else "1", None)},
    **{f"config.{key}": lambda run, key=key: json.dumps(run | {"config": run["config"] | {key: "x"}})  # type: ignore[misc]
       for key in ("data", "model", "optim_args", "learning_rate", "max_steps", "precondition_exclude")},
    **{f"point is {point}": lambda run, point=point: json.dumps(run | {"curve": [point]})  # type: ignore[misc]
       for point in (1, {}, {"step": "1"}, {"step": 1, "eval_loss": "x"}, {"step": 1, "seconds": [1]},
                     {"step": 1, "health": 1}, {"step": 1, "health": {"cos_min": "x"}})},
    **{f"route is {route}": lambda run, route=route: json.dumps(run | {"routing": {"mkor": route}})  # type: ignore[misc]
       for route in (1, {}, {"parameters": 1}, {"parameters": "1", "first": []}, {"parameters": 1, "first": [1]})},
    "loss": lambda run: json.dumps(run | {"final": {"eval_loss": "1.0"}}),
    "infinite": lambda run: json.dumps(run | {"final": {"eval_loss": float("inf")}}),
    "search": lambda run: json.dumps(run | {"search": {"study": "x"}}),
    "stage": lambda run: json.dumps(run | {"search": {**SEARCH, "stage": "wjde"}}),
    "rate": lambda run: json.dumps(run | {"search": {**SEARCH, "params": {"learning_rate": "x"}}}),
}  # fmt: skip
SEARCH = {"study": "s", "space": "m", "stage": "wide", "number": 0, "trials": 1, "params": {"learning_rate": 0.1}}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    good = run("lamb", "lamb", 0.1, [3.0, 2.0])
    good.write(tmp_path)
    content = DAMAGE[damage](json.loads((tmp_path / f"{good.name}.json").read_text()))
    (tmp_path / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"bad\.json: ") as error:
        read_runs(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    _, text = report_of(tmp_path)
    table, _, note = text.rpartition("\nDamaged, and passed over: bad.json (")
    assert table == report.table([good]) and note.endswith(").\n") and note.count("\n") == 1
    (tmp_path / f"{good.name}.json").unlink()
    with pytest.raises(ValueError, match=r"bad\.json: "):
        report_of(tmp_path)


def test_every_report_passes_damaged_files_over(tmp_path: Path) -> None:
    for kind in ("search", "reproduction"):
        (tmp_path / kind).mkdir()
        REPORTS[kind]("x", tmp_path / kind)
    record("rte", {"accuracy": 0.6}).write(tmp_path / "glue")
    (tmp_path / "bench").mkdir()
    bench = Path(__file__).parents[2] / "results" / "bench"
    for file in bench.glob("*.json"):
        (tmp_path / "bench" / file.name).write_text(file.read_text())
    whole = {kind: report_of(tmp_path / kind)[1] for kind in ("search", "reproduction", "glue", "bench")}
    for kind, text in whole.items():
        folder = tmp_path / kind / "phase2" if kind == "reproduction" else tmp_path / kind
        for name, content in (("a", "{"), ("b", "[]"), ("c", '{"kind": "bench"}'), ("d", '{"search": {"study": 1}}')):
            (folder / f"bad-{name}.json").write_text(content)
        (folder / "bad-link.json").symlink_to("nowhere")
        (folder / "bad-folder.json").mkdir()
        now = report_of(tmp_path / kind)[1]
        assert now.startswith(text) and now.count("Damaged, and passed over: ") == 1
        names = re.findall(r"bad-\w+\.json", now[len(text) :])
        assert len(names) >= (4 if kind == "bench" else 6), now[len(text) :]


def test_older_runs_say_less(tmp_path: Path) -> None:
    """Each key that is not needed may be missing, and so may the numbers of a curve's points but for the step."""
    made = run("mkor", "lamb", 0.1, [3.0, 2.0])
    whole = json.loads(made.write(tmp_path).read_text())
    needed = {"name", "optimizer", "base", "config", "seed", "status"}
    for key in whole.keys() - needed:
        (tmp_path / f"{made.name}.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        check_tables(report_of(tmp_path)[1])
    least = {key: whole[key] for key in needed} | {"config": {}, "curve": [{"step": 0}, {"step": 5, "eval_loss": 2.0}]}
    (tmp_path / f"{made.name}.json").write_text(json.dumps(least))
    check_tables(report_of(tmp_path)[1])
    (found,) = read_runs(tmp_path)
    assert found.curve[1] == {"step": 5, "seconds": None, "train_loss": None, "eval_loss": 2.0}
    report.save(report.figure([found]), tmp_path / "a.png")
    for part in ("phase1", "phase2", "squad", "glue/mkor-lamb-0.1"):
        (tmp_path / "old" / part).mkdir(parents=True)
        (tmp_path / "old" / part / "x.json").write_text(json.dumps(least))
    assert "5 steps of ? x ? tokens" in report_of(tmp_path / "old")[1].replace("0 steps", "5 steps")

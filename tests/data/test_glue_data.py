"""Reading GLUE: every layout, every way a file can be wrong, and the real files where they are."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_soo.glue.data import GlueDataArguments, load_part
from hf_soo.glue.files import Examples, read_examples
from hf_soo.glue.tasks import TASKS, find_tasks
from tests.tasks.glue_cases import write_archive, write_tests

REAL = Path(os.environ.get("HF_SOO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "glue"
PAIR_HEADER = "index\tsentence1\tsentence2\tlabel\n"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_archive(tmp_path_factory.mktemp("glue"))
    write_tests(root)
    return root


def load(task: str, part: str, **given: Any) -> Examples:
    found = load_part(TASKS[task], part, GlueDataArguments(**given))
    assert found is not None
    return found


def wrong(task: str, file: Path, content: str | bytes, message: str) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        read_examples(file, TASKS[task], labelled=True)
    assert message.format(file=file) in str(raised.value) and "\n" not in str(raised.value)


def test_names() -> None:
    for spelling in ("SST-2", "sst2", "sst_2", " Sst2"):
        assert find_tasks([spelling])[0].name == "sst2"
    assert [task.name for task in find_tasks(["mrpc,STS-B", "rte", "MRPC"])] == ["mrpc", "stsb", "rte"]
    assert [task.name for task in find_tasks(["all"])] == list(TASKS) and len(TASKS) == 9
    with pytest.raises(ValueError, match=r"'mprc' is no task of GLUE; did you mean 'mrpc'\? Use cola"):
        find_tasks(["mprc"])
    with pytest.raises(ValueError, match="task_name is missing"):
        find_tasks([","])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_in_the_archives_layout(archive: Path, name: str) -> None:
    task = TASKS[name]
    train = load(name, "train", data_dir=str(archive))
    dev = load(name, task.evaluation_parts[0], data_dir=str(archive))
    assert (len(train), len(dev), len(train.texts)) == (48, 20, len(task.texts))
    assert train.source.startswith(f"{task.title}/train.")
    expected = [0.0, 4.625, 0.25, 4.5] if name == "stsb" else [0, 1, 0, 1]
    assert train.labels is not None and train.labels[:4] == expected
    if name == "mrpc":  # a quote is text
        assert all(text.startswith('" ') for text in train.texts[0])


def test_test_parts_have_no_labels(archive: Path) -> None:
    for name, part in (("mrpc", "test"), ("stsb", "test"), ("mnli", "test_mismatched")):
        found = load(name, part, data_dir=str(archive))
        assert (len(found), found.labels) == (5, None)
    mismatched = load("mnli", "validation_mismatched", data_dir=str(archive))
    assert mismatched.labels == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "place", ["MNLI/diagnostic.tsv", "MNLI/AX.tsv", "AX/AX.tsv", "AX/test.tsv", "AX.tsv", "diagnostic/diagnostic.tsv"]
)
def test_the_diagnostic_set_is_a_test_part_of_mnli(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MNLI").mkdir()
    given = GlueDataArguments(data_dir=str(tmp_path))
    assert TASKS["mnli"].test_parts == ("test_matched", "test_mismatched", "diagnostic")
    assert TASKS["rte"].test_parts == ("test",)
    with caplog.at_level(logging.WARNING):
        assert load_part(TASKS["mnli"], "diagnostic", given) is None
    assert "has no diagnostic.tsv: no AX.tsv for the server" in caplog.text
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("index\tsentence1\tsentence2\n0\tA cat.\tNo cat.\n1\tA dog.\tA dog.\n")
    assert load("mnli", "diagnostic", data_dir=str(tmp_path)).texts == (["A cat.", "A dog."], ["No cat.", "A dog."])
    (tmp_path / "own.tsv").write_text("premise\thypothesis\na\tb\n")
    assert load_part(TASKS["mnli"], "diagnostic", GlueDataArguments(test_file=str(tmp_path / "own.tsv"))) is None
    asked: list[Any] = []

    def of_the_hub(name: str, configuration: str, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        if name == "other/copy":
            raise ValueError("no such configuration")
        return datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [-1]})

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    found = load("mnli", "diagnostic")
    assert (found.texts, found.labels, asked) == ((["a"], ["b"]), None, [("nyu-mll/glue", "ax", "test")])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_part(TASKS["mnli"], "diagnostic", GlueDataArguments(dataset_name="other/copy")) is None
    assert "no AX.tsv for the server: dataset_name='other/copy' (ax, test) cannot be loaded" in caplog.text


def test_own_files_in_all_formats(tmp_path: Path) -> None:
    rows = [{"sentence1": 'a "b", c', "sentence2": "d", "label": 0}, {"sentence1": "e", "sentence2": "f", "label": 1}]
    (tmp_path / "x.csv").write_text('sentence1,sentence2,label\n"a ""b"", c",d,entailment\ne,f,not_entailment\n')
    (tmp_path / "x.tsv").write_text('label\tsentence1\tsentence2\r\n0\ta "b", c\td\r\n1\te\tf\r\n')
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    for name in ("x.csv", "x.tsv", "x.json", "lines.json", "x.jsonl"):
        found = load("rte", "validation", validation_file=str(tmp_path / name))
        assert (found.texts, found.labels) == ((['a "b", c', "e"], ["d", "f"]), [0, 1]), name
    with pytest.raises(ValueError, match="train_file is missing: validation_file given without it"):
        load("rte", "train", validation_file=str(tmp_path / "x.csv"))


def test_head_is_the_first_examples(archive: Path) -> None:
    train = load("sst2", "train", data_dir=str(archive))
    head = train.head(3)
    assert (head.texts[0], head.labels) == (train.texts[0][:3], [0, 1, 0]) and len(train.head(None)) == 48


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("rte", "x.tsv", PAIR_HEADER + "0\ta\tb\tentailment\n1\ta\tb\n", "{file}, line 3: 3 columns, the header has 4"),
        ("rte", "x.tsv", PAIR_HEADER + "0\ta\tb\tc\tentailment\n", "{file}, line 2: 5 columns, the header has 4"),
        ("cola", "x.tsv", "gj04\t1\t\tgood\ngj04\t1\tgood\n", "{file}, line 2: 3 columns, the header has 4"),
        ("rte", "x.tsv", "index\tlabel\tsentence1\tlabel\n", "{file}: the header has the column 'label' twice"),
        ("sst2", "x.jsonl", '{"sentence": "\\ud800", "label": 1}', "line 1: sentence is '\\ud800', which is no text"),
        ("rte", "x.tsv", PAIR_HEADER + "0\ta\tb\tmaybe\n", "{file}, line 2: the label 'maybe' is none of RTE's: "
                                                          "entailment, not_entailment or 0 to 1."),
        ("sst2", "x.tsv", "sentence\tlabel\na\t2\n", "{file}, line 2: the label '2' is none of SST-2's: 0, 1."),
        ("stsb", "x.tsv", "sentence1\tsentence2\tscore\na\tb\tlow\n", "{file}, line 2: the score 'low' is no number"),
        ("stsb", "x.tsv", "sentence1\tsentence2\tscore\na\tb\t5.2\n", "the score '5.2' is no number from 0 to 5"),
        ("stsb", "x.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", "the score 'nan' is no number from 0 to 5"),
        ("stsb", "x.tsv", "sentence1\tsentence2\tscore\na\tb\t0_3\n", "the score '0_3' is no number from 0 to 5"),
        ("rte", "x.json", "[" * 200_000, "{file}, line 1: no JSON (too deep a nest)"),
        ("rte", "x.json", '[{"a":\n' + "7" * 5000 + "}]", "{file}, line 2: no JSON (Exceeds the limit"),
        ("rte", "x.jsonl", "\n" + "7" * 5000, "{file}, line 2: no JSON (Exceeds the limit"),
        ("rte", "x.jsonl", '\n{"a": 1, "a": 2}', "{file}, line 2: no JSON (key 'a' stands twice in an object)"),
        ("mrpc", "x.tsv", "Quality\t#1 String\tother\n1\ta\tb\n", "{file}, line 2: no 'sentence2' among the columns "
                                                                 "Quality, #1 String, other; MRPC needs sentence1"),
        ("sst2", "x.tsv", "sentence\tlabel\n", "{file} holds no examples; SST-2 needs at least one."),
        ("sst2", "x.tsv", "", "{file} holds no examples"),
        ("sst2", "x.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", "is not UTF-8: byte 0xe9 at offset 18"),
        ("sst2", "x.csv", 'sentence,label\n"a,1\n', "{file}, line 2: no CSV"),
        ("sst2", "x.json", '{"0": {"sentence":\n}}', "{file}, line 2: no JSON"),
        ("sst2", "x.json", '{"0": {"sentence": "a", "label": 7}}', "{file}, entry 0: the label 7 is none of SST-2's"),
        ("sst2", "x.json", '[{"sentence": 5, "label": 1}]', "{file}, entry 0: sentence is 5, which is no text"),
        ("sst2", "x.json", '["a"]', "{file}, entry 0: a str, not an object"),
        ("sst2", "x.json", "3", "{file} holds a int; a list of objects is needed"),
        ("sst2", "x.jsonl", '{"sentence": "a", "label": 1}\n{', "{file}, line 2: no JSON"),
        ("sst2", "x.parquet", "", "{file} ends in '.parquet'; readable are .tsv, .csv"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_line(
    tmp_path: Path, task: str, name: str, content: str | bytes, message: str
) -> None:
    wrong(task, tmp_path / name, content, message)


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
def test_broken_rows_and_empty_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """One row in a thousand may be broken, where there are labels; predictions must keep the rows of their file."""
    separator = {"x.tsv": "\t", "x.csv": ","}[name]
    good = [separator.join((f"a{i}", "b", "0")) for i in range(1998)]
    lines = [
        separator.join(("question1", "question2", "label")),
        *good[:7],
        "",
        "cut",
        *good[7:],
        separator * 3,
        "",
        "",
    ]
    file = tmp_path / name
    file.write_text("\n".join(lines))
    found = read_examples(file, TASKS["qqp"], labelled=True)
    assert found.texts[0] == [f"a{i}" for i in range(1998)]
    assert f"left out 2 of 2000 rows with too few or too many columns: {file}, line 10: 1 columns" in caplog.text
    with pytest.raises(ValueError, match=r"line 10: 1 columns, the header has 3 \(.*\); 2 of 2000 rows are so"):
        read_examples(file, TASKS["qqp"], labelled=False)
    file.write_text("\n".join([*lines, "cut"]))
    with pytest.raises(ValueError, match="3 of 2001 rows are so: fix or delete them"):
        read_examples(file, TASKS["qqp"], labelled=True)


def test_places_that_are_not_there(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    for given, message in (
        ({"data_dir": str(tmp_path / "none")}, "is no folder; give the one that holds RTE/train.tsv"),
        ({"data_dir": str(tmp_path)}, "RTE has no train.tsv"),
        ({"data_dir": str(archive / "CoLA")}, "has no folder RTE; it has no folders"),
        ({"train_file": str(tmp_path / "x.tsv")}, "x.tsv is no file; RTE needs it"),
    ):
        with pytest.raises(ValueError, match=message):
            load("rte", "train", **given)


def test_empty_texts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na\t1\n\t0\n \t0\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_examples(tmp_path / "x.tsv", TASKS["sst2"], labelled=True)) == 3
    assert f"2 of 3 rows have an empty text; the first is {tmp_path / 'x.tsv'}, line 3" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_eval_samples": 0}, "max_eval_samples=0 is not allowed; give a whole number >= 1"),
        ({"max_seq_length": 4}, "max_seq_length=4 is not allowed; give a whole number >= 8"),
        ({"data_dir": "x", "test_file": "y"}, "data_dir='x' and test_file exclude each other"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlueDataArguments(**given)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stored(name: str, configuration: str, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        label = -1 if split == "test" else 1
        return datasets.Dataset.from_dict({"question1": ["a"], "question2": ["b"], "label": [label], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", stored)
    found = load("qqp", "validation", dataset_name="mirror/glue")
    assert (found.texts, found.labels, found.source) == ((["a"], ["b"]), [1], "mirror/glue")
    assert load("qqp", "test").labels is None
    assert asked == [("mirror/glue", "qqp", "validation"), ("nyu-mll/glue", "qqp", "test")]
    with pytest.raises(ValueError, match="nyu-mll/glue, sst2, train, row 0: no 'sentence' among the columns question1"):
        load("sst2", "train")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nyu-mll/glue' .* cannot be loaded: .*give --data_dir for local files"):
        load("rte", "train")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no GLUE files under {REAL}; set HF_SOO_DATA")
def test_the_real_files() -> None:
    """All rows of all local files are readable; where they are the official parts, so are their numbers."""
    for name in ("cola", "mrpc", "rte", "stsb", "sst2"):
        task = TASKS[name]
        sizes = [len(load(name, part, data_dir=str(REAL))) for part in ("train", "validation")]
        assert sizes == [task.train_samples, task.dev_samples], name
    for name in ("mnli", "qnli", "qqp"):
        parts = ("train", TASKS[name].evaluation_parts[0])
        assert [len(load(name, part, data_dir=str(REAL))) for part in parts] == [8999, 1000]
    paraphrases = load("mrpc", "validation", data_dir=str(REAL))
    assert paraphrases.texts[1][0].startswith('" The foodservice pie business')
    assert sum(paraphrases.labels or []) == 279

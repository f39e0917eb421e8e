"""Damaged files of every format that is read: each ends in the right data, or in one line that names the file.

Nothing is drawn at run time: the seed of each of the 500 damages of a format is its number.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_soo.bert.data.folder import load_prepared
from hf_soo.bert.data.hdf5 import RowWorker, hdf5_files, row_blocks
from hf_soo.bert.data.prepare import PrepareConfig, prepare
from hf_soo.bert.data.wordpiece import SPECIAL_TOKENS, SpecialIds, read_vocabulary
from hf_soo.cli import report_of
from hf_soo.glue.files import read_examples
from hf_soo.glue.tasks import TASKS
from hf_soo.runs.record import RunRecord, read_run
from hf_soo.squad.files import QuestionSet
from hf_soo.squad.score import _read
from hf_soo.text.cleaning import Cleaning
from hf_soo.text.corpus import Corpus
from tests.data.test_hdf5 import make_pairs, nvidia, unmasked

COUNT = 500
TEXTS = [f"The first sentence of {i} is hére. It has another one.\nAnd it ended with {i * i}." for i in range(8)]


def damaged(content: bytes, number: int) -> bytes:
    """A bit, a byte, an end, a piece or a sector that is not what was written."""
    draw, data = random.Random(number), bytearray(content)
    place, length = draw.randrange(len(data)), draw.randint(1, 40)
    kind = draw.choice(("bit", "byte", "cut", "gone", "twice", "zeros", "more", "swapped"))
    if kind == "bit":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[place] = draw.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "gone":
        del data[place : place + length]
    elif kind == "twice":
        data[place:place] = data[place : place + length]
    elif kind == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "more":
        data[place:place] = draw.randbytes(draw.randint(1, 4))
    else:
        other = draw.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    return bytes(data)


# Of each format: the file, what reads it, and what its bytes say by another, simpler way; None: they say nothing.
Read = Callable[[Path], Any]
Says = Callable[[bytes], Any]


def wiki() -> bytes:
    documents = (
        f'<doc id="{i}" url="?curid={i}" title="T {i}">\nT {i}\n\n{text}\n</doc>\n' for i, text in enumerate(TEXTS)
    )
    return "".join(documents).encode()


def wiki_says(content: bytes) -> list[str] | None:
    documents, lines = [], None
    for line in content.decode().split("\n"):
        if line.startswith("<doc "):
            if lines is not None:
                return None
            lines = [line]
        elif line.startswith("</doc>") and lines is not None:
            head, *lines = [each for each in lines if each.strip()]
            title = head.partition(' title="')[2].rpartition('">')[0] if ' title="' in head and '">' in head else None
            documents.append("\n".join(lines[1:] if lines and title in (None, lines[0].strip()) else lines))
            lines = None
        elif lines is not None:
            lines.append(line.rstrip("\r"))
        elif line.strip():
            return None
    return None if lines is not None else [text for text in documents if text]


def jsonl() -> bytes:
    rows = ({"id": i, "text": text, "title": f"T {i}"} for i, text in enumerate(TEXTS))
    return "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()


def jsonl_says(content: bytes) -> list[str]:
    rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    texts = ["\n".join(line for line in (row["text"] or "").splitlines() if line.strip()) for row in rows]
    return [text for text in texts if text]


def parquet() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [f"{text} {i}" for i in range(8) for text in TEXTS], "title": ["T"] * 64})
    pq.write_table(table, sink, row_group_size=20, write_page_checksum=True)
    return sink.getvalue()


def squad() -> bytes:
    answers = [{"text": "brown fox", "answer_start": 10}]
    paragraphs = [
        {"context": f"The quick brown fox jumps over dog {p}.", "qas": [
            {"id": f"q{p}{i}", "question": "Who jümps?", "is_impossible": i == 1, "answers": [] if i == 1 else answers}
            for i in range(3)]} for p in range(3)]  # fmt: skip
    return json.dumps(
        {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}, ensure_ascii=False
    ).encode()


def squad_says(content: bytes) -> list[tuple[Any, ...]]:
    paragraphs = (each for article in json.loads(content)["data"] for each in article["paragraphs"])
    return [
        (qa["id"], qa["question"].strip(), each["context"],
         None if qa.get("answers") is None and "answers" not in qa else
         tuple((answer["answer_start"], answer["text"]) for answer in qa["answers"]))
        for each in paragraphs for qa in each["qas"]
    ]  # fmt: skip


def tsv() -> bytes:
    rows = (f"{i}\tA séntence {i}.\tAnother one {i}.\t{('entailment', 'not_entailment')[i % 2]}\n" for i in range(12))
    return ("index\tsentence1\tsentence2\tlabel\n" + "".join(rows)).encode()


def tsv_says(content: bytes) -> tuple[Any, ...]:
    head, *rows = [line.rstrip("\r").split("\t") for line in content.decode().split("\n") if line.strip("\r")]
    labels = {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}
    columns = [[row[head.index(name)] for row in rows] for name in ("sentence1", "sentence2", "label")]
    return columns[0], columns[1], [labels[label.strip()] for label in columns[2]]


def hdf5(columns: dict[str, Any]) -> bytes:
    h5py = pytest.importorskip("h5py")
    sink = io.BytesIO()
    with h5py.File(sink, "w") as shard:
        for name, values in columns.items():
            shard.create_dataset(name, data=values, compression="gzip", fletcher32=True)
    return sink.getvalue()


def pairs_of(path: Path) -> list[Any]:
    vocabulary = path.with_name("v.txt")
    vocabulary.write_text("\n".join([*SPECIAL_TOKENS, *(f"w{i}" for i in range(5, 30))]))
    work = RowWorker(SpecialIds.of(vocabulary), max_seq_length=16, eval_share=0.0, seed=0)
    made = [split.pairs for block in row_blocks(hdf5_files(str(path))) for split in work(block)]
    return [(p.input_ids.tolist(), p.segment_b_start.tolist(), p.next_sentence_label.tolist()) for p in made]


def questions(path: Path) -> list[tuple[Any, ...]]:
    return [(each.id, each.question, each.context, each.answers) for each in QuestionSet.read(path).questions]


def examples(path: Path) -> tuple[Any, ...]:
    found = read_examples(path, TASKS["rte"], labelled=True)
    return (*found.texts, found.labels)


def texts(path: Path) -> list[str]:
    return list(Corpus(str(path), cleaning=Cleaning(keep_headings=True)).texts())


SAME = None  # nothing but what was written is right: there are checksums
FORMATS: dict[str, tuple[str, Callable[[], bytes], Read, Says | None]] = {
    "wiki": ("wiki_00", wiki, texts, wiki_says),
    "jsonl": ("a.jsonl", jsonl, texts, jsonl_says),
    "parquet": ("a.parquet", parquet, texts, SAME),
    "squad": ("a.json", squad, questions, squad_says),
    "tsv": ("a.tsv", tsv, examples, tsv_says),
    "nvidia": ("a.hdf5", lambda: hdf5(nvidia(make_pairs(30))), pairs_of, SAME),
    "unmasked": ("a.h5", lambda: hdf5(unmasked(make_pairs(30))), pairs_of, SAME),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_data_are_named_or_right(tmp_path: Path, kind: str) -> None:
    name, write, read, says = FORMATS[kind]
    content, path = write(), tmp_path / name
    path.write_bytes(content)
    right = read(path)
    assert says is None or says(content) == right
    ends: Counter[str] = Counter()
    for number in range(COUNT):
        bad = damaged(content, number)
        path.write_bytes(bad)
        try:
            found = read(path)
        except ValueError as error:
            message = str(error)
            assert name in message and "\n" not in message and len(message) < 500, (number, message)
            ends["named"] += 1
        else:
            assert found == (right if says is None else says(bad)), number
            ends["same" if found == right else "other"] += 1
    assert ends["named"] > COUNT // 3, ends


ROWS = [{"sentence1": f'A "q", séntence {i}.', "sentence2": f"b {i}", "label": i % 2} for i in range(10)]


def comma_separated() -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return sink.getvalue().encode()


def of_task(name: str) -> Read:
    return lambda path: read_examples(path, TASKS[name], labelled=True)


# Formats in which another text is right too, so that only how reading ends is looked at.
FURTHER: dict[str, tuple[bytes, Read]] = {
    "a.csv": (comma_separated(), of_task("rte")),
    "a.json": (json.dumps({str(i): row for i, row in enumerate(ROWS)}).encode(), of_task("rte")),
    "a.jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS).encode(), of_task("rte")),
    "scores.tsv": (b"sentence1\tsentence2\tscore\n" + b"a\tb\t0.5\nc\td\t3.2\n" * 5, of_task("stsb")),
    "cola.tsv": (b"".join(b"gj04\t%d\t\tA sentence.\n" % (i % 2) for i in range(9)), of_task("cola")),
    "wikitext.txt": (" = T = \n\n One . \n\n = Two = \n text é. \n".encode() * 3, texts),
    "wiki_00": (json.dumps({"url": "?curid=1", "title": "T", "text": "T\n\nHistory.\nIt is."}).encode(), texts),
    "answers.json": (json.dumps({f"q{i}": "a" for i in range(20)}).encode(), lambda path: _read(str(path), str, "")),
    "odds.json": (json.dumps({f"q{i}": i / 7 for i in range(20)}).encode(), lambda path: _read(str(path), float, "")),
    "vocab.txt": ("\n".join([*SPECIAL_TOKENS, *"abcdefgé"]).encode(), read_vocabulary),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_damaged_files_of_further_formats_end_well(tmp_path: Path, name: str) -> None:
    content, read = FURTHER[name]
    path, ends = tmp_path / name, Counter[str]()
    for number in range(COUNT):
        path.write_bytes(damaged(content, number))
        try:
            read(path)
            ends["read"] += 1
        except ValueError as error:
            ends["named"] += 1
            message = str(error)
            assert name in message and "\n" not in message and len(message) < 500, (number, message)
    assert min(ends["read"], ends["named"]) > COUNT // 20, ends


def test_damaged_prepared_folders_are_named(tmp_path: Path) -> None:
    """Any file of it, with its checksums compared; the manifest's own numbers are what they are compared with."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"{text} " * 3 for text in TEXTS for _ in range(3)), encoding="utf-8")
    settings = {"vocab_size": 120, "keep_duplicates": True, "eval_documents": 0.2, "max_seq_length": 32}
    prepare(PrepareConfig(source=str(tmp_path / "a.txt"), output=str(tmp_path / "out"), **settings))  # type: ignore[arg-type]
    files = sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
    right = load_prepared(tmp_path / "out", verify=True)
    rows = {split: right[split].to_list() for split in ("train", "eval")}  # type: ignore[literal-required]
    named = 0
    for number in range(COUNT):
        file = files[number % len(files)]
        content = file.read_bytes()
        file.write_bytes(damaged(content, number))
        try:
            found = load_prepared(tmp_path / "out", verify=True)
        except ValueError as error:
            named += 1
            message = str(error)
            assert str(tmp_path / "out") in message and "\n" not in message and len(message) < 500, (number, message)
        else:
            assert file.name == "manifest.json" or file.read_bytes() == content, number
            assert {split: found[split].to_list() for split in rows} == rows, number  # type: ignore[literal-required]
        file.write_bytes(content)
    assert named > COUNT // 2


def stored() -> RunRecord:
    record = RunRecord("good", "mkor", "lamb", {"learning_rate": 0.1, "max_steps": 9, "data": {"seq_length": 8}}, 0)
    record.status, record.steps, record.seconds, record.final = "completed", 9, 1.5, {"eval_loss": 2.25}
    points = ((1, 0.5, 3.0, None), (9, 1.5, 2.5, 2.25))
    record.curve = [dict(zip(("step", "seconds", "train_loss", "eval_loss"), point, strict=True)) for point in points]
    return record


@pytest.mark.parametrize("search", [False, True])
def test_damaged_runs_are_named_or_reported(tmp_path: Path, search: bool) -> None:
    made = stored()
    if search:
        params = {"learning_rate": 0.1}
        made.search = {"study": "s", "space": "m", "stage": "wide", "number": 0, "trials": 1, "params": params}
    made.write(tmp_path)
    content = made.write(tmp_path / "other").read_bytes()
    path, ends = tmp_path / "bad.json", Counter[str]()
    for number in range(COUNT // 2):
        bad = damaged(content, number)
        path.write_bytes(bad)
        try:
            run = read_run(path)
        except ValueError as error:
            ends["named"] += 1
            message = str(error)
            assert "bad.json" in message and "\n" not in message and len(message) < 500, (number, message)
            _, text = report_of(tmp_path)
            assert "\nDamaged, and passed over: bad.json (" in text, (number, text)
        else:
            ends["read"] += 1
            said = json.loads(bad)
            assert (run.name, run.seed, run.config) == (said["name"], said["seed"], said["config"]), number
            try:
                report_of(tmp_path)
            except ValueError as error:  # of other settings than the good one
                assert run.name in str(error) and "\n" not in str(error), (number, error)
    assert min(ends["named"], ends["read"]) > COUNT // 20, ends

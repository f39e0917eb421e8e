"""The prepared folder: content, reproducibility, and that nothing unfinished is ever taken for a whole one."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest

from hf_soo.bert.data import prepare as pretraining_data
from hf_soo.bert.data import workers as sharding
from hf_soo.bert.data.folder import load_prepared
from hf_soo.bert.data.prepare import PrepareConfig, prepare
from hf_soo.bert.data.wordpiece import SpecialIds, load_tokenizer
from hf_soo.bert.masking import PretrainingCollator
from hf_soo.text.corpus import Corpus

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prepare_pretraining.py"
DATA = Path(os.environ.get("HF_SOO_DATA", ROOT.parent / "shared" / "data"))
COLUMNS = ["input_ids", "segment_b_start", "next_sentence_label", "length", "example_id"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of 90 documents with 1 to 12 sentences of 3 to 30 words from a list of 200."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), size=rng.integers(2, 8))) for _ in range(200)]

    def sentence() -> str:
        return " ".join(rng.choice(words, size=rng.integers(3, 31))).capitalize() + "."

    documents = ["\n".join(sentence() for _ in range(rng.integers(1, 13))) for _ in range(90)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return str(tmp_path / "text.txt")


def config(source: str, output: Path, **changes: Any) -> PrepareConfig:
    settings = {"vocab_size": 300, "max_seq_length": 48, "eval_documents": 0.2, "min_document_characters": 1, **changes}
    return PrepareConfig(source=source, output=str(output), **settings)


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare_pretraining", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_pretraining.py", *flags])
    return int(script.main())


def test_folder_holds_what_it_promises(text: str, tmp_path: Path) -> None:
    manifest = prepare(config(text, tmp_path / "out"))
    data = load_prepared(tmp_path / "out")
    assert data["manifest"] == manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    ids = SpecialIds.of(data["vocab_file"])
    assert manifest["vocab_size"] == ids.size == 300
    assert manifest["counts"]["train"]["documents"] == 72 and manifest["counts"]["eval"]["documents"] == 18
    for split in ("train", "eval"):
        rows, counts = data[split], manifest["counts"][split]
        assert rows.column_names == COLUMNS
        assert [str(rows.features[name].dtype) for name in COLUMNS[1:]] == ["int32", "int8", "int32", "int32"]
        assert rows.features["input_ids"].feature.dtype == "int32"
        assert counts["examples"] == len(rows) and counts["tokens"] == sum(map(len, rows["input_ids"]))
        assert counts["random_next"] == sum(rows["next_sentence_label"])
        for row in rows:
            tokens, start = row["input_ids"], row["segment_b_start"]
            assert len(tokens) <= 48 and ids.mask not in tokens and ids.pad not in tokens
            assert [tokens[0], tokens[start - 1], tokens[-1]] == [ids.cls, ids.sep, ids.sep]
    every = [*data["train"]["example_id"], *data["eval"]["example_id"]]
    assert sorted(every) == list(range(len(every)))
    batch = PretrainingCollator(ids)([data["train"][i] for i in range(4)])
    assert batch["labels"].shape == (4, 20)


def test_evaluation_documents_are_not_trained_on(tmp_path: Path) -> None:
    documents = [f"Word{i} alone.\nWord{i} again." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    prepare(config(str(tmp_path / "a.txt"), tmp_path / "out", eval_documents=0.25, vocab_size=400))
    data = load_prepared(tmp_path / "out")
    tokenizer = load_tokenizer(data["vocab_file"])
    texts = {s: [tokenizer.decode(ids) for ids in data[s]["input_ids"]] for s in ("train", "eval")}  # type: ignore[literal-required]
    seen = {s: {w for t in texts[s] for w in t.split() if w.startswith("word")} for s in texts}
    assert len(seen["train"]) == 30 and len(seen["eval"]) == 10 and not seen["train"] & seen["eval"]


def content(folder: Path) -> list[Any]:
    data = load_prepared(folder)
    return [data["train"].to_dict(), data["eval"].to_dict(), Path(data["vocab_file"]).read_text()]


def test_result_depends_on_the_seed_not_on_the_processes(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "MOST_DOCUMENTS", 17)  # 72 documents: several shards for two processes
    for name, changes in {"one": {}, "two": {"num_proc": 2}, "seed": {"seed": 1}}.items():
        prepare(config(text, tmp_path / name, **changes))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert content(tmp_path / "one")[0] != content(tmp_path / "seed")[0]


@pytest.mark.parametrize(
    ("changes", "longer"),
    [
        ({"dupe_factor": 3}, 2.5),
        ({"short_seq_prob": 1.0}, 1.2),
        ({"max_seq_length": 24}, 1.2),
        ({"max_documents": 30}, 0),
    ],
)
def test_every_setting_counts(text: str, tmp_path: Path, changes: dict[str, Any], longer: float) -> None:
    before = prepare(config(text, tmp_path / "a"))["counts"]["train"]["examples"]
    after = prepare(config(text, tmp_path / "b", **changes))["counts"]["train"]["examples"]
    assert after > longer * before if longer else after < 0.5 * before


def test_shards_hold_every_document_once_and_the_last_is_not_small() -> None:
    documents = [f"document {i}" for i in range(3 * sharding.MOST_DOCUMENTS + 3)]
    shards = list(sharding.make_shards(documents, 0.0, 0))
    assert [len(shard.documents) for shard in shards] == [256, 256, 259]
    assert [document for shard in shards for document in shard.documents] == documents
    assert [shard.number for shard in shards] == [0, 1, 2]
    long = ["x" * 1_000_000] * 40
    assert [len(shard.documents) for shard in sharding.make_shards(long, 0.0, 0)] == [16, 24]


def test_documents_without_known_characters_are_left_out(text: str, tmp_path: Path) -> None:
    Path(text).write_text(Path(text).read_text() + "\n\n\u0007\n\u0001\n", encoding="utf-8")
    counts = prepare(config(text, tmp_path / "out"))["counts"]
    assert counts["train"]["documents"] + counts["eval"]["documents"] == 90


def test_given_vocabulary_is_used(text: str, tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij.", *(f"##{c}" for c in "abcdefghij")]
    (tmp_path / "v.txt").write_text("\n".join(pieces))
    manifest = prepare(config(text, tmp_path / "out", vocab=str(tmp_path / "v.txt"), vocab_size=None))
    assert manifest["vocab_size"] == 26
    assert (tmp_path / "out" / "vocab.txt").read_text().split() == pieces


def test_no_evaluation_documents(text: str, tmp_path: Path) -> None:
    prepare(config(text, tmp_path / "out", eval_documents=0.0))
    data = load_prepared(tmp_path / "out")
    assert data["eval"] is None and not (tmp_path / "out" / "eval").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": "v.txt"}, "vocab is 'v.txt' and vocab_size is 300; give one"),
        ({"eval_documents": 0.9}, "eval_documents=0.9"),
        ({"max_documents": 1}, "max_documents=1"),
        ({"num_proc": 0}, "num_proc=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_seq_length": 4}, "max_seq_length=4"),
    ],
)
def test_bad_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("embedded", Path("out"), **changes)


def test_splits_are_of_the_hub(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"split is 'test'; source '.*text.txt' is no hub data set: leave it out"):
        prepare(config(text, tmp_path / "out", split="test"))

    def refuse(path: str, name: str | None, split: str) -> None:
        raise ConnectionError(f"asked for {split}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="asked for test"):
        prepare(config("owner/name", tmp_path / "out", split="test"))


def test_too_few_evaluation_documents(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_documents=0.001 keeps nothing for evaluation; raise it"):
        prepare(config(text, tmp_path / "out", eval_documents=0.001))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_finished_output_is_kept_unless_overwrite(text: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare(config(text, output))
    with pytest.raises(ValueError, match="is a finished data set already; choose another folder or set overwrite"):
        prepare(config(text, output, seed=1))
    before = content(output)
    with pytest.raises(ValueError, match="not UTF-8"):  # a failing replacement leaves the old one
        (tmp_path / "bad.txt").write_bytes(b"\xff")
        prepare(config(str(tmp_path / "bad.txt"), output, overwrite=True))
    assert content(output) == before
    prepare(config(text, output, seed=1, overwrite=True))
    assert content(output)[0] != before[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "out", "text.txt"]


def test_other_peoples_files_are_never_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are no prepared data set"):
        prepare(config(text, tmp_path / "home", overwrite=True))
    with pytest.raises(ValueError, match=r"cannot be written to: .* is a file; give another folder"):
        prepare(config(text, Path(text), overwrite=True))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_empty_output_folder_is_filled(text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(config(text, tmp_path / "out"))
    assert load_prepared(tmp_path / "out")["manifest"]["vocab_size"] == 300


def test_unfinished_or_damaged_folder_is_not_loaded(text: str, tmp_path: Path) -> None:
    prepare(config(text, tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())

    def write(**changes: Any) -> None:
        (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    write(format=99)
    with pytest.raises(ValueError, match="has format 99, this version reads 2"):
        load_prepared(tmp_path / "out")
    counts = {**manifest["counts"], "train": {**manifest["counts"]["train"], "examples": 10**6}}
    write(counts=counts)
    with pytest.raises(ValueError, match="train examples, its manifest says 1000000"):
        load_prepared(tmp_path / "out")
    write()
    with (tmp_path / "out" / "vocab.txt").open("a") as stream:
        stream.write("more\n")
    with pytest.raises(ValueError, match=r"holds another vocab.txt than its data were made with"):
        load_prepared(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is no finished data set, it has no manifest.json"):
        load_prepared(tmp_path / "out")


def test_interrupted_run_leaves_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining_data, "_manifest", interrupt)  # all data are written, the manifest is not
    with pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.usefixtures("no_ignored_signals")
def test_ctrl_c_stops_the_script_and_its_workers(text: str, tmp_path: Path) -> None:
    big = tmp_path / "big.txt"
    big.write_text(
        (Path(text).read_text() + "\n\n") * 300, encoding="utf-8"
    )  # on a busy machine too it is not done yet
    vocabulary = tmp_path / "letters.txt"
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    flags = ["--source", str(big), "--output", str(tmp_path / "out"), "--vocab", str(vocabulary)]
    flags += ["--num_proc", "2", "--keep_duplicates"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out.partial-*/vocab.txt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted; nothing was kept" and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.txt", "letters.txt", "text.txt"]


def test_killed_worker_is_a_clear_error() -> None:
    with pytest.raises(ChildProcessError, match="one of num_proc=2 worker processes was killed"):
        list(sharding.map_in_order(os._exit, [9, 9], 2))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "from hf_soo.bert.data.workers import map_in_order\n"
        "list(map_in_order(exec, ['import time; print(1, flush=True); time.sleep(600)'], 2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.kill()
    process.communicate(timeout=60)  # the pipe ends when the last process that holds it does


def test_script_reports_counts(
    text: str, tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--source", text, "--output", str(tmp_path / "out"), "--vocab_size", "300"]
    flags += ["--eval_documents", "0.2", "--min_document_characters", "1"]
    assert run(script, monkeypatch, *flags) == 0
    counts = load_prepared(tmp_path / "out")["manifest"]["counts"]["train"]
    assert f"train: 72 documents, {counts['examples']:,} examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "missing.txt", "--output", "{tmp}/out"], "error: source 'missing.txt' is no file or folder here"),
        (["--source", "embedded", "--output", "{tmp}/text.txt/out"], "text.txt' is a file; give another folder."),
        (["--source", "embedded", "--output", "/proc/out"], "/proc/out.partial"),
        (["--source", "embedded", "--output", "{tmp}/out", "--seed", "-1"], "error: seed=-1"),
        (["--source", "embedded", "--output", "{tmp}/out", "--vocab", "{tmp}/no.txt"], "no.txt' is no file"),
    ],
)
def test_script_errors_are_one_line(
    text: str,
    tmp_path: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run(script, monkeypatch, *(flag.format(tmp=tmp_path) for flag in flags)) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_full_disk_is_one_line_and_leaves_nothing(
    text: str, tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writing past it fails as on a full disk
    try:
        status = run(script, monkeypatch, "--source", text, "--output", str(tmp_path / "out"), "--vocab_size", "300")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    errors = capfd.readouterr().err
    assert "error: [Errno 27]" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_real_wikipedia_with_the_bert_vocabulary(tmp_path: Path) -> None:
    archive, vocab = DATA / "wikipedia" / "enwiki2015_AA.tar.xz", DATA / "bert-base-uncased-vocab.txt"
    if not archive.is_file() or not vocab.is_file():
        pytest.skip(f"no {archive.name} and {vocab.name} under {DATA}; set HF_SOO_DATA")
    with tarfile.open(archive) as stream:
        member = next(member for member in stream if member.isfile())
        file = stream.extractfile(member)
        assert file is not None
        (tmp_path / "wiki_00").write_bytes(file.read())
    corpus = Corpus(str(tmp_path / "wiki_00"))
    texts = list(corpus.texts())
    assert len(texts) == 38 and corpus.counts.headings == 641
    assert not {"History.", "See also.", "Early life."} & {line for text in texts for line in text.splitlines()}
    settings = {"vocab": str(vocab), "vocab_size": None, "max_seq_length": 128, "short_seq_prob": 0.0}
    prepare(config(str(tmp_path / "wiki_00"), tmp_path / "out", keep_headings=True, **settings))
    data = load_prepared(tmp_path / "out")
    counts = data["manifest"]["counts"]["train"]
    unknown = sum(ids.count(100) for ids in data["train"]["input_ids"]) / counts["tokens"]
    lengths = np.array([len(ids) for ids in data["train"]["input_ids"]])
    assert unknown < 0.005
    assert 0.5 < counts["random_next"] / counts["examples"] < 0.6
    assert lengths.max() == 128 and 115 < lengths.mean() < 128

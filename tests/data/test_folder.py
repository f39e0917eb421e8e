"""Several Arrow files, their checksums, and the two flags that look at a finished folder."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from hf_soo import cli
from hf_soo.bert.data import folder as prepared_folder
from hf_soo.bert.data import prepare as pretraining_data
from hf_soo.bert.data.folder import SplitWriter, load_prepared
from hf_soo.bert.data.pairs import PairBatch
from hf_soo.bert.data.prepare import PrepareConfig, prepare
from hf_soo.bert.data.wordpiece import SPECIAL_TOKENS
from tests.scripts.script_runs import check_error

WORDS = ["red", "green", "blue", "sky", "sea", "."]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 documents of 8 sentences, and a vocabulary of 11 pieces."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    documents = ["\n".join(" ".join([*rng.choice(WORDS[:5], size=9), "."]) for _ in range(8)) for _ in range(40)]
    (folder / "a.txt").write_text("\n\n".join(documents))
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]))
    return folder


def config(text: Path, output: Path, **changes: Any) -> PrepareConfig:
    settings = {"vocab": str(text / "vocab.txt"), "max_seq_length": 32, "eval_documents": 0.2, **changes}
    return PrepareConfig(source=str(text / "a.txt"), output=str(output), **settings)


@pytest.fixture(scope="module")
def finished(text: Path) -> Path:
    prepare(config(text, text / "finished"))
    return text / "finished"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def batch(count: int, length: int) -> PairBatch:
    ids = np.arange(count * length, dtype=np.int32)
    starts, labels = np.full(count, 3, np.int32), (np.arange(count) % 2).astype(np.int8)
    return PairBatch(ids, np.arange(count + 1, dtype=np.int64) * length, starts, labels)


def test_large_splits_become_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_folder, "MOST_BYTES", 5000)
    writer = SplitWriter(tmp_path / "train", 32)
    for i in range(10):  # 20 rows of 20 ids: about 2000 bytes
        writer.write(batch(20, 20), documents=2, first_id=20 * i)
    writer.write(batch(1, 30), documents=1, first_id=200)
    counts = writer.finish()
    arrow = [tmp_path / file for file in writer.files if file.endswith(".arrow")]
    assert [file.name for file in arrow] == [f"data-0000{i}.arrow" for i in range(5)]
    assert all(1000 < file.stat().st_size < 7000 for file in arrow)
    rows = datasets.load_from_disk(str(tmp_path / "train"))
    assert rows["example_id"][:] == list(range(201)) and rows["length"][:] == [20] * 200 + [30]
    assert rows["input_ids"][41] == list(range(20, 40))
    assert counts == {
        "documents": 21,
        "examples": 201,
        "tokens": 4030,
        "random_next": 100,
        "random_next_share": 0.4975,
        "mean_length": 20.05,
        "length_quantiles": {"0": 20, "0.05": 20, "0.25": 20, "0.5": 20, "0.75": 20, "0.95": 20, "1": 30},
    }


def test_fingerprint_tells_contents_apart(text: Path, finished: Path, tmp_path: Path) -> None:
    prepare(config(text, tmp_path / "same"))
    prepare(config(text, tmp_path / "other", seed=1))
    folders = (finished, tmp_path / "same", tmp_path / "other")
    here, same, other = (load_prepared(folder)["train"]._fingerprint for folder in folders)
    assert here == same != other


def test_manifest_counts_agree_with_the_rows(text: Path, finished: Path) -> None:
    data = load_prepared(finished, verify=True)
    manifest = data["manifest"]
    for split in ("train", "eval"):
        counts, lengths = manifest["counts"][split], np.array(data[split]["length"])  # type: ignore[literal-required]
        assert lengths.tolist() == [len(ids) for ids in data[split]["input_ids"]]  # type: ignore[literal-required]
        assert counts["mean_length"] == round(lengths.mean(), 2) and counts["tokens"] == lengths.sum()
        expected = {q: int(np.quantile(lengths, float(q), method="inverted_cdf")) for q in counts["length_quantiles"]}
        assert counts["length_quantiles"] == expected
        assert counts["random_next_share"] == round(np.mean(data[split]["next_sentence_label"]), 4)  # type: ignore[literal-required]
    assert manifest["source"]["text_bytes"] == (text / "a.txt").stat().st_size - 39 * 2  # but for what is in between
    assert sorted(manifest["files"]) == [
        f"{split}/{name}"
        for split in ("eval", "train")
        for name in ("data-00000.arrow", "dataset_info.json", "state.json")
    ]
    timing = manifest["timing"]
    assert timing["cpu_seconds"] >= timing["cpu_seconds_of_main_process"] > 0
    assert list(timing["computed_hours_for_20_gb"]) == ["1_core"]


@pytest.mark.parametrize("name", ["train/data-00000.arrow", "eval/data-00000.arrow", "train/state.json"])
def test_damaged_file_is_named(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"out/{name}' has [\d,]+ bytes, its manifest says {len(content):,}; copy"):
        load_prepared(copied)
    (copied / name).write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    if name.endswith(".arrow"):
        load_prepared(copied)
    with pytest.raises(ValueError, match=f"out/{name}' was changed: its SHA-256 is not the manifest's; copy"):
        load_prepared(copied, verify=True)
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"out/{name}' is missing; copy it again"):
        load_prepared(copied)


def test_damaged_manifest_is_named(copied: Path) -> None:
    (copied / "manifest.json").write_bytes((copied / "manifest.json").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"out' has a manifest.json that is no JSON \(.*; prepare it again"):
        load_prepared(copied)


def run(*flags: str) -> int:
    return cli.main(["prepare", *flags])


def test_inspect_prints_examples(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--inspect", "2", "--output", str(finished)) == 0
    lines = capsys.readouterr().out.splitlines()
    row = load_prepared(finished)["train"][0]
    pieces = [*SPECIAL_TOKENS, *WORDS]
    a, b = row["input_ids"][: row["segment_b_start"]], row["input_ids"][row["segment_b_start"] :]
    meaning = ["B follows A (0)", "B is random (1)"][row["next_sentence_label"]]
    assert lines[-6:-3] == [
        f"example 0: {row['length']} tokens, {meaning}",
        "  A: " + " ".join(pieces[i] for i in a),
        "  B: " + " ".join(pieces[i] for i in b),
    ]
    counts = load_prepared(finished)["manifest"]["counts"]["train"]
    assert any(line.startswith(f"train: 32 documents, {counts['examples']} examples") for line in lines)
    assert sum(line.startswith("example ") for line in lines) == 2 and "[MASK]" not in "".join(lines)


def test_inspect_shows_masks(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--inspect", "20", "--masked", "--output", str(finished)) == 0
    masked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  predicted: ")]
    lengths = load_prepared(finished)["train"]["length"][:20]
    assert [line.count("->") for line in masked] == [min(5, max(1, round(0.15 * n))) for n in lengths]
    assert any("-> [MASK]" in line for line in masked)


def test_verify_reads_the_files(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verify", "--output", str(copied)) == 0
    assert "6 files are as they were written" in capsys.readouterr().out
    file = copied / "train" / "data-00000.arrow"
    content = file.read_bytes()
    file.write_bytes(content[:900] + b"x" + content[901:])
    assert run("--verify", "--output", str(copied)) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "data-00000.arrow' was changed" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inspect", "1"], "the following arguments are required: --output"),
        (["--inspect", "-1", "--output", "x"], "inspect=-1 is not allowed; give a whole number >= 0"),
        (["--masked", "--output", "x"], "--masked shows examples: give --inspect N as well"),
        (["--inspect", "1", "--output", "x", "--seed", "1"], "unknown flag '--seed'"),
    ],
)
def test_wrong_use_of_the_looking_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*flags) == 1
    check_error(capsys, message)


def test_full_disk_says_so(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SplitWriter, "write", full)
    flags = ["--source", str(text / "a.txt"), "--vocab", str(text / "vocab.txt"), "--output", str(tmp_path / "out")]
    assert run(*flags) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: [Errno 28] No space left on device; nothing was kept: free some space"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "share"), [({"random_next": 0.0}, (0.0, 0.2)), ({"random_next": 1.0}, (1.0, 1.0))])
def test_random_next_counts(text: Path, tmp_path: Path, changes: dict[str, float], share: tuple[float, float]) -> None:
    found = prepare(config(text, tmp_path / "out", **changes))["counts"]["train"]["random_next_share"]
    assert share[0] <= found <= share[1]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("Red sky .\nBlue sea .", {"eval_documents": 0.0}, "the train split has one document and needs at least 2"),
        ("Red sky .\n\nBlue sea .\n\nRed sea .\n\nSky .", {"eval_documents": 0.25}, "the eval split has one document"),
        ("Red sky .\n\nRED  sky .", {"eval_documents": 0.0}, "the train split has one document"),  # the same twice
        ("\u0001\n\n\u0007", {"eval_documents": 0.0}, "gives no pair to train on; its documents hold no word piece"),
    ],
)
def test_corpora_without_pairs(text: Path, tmp_path: Path, content: str, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    settings = config(text, tmp_path / "out", min_document_characters=1, **changes)
    settings.source = str(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=message):
        prepare(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_flags_of_cleaning_reach_the_corpus(text: Path, tmp_path: Path) -> None:
    rows = [{"text": f"Head\n\nThe {word} sky .\n\nThe sea ."} for word in ("red", "green", "blue", "red")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def source(number: int, **changes: Any) -> dict[str, Any]:
        settings = config(text, tmp_path / f"out{number}", eval_documents=0.0, **changes)
        settings.source = str(tmp_path / "a.jsonl")
        found: dict[str, Any] = prepare(settings)["source"]
        return found

    left = {"empty": 0, "too_short": 0, "duplicate": 1, "without_tokens": 0}
    first = source(0, min_document_characters=10)
    assert first == {"documents": 4, "text_bytes": 123, "left_out": left, "headings_left_out": 3}
    assert source(1, min_document_characters=10, keep_duplicates=True)["left_out"]["duplicate"] == 0
    assert source(2, min_document_characters=10, keep_headings=True)["headings_left_out"] == 0
    assert source(3, min_document_characters=24)["left_out"] == {**left, "too_short": 2, "duplicate": 0}


def test_output_in_the_source_is_refused(text: Path) -> None:
    settings = config(text, text / "deep" / "out")
    settings.source = str(text)
    with pytest.raises(ValueError, match=r"lies in the source .*; choose a folder outside of it"):
        prepare(settings)


def test_run_removes_what_a_killed_one_left(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    monkeypatch.setattr(pretraining_data, "clear_leftovers", cleared.append)
    prepare(config(text, tmp_path / "out"))
    assert cleared == [tmp_path / "out"]

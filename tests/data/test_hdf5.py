"""HDF5 shards in both layouts, written here row by row, and every way in which they can be wrong."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_soo.bert.data import hdf5 as hdf5_pairs
from hf_soo.bert.data.folder import load_prepared
from hf_soo.bert.data.hdf5 import RowWorker, row_blocks
from hf_soo.bert.data.prepare import PrepareConfig, prepare
from hf_soo.bert.data.wordpiece import SPECIAL_TOKENS, SpecialIds
from hf_soo.bert.masking import PretrainingCollator

h5py = pytest.importorskip("h5py")

CLS, SEP, MASK = 2, 3, 4
WIDTH = 16
Pair = tuple[list[int], list[int], int]


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """A, B and label: words from 5 to 29, each with 3 to 13 of them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, size=(count, 2))
    return [(*(rng.integers(5, 30, size=n).tolist() for n in pair), int(rng.integers(2))) for pair in lengths]  # type: ignore[misc]


def joined(pair: Pair) -> list[int]:
    return [CLS, *pair[0], SEP, *pair[1], SEP]


def padded(rows: list[list[int]], width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int32)


def write(file: Path, columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as shard:
        for name, values in columns.items():
            shard.create_dataset(name, data=values, compression="gzip" if len(values) else None)


def unmasked(pairs: list[Pair]) -> dict[str, Any]:
    """gpauloski's layout."""
    return {
        "input_ids": padded([joined(pair) for pair in pairs]),
        "special_token_positions": np.array(
            [[0, len(a) + 1, len(a) + len(b) + 2] for a, b, _ in pairs], dtype=np.int32
        ),
        "next_sentence_labels": np.array([label for *_, label in pairs], dtype=np.int8),
    }


def nvidia(pairs: list[Pair]) -> dict[str, Any]:
    """NVIDIA's layout: the first word of A is [MASK], the last of B another word; the list of masks has room for 4."""
    tokens = [joined(pair) for pair in pairs]
    masked = [[row[0], MASK, *row[2:-2], 29 if row[-2] != 29 else 28, row[-1]] for row in tokens]
    return {
        "input_ids": padded(masked),
        "input_mask": padded([[1] * len(row) for row in tokens]).astype(np.int8),
        "segment_ids": padded([[0] * (len(a) + 2) + [1] * (len(b) + 1) for a, b, _ in pairs]).astype(np.int8),
        "masked_lm_positions": padded([[1, len(row) - 2] for row in tokens], 4),
        "masked_lm_ids": padded([[row[1], row[-2]] for row in tokens], 4),
        "next_sentence_labels": np.array([label for *_, label in pairs], dtype=np.int8),
    }


LAYOUTS = {"nvidia": nvidia, "unmasked": unmasked}


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    (tmp_path / "v.txt").write_text("\n".join([*SPECIAL_TOKENS, *(f"w{i}" for i in range(5, 30))]))
    return str(tmp_path / "v.txt")


def config(source: Path, vocab: str | None, **changes: Any) -> PrepareConfig:
    settings = {"output": str(source.parent / "out"), "vocab": vocab, "max_seq_length": WIDTH, **changes}
    return PrepareConfig(source=str(source), **settings)


def rows_of(split: Any) -> list[Pair]:
    found = []
    for ids, start, label, length in zip(
        *(split[name] for name in ("input_ids", "segment_b_start", "next_sentence_label", "length")), strict=True
    ):
        assert ids[0] == CLS and ids[start - 1] == ids[-1] == SEP and length == len(ids)
        found.append((ids[1 : start - 1], ids[start:-1], label))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_comes_back(tmp_path: Path, vocab: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_pairs, "ROWS_AT_A_TIME", 7)  # blocks end inside of files
    pairs = make_pairs(40)
    write(tmp_path / "in" / "b.hdf5", LAYOUTS[layout](pairs[25:]))
    write(tmp_path / "in" / "a" / "deep.h5", LAYOUTS[layout](pairs[:25]))
    write(tmp_path / "in" / "a" / "none.h5", {name: values[:0] for name, values in LAYOUTS[layout](pairs).items()})
    manifest = prepare(config(tmp_path / "in", vocab, eval_documents=0.2))
    data = load_prepared(tmp_path / "out", verify=True)
    order = np.argsort([*data["train"]["example_id"], *data["eval"]["example_id"]])
    train, evaluation = rows_of(data["train"]), rows_of(data["eval"])
    assert len(train) == 32 and len(evaluation) == 8
    assert sorted(train + evaluation) == sorted(pairs) and len(order) == 40
    assert train == [pair for pair in pairs if pair not in evaluation]  # in the order of the files
    places = [pairs.index(pair) for pair in evaluation]
    assert np.diff(places).tolist() == [5] * 7  # evenly spread
    assert manifest["source"]["files"] == 3 and "documents" not in manifest["counts"]["train"]
    assert manifest["counts"]["train"]["random_next"] == sum(label for *_, label in train)
    collate = PretrainingCollator(SpecialIds.of(vocab), max_predictions=3)
    assert collate(list(data["train"]))["token_type_ids"].sum(1).tolist() == [len(b) + 1 for _, b, _ in train]


def test_both_layouts_give_the_same_files(tmp_path: Path, vocab: str) -> None:
    files = []
    for layout, make in LAYOUTS.items():
        write(tmp_path / layout / "in" / "a.hdf5", make(make_pairs(30)))
        files.append(prepare(config(tmp_path / layout / "in", vocab, eval_documents=0.1))["files"])
    assert files[0] == files[1]


def test_work_can_be_sent_to_a_process(tmp_path: Path, vocab: str) -> None:
    write(tmp_path / "in" / "a.hdf5", unmasked(make_pairs(20)))
    work = RowWorker(SpecialIds.of(vocab), WIDTH, 0.1, 0)
    (block,) = row_blocks([tmp_path / "in" / "a.hdf5"])
    there, block_there = pickle.loads(pickle.dumps((work, block)))
    for one, other in zip(work(block), there(block_there), strict=True):
        assert one.pairs.input_ids.tolist() == other.pairs.input_ids.tolist() and len(one.pairs) in (2, 18)


def test_empty_segment_b_of_gpauloski_is_a_pair(tmp_path: Path, vocab: str) -> None:
    write(tmp_path / "in" / "a.hdf5", unmasked([([5, 6], [], 0), ([7], [8], 1)]))
    prepare(config(tmp_path / "in", vocab, eval_documents=0))
    assert rows_of(load_prepared(tmp_path / "out")["train"]) == [([5, 6], [], 0), ([7], [8], 1)]


def change(name: str, row: int, column: int, value: int) -> Callable[[dict[str, Any]], None]:
    def apply(columns: dict[str, Any]) -> None:
        columns[name][row, column] = value

    return apply


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.pop(name)  # type: ignore[no-any-return]


def cut(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({name: columns[name][:, :-1]})


def label(columns: dict[str, Any]) -> None:
    columns["next_sentence_labels"][3] = 2


def as_floats(columns: dict[str, Any]) -> None:
    columns["next_sentence_labels"] = columns["next_sentence_labels"] / 2


WRONG = [
    ("unmasked", change("input_ids", 4, 1, 30), "row 4: an id beyond the 30 of the vocabulary"),
    ("unmasked", change("input_ids", 2, 1, -1), "row 2: an id beyond the 30"),
    ("unmasked", change("input_ids", 2, 0, 9), r"row 2: no \[CLS\] \(id 2\) at the front"),
    ("unmasked", change("special_token_positions", 2, 1, 9), r"row 2: (no \[SEP\]|special_token_positions is not)"),
    ("unmasked", change("special_token_positions", 1, 2, 16), "row 1: special_token_positions is not 0 and two later"),
    ("unmasked", change("special_token_positions", 3, 0, 1), "row 3: special_token_positions is not 0 and"),
    ("unmasked", cut("special_token_positions"), r"'special_token_positions' has shape \(6, 2\), expected \(6, 3\)"),
    ("unmasked", label, "row 3: next_sentence_labels is not 0 or 1"),
    ("unmasked", as_floats, "'next_sentence_labels' is of type float64, expected whole numbers"),
    ("unmasked", drop("next_sentence_labels"), "has no data set 'next_sentence_labels'; it has input_ids, special_"),
    ("nvidia", drop("masked_lm_ids"), "has no data set 'masked_lm_ids'"),
    ("nvidia", cut("segment_ids"), r"'segment_ids' has shape \(6, 15\), expected \(6, 16\)"),
    ("nvidia", cut("masked_lm_ids"), r"'masked_lm_ids' has shape \(6, 3\), expected \(6, 4\)"),
    ("nvidia", change("input_mask", 5, 0, 0), "row 5: input_mask is not ones, then zeros"),
    ("nvidia", change("segment_ids", 5, 0, 1), "row 5: segment_ids is not zeros, ones"),
    ("nvidia", change("masked_lm_positions", 5, 1, 15), "row 5: masked_lm_positions points outside the row"),
    ("nvidia", change("masked_lm_ids", 1, 0, 99), "row 1: an id beyond the 30"),
]


@pytest.mark.parametrize(("layout", "spoil", "message"), WRONG)
def test_wrong_rows_are_named(
    tmp_path: Path, vocab: str, layout: str, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    columns = LAYOUTS[layout](make_pairs(6))
    spoil(columns)
    write(tmp_path / "in" / "a.hdf5", columns)
    with pytest.raises(ValueError, match=f"a.hdf5'.*{message}") as error:
        prepare(config(tmp_path / "in", vocab, eval_documents=0))
    assert "\n" not in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == ["in", "v.txt"]


def test_damaged_files_are_named(tmp_path: Path, vocab: str) -> None:
    file = tmp_path / "in" / "a.hdf5"
    write(file, unmasked(make_pairs(500)))
    whole = file.read_bytes()
    with h5py.File(file) as shard:
        chunk = shard["input_ids"].id.get_chunk_info(0)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.hdf5' is no whole HDF5 file \(.*truncated"):
        prepare(config(tmp_path / "in", vocab))
    file.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"a.hdf5' is no whole HDF5 file"):
        prepare(config(tmp_path / "in", vocab))
    start = chunk.byte_offset
    file.write_bytes(whole[:start] + bytes(chunk.size) + whole[start + chunk.size :])
    with pytest.raises(ValueError, match=r"a.hdf5', rows 0 to 499 cannot be read \(.*; copy it again"):
        prepare(config(tmp_path / "in", vocab))


def test_the_last_file_is_opened_before_the_first_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.hdf5", unmasked(make_pairs(5)))
    (tmp_path / "b.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"b.hdf5' is no whole HDF5 file"):
        next(row_blocks([tmp_path / "a.hdf5", tmp_path / "b.hdf5"]))


def test_longer_rows_than_wanted(tmp_path: Path, vocab: str) -> None:
    write(tmp_path / "in" / "a.hdf5", nvidia([([5], [6], 0), ([5, 6, 7], [8, 9, 10], 0)]))
    with pytest.raises(ValueError, match="row 1: more than max_seq_length=8 tokens; raise max_seq_length"):
        prepare(config(tmp_path / "in", vocab, max_seq_length=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": None}, "vocab is None; HDF5 shards hold ids, so give the vocabulary"),
        ({"dupe_factor": 2}, "dupe_factor is 2; the pairs of HDF5 shards are made already: leave it out"),
        ({"split": "test"}, "split is test; the pairs"),
        ({"random_next": 0.1}, "random_next is 0.1; the pairs"),
        ({"eval_documents": 0.001}, "eval_documents=0.001 keeps nothing"),
    ],
)
def test_settings_that_do_not_apply(tmp_path: Path, vocab: str, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "in" / "a.hdf5", unmasked(make_pairs(5)))
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path / "in", **{"vocab": vocab, **changes}))


def test_folder_of_two_kinds_is_refused(tmp_path: Path, vocab: str) -> None:
    write(tmp_path / "in" / "a.hdf5", unmasked(make_pairs(5)))
    (tmp_path / "in" / "b.txt").write_text("Text.")
    with pytest.raises(ValueError, match=r"holds HDF5 shards and other files, for example 'b.txt'"):
        prepare(config(tmp_path / "in", vocab))


def test_without_h5py_the_error_says_what_to_install(
    tmp_path: Path, vocab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"need the package h5py, which is not installed; install hf-soo\[hdf5\]"):
        prepare(config(tmp_path / "a.hdf5", vocab))


def test_manifest_is_plain_json(tmp_path: Path, vocab: str) -> None:
    write(tmp_path / "a.hdf5", unmasked(make_pairs(20)))
    manifest = prepare(config(tmp_path / "a.hdf5", vocab))
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["source"] == {"files": 1, "file_bytes": (tmp_path / "a.hdf5").stat().st_size}
    assert "text_mb_per_cpu_second" not in manifest["timing"]

"""HDF5 shards of other BERT trainers -> the pairs of the prepared folder: unpadded, unmasked ids.

Two layouts, N rows of width W, told apart by their data sets:

    NVIDIA DeepLearningExamples (masks made beforehand)
        input_ids, input_mask, segment_ids [N, W]; masked_lm_positions, masked_lm_ids [N, P], ended by position 0;
        next_sentence_labels [N]
        The original ids are put back at the masked positions, so that the collator can draw its own masks each epoch.
    gpauloski/BERT-PyTorch, KAISA, MKOR (no masks)
        input_ids [N, W]; special_token_positions [N, 3], of [CLS], [SEP] and [SEP]; next_sentence_labels [N]

Every row is checked: [CLS] and both [SEP] at their places, ids in the vocabulary, length. An error names file and row,
counted from 0. Which documents the rows come from is not known: the evaluation split is a share of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_soo.bert.data.pairs import PairBatch
from hf_soo.bert.data.wordpiece import SpecialIds
from hf_soo.bert.data.workers import SplitPairs, eval_rows
from hf_soo.files import files_below

SUFFIXES = (".hdf5", ".h5")
ROWS_AT_A_TIME = 4096
NVIDIA = ("input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids", "next_sentence_labels")
UNMASKED = ("input_ids", "special_token_positions", "next_sentence_labels")

Rows = dict[str, npt.NDArray[np.int64]]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _RowBlock:
    """Rows first, ..., stop - 1 of a file; ``index`` is the number of the first one in the whole source."""

    file: str
    names: tuple[str, ...]
    first: int
    stop: int
    index: int


def hdf5_files(source: str) -> list[Path]:
    """The HDF5 files of a source, by name; none when it is of another kind.

    Args:
        source: as in ``PrepareConfig``.

    Returns:
        The file itself, or those under the folder.

    Raises:
        ValueError: the folder holds other files as well.
    """
    path = Path(source).expanduser()
    files = files_below(path) if path.is_dir() else [path] if path.is_file() else []
    found = [file for file in files if file.suffix in SUFFIXES]
    if found and len(found) < len(files):
        other = next(file for file in files if file.suffix not in SUFFIXES)
        raise ValueError(
            f"folder {source!r} holds HDF5 shards and other files, for example {other.name!r}; "
            "give a folder of one kind: shards are pairs already, text is not."
        )
    return found


def row_blocks(files: list[Path]) -> Iterator[_RowBlock]:
    """Cut HDF5 shards into blocks of rows.

    Args:
        files: the shards.

    Yields:
        The blocks, in order.

    Raises:
        ValueError: a file cannot be opened or is of neither layout.
    """
    index = 0
    layouts = [_layout(file) for file in files]  # all of them first: a wrong one shows before any work
    for file, (names, rows) in zip(files, layouts, strict=True):
        for first in range(0, rows, ROWS_AT_A_TIME):
            stop = min(first + ROWS_AT_A_TIME, rows)
            yield _RowBlock(str(file), names, first, stop, index)
            index += stop - first


def _layout(file: Path) -> tuple[tuple[str, ...], int]:
    """The data sets to read of a file, and its number of rows."""
    with _opened(str(file)) as shard, _damage_named(f"file {str(file)!r}"):
        there = sorted(shard)
        names = UNMASKED if "special_token_positions" in there else NVIDIA
        found = {name: shard[name] for name in names if name in there}
        shapes = {name: tuple(each.shape) for name, each in found.items()}
        kinds = {name: each.dtype for name, each in found.items()}
        absent = [name for name, each in found.items() if each.chunks and not _has_all_chunks(each)]
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"file {str(file)!r} has no data set {', '.join(map(repr, missing))}; it has "
            f"{' '.join(', '.join(there).split()) or 'none'}, and needs {', '.join(names)}."
        )
    if absent:  # HDF5 would read zeros there, or crash
        raise ValueError(f"file {str(file)!r}: {absent[0]!r} lacks some of its chunks; copy it again.")
    for name, kind in kinds.items():
        if kind.kind not in "iu":
            raise ValueError(f"file {str(file)!r}: {name!r} is of type {kind}, expected whole numbers; write it again.")
    rows, width = (*shapes["input_ids"], 0, 0)[:2]
    expected: dict[str, tuple[Any, ...]] = {name: (rows, width) for name in ("input_ids", "input_mask", "segment_ids")}
    expected |= {"special_token_positions": (rows, 3), "next_sentence_labels": (rows,)}
    predictions = shapes.get("masked_lm_positions", (0, 0))[-1]
    expected |= {name: (rows, predictions) for name in ("masked_lm_positions", "masked_lm_ids")}
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(
                f"file {str(file)!r}: {name!r} has shape {shape}, expected {expected[name]} beside input_ids "
                f"{shapes['input_ids']} (a pair has 3 special tokens); write it again."
            )
    return names, rows


def _has_all_chunks(data_set: Any) -> bool:
    """Whether each chunk that a data set needs is in the file."""
    sides = [range(0, size, chunk) for size, chunk in zip(data_set.shape, data_set.chunks, strict=True)]
    chunks = (data_set.id.get_chunk_info_by_coord(corner) for corner in itertools.product(*sides))
    # Storage first: HDF5 may crash in an index that has lost its entries.
    return not data_set.size or (data_set.id.get_storage_size() > 0 and all(c.byte_offset is not None for c in chunks))


@contextmanager
def _damage_named(where: str) -> Iterator[None]:
    """Name the file in HDF5's errors: a chunk that does not decompress, or lies behind the end of the file."""
    try:
        yield
    except Exception as error:  # h5py raises whatever damage leads it to
        raise ValueError(f"{where} cannot be read ({' '.join(str(error).split())}); copy it again.") from error


def _opened(file: str) -> Any:
    """An HDF5 file; h5py is optional."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(
            "HDF5 shards need the package h5py, which is not installed; install hf-soo[hdf5], or h5py itself."
        ) from error
    try:
        return h5py.File(file, "r")
    except Exception as error:  # as below
        reason = " ".join(str(error).split())
        raise ValueError(f"file {file!r} is no whole HDF5 file ({reason}); copy it again.") from error


@dataclass(frozen=True, slots=True)
class RowWorker:
    """Reads, checks and converts a block of rows; small, so that it can be sent to a process."""

    ids: SpecialIds
    max_seq_length: int
    eval_share: float
    seed: int

    def __call__(self, block: _RowBlock) -> list[SplitPairs]:
        """The pairs of the block, for training and for evaluation."""
        pairs = self._pairs_of(_read(block), block)
        chosen = eval_rows(block.index, block.stop - block.first, self.eval_share, self.seed)
        return [SplitPairs("train", _select(pairs, ~chosen)), SplitPairs("eval", _select(pairs, chosen))]

    def _pairs_of(self, rows: Rows, block: _RowBlock) -> PairBatch:
        """The rows of a block, checked, as pairs in the same order."""
        convert = _unmasked_layout if block.names == UNMASKED else _nvidia_layout
        tokens, lengths, starts = convert(rows, block)
        self._check(tokens, lengths, starts, block)
        labels = rows["next_sentence_labels"]
        _refuse((labels != 0) & (labels != 1), block, "next_sentence_labels is not 0 or 1")
        used = np.arange(tokens.shape[1]) < lengths[:, None]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return PairBatch(tokens[used].astype(np.int32), offsets, starts.astype(np.int32), labels.astype(np.int8))

    def _check(self, tokens: Ints, lengths: Ints, starts: Ints, block: _RowBlock) -> None:
        """Refuse rows whose ids, length or special tokens are wrong."""
        row = np.arange(len(tokens))
        too_long = f"more than max_seq_length={self.max_seq_length} tokens; raise max_seq_length"
        _refuse(lengths > self.max_seq_length, block, too_long)
        beyond = (tokens < 0) | (tokens >= self.ids.size)
        no_sep = (tokens[row, starts - 1] != self.ids.sep) | (tokens[row, lengths - 1] != self.ids.sep)
        advice = "give the vocabulary that the shards were made with"
        _refuse(np.any(beyond, axis=1), block, f"an id beyond the {self.ids.size} of the vocabulary; {advice}")
        _refuse(tokens[:, 0] != self.ids.cls, block, f"no [CLS] (id {self.ids.cls}) at the front; {advice}")
        _refuse(no_sep, block, f"no [SEP] (id {self.ids.sep}) at the end of segment A or B; {advice}")


def _read(block: _RowBlock) -> Rows:
    """The rows of a block as int64."""
    where = f"file {block.file!r}, rows {block.first} to {block.stop - 1}"
    with _opened(block.file) as shard, _damage_named(where):
        return {name: shard[name][block.first : block.stop].astype(np.int64) for name in block.names}


def _nvidia_layout(rows: Rows, block: _RowBlock) -> tuple[Ints, Ints, Ints]:
    """Original ids [N, W], lengths [N] and starts of segment B [N] of masked rows."""
    mask, segment, width = rows["input_mask"], rows["segment_ids"], rows["input_ids"].shape[1]
    lengths: Ints = mask.sum(axis=1)
    position = np.arange(width)
    _refuse(np.any(mask != (position < lengths[:, None]), axis=1), block, "input_mask is not ones, then zeros")
    starts = lengths - segment.sum(axis=1)
    in_b = (position >= starts[:, None]) & (position < lengths[:, None])
    _refuse(np.any(segment != in_b, axis=1), block, "segment_ids is not zeros, ones, then zeros under the padding")
    _refuse((starts < 2) | (starts >= lengths), block, "segment A or B is empty")
    return _unmask(rows, lengths, block), lengths, starts


def _unmask(rows: Rows, lengths: Ints, block: _RowBlock) -> Ints:
    """The ids with masked_lm_ids put back; the list of a row ends at its first position 0, which is [CLS]."""
    positions, originals = rows["masked_lm_positions"], rows["masked_lm_ids"]
    listed = np.cumprod(positions != 0, axis=1).astype(np.bool_)
    outside = listed & ((positions < 0) | (positions >= lengths[:, None]))
    _refuse(np.any(outside, axis=1), block, "masked_lm_positions points outside the row")
    tokens: Ints = rows["input_ids"].copy()
    tokens[np.nonzero(listed)[0], positions[listed]] = originals[listed]
    return tokens


def _unmasked_layout(rows: Rows, block: _RowBlock) -> tuple[Ints, Ints, Ints]:
    """Ids [N, W], lengths [N] and starts of segment B [N] of rows with special_token_positions."""
    cls, first_sep, last_sep = rows["special_token_positions"].T
    tokens = rows["input_ids"]
    wrong = (cls != 0) | (first_sep < 1) | (last_sep <= first_sep) | (last_sep >= tokens.shape[1])
    _refuse(wrong, block, "special_token_positions is not 0 and two later places of the row")
    return tokens, last_sep + 1, first_sep + 1


def _refuse(wrong: Bools, block: _RowBlock, what: str) -> None:
    """Refuse the block if a row is wrong, and name the first one."""
    if wrong.any():
        raise ValueError(f"file {block.file!r}, row {block.first + int(np.argmax(wrong))}: {what}.")


def _select(pairs: PairBatch, chosen: Bools) -> PairBatch:
    """Some of the pairs, in their order."""
    lengths = np.diff(pairs.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
    ids = pairs.input_ids[np.repeat(chosen, lengths)]
    return PairBatch(ids, offsets, pairs.segment_b_start[chosen], pairs.next_sentence_label[chosen])

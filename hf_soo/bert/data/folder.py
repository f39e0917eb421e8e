"""The prepared folder: how its Arrow files are written, and how it is loaded and checked.

The layout:

    train/ eval/     Arrow data sets (``datasets.load_from_disk``) in files of at most 512 MB: input_ids (unpadded and
                     unmasked), segment_b_start, next_sentence_label (0 = B follows A, 1 = B is random), length (of
                     input_ids, for length-grouped sampling), example_id
    vocab.txt        the vocabulary the ids refer to
    manifest.json    configuration, counts, versions, size and SHA-256 of every file of the data sets; written last:
                     a folder without it is not finished
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from hf_soo.bert.data.pairs import PairBatch
from hf_soo.engine.checks import allowed, fits
from hf_soo.files import parse_json, readable, sha256_of

FORMAT = 2
MANIFEST = "manifest.json"
VOCABULARY = "vocab.txt"
COLUMNS = ("input_ids", "segment_b_start", "next_sentence_label", "length", "example_id")
MOST_BYTES = 512_000_000  # of one Arrow file

_QUANTILES = ("0", "0.05", "0.25", "0.5", "0.75", "0.95", "1")
# What is asked of the manifest.
_MANIFEST = {"config": dict, "counts": dict, "files": dict, "vocab_sha256": str}
_CONFIG = {"source": str, "max_seq_length": int}
_COUNTS = {"examples": int}
_FILE = {"bytes": int, "sha256": str}
_AGAIN = "prepare it again with `hf-soo prepare`"


class Prepared(TypedDict):
    """What ``load_prepared`` returns; ``eval`` is None when no documents were kept for it."""

    train: Any
    eval: Any
    manifest: dict[str, Any]
    vocab_file: str


class SplitWriter:
    """Writes the examples of one split in Arrow files, a batch at a time, and counts them."""

    def __init__(self, folder: Path, max_seq_length: int) -> None:
        """Start a split in ``folder``, made with the first batch; no example is longer than ``max_seq_length``."""
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}  # path in the prepared folder -> size and SHA-256
        self.documents = 0
        self.random_next = 0
        self.lengths = np.zeros(max_seq_length + 1, dtype=np.int64)  # examples of each length
        self._stream: Any = None
        self._file = folder / "data-00000.arrow"
        self._bytes = 0

    def write(self, pairs: PairBatch, documents: int, first_id: int) -> None:
        """Append pairs; their ids count from ``first_id``."""
        if not len(pairs):
            return
        table = _table(pairs, first_id)
        # Where a file ends depends on the data alone, so the files are the same for any number of processes.
        if self._stream is None or self._bytes + table.nbytes > MOST_BYTES:
            self._next_file(table.schema)
        self._stream.write_table(table)
        self._bytes += table.nbytes
        self.documents += documents
        self.random_next += int(pairs.next_sentence_label.sum())
        self.lengths += np.bincount(np.diff(pairs.offsets), minlength=len(self.lengths))

    def _next_file(self, schema: Any) -> None:
        """Close the file at hand and begin another."""
        import pyarrow as pa

        self.close()
        self.folder.mkdir(exist_ok=True)
        self._file = self.folder / f"data-{len(self.files):05d}.arrow"
        self._stream, self._bytes = pa.ipc.new_stream(str(self._file), schema), 0

    def close(self) -> None:
        """Close the file at hand and describe it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._describe(self._file)

    def _describe(self, file: Path) -> None:
        entry = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        self.files[file.relative_to(self.folder.parent).as_posix()] = entry

    def finish(self) -> dict[str, Any]:
        """Make the folder a data set that ``datasets.load_from_disk`` reads, and return its counts."""
        import datasets

        self.close()
        if self.files:
            arrow = sorted(self.files)
            # `datasets` names the results of `map` after the fingerprint, so it must tell contents apart.
            content = "".join(self.files[file]["sha256"] for file in arrow)
            state: dict[str, Any] = {
                "_data_files": [{"filename": Path(file).name} for file in arrow],
                "_fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            datasets.Dataset.from_file(str(self.folder.parent / arrow[0])).info.write_to_directory(str(self.folder))
            (self.folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for name in ("dataset_info.json", "state.json"):
                self._describe(self.folder / name)
        return self._counts()

    def _counts(self) -> dict[str, Any]:
        """Counts of the split; a length quantile q is the least length that a share q of the examples does not pass."""
        examples = int(self.lengths.sum())
        tokens = int(self.lengths @ np.arange(len(self.lengths)))
        below = np.cumsum(self.lengths)
        quantiles = {q: int(np.searchsorted(below, max(1.0, float(q) * examples))) for q in _QUANTILES if examples}
        return {
            "documents": self.documents,
            "examples": examples,
            "tokens": tokens,
            "random_next": self.random_next,
            "random_next_share": round(self.random_next / max(examples, 1), 4),
            "mean_length": round(tokens / max(examples, 1), 2),
            "length_quantiles": quantiles,
        }


def _table(pairs: PairBatch, first_id: int) -> Any:
    """The Arrow table of a batch of pairs."""
    import pyarrow as pa

    columns = (
        pa.ListArray.from_arrays(pa.array(pairs.offsets, pa.int32()), pa.array(pairs.input_ids)),
        pairs.segment_b_start,
        pairs.next_sentence_label,
        np.diff(pairs.offsets).astype(np.int32),
        np.arange(first_id, first_id + len(pairs), dtype=np.int32),
    )
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def load_prepared(path: str | Path, *, verify: bool = False) -> Prepared:
    """Load what ``prepare`` wrote.

    Args:
        path: the folder.
        verify: read every file and compare its SHA-256; otherwise its size alone is compared.

    Returns:
        train and eval (``datasets.Dataset``, or None), the manifest, and the vocabulary file.

    Raises:
        ValueError: the folder is not a finished data set, or is not what its manifest says.
    """
    import datasets

    folder = Path(path)
    name = repr(str(folder))
    manifest = _read_manifest(folder)
    with readable(folder / VOCABULARY):
        if sha256_of(folder / VOCABULARY) != manifest["vocab_sha256"]:
            raise ValueError(f"{name} holds another {VOCABULARY} than its data were made with; {_AGAIN}.")
    for file, wanted in manifest["files"].items():
        _check_file(folder / file, wanted, verify)
    splits: dict[str, Any] = {}
    for split, counts in manifest["counts"].items():
        try:
            splits[split] = datasets.load_from_disk(str(folder / split)) if counts["examples"] else None
        except Exception as error:  # Arrow raises whatever damage leads it to
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{str(folder / split)!r} cannot be read ({reason}); copy it again, or {_AGAIN}."
            ) from error
        if splits[split] is not None and len(splits[split]) != counts["examples"]:
            found = len(splits[split])
            raise ValueError(f"{name} has {found} {split} examples, its manifest says {counts['examples']}; {_AGAIN}.")
    return Prepared(train=splits["train"], eval=splits["eval"], manifest=manifest, vocab_file=str(folder / VOCABULARY))


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of itself, with all that is asked of it."""
    name = repr(str(folder))
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{name} is no finished data set, it has no {MANIFEST}; {_AGAIN}.")
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} has a {MANIFEST} that is no JSON ({error}); {_AGAIN}.") from error
    made = manifest.get("format") if isinstance(manifest, dict) else None
    if made != FORMAT:
        raise ValueError(f"{name} has format {made!r:.60}, this version reads {FORMAT}; {_AGAIN}.")
    _require(name, manifest, _MANIFEST)
    _require(name, manifest["config"], _CONFIG)
    _require(name, manifest["counts"], {"train": dict, "eval": dict})
    for key, hints in (("counts", _COUNTS), ("files", _FILE)):
        for each in manifest[key].values():
            _require(name, each, hints)
    return dict(manifest)


def _require(name: str, values: Any, hints: dict[str, Any]) -> None:
    for key, hint in hints.items():
        if not isinstance(values, dict) or not fits(values.get(key), hint):
            raise ValueError(f"{name} has a {MANIFEST} in which a {key!r} is not {allowed(hint)}; {_AGAIN}.")


def _check_file(file: Path, wanted: dict[str, Any], verify: bool) -> None:
    """Refuse a file that is not the one that was written."""
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing; copy it again, or {_AGAIN}.")
    if (size := file.stat().st_size) != wanted["bytes"]:
        raise ValueError(
            f"{str(file)!r} has {size:,} bytes, its manifest says {wanted['bytes']:,}; copy it again, or {_AGAIN}."
        )
    if verify and sha256_of(file) != wanted["sha256"]:
        raise ValueError(f"{str(file)!r} was changed: its SHA-256 is not the manifest's; copy it again, or {_AGAIN}.")

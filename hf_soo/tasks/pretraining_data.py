"""Corpus -> a prepared folder of next-sentence pairs, and back.

    train/ eval/     Arrow data sets (`datasets.load_from_disk`): input_ids (unpadded, unmasked), segment_b_start,
                     next_sentence_label (0 = B follows A, 1 = B is random), example_id
    vocab.txt        the vocabulary the ids refer to
    manifest.json    configuration, counts and versions; written last: a folder without it is not finished

The corpus is cut into shards of whole documents by rules that look at the documents alone, and every shard has its own
generator, keyed with (seed, split, number of the shard). So the result depends on the seed, never on `num_proc`. The
folder is built beside its final place and renamed at the end: an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from hf_soo.files import write_atomically
from hf_soo.tasks.corpus import Corpus
from hf_soo.tasks.pairs import PairBatch, PairConfig
from hf_soo.tasks.sharding import ShardWorker, make_shards, map_in_order
from hf_soo.tasks.wordpiece import SpecialIds, read_vocabulary, special_ids, train_wordpiece

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocab.txt"


def _flag(text: str, **default: Any) -> Any:
    """A field with the help text of its flag."""
    return field(metadata={"help": text}, **default)


@dataclass
class PrepareConfig:
    """What to prepare, and where; also the flags of scripts/prepare_pretraining.py."""

    source: str = _flag(
        "'embedded' (0.5 MB of text that every Python carries); a WikiExtractor folder; a .txt (blank line between "
        "documents), .jsonl or .parquet file, or a folder of them; or a hub data set as 'name' or 'name:configuration'."
    )
    output: str = _flag("Folder to write. It appears when it is finished, not before.")
    vocab: str | None = _flag("WordPiece vocabulary, one piece a line. Trained on the corpus if absent.", default=None)
    vocab_size: int | None = _flag("Size of the vocabulary to train without --vocab; 30522 if absent.", default=None)
    max_seq_length: int = _flag("Tokens of a pair with [CLS] and both [SEP]. BERT: 128, then 512.", default=128)
    short_seq_prob: float = _flag("Share of the documents that are cut into shorter pairs. BERT: 0.1.", default=0.1)
    dupe_factor: int = _flag("Passes over the corpus, each with other pairs; masks are new each epoch.", default=1)
    eval_documents: float = _flag("Share of the documents for evaluation, evenly spread; 0 for none.", default=0.05)
    max_documents: int | None = _flag("Stop after this many documents; all if absent.", default=None)
    text_column: str = _flag("Column or key of the text in .jsonl, .parquet and hub data.", default="text")
    split: str = _flag("Split of a hub data set.", default="train")
    num_proc: int = _flag("Worker processes. The result is the same for any number.", default=1)
    seed: int = _flag("All chance comes from it.", default=0)
    overwrite: bool = _flag("Replace a finished data set at --output.", default=False)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of its range.
        """
        self.pairs()
        if self.vocab is not None and self.vocab_size is not None:
            raise ValueError(f"vocab is {self.vocab!r} and vocab_size is {self.vocab_size}; give one of them")
        if not 0.0 <= self.eval_documents <= 0.5:
            raise ValueError(f"eval_documents is {self.eval_documents}; it must be a share between 0 and 0.5")
        if self.max_documents is not None and self.max_documents < 2:
            raise ValueError(f"max_documents is {self.max_documents}; random next sentences need at least 2 documents")
        if self.num_proc < 1:
            raise ValueError(f"num_proc is {self.num_proc}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2**63)")

    def pairs(self) -> PairConfig:
        """The part that the pairs depend on."""
        return PairConfig(self.max_seq_length, self.short_seq_prob, self.dupe_factor)


class Prepared(TypedDict):
    """What `load_prepared` returns; `eval` is None when no documents were kept for it."""

    train: Any
    eval: Any
    manifest: dict[str, Any]
    vocab_file: str


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare a corpus.

    With `num_proc` above 1 it starts processes: call it under `if __name__ == "__main__":`.

    Args:
        config: What to prepare, and where.

    Returns:
        The manifest.

    Raises:
        ValueError: The corpus, the vocabulary or the output folder cannot be used.
    """
    began = time.monotonic()
    output = Path(config.output)
    _check_output(output, config.overwrite)
    corpus = Corpus(config.source, text_column=config.text_column, split=config.split, limit=config.max_documents)
    with _built_beside(output) as partial:
        vocab_file = partial / VOCABULARY
        if config.vocab is None:
            logger.info("training a vocabulary of %d pieces on %s", config.vocab_size or 30522, config.source)
            train_wordpiece(corpus, config.vocab_size or 30522, vocab_file)
        else:
            write_atomically(vocab_file, "".join(f"{piece}\n" for piece in read_vocabulary(config.vocab)))
        ids = special_ids(vocab_file)
        counts = _write_examples(corpus, config, ids, partial)
        if config.eval_documents and (kept := counts["eval"]["documents"]) < 2:
            raise ValueError(
                f"eval_documents={config.eval_documents} keeps {kept} documents; evaluation needs at least 2: "
                "raise it, or set it to 0"
            )
        manifest = _manifest(config, ids, vocab_file, counts) | {"seconds": round(time.monotonic() - began, 1)}
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def load_prepared(path: str | Path) -> Prepared:
    """Load what `prepare` wrote.

    Args:
        path: The folder.

    Returns:
        train and eval (`datasets.Dataset`, or None), the manifest, and the vocabulary file.

    Raises:
        ValueError: The folder is not a finished data set, or is not what its manifest says.
    """
    import datasets

    folder = Path(path)
    name, again = repr(str(folder)), "prepare it again with scripts/prepare_pretraining.py"
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{name} is no finished data set, it has no {MANIFEST}; {again}")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{name} has format {manifest.get('format')!r}, this version reads {FORMAT}; {again}")
    if _sha256(folder / VOCABULARY) != manifest["vocab_sha256"]:
        raise ValueError(f"{name} holds another {VOCABULARY} than its data were made with; {again}")
    splits: dict[str, Any] = {}
    for split, counts in manifest["counts"].items():
        splits[split] = datasets.load_from_disk(str(folder / split)) if counts["examples"] else None
        if splits[split] is not None and len(splits[split]) != counts["examples"]:
            found = len(splits[split])
            raise ValueError(f"{name} has {found} {split} examples, its manifest says {counts['examples']}; {again}")
    return Prepared(train=splits["train"], eval=splits["eval"], manifest=manifest, vocab_file=str(folder / VOCABULARY))


def _write_examples(corpus: Corpus, config: PrepareConfig, ids: SpecialIds, folder: Path) -> dict[str, dict[str, int]]:
    """Tokenise the corpus, make the pairs and write both splits; returns their counts."""
    from datasets.utils import tqdm

    worker = ShardWorker(str(folder / VOCABULARY), config.pairs(), ids.cls, ids.sep, config.seed)
    shards = make_shards(corpus, config.eval_documents, config.seed)
    writers = {split: _SplitWriter(folder / split) for split in ("train", "eval")}
    first_id = 0
    with tqdm(total=config.max_documents, unit=" documents", desc="preparing") as bar:
        for split, documents, pairs in map_in_order(worker, shards, config.num_proc):
            writers[split].write(pairs, documents, first_id)
            first_id += len(pairs)
            bar.update(documents)
            bar.set_postfix(examples=first_id)
    return {split: writer.finish() for split, writer in writers.items()}


class _SplitWriter:
    """Writes the examples of one split, shard by shard, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stream = folder.with_suffix(".arrow")
        self.counts = {"documents": 0, "examples": 0, "tokens": 0, "random_next": 0}
        self._writer: Any = None

    def write(self, pairs: PairBatch, documents: int, first_id: int) -> None:
        """Append the pairs of a shard; their ids count from `first_id`."""
        import numpy as np
        import pyarrow as pa
        from datasets.arrow_writer import ArrowWriter

        table = pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(pa.array(pairs.offsets, pa.int32()), pa.array(pairs.input_ids)),
                "segment_b_start": pairs.segment_b_start,
                "next_sentence_label": pairs.next_sentence_label,
                "example_id": np.arange(first_id, first_id + len(pairs), dtype=np.int32),
            }
        )
        if self._writer is None:
            self._writer = ArrowWriter(path=str(self.stream), schema=table.schema)
        self._writer.write_table(table)
        new = (documents, len(pairs), len(pairs.input_ids), int(pairs.next_sentence_label.sum()))
        self.counts = {name: count + more for (name, count), more in zip(self.counts.items(), new, strict=True)}

    def finish(self) -> dict[str, int]:
        """Write the folder of the split, if it has examples, and return its counts."""
        import datasets

        if self._writer is not None:
            self._writer.finalize()
            datasets.Dataset.from_file(str(self.stream)).save_to_disk(str(self.folder))
            self.stream.unlink()
        return self.counts


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse to lose what is at the output."""
    name = repr(str(output))
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {name} is a file; give a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise ValueError(f"output {name} holds files that are no prepared data set; choose another folder")
    if not overwrite:
        raise ValueError(f"output {name} is a finished data set already; choose another folder or set overwrite")


@contextmanager
def _built_beside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place if the block succeeds, and goes if it does not."""
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    retired = output.with_name(f"{output.name}.old-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        if output.exists():
            output.rename(retired)
        partial.rename(output)
    except BaseException:
        if retired.exists():
            retired.rename(output)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make sure that the files are on the disk before the folder gets its name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _manifest(
    config: PrepareConfig, ids: SpecialIds, vocab_file: Path, counts: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What the folder holds and how it came about."""
    packages = {name: version(name) for name in ("datasets", "numpy", "tokenizers")}
    return {
        "format": FORMAT,
        "config": asdict(config),
        "counts": counts,
        "vocab_size": ids.size,
        "special_ids": asdict(ids),
        "vocab_sha256": _sha256(vocab_file),
        "versions": {"python": platform.python_version(), **packages},
    }


def _sha256(file: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()

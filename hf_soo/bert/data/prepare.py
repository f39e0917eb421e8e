"""Corpus -> a prepared folder of next-sentence pairs (``folder`` has its layout).

The corpus is cut into shards of whole documents by rules that look at the documents alone, and every shard has its own
generator, keyed with (seed, split, number of the shard). So the result depends on the seed, never on ``num_proc``. The
folder is built beside its final place and renamed at the end: an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from hf_soo.bert.data.folder import FORMAT, MANIFEST, VOCABULARY, SplitWriter
from hf_soo.bert.data.hdf5 import RowWorker, hdf5_files, row_blocks
from hf_soo.bert.data.pairs import PairConfig
from hf_soo.bert.data.wordpiece import SpecialIds, read_vocabulary, train_wordpiece
from hf_soo.bert.data.workers import ShardWorker, SplitPairs, make_shards, map_in_order
from hf_soo.engine.checks import Bounds, Checked, Count, Portion, Whole
from hf_soo.files import built_beside, clear_leftovers, sha256_of, write_atomically
from hf_soo.outputs import folder_to_write
from hf_soo.progress import Progress
from hf_soo.text.cleaning import Cleaning
from hf_soo.text.corpus import Corpus

logger = logging.getLogger(__name__)

TEXT_ONLY = (  # the settings that pairs made elsewhere cannot follow
    "vocab_size", "short_seq_prob", "random_next", "dupe_factor", "max_documents", "min_document_characters",
    "keep_duplicates", "keep_headings", "text_column", "split",
)  # fmt: skip


def _flag(text: str, **default: Any) -> Any:
    """A field with the help text of its flag."""
    return field(metadata={"help": text}, **default)


@dataclass
class PrepareConfig(Checked):
    """What to prepare, and where; also the flags of scripts/prepare_pretraining.py."""

    source: str = _flag(
        "'embedded' (0.5 MB of text that every Python carries); a WikiExtractor folder; a .txt (blank line between "
        "documents), .jsonl or .parquet file, or a folder of them; a hub data set as 'name' or 'name:configuration'; "
        "or HDF5 shards (.hdf5, .h5) of NVIDIA, gpauloski or MKOR, which are pairs already and need --vocab."
    )
    output: str = _flag("Folder to write. It appears when it is finished, not before.")
    vocab: str | None = _flag("WordPiece vocabulary, one piece a line. Trained on the corpus if absent.", default=None)
    vocab_size: Annotated[int, Bounds(100)] | None = _flag(
        "Size of the vocabulary to train without --vocab; 30522 if absent.", default=None
    )
    max_seq_length: Annotated[int, Bounds(8)] = _flag(
        "Tokens of a pair with [CLS] and both [SEP]. BERT: 128, then 512.", default=128
    )
    short_seq_prob: Portion = _flag("Share of the documents that are cut into shorter pairs. BERT: 0.1.", default=0.1)
    random_next: Portion = _flag(
        "Probability that B is taken from another document (always, if a chunk has one sentence). BERT: 0.5.",
        default=0.5,
    )
    dupe_factor: Count = _flag("Passes over the corpus, each with other pairs; masks are new each epoch.", default=1)
    eval_documents: Annotated[float, Bounds(0, 0.5, closed_high=True)] = _flag(
        "Share of the documents for evaluation, evenly spread; 0 for none. Of HDF5 shards, whose documents are not "
        "known, the share of the rows: neighbours from one document may then be on both sides.",
        default=0.05,
    )
    max_documents: Annotated[int, Bounds(2)] | None = _flag(
        "Stop after this many documents; all if absent.", default=None
    )
    min_document_characters: Count = _flag("Leave out documents of fewer characters; they are counted.", default=100)
    keep_duplicates: bool = _flag("Keep documents whose text was there before; otherwise counted.", default=False)
    keep_headings: bool = _flag("Keep section headings; hf_soo/bert/data/cleaning.py has the rules.", default=False)
    text_column: str = _flag("Column or key of the text in .jsonl, .parquet and hub data.", default="text")
    split: str = _flag("Split of a hub data set.", default="train")
    num_proc: Count = _flag("Worker processes. The result is the same for any number.", default=1)
    seed: Whole = _flag("All chance comes from it.", default=0)
    overwrite: bool = _flag("Replace a finished data set at --output.", default=False)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is out of its range.
        """
        super().__post_init__()
        if self.vocab is not None and self.vocab_size is not None:
            raise ValueError(f"vocab is {self.vocab!r} and vocab_size is {self.vocab_size}; give one of them.")

    def pairs(self) -> PairConfig:
        """The part that the pairs depend on."""
        return PairConfig(self.max_seq_length, self.short_seq_prob, self.dupe_factor, self.random_next)

    def cleaning(self) -> Cleaning:
        """What is left out of the corpus."""
        return Cleaning(self.min_document_characters, self.keep_duplicates, self.keep_headings)


class _Job(NamedTuple):
    """Work for the processes, and what to say of the source afterwards."""

    work: Callable[[Any], list[SplitPairs]]
    items: Iterable[Any]
    describe: Callable[[], dict[str, Any]]
    unit: str  # that the work is counted in
    total: int | None  # of them; None: not known before all are read


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare a corpus.

    With ``num_proc`` above 1 it starts processes: call it under ``if __name__ == "__main__":``.

    Args:
        config: what to prepare, and where.

    Returns:
        The manifest.

    Raises:
        ValueError: the corpus, the vocabulary or the output folder cannot be used.
    """
    clock = _Clock()
    output = Path(config.output)
    clear_leftovers(output)
    _check_output(output, config)
    shards = hdf5_files(config.source)
    if shards:
        _check_shard_settings(config)
    corpus = Corpus(
        config.source,
        text_column=config.text_column,
        split=config.split,
        limit=config.max_documents,
        cleaning=config.cleaning(),
    )
    if config.split != "train" and not shards and not corpus.on_hub:
        raise ValueError(f"split is {config.split!r}; source {config.source!r} is no hub data set: leave it out.")
    with built_beside(output) as partial:
        vocab_file = partial / VOCABULARY
        if config.vocab is None:
            logger.info("training a vocabulary of %d pieces on %s", config.vocab_size or 30522, config.source)
            train_wordpiece(corpus, config.vocab_size or 30522, vocab_file)
        else:
            write_atomically(vocab_file, "".join(f"{piece}\n" for piece in read_vocabulary(config.vocab)))
        ids = SpecialIds.of(vocab_file)
        job = _rows_job(config, shards, ids) if shards else _text_job(config, corpus, ids, vocab_file)
        written = _write_examples(job, config, partial)
        manifest = _manifest(config, ids, vocab_file, written)
        manifest["timing"] = clock.report(manifest["source"].get("text_bytes"))
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _text_job(config: PrepareConfig, corpus: Corpus, ids: SpecialIds, vocab_file: Path) -> _Job:
    """Tokenise the corpus and make pairs."""
    worker = ShardWorker(str(vocab_file), config.pairs(), ids.cls, ids.sep, config.seed)
    shards = make_shards(corpus.texts(), config.eval_documents, config.seed)
    read = corpus.counts  # for the vocabulary, if one was made
    documents = read.documents - sum(read.left_out.values())
    return _Job(worker, shards, lambda: corpus.counts.as_dict(), "documents", documents or None)


def _rows_job(config: PrepareConfig, files: list[Path], ids: SpecialIds) -> _Job:
    """Take the pairs of HDF5 shards."""
    worker = RowWorker(ids, config.max_seq_length, config.eval_documents, config.seed)
    size = sum(file.stat().st_size for file in files)
    return _Job(worker, row_blocks(files), lambda: {"files": len(files), "file_bytes": size}, "examples", None)


def _write_examples(job: _Job, config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Make the pairs and write both splits; returns source, counts and files for the manifest."""
    writers = {split: SplitWriter(folder / split, config.max_seq_length) for split in ("train", "eval")}
    first_id = without_tokens = 0
    with Progress(desc="preparing", unit=f" {job.unit}", unit_scale=True, total=job.total) as bar:
        for results in map_in_order(job.work, job.items, config.num_proc):
            for made in results:
                writers[made.split].write(made.pairs, made.documents, first_id)
                first_id += len(made.pairs)
                without_tokens += made.without_tokens
                bar.update(made.documents + made.without_tokens if job.unit == "documents" else len(made.pairs))
                bar.set_postfix_str(f"{first_id:,} examples", refresh=False)
    counts = {split: writer.finish() for split, writer in writers.items()}
    source = job.describe()
    if "left_out" in source:
        source["left_out"]["without_tokens"] += without_tokens
    else:  # HDF5 shards: nobody knows the documents
        for split in counts.values():
            del split["documents"]
    _check_counts(config, counts)
    return {"source": source, "counts": counts, "files": writers["train"].files | writers["eval"].files}


def _check_counts(config: PrepareConfig, counts: dict[str, dict[str, Any]]) -> None:
    """Refuse a result that nothing can be trained on, or that lacks the evaluation split that was asked for."""
    if not counts["train"]["examples"]:
        raise ValueError(
            f"source {config.source!r} gives no pair to train on; its documents hold no word piece of the vocabulary, "
            "or there are none: look at the source."
        )
    if config.eval_documents and not counts["eval"]["examples"]:
        raise ValueError(
            f"eval_documents={config.eval_documents} keeps nothing for evaluation; raise it, or set it to 0."
        )


def _check_shard_settings(config: PrepareConfig) -> None:
    """Refuse settings of the text pipeline for pairs that are made already."""
    if config.vocab is None:
        raise ValueError("vocab is None; HDF5 shards hold ids, so give the vocabulary that they were made with.")
    for setting in fields(PrepareConfig):
        if setting.name in TEXT_ONLY and (value := getattr(config, setting.name)) != setting.default:
            raise ValueError(f"{setting.name} is {value}; the pairs of HDF5 shards are made already: leave it out.")


def _check_output(output: Path, config: PrepareConfig) -> None:
    """Refuse to lose what is at the output, and to read what is being written."""
    name = repr(str(output))
    source = Path(config.source).expanduser()
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output {name} lies in the source {config.source!r}; choose a folder outside of it.")
    folder_to_write("output", output)
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise ValueError(f"output {name} holds files that are no prepared data set; choose another folder.")
    if not config.overwrite:
        raise ValueError(f"output {name} is a finished data set already; choose another folder or set overwrite.")


def _manifest(config: PrepareConfig, ids: SpecialIds, vocab_file: Path, written: dict[str, Any]) -> dict[str, Any]:
    """What the folder holds and how it came about."""
    packages = {name: version(name) for name in ("datasets", "numpy", "pyarrow", "tokenizers")}
    return {
        "kind": "prepare",
        "format": FORMAT,
        "config": asdict(config),
        **written,
        "vocab_size": ids.size,
        "special_ids": asdict(ids),
        "vocab_sha256": sha256_of(vocab_file),
        "versions": {"python": platform.python_version(), **packages},
    }


class _Clock:
    """Time since it was made: by the wall, and on the cores of this process and of the workers that have ended."""

    WIKIPEDIA = 20e9  # bytes of text of English Wikipedia, 2023

    def __init__(self) -> None:
        self._began = time.monotonic(), *_cpu_seconds()

    def report(self, text_bytes: int | None) -> dict[str, Any]:
        """Times, and for a source of text the rate and the hours that English Wikipedia would take."""
        now = time.monotonic(), *_cpu_seconds()
        wall, main, workers = (after - before for before, after in zip(self._began, now, strict=True))
        times = {"seconds": wall, "cpu_seconds": main + workers, "cpu_seconds_of_main_process": main}
        report: dict[str, Any] = {name: round(value, 2) for name, value in times.items()}
        if text_bytes:
            hours = self.WIKIPEDIA / text_bytes / 3600
            report["text_mb_per_cpu_second"] = round(text_bytes / 1e6 / (main + workers), 3)
            report["computed_hours_for_20_gb"] = {"1_core": round(hours * (main + workers), 2)}
            if workers:  # 15 cores share their work; reading and writing stay on the main process
                report["computed_hours_for_20_gb"]["16_cores"] = round(hours * max(main, workers / 15), 2)
        return report


def _cpu_seconds() -> tuple[float, float]:
    """CPU time of this process, and of its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime

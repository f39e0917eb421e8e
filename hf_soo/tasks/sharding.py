"""Cut a corpus into shards of whole documents, and turn shards into pairs on several processes.

Where a shard ends is decided by the documents alone, so it is the same for any number of processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from hf_soo.tasks.pairs import PairBatch, PairConfig, TokenDocument, make_pairs
from hf_soo.tasks.wordpiece import Document, load_tokenizer

# A shard ends after so many documents, or so many characters: random next sentences come from the same shard, so it
# must hold many documents; a worker holds a whole shard in memory, so it must not hold too much text.
MOST_DOCUMENTS = 256
MOST_CHARACTERS = 4_000_000
LEAST_DOCUMENTS = 16

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Shard:
    """Whole documents of one split; `number` counts the shards of the split."""

    split: str
    number: int
    documents: list[Document]


class _Grouper:
    """Collects the documents of one split into shards; the last shard is joined to the one before if it is small."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.number = 0
        self.ready: list[Document] = []
        self.current: list[Document] = []
        self.characters = 0

    def add(self, document: Document) -> Iterator[Shard]:
        """Take a document, and yield the shard that it made certain, if any."""
        self.current.append(document)
        self.characters += sum(map(len, document))
        full = self.characters >= MOST_CHARACTERS and len(self.current) >= LEAST_DOCUMENTS
        if full or len(self.current) >= MOST_DOCUMENTS:
            yield from self._next()
            self.ready, self.current, self.characters = self.current, [], 0

    def finish(self) -> Iterator[Shard]:
        """Yield what is left."""
        if len(self.current) < LEAST_DOCUMENTS:
            self.ready, self.current = self.ready + self.current, []
        yield from self._next()
        self.ready = self.current
        yield from self._next()

    def _next(self) -> Iterator[Shard]:
        """Yield the shard that is ready, if there is one."""
        if self.ready:
            yield Shard(self.split, self.number, self.ready)
            self.number += 1


def make_shards(documents: Iterable[Document], eval_share: float, seed: int) -> Iterator[Shard]:
    """Cut a corpus into shards of training and of evaluation documents.

    Args:
        documents: The corpus.
        eval_share: Share of the documents for evaluation, evenly spread; the seed decides where the first one is.
        seed: See `eval_share`.

    Yields:
        Shards of "train" and of "eval", as they are complete.
    """
    phase = float(np.random.default_rng([seed, 2]).random())
    groups = {split: _Grouper(split) for split in ("train", "eval")}
    for index, document in enumerate(documents):
        is_eval = math.floor((index + 1) * eval_share + phase) > math.floor(index * eval_share + phase)
        yield from groups["eval" if is_eval else "train"].add(document)
    for group in groups.values():
        yield from group.finish()


@dataclass(frozen=True, slots=True)
class ShardWorker:
    """Tokenises a shard and makes its pairs; small, so that it can be sent to a process."""

    vocab_file: str
    config: PairConfig
    cls_id: int
    sep_id: int
    seed: int

    def __call__(self, shard: Shard) -> tuple[str, int, PairBatch]:
        """Split of the shard, number of its documents that hold tokens, and their pairs."""
        documents = [document for document in self._tokenise(shard.documents) if document.sentences]
        rng = np.random.default_rng([self.seed, int(shard.split == "eval"), shard.number])
        pairs = make_pairs(documents, self.config, cls_id=self.cls_id, sep_id=self.sep_id, rng=rng)
        return shard.split, len(documents), pairs

    def _tokenise(self, documents: list[Document]) -> Iterator[TokenDocument]:
        """Token ids of the documents, one at a time: an encoding takes 100 bytes a token."""
        tokenizer = _tokenizer(self.vocab_file)
        for document in documents:
            encodings = tokenizer.encode_batch_fast(document, add_special_tokens=False)
            yield TokenDocument.from_sentences([encoding.ids for encoding in encodings])


@lru_cache(maxsize=1)
def _tokenizer(vocab_file: str) -> Any:
    """The tokenizer of this process."""
    return load_tokenizer(vocab_file)


def map_in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], num_proc: int) -> Iterator[_Result]:
    """Like `map`, on several processes; takes items only a little ahead of the results, so memory stays bounded.

    Args:
        function: What to do; it must pickle.
        items: Inputs; they must pickle.
        num_proc: Number of processes; 1 works in this one.

    Yields:
        The results, in the order of the items.

    Raises:
        ChildProcessError: A process was killed.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    # "spawn": forking a process that has threads (Arrow, torch, tokenizers) can deadlock.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), initializer=_use_one_thread)
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            with _interrupts_ignored():  # processes start here, on demand
                pending.append(pool.submit(function, item))
            if len(pending) >= 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of num_proc={num_proc} worker processes was killed, perhaps for its memory; use fewer"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _use_one_thread() -> None:
    """Keep a worker to one core: the processes are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C does nothing here, nor in processes started here, ever: it is the parent that stops them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)

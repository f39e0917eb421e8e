"""Cut a corpus into shards of whole documents, and turn shards into pairs on several processes.

Where a shard ends is decided by the documents alone, so it is the same for any number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hf_soo.bert.data.pairs import PairBatch, PairConfig, TokenDocument, make_pairs
from hf_soo.bert.data.wordpiece import load_tokenizer
from hf_soo.text.corpus import sentences_of

# A shard ends after so many documents, or so many characters: random next sentences come from the same shard, so it
# must hold many documents; a worker holds a whole shard in memory, so it must not hold too much text.
MOST_DOCUMENTS = 256
MOST_CHARACTERS = 4_000_000
LEAST_DOCUMENTS = 16
SENTENCES = 4096  # of a document that are encoded at once
LONGEST_PIECE = 100_000  # characters of a sentence that are encoded at once

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Shard:
    """Texts of whole documents of one split, a paragraph a line; ``number`` counts the shards of the split."""

    split: str
    number: int
    documents: list[str]


@dataclass(frozen=True, slots=True)
class SplitPairs:
    """Pairs of one split and what they were made of."""

    split: str
    pairs: PairBatch
    documents: int = 0
    without_tokens: int = 0


class _Grouper:
    """Collects the documents of one split into shards; the last shard is joined to the one before if it is small."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.number = 0
        self.ready: list[str] = []
        self.current: list[str] = []
        self.characters = 0

    def add(self, document: str) -> Iterator[_Shard]:
        """Take a document, and yield the shard that it made certain, if any."""
        self.current.append(document)
        self.characters += len(document)
        full = self.characters >= MOST_CHARACTERS and len(self.current) >= LEAST_DOCUMENTS
        if full or len(self.current) >= MOST_DOCUMENTS:
            yield from self._next()
            self.ready, self.current, self.characters = self.current, [], 0

    def finish(self) -> Iterator[_Shard]:
        """Yield what is left."""
        if len(self.current) < LEAST_DOCUMENTS:
            self.ready, self.current = self.ready + self.current, []
        if len(self.ready) == 1:  # the only one of its split
            raise ValueError(
                f"the {self.split} split has one document and needs at least 2, as random next sentences come from "
                "another; give more documents (in a .txt file a blank line separates them) or change eval_documents."
            )
        yield from self._next()
        self.ready = self.current
        yield from self._next()

    def _next(self) -> Iterator[_Shard]:
        """Yield the shard that is ready, if there is one."""
        if self.ready:
            yield _Shard(self.split, self.number, self.ready)
            self.number += 1


def eval_rows(first: int, count: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which of the documents (or rows) first, first + 1, ... are for evaluation: evenly spread, the seed moves them."""
    phase = float(np.random.default_rng([seed, 2]).random())
    steps: npt.NDArray[np.bool_] = np.diff(np.floor(np.arange(first, first + count + 1) * share + phase)) > 0
    return steps


def make_shards(documents: Iterable[str], eval_share: float, seed: int) -> Iterator[_Shard]:
    """Cut a corpus into shards of training and of evaluation documents.

    Args:
        documents: texts of the corpus.
        eval_share: share of the documents for evaluation, evenly spread; the seed decides where the first one is.
        seed: see ``eval_share``.

    Yields:
        Shards of "train" and of "eval", as they are complete.

    Raises:
        ValueError: a split has exactly one document.
    """
    groups = {split: _Grouper(split) for split in ("train", "eval")}
    is_eval = np.empty(0, dtype=np.bool_)
    for index, document in enumerate(documents):
        if index % MOST_DOCUMENTS == 0:
            is_eval = eval_rows(index, MOST_DOCUMENTS, eval_share, seed)
        yield from groups["eval" if is_eval[index % MOST_DOCUMENTS] else "train"].add(document)
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

    def __call__(self, shard: _Shard) -> list[SplitPairs]:
        """The pairs of the shard's documents that hold tokens."""
        documents = [document for document in self._tokenise(shard.documents) if document.sentences]
        rng = np.random.default_rng([self.seed, int(shard.split == "eval"), shard.number])
        pairs = make_pairs(documents, self.config, cls_id=self.cls_id, sep_id=self.sep_id, rng=rng)
        return [SplitPairs(shard.split, pairs, len(documents), len(shard.documents) - len(documents))]

    def _tokenise(self, documents: list[str]) -> Iterator[TokenDocument]:
        """Token ids of the documents, some sentences at a time: an encoding takes 100 bytes a token."""
        tokenizer = _tokenizer(self.vocab_file)
        for document in documents:
            yield TokenDocument.from_sentences(_token_ids(tokenizer, sentences_of(document)))


def _token_ids(tokenizer: Any, sentences: list[str]) -> Iterator[Sequence[int]]:
    """The token ids of each sentence; a long one is cut between words, which changes none of them."""
    for first in range(0, len(sentences), SENTENCES):
        batch = sentences[first : first + SENTENCES]
        if max(map(len, batch)) <= LONGEST_PIECE:
            yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
            continue
        for sentence in batch:
            encoded = (tokenizer.encode(piece, add_special_tokens=False) for piece in _pieces(sentence))
            yield array("i", chain.from_iterable(encoding.ids for encoding in encoded))


def _pieces(sentence: str) -> Iterator[str]:
    """A sentence, cut at the first space behind so many characters."""
    start = 0
    while start < len(sentence):
        space = sentence.find(" ", start + LONGEST_PIECE)
        stop = space if space >= 0 else len(sentence)
        yield sentence[start:stop]
        start = stop


@lru_cache(maxsize=1)
def _tokenizer(vocab_file: str) -> Any:
    """The tokenizer of this process."""
    return load_tokenizer(vocab_file)


def map_in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], num_proc: int) -> Iterator[_Result]:
    """Like ``map``, on several processes; takes items only a little ahead of the results, so memory stays bounded.

    Args:
        function: what to do; it must pickle.
        items: inputs; they must pickle.
        num_proc: number of processes; 1 works in this one.

    Yields:
        The results, in the order of the items.

    Raises:
        ChildProcessError: a process was killed.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    # "spawn": forking a process that has threads (Arrow, torch, tokenizers) can deadlock.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            with _interrupts_held():  # processes start here, on demand
                pending.append(pool.submit(function, item))
            if len(pending) >= 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of num_proc={num_proc} worker processes was killed, perhaps for its memory; use fewer."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Keep a worker to one core, as the processes are the parallelism, and end it when its parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for work forever: it holds both ends of the pipe itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A Ctrl-C waits until this is over, and processes started here never see one: it is the parent that stops them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))  # another thread may get it
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if masks:
        resource_tracker.ensure_running()  # starting it later would let signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit what is blocked
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if pressed and callable(handler):
        handler(signal.SIGINT, None)

"""Next-sentence pairs [CLS] A [SEP] B [SEP] from documents of token ids.

Semantics of ``create_instances_from_document`` (google-research/bert, create_pretraining_data.py). For one document:

    target = L - 3, or with probability short_seq_prob a uniform length in [2, L - 3], drawn once per document
    chunk  = sentences until their length >= target or the document ends
    A      = the first a sentences of the chunk, a uniform in [1, n - 1] (1 if the chunk has one sentence)
    B      = the rest (label 0); or, with probability random_next (1/2), and always if the chunk has one sentence,
             sentences of another document from a random one on until target - |A| tokens are there (label 1); the
             rest is put back then
    then the longer of A and B loses tokens from its front or back, a coin each, until |A| + |B| <= L - 3.

A document is one flat array with sentence bounds, A and B are slices of it: no list of tokens is ever built.

Deviations: the other document is drawn from the others directly, where Google draws from all and gives up after 10
tries; and the number of tokens that leave at the front is one binomial draw, the same distribution as a coin a token.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Annotated

import numpy as np
import numpy.typing as npt

from hf_soo.engine.checks import Bounds, Checked, Count, Portion

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """Token ids of all sentences in a row, and where they begin: sentence i is ids[bounds[i]:bounds[i + 1]]."""

    ids: Ids
    bounds: list[int]

    @property
    def sentences(self) -> int:
        """Number of sentences."""
        return len(self.bounds) - 1

    @classmethod
    def from_sentences(cls, sentences: Iterable[Sequence[int]]) -> TokenDocument:
        """Join sentences of token ids; empty ones are dropped."""
        kept = [array("i", sentence) for sentence in sentences if len(sentence)]  # 4 bytes a token, a list's are 36
        ids = np.fromiter(chain.from_iterable(kept), dtype=np.int32)
        return cls(ids, [0, *accumulate(map(len, kept))])


@dataclass(frozen=True, slots=True)
class PairConfig(Checked):
    """How pairs are made; L is ``max_seq_length``, with [CLS] and both [SEP]."""

    max_seq_length: Annotated[int, Bounds(8)] = 128
    short_seq_prob: Portion = 0.1
    dupe_factor: Count = 1
    random_next: Portion = 0.5


@dataclass(frozen=True, slots=True)
class _Pair:
    """A = ids[a] of its own document, B = ids[b] of document ``b_document``; spans are (start, stop)."""

    a: tuple[int, int]
    b: tuple[int, int]
    b_document: int
    is_random: bool


@dataclass(frozen=True, slots=True)
class PairBatch:
    """N pairs, flat: pair i is input_ids[offsets[i]:offsets[i + 1]], its segment B begins at segment_b_start[i]."""

    input_ids: Ids
    offsets: npt.NDArray[np.int64]
    segment_b_start: Ids
    next_sentence_label: npt.NDArray[np.int8]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.segment_b_start)


def make_pairs(
    documents: Sequence[TokenDocument], config: PairConfig, *, cls_id: int, sep_id: int, rng: np.random.Generator
) -> PairBatch:
    """Make the pairs of a group of documents; random next sentences come from the same group.

    Args:
        documents: documents with at least one sentence each.
        config: how pairs are made.
        cls_id: id of [CLS].
        sep_id: id of [SEP].
        rng: where all chance comes from.

    Returns:
        The pairs, in the order of the documents, ``dupe_factor`` times over.

    Raises:
        ValueError: there is one document and it needs a random next sentence from another.
    """
    pairs = [
        (index, pair)
        for _ in range(config.dupe_factor)
        for index in range(len(documents))
        for pair in _pairs_of_document(documents, index, config, rng)
    ]
    lengths = [3 + pair.a[1] - pair.a[0] + pair.b[1] - pair.b[0] for _, pair in pairs]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids = np.full(int(offsets[-1]), sep_id, dtype=np.int32)
    for start, (index, pair) in zip(offsets.tolist(), pairs, strict=False):
        a, b = documents[index].ids[slice(*pair.a)], documents[pair.b_document].ids[slice(*pair.b)]
        ids[start] = cls_id
        ids[start + 1 : start + 1 + len(a)] = a
        ids[start + 2 + len(a) : start + 2 + len(a) + len(b)] = b
    return PairBatch(
        ids,
        offsets,
        np.array([2 + pair.a[1] - pair.a[0] for _, pair in pairs], dtype=np.int32),
        np.array([pair.is_random for _, pair in pairs], dtype=np.int8),
    )


def _pairs_of_document(
    documents: Sequence[TokenDocument], index: int, config: PairConfig, rng: np.random.Generator
) -> Iterator[_Pair]:
    """The pairs whose A is in document ``index``: spans of at most ``max_seq_length - 3`` tokens together."""
    most = config.max_seq_length - 3
    target = int(rng.integers(2, most + 1)) if rng.random() < config.short_seq_prob else most
    document = documents[index]
    bounds, first = document.bounds, 0
    while first < document.sentences:
        # The first sentence end at which the chunk is long enough, or the end of the document.
        last = min(bisect_left(bounds, bounds[first] + target, lo=first + 1), document.sentences)
        n = last - first
        split = first + (int(rng.integers(1, n)) if n >= 2 else 1)
        a, b, b_document = (bounds[first], bounds[split]), (bounds[split], bounds[last]), index
        is_random = n == 1 or rng.random() < config.random_next
        if is_random:
            b_document = _other(len(documents), index, rng)
            b = _random_span(documents[b_document], target - (a[1] - a[0]), rng)
            last = split  # sentences of the chunk that were not used are put back
        from_a, from_b = _tokens_to_remove(a[1] - a[0], b[1] - b[0], most)
        yield _Pair(_shorten(a, from_a, rng), _shorten(b, from_b, rng), b_document, bool(is_random))
        first = last


def _other(count: int, index: int, rng: np.random.Generator) -> int:
    """A random document that is not ``index``."""
    if count < 2:
        raise ValueError(
            "a random next sentence must come from another document, but there is only one; give at least 2 documents "
            "(in a .txt file a blank line separates them)."
        )
    draw = int(rng.integers(count - 1))
    return draw + (draw >= index)


def _random_span(document: TokenDocument, wanted: int, rng: np.random.Generator) -> tuple[int, int]:
    """Sentences from a random one on, until ``wanted`` tokens are there or the document ends; at least one sentence."""
    bounds = document.bounds
    first = int(rng.integers(document.sentences))
    last = min(bisect_left(bounds, bounds[first] + wanted, lo=first + 1), document.sentences)
    return bounds[first], bounds[last]


def _tokens_to_remove(length_a: int, length_b: int, most: int) -> tuple[int, int]:
    """How many tokens A and B lose when each step takes one from the longer of the two, from B when they are equal."""
    excess = max(0, length_a + length_b - most)
    lead = min(excess, abs(length_a - length_b))  # these all come from the longer one; then B and A take turns
    turns = excess - lead
    from_a, from_b = turns // 2, turns - turns // 2
    return (from_a + lead, from_b) if length_a > length_b else (from_a, from_b + lead)


def _shorten(span: tuple[int, int], count: int, rng: np.random.Generator) -> tuple[int, int]:
    """Take ``count`` tokens off a span; each leaves at the front or at the back with equal probability."""
    front = int(rng.binomial(count, 0.5)) if count else 0
    return span[0] + front, span[1] - (count - front)

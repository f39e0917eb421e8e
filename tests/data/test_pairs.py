"""Next-sentence pairs against a plain list version of Google's create_instances_from_document."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from hf_soo.bert.data.pairs import PairConfig, TokenDocument, _pairs_of_document, _tokens_to_remove, make_pairs

CLS, SEP = 2, 3


def google_pairs(
    documents: list[list[list[int]]], index: int, length: int, short_seq_prob: float, rng: random.Random
) -> list[tuple[list[int], list[int], bool]]:
    """create_pretraining_data.py of google-research/bert, retold without masks: (A, B, is_random) of one document."""
    most = length - 3
    target = rng.randint(2, most) if rng.random() < short_seq_prob else most
    instances, chunk, i = [], [], 0
    document = documents[index]
    while i < len(document):
        chunk.append(document[i])
        if i == len(document) - 1 or sum(map(len, chunk)) >= target:
            a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            a = [token for sentence in chunk[:a_end] for token in sentence]
            is_random = len(chunk) == 1 or rng.random() < 0.5
            if is_random:
                for _ in range(10):
                    other = rng.randint(0, len(documents) - 1)
                    if other != index:
                        break
                b: list[int] = []
                for sentence in documents[other][rng.randint(0, len(documents[other]) - 1) :]:
                    b.extend(sentence)
                    if len(b) >= target - len(a):
                        break
                i -= len(chunk) - a_end
            else:
                b = [token for sentence in chunk[a_end:] for token in sentence]
            google_truncate(a, b, most, rng)
            instances.append((a, b, is_random))
            chunk = []
        i += 1
    return instances


def google_truncate(a: list[int], b: list[int], most: int, rng: random.Random) -> None:
    """truncate_seq_pair of the same file."""
    while len(a) + len(b) > most:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if rng.random() < 0.5 else -1)


def random_documents(count: int, longest: int = 40) -> list[list[list[int]]]:
    """Documents of 1 to 30 sentences of 1 to `longest` tokens; each token is a number of its own."""
    rng = random.Random(0)
    token = iter(range(10, 10**9))
    return [
        [[next(token) for _ in range(rng.randint(1, longest))] for _ in range(rng.randint(1, 30))] for _ in range(count)
    ]


def flat(documents: list[list[list[int]]]) -> list[TokenDocument]:
    return [TokenDocument.from_sentences(document) for document in documents]


def test_removal_counts_equal_the_token_by_token_loop() -> None:
    rng = random.Random(0)
    for length_a in range(1, 14):
        for length_b in range(1, 14):
            for most in range(2, 16):
                a, b = [0] * length_a, [0] * length_b
                google_truncate(a, b, most, rng)
                assert _tokens_to_remove(length_a, length_b, most) == (length_a - len(a), length_b - len(b))


@pytest.mark.parametrize("short_seq_prob", [0.0, 0.1, 1.0])
def test_statistics_equal_google_s(short_seq_prob: float) -> None:
    texts = random_documents(60)
    documents = flat(texts)
    rng, generator, passes = random.Random(1), np.random.default_rng(1), 30
    config = PairConfig(64, short_seq_prob)
    theirs = [p for _ in range(passes) for i in range(60) for p in google_pairs(texts, i, 64, short_seq_prob, rng)]
    ours = [p for _ in range(passes) for i in range(60) for p in _pairs_of_document(documents, i, config, generator)]
    google = np.array([(len(a), len(b), is_random) for a, b, is_random in theirs])
    mine = np.array([(p.a[1] - p.a[0], p.b[1] - p.b[0], p.is_random) for p in ours])
    assert len(mine) == pytest.approx(len(google), rel=0.02)
    # Means of |A|, |B| and the random share over more than 20,000 pairs: 4 standard errors of the difference.
    error = np.sqrt(google.var(0) / len(google) + mine.var(0) / len(mine))
    assert (np.abs(google.mean(0) - mine.mean(0)) < 4 * error).all(), (google.mean(0), mine.mean(0), error)
    assert mine[:, 2].mean() > 0.5


def test_every_sentence_is_used_and_unused_ones_are_put_back() -> None:
    texts = [[[100 * d + s] for s in range(50)] for d in range(4)]  # sentences of one token: nothing is truncated
    documents = flat(texts)
    pairs = list(_pairs_of_document(documents, 1, PairConfig(15, 0.0), np.random.default_rng(0)))
    spans = [span for pair in pairs for span in ([pair.a] if pair.is_random else [pair.a, pair.b])]
    assert spans[0][0] == 0 and spans[-1][1] == 50
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert {pair.is_random for pair in pairs} == {True, False}
    assert all(pair.b_document != 1 for pair in pairs if pair.is_random)
    assert all(pair.b_document == 1 for pair in pairs if not pair.is_random)


def test_batch_layout() -> None:
    documents = flat(random_documents(30))
    config = PairConfig(64, 0.1, dupe_factor=2)
    batch = make_pairs(documents, config, cls_id=CLS, sep_id=SEP, rng=np.random.default_rng(0))
    assert batch.input_ids.dtype == np.int32 and batch.next_sentence_label.dtype == np.int8
    for i in range(len(batch)):
        row = batch.input_ids[batch.offsets[i] : batch.offsets[i + 1]].tolist()
        start = int(batch.segment_b_start[i])
        assert 5 <= len(row) <= 64
        assert (row[0], row[start - 1], row[-1]) == (CLS, SEP, SEP)
        assert row.count(SEP) == 2 and row.count(CLS) == 1
        a, b = row[1 : start - 1], row[start:-1]
        assert a == list(range(a[0], a[0] + len(a)))  # tokens are numbered through: a slice is a run of numbers
        assert b == list(range(b[0], b[0] + len(b)))
    again = make_pairs(documents, config, cls_id=CLS, sep_id=SEP, rng=np.random.default_rng(0))
    assert np.array_equal(batch.input_ids, again.input_ids)
    other = make_pairs(documents, config, cls_id=CLS, sep_id=SEP, rng=np.random.default_rng(1))
    assert not np.array_equal(batch.input_ids, other.input_ids)
    assert len(batch) > 1.8 * len(
        make_pairs(documents, PairConfig(64), cls_id=CLS, sep_id=SEP, rng=np.random.default_rng(0))
    )


def test_labels_tell_whether_b_follows_a() -> None:
    documents = flat([[[1000 * d + i] for i in range(200)] for d in range(1, 5)])
    batch = make_pairs(documents, PairConfig(32, 0.0), cls_id=CLS, sep_id=SEP, rng=np.random.default_rng(0))
    for i, label in enumerate(batch.next_sentence_label.tolist()):
        row = batch.input_ids[batch.offsets[i] : batch.offsets[i + 1]]
        start = batch.segment_b_start[i]
        last_a, first_b = int(row[start - 2]), int(row[start])
        assert (first_b == last_a + 1) if label == 0 else (first_b // 1000 != last_a // 1000)


def test_one_sentence_document_gives_a_random_pair() -> None:
    documents = flat([[[11, 12, 13]], [[21], [22, 23]]])
    pairs = list(_pairs_of_document(documents, 0, PairConfig(16, 0.0), np.random.default_rng(0)))
    assert [(pair.a, pair.b_document, pair.is_random) for pair in pairs] == [((0, 3), 1, True)]


def test_very_long_sentence_is_cut_to_the_length() -> None:
    documents = flat([[list(range(1000))], [[5]]])
    (pair,) = _pairs_of_document(documents, 0, PairConfig(128, 0.0), np.random.default_rng(0))
    assert pair.a[1] - pair.a[0] == 124 and pair.b == (0, 1)
    assert pair.a[0] > 300  # some 438 of 876 tokens leave at the front


def test_single_document_is_a_clear_error_when_a_random_next_is_needed() -> None:
    with pytest.raises(ValueError, match="there is only one; give at least 2 documents"):
        make_pairs(flat([[[11]]]), PairConfig(16), cls_id=CLS, sep_id=SEP, rng=np.random.default_rng(0))


def test_empty_sentences_are_dropped() -> None:
    document = TokenDocument.from_sentences([[], [1, 2], [], [3]])
    assert (document.bounds, document.sentences, document.ids.tolist()) == ([0, 2, 3], 2, [1, 2, 3])
    assert TokenDocument.from_sentences([[], []]).sentences == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_seq_length": 7}, "max_seq_length=7 is not allowed; give a whole number >= 8"),
        ({"short_seq_prob": 1.1}, "short_seq_prob=1.1"),
        ({"dupe_factor": 0}, "dupe_factor=0"),
    ],
)
def test_bad_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairConfig(**config)

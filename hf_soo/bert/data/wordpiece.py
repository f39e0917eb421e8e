"""The uncased WordPiece vocabulary of BERT: train, check, load; and the small text files of the data pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_soo.files import read_lines, write_atomically
from hf_soo.progress import Progress
from hf_soo.text.corpus import Document

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Size of a vocabulary and the ids of the tokens with a meaning of their own."""

    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, vocab_file: str | Path) -> SpecialIds:
        """Size and special ids of a vocabulary file; errors as ``read_vocabulary``."""
        vocabulary = read_vocabulary(vocab_file)
        return cls(len(vocabulary), *(vocabulary[token] for token in SPECIAL_TOKENS))


def train_wordpiece(documents: Iterable[Document], vocab_size: int, out_file: str | Path) -> int:
    """Train an uncased WordPiece vocabulary and write it, one piece a line; the same text gives the same file.

    ``WordPieceTrainer`` numbers the pieces "##c" in the order of a hash map, and breaks ties by number, so that two
    runs differ. Fixing the alphabet and every "##c" beforehand removes that, and lets any word of known characters be
    spelled.

    Args:
        documents: read twice; a generator is kept in memory.
        vocab_size: entries wanted; a small corpus may give fewer.
        out_file: where the vocabulary goes; written whole or not at all.

    Returns:
        The number of entries written.

    Raises:
        ValueError: the size is below 100 or the documents hold no text.
    """
    from tokenizers import Tokenizer, models, trainers

    if vocab_size < 100:
        raise ValueError(
            f"vocab_size is {vocab_size}; a WordPiece vocabulary needs at least 100 entries (BERT: 30522)."
        )
    if iter(documents) is documents:
        documents = list(documents)
    tokenizer = _uncased(Tokenizer(models.WordPiece(unk_token="[UNK]")))
    seen = Progress(iterable=documents, desc="characters", unit=" documents", unit_scale=True)
    alphabet = _alphabet(seen, tokenizer, limit=min(1000, vocab_size // 4))
    inside = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + c)) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    again = Progress(iterable=documents, desc="vocabulary", unit=" documents", unit_scale=True, total=seen.n)
    tokenizer.train_from_iterator(("\n".join(document) for document in again), trainer)
    vocabulary = tokenizer.get_vocab()
    write_atomically(out_file, "".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.__getitem__)))
    return len(vocabulary)


def _alphabet(documents: Iterable[Document], tokenizer: Any, limit: int) -> list[str]:
    """The most frequent characters after normalisation, at most ``limit``, sorted; white space is not one."""
    raw: Counter[str] = Counter()
    for document in documents:
        raw.update("".join(document))
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normal in set(tokenizer.normalizer.normalize_str(character)) - set(" \t\n\r"):
            counts[normal] += count
    if not counts:
        raise ValueError("the corpus holds no text to train a vocabulary on; give documents with words.")
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:limit])


def load_tokenizer(vocab_file: str | Path) -> Any:
    """An uncased BERT tokenizer (``tokenizers.Tokenizer``) that has exactly this vocabulary; it adds no special tokens.

    ``BertTokenizerFast(vocab_file=...)`` of transformers 5 takes the argument, ignores it, and yields five tokens.

    Args:
        vocab_file: one piece a line.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the file is missing or not UTF-8, repeats a piece, or lacks a special token.
    """
    from tokenizers import Tokenizer, models

    return _uncased(Tokenizer(models.WordPiece(read_vocabulary(vocab_file), unk_token="[UNK]")))


def read_vocabulary(vocab_file: str | Path) -> dict[str, int]:
    """Read and check a vocabulary.

    Args:
        vocab_file: one piece a line.

    Returns:
        piece -> id, in the order of the lines.

    Raises:
        ValueError: the file is missing or not UTF-8, repeats a piece, or lacks a special token.
    """
    path = Path(vocab_file)
    if not path.is_file():
        raise ValueError(f"vocabulary {str(path)!r} is no file; give a text file with one word piece a line.")
    pieces = list(read_lines(path))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise ValueError(
            f"vocabulary {str(path)!r} lacks {', '.join(missing)}; it needs {' '.join(SPECIAL_TOKENS)}, each on a line."
        )
    if len(vocabulary) != len(pieces):
        repeated = next(piece for i, piece in enumerate(pieces) if vocabulary[piece] != i)
        raise ValueError(f"vocabulary {str(path)!r} has {repeated!r} on two lines; each piece must be there once.")
    return vocabulary


def _uncased(tokenizer: Any) -> Any:
    """Give a tokenizer BERT's uncased normalisation and splitting."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer

"""Text of any layout -> symbols -> windows to train on, and two held-out parts to evaluate on.

symbols     the 256 bytes of the text in ASCII (accents go from letters, other characters are left out), so that
there is no vocabulary to pay for; with a tokenizer, its tokens. Documents in order, joined.
held out    of every 20 documents the 10th is evaluated on to choose settings, the 20th to make claims; neither is
ever trained on
windows     training: at random places, a function of (seed, epoch, number) alone; evaluation: spread evenly
masks       a fixed share of each window, drawn from the same key, each place replaced by one more symbol; in
evaluation the same whatever the run's seed
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_soo.engine.checks import Bounds, Checked, Count, OpenShare
from hf_soo.runs.arguments import option
from hf_soo.text.cleaning import Cleaning
from hf_soo.text.corpus import Corpus

logger = logging.getLogger(__name__)

Symbols = npt.NDArray[np.integer[Any]]
IGNORE = -100  # a label that the loss passes over
_BYTES = 256
_EVERY = 20  # documents, of which one belongs to each held-out part
_HELD_OUT = {"choose": 9, "claim": 19}  # number of that one, from 0
_EVAL_SEED = 0


@dataclass
class TextArguments(Checked):
    """Which text, cut how, and what is predicted of it."""

    _argument_group_name = "data"

    source: str = option("embedded", "WikiExtractor folder, text, JSONL, Parquet or hub name; embedded: Python's own.")
    text_column: str = option("text", "Column or key of the text in JSONL, Parquet and hub data.")
    wiki_as_written: bool = option(
        False, "Leave the HTML entities and the section titles ('History.') of WikiExtractor's output in the text."
    )
    max_bytes: Count = option(20_000_000, "Read documents until there is so much text.")
    tokenizer_name: str | None = option(None, "Folder or hub name of a tokenizer; None: bytes, without any.")
    objective: Literal["causal", "masked"] = option("causal", "causal: the next symbol (GPT); masked: some (BERT).")
    mask_prob: OpenShare = option(0.15, "masked: share of each window that is predicted; the count is exact.")
    window: Annotated[int, Bounds(2)] = option(128, "Symbols of an example; one is predicted from another.")
    held_out: Literal["choose", "claim"] = option("choose", "Evaluate on the text to choose by, or that for claims.")
    max_eval_samples: Count = option(384, "Windows to evaluate on.")


@dataclass(frozen=True, slots=True)
class TextData:
    """The symbols of each part, and what they are."""

    train: Symbols
    eval: Symbols
    symbols: int  # that there are, without the mask
    mask: int | None  # the symbol in place of what is to be predicted
    description: dict[str, Any]

    @classmethod
    def load(cls, given: TextArguments) -> TextData:
        """Read the documents and part them.

        Args:
            given: which text.

        Raises:
            ValueError: the source cannot be read, or a part of it is shorter than a window.
        """
        encode = _Bytes() if given.tokenizer_name is None else _Tokens(given.tokenizer_name)
        parts = _read(given, encode)
        for name, part in parts.items():
            if len(part) < given.window:
                raise ValueError(
                    f"source {given.source!r} has {len(part)} symbols for {name!r}, of one document in {_EVERY}, and "
                    f"window={given.window}; give more text or a smaller window."
                )
        masked = given.objective == "masked"
        if masked and encode.mask is None:
            raise ValueError(f"tokenizer_name={given.tokenizer_name!r} has no mask token; use objective=causal.")
        evaluated, train = parts[given.held_out], parts["train"]
        description = {
            "source": Path(given.source).name,
            "objective": given.objective,
            **({"mask_prob": given.mask_prob} if masked else {}),
            "window": given.window,
            "held_out": given.held_out,
            "symbols": encode.count,
            "train_symbols": len(train),
            "eval_examples": min(given.max_eval_samples, len(evaluated) // given.window),
            "digest": _digest(parts),
            "unigram_entropy": unigram_entropy(train),
        }
        return cls(train, evaluated, encode.count, encode.mask if masked else None, description)


class _Bytes:
    """ASCII: "é" becomes "e", what has no ASCII goes."""

    count, mask, dtype = _BYTES, _BYTES, np.uint8

    def __call__(self, text: str) -> Symbols:
        plain = text if text.isascii() else unicodedata.normalize("NFKD", text)
        return np.frombuffer(plain.encode("ascii", "ignore") + b"\n", dtype=np.uint8)


class _Tokens:
    """The tokens of a tokenizer, and after each document the one that ends it, where there is one."""

    dtype = np.int32

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer_name={name!r} does not load: {' '.join(str(error).split())}") from error
        self.count, self.mask = len(self._tokenizer), self._tokenizer.mask_token_id
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self._end = [number for number in ends if number is not None][:1]

    def __call__(self, text: str) -> Symbols:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([*ids, *self._end], dtype=np.int32)


def _read(given: TextArguments, encode: _Bytes | _Tokens) -> dict[str, Symbols]:
    """The symbols of each part."""
    found: dict[str, list[Symbols]] = {"train": [], **{name: [] for name in _HELD_OUT}}
    whose = {place: name for name, place in _HELD_OUT.items()}
    read = 0
    corpus = Corpus(
        given.source, text_column=given.text_column, cleaning=Cleaning(wiki_as_written=given.wiki_as_written)
    )
    for number, text in enumerate(corpus.texts()):
        found[whose.get(number % _EVERY, "train")].append(encode(text))
        read += len(text)
        if read >= given.max_bytes:
            break
    logger.info("%s: %s", given.source, corpus.counts)
    none = np.empty(0, dtype=encode.dtype)
    return {name: np.concatenate([none, *documents]) for name, documents in found.items()}


def _digest(parts: dict[str, Symbols]) -> str:
    digest = hashlib.sha256()
    for part in parts.values():
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def unigram_entropy(symbols: Symbols) -> float:
    """-Σ p ln p of the symbols' frequencies, in nats: the loss of a model that knows those and no more."""
    counts = np.bincount(symbols)
    p = counts[counts > 0] / len(symbols)
    return float(-(p * np.log(p)).sum())


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of symbols with their labels: `input_ids` and `labels`, int64 [window]."""

    def __init__(
        self,
        symbols: Symbols,
        window: int,
        *,
        mask: int | None = None,
        mask_prob: OpenShare = 0.15,
        seed: int = _EVAL_SEED,
        count: int | None = None,
    ) -> None:
        """Cut nothing yet.

        Args:
            symbols: the text.
            window: symbols of an example.
            mask: what replaces the symbols to predict; None: the model predicts each from those before it.
            mask_prob: share of a window that is replaced.
            seed: of the places of the windows, and of the masks.
            count: None: as many windows as the text has, at random places; a number: at most so many, without overlap,
                spread evenly over the text.
        """
        self.symbols, self.window, self.mask, self.seed = symbols, window, mask, seed
        self.masked = max(1, round(mask_prob * window))
        whole = len(symbols) // window
        self.spread = count is not None
        self._count = whole if count is None else min(count, whole)
        # In shared memory: workers of a DataLoader that persist see set_epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the places and masks of this epoch from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """The number of windows."""
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """A window and its labels."""
        key = np.array([self.seed, int(self._epoch) << 32 | number], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        last = len(self.symbols) - self.window
        start = number * last // max(1, self._count - 1) if self.spread else int(random.integers(last + 1))
        ids = self.symbols[start : start + self.window].astype(np.int64)
        labels = ids.copy()
        if self.mask is not None:
            chosen = random.permutation(self.window)[: self.masked]
            labels = np.full_like(ids, IGNORE)
            labels[chosen] = ids[chosen]
            ids[chosen] = self.mask
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

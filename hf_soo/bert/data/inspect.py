"""What a prepared folder looks like: its counts, and examples as tokens, masked if wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_soo.bert.data.folder import Prepared
from hf_soo.bert.data.wordpiece import SpecialIds, read_vocabulary
from hf_soo.bert.masking import IGNORE, PretrainingCollator


def describe(manifest: dict[str, Any]) -> Iterator[str]:
    """The counts of a manifest as lines of text."""
    for title, counts in {"source": manifest["source"], **manifest["counts"]}.items():
        yield f"{title}: {_phrase(counts)}"
        for name, inner in counts.items():
            if isinstance(inner, dict) and inner:
                yield f"  {name.replace('_', ' ')}: {_phrase(inner)}"


def _phrase(counts: dict[str, Any]) -> str:
    """Plain numbers with their names."""
    return ", ".join(
        f"{value:,} {name.replace('_', ' ')}" if not name[0].isdigit() else f"{name} {value:,}"
        for name, value in counts.items()
        if not isinstance(value, dict)
    )


def show_examples(prepared: Prepared, count: int, *, masked: bool = False) -> Iterator[str]:
    """The first examples for training, as tokens.

    Args:
        prepared: as ``load_prepared`` returns it.
        count: number of examples.
        masked: show as well what the collator makes of them in epoch 0, with BERT's settings and seed 0.

    Yields:
        Lines of text.
    """
    pieces = list(read_vocabulary(prepared["vocab_file"]))
    collate = PretrainingCollator(SpecialIds.of(prepared["vocab_file"]), max_predictions=_predictions(prepared))
    samples = prepared["train"]
    for row in samples.select(range(min(count, len(samples)))):
        tokens = [pieces[i] for i in row["input_ids"]]
        start, label = row["segment_b_start"], row["next_sentence_label"]
        yield f"example {row['example_id']}: {row['length']} tokens, {('B follows A', 'B is random')[label]} ({label})"
        yield f"  A: {' '.join(tokens[:start])}"
        yield f"  B: {' '.join(tokens[start:])}"
        if masked:
            batch = collate([row])
            new = [pieces[i] for i in batch["input_ids"][0].tolist()]
            pairs = zip(batch["masked_positions"][0].tolist(), batch["labels"][0].tolist(), strict=True)
            listed = [f"{place}: {tokens[place]} -> {new[place]}" for place, label in pairs if label != IGNORE]
            yield f"  masked: {' '.join(new[: row['length']])}"
            yield f"  predicted: {', '.join(listed)}"


def _predictions(prepared: Prepared) -> int:
    """BERT's cap on predictions: 20 at length 128, 80 at 512."""
    length: int = prepared["manifest"]["config"]["max_seq_length"]
    return max(1, round(length * 20 / 128))

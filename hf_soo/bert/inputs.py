"""What a pretraining run starts from, and its flags: prepared data and a BERT for its vocabulary."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import BertConfig, BertTokenizer, set_seed

from hf_soo.bert.data.folder import load_prepared
from hf_soo.bert.data.prepare import PrepareConfig, prepare
from hf_soo.bert.data.wordpiece import SpecialIds
from hf_soo.bert.model import SIZES, GatheredBertForPreTraining, name_bias_once
from hf_soo.engine.checks import Bounds, Checked, Count, OpenShare, Share
from hf_soo.runs.arguments import option
from hf_soo.runs.pretrained import check_vocabulary, load_weights
from hf_soo.runs.run_arguments import RunTrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(Checked):
    """Which BERT."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        None, "Folder or hub name of a pretrained BERT to start from: its weights alone."
    )
    previous_phase: str | None = option(
        None,
        "Go on from an earlier run's output_dir or checkpoint: its weights, and its base's moments at step 0 (BERT's "
        "phase 2).",
    )
    preset: Literal["tiny", "mini", "small", "base", "large"] = option(
        "mini", "Shape of a new model: tiny 2 x 128, mini 4 x 256, small 4 x 512, base 12 x 768, large 24 x 1024."
    )
    pad_vocab_to_multiple_of: Annotated[int, Bounds(1, 129)] = option(
        1, "Rows of a new model's embedding are rounded up; 8 suits tensor cores."
    )
    hidden_size: Count | None = option(None, "Instead of the preset's.")
    num_hidden_layers: Count | None = option(None, "Instead of the preset's.")
    num_attention_heads: Count | None = option(None, "Instead of the preset's.")
    intermediate_size: Count | None = option(None, "Instead of 4 x hidden_size.")
    dropout: Share = option(0.1, "Of hidden states and attention.")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2; None: transformers chooses.")


@dataclass
class DataArguments(Checked):
    """Which text, and how it is masked."""

    _argument_group_name = "data"

    data_dir: str | None = option(None, "Folder written by `hf-soo prepare`.")
    corpus: str | None = option(
        None, "Without data_dir: a corpus to prepare once into OUTPUT_DIR/data ('embedded' needs no file)."
    )
    seq_length: Annotated[int, Bounds(8)] = option(128, "Tokens of a pair when a corpus is prepared here.")
    vocab_size: Annotated[int, Bounds(100)] = option(4096, "Word pieces to train when a corpus is prepared here.")
    eval_documents: Annotated[float, Bounds(0, 0.5, closed_high=True)] = option(
        0.05, "Share of the documents to evaluate on when a corpus is prepared here."
    )
    masking: Literal["exact", "bernoulli"] = option("exact", "exact: a fixed count a sequence; bernoulli: each token.")
    mask_prob: OpenShare = option(0.15, "Share of the tokens that are predicted.")
    max_predictions: Count = option(20, "Cap of 'exact': 20 at length 128, 80 at 512.")
    max_train_samples: Count | None = option(None, "Train on the first so many examples.")
    max_eval_samples: Count | None = option(None, "Evaluate on the first so many examples, always masked alike.")


@dataclass(frozen=True, slots=True)
class PretrainingData:
    """Prepared examples, their vocabulary, and what a run JSON says of them."""

    train: Any
    eval: Any
    ids: SpecialIds
    vocab_file: str
    seq_length: int
    description: dict[str, Any]

    @classmethod
    def load(cls, data: DataArguments, args: RunTrainingArguments) -> PretrainingData:
        """Load the prepared folder, preparing the corpus first when that is what was asked for.

        Args:
            data: which text.
            args: ``output_dir`` is where a corpus is prepared; one process of several does it.

        Raises:
            ValueError: neither or both of data_dir and corpus, nothing to evaluate on, or a folder that cannot be used.
        """
        if (data.data_dir is None) == (data.corpus is None):
            raise ValueError(
                f"data_dir is {data.data_dir!r} and corpus is {data.corpus!r}; give one: a prepared folder, or a "
                "corpus."
            )
        folder = data.data_dir
        if folder is None:
            with args.in_turn():
                folder = _prepare_once(data, args.folder / "data")
        prepared = load_prepared(folder)
        if prepared["train"] is None or prepared["eval"] is None:
            raise ValueError(
                f"{folder!r} has no examples to train or to evaluate on; prepare it with eval_documents above 0."
            )
        train, evaluation = (
            _head(prepared["train"], data.max_train_samples),
            _head(prepared["eval"], data.max_eval_samples),
        )
        config = prepared["manifest"]["config"]
        description = {
            "source": Path(config["source"]).name,
            "seq_length": config["max_seq_length"],
            "train_examples": len(train),
            "eval_examples": len(evaluation),
            "vocabulary": prepared["manifest"]["vocab_sha256"][:12],
            **{key: getattr(data, key) for key in ("masking", "mask_prob", "max_predictions")},
        }
        ids = SpecialIds.of(prepared["vocab_file"])
        return cls(train, evaluation, ids, prepared["vocab_file"], config["max_seq_length"], description)


def _prepare_once(data: DataArguments, folder: Path) -> str:
    """Prepare the corpus into ``folder``, or find it there from an earlier run with the same settings."""
    assert data.corpus is not None
    asked = {
        "source": data.corpus,
        "max_seq_length": data.seq_length,
        "vocab_size": data.vocab_size,
        "eval_documents": data.eval_documents,
    }
    config = PrepareConfig(output=str(folder), **asked)  # type: ignore[arg-type]
    if not (folder / "manifest.json").is_file():
        logger.info("Preparing corpus %s in %s", data.corpus, folder)
        prepare(config)
        return str(folder)
    made = load_prepared(folder)["manifest"]["config"]
    for key, value in asked.items():
        if made[key] != value:
            raise ValueError(f"{folder} was prepared with {key}={made[key]!r}, now {value!r}; use another output_dir.")
    return str(folder)


def _head(dataset: Any, count: int | None) -> Any:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def make_model(model: ModelArguments, data: PretrainingData, seed: int) -> GatheredBertForPreTraining:
    """A new BERT for the vocabulary of the data, or the pretrained one of a folder.

    Args:
        model: which; ``model_name_or_path`` holds the weights to start from.
        data: says vocabulary and sequence length.
        seed: of the initial weights.

    Raises:
        ValueError: the folder holds no BERT, or one with another vocabulary (in size or words) or too few positions.
    """
    set_seed(seed)
    if model.model_name_or_path is not None:
        kept = load_weights(
            GatheredBertForPreTraining,
            model.model_name_or_path,
            attn_implementation=model.attn_implementation,
            hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout,
        )
        assert isinstance(kept, GatheredBertForPreTraining)
        check_vocabulary(kept.config, data.ids.size)
        _check_words(model.model_name_or_path, data.vocab_file)
        if kept.config.max_position_embeddings < data.seq_length:
            raise ValueError(
                f"The model has {kept.config.max_position_embeddings} positions, the data {data.seq_length} tokens; "
                "prepare shorter sequences or start from a model with more positions."
            )
    else:
        kept = GatheredBertForPreTraining(_config(model, data.ids.size, data.ids.pad, data.seq_length))
    name_bias_once(kept)
    return kept


def _check_words(folder: str, vocab_file: str) -> None:
    """Refuse a vocabulary of the right size and other words, where the model has its tokenizer beside it."""
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return
    theirs = BertTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    ours = BertTokenizer(vocab=vocab_file).get_vocab()
    other = sorted(word for word, number in ours.items() if theirs.get(word) != number)
    if other:
        raise ValueError(
            f"{len(other)} of the data's {len(ours)} words are others in the vocabulary of {folder} ({other[0]!r} for "
            "one); prepare the data with the model's vocabulary (prepare_pretraining.py --vocab)."
        )


def sketch(model: ModelArguments, data: DataArguments) -> GatheredBertForPreTraining | None:
    """A BERT of the same layers, before its data and weights are read; None where they come from the hub."""
    start = model.previous_phase or model.model_name_or_path
    if start is None:
        return GatheredBertForPreTraining(_config(model, 30_522, 0, data.seq_length))
    if not (Path(start) / "config.json").is_file():
        return None
    config, _ = BertConfig.get_config_dict(start)
    return GatheredBertForPreTraining(BertConfig(**config)) if config.get("model_type") == "bert" else None


def _config(model: ModelArguments, words: int, pad: int, length: int) -> BertConfig:
    sizes = SIZES[model.preset]
    multiple = model.pad_vocab_to_multiple_of
    hidden = model.hidden_size or sizes["hidden_size"]
    settings: dict[str, Any] = dict(
        vocab_size=-(-words // multiple) * multiple,
        hidden_size=hidden,
        num_hidden_layers=model.num_hidden_layers or sizes["num_hidden_layers"],
        num_attention_heads=model.num_attention_heads or sizes["num_attention_heads"],
        intermediate_size=model.intermediate_size or 4 * hidden,
        max_position_embeddings=max(512, length),
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        pad_token_id=pad,
        attn_implementation=model.attn_implementation,
    )
    return BertConfig(**settings)

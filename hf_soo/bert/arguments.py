"""The flags of `scripts/pretrain_bert.py` besides those that every training script has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_soo.runs.flags import option


@dataclass
class ModelArguments:
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
    pad_vocab_to_multiple_of: int = option(1, "Rows of a new model's embedding are rounded up; 8 suits tensor cores.")
    hidden_size: int | None = option(None, "Instead of the preset's.")
    num_hidden_layers: int | None = option(None, "Instead of the preset's.")
    num_attention_heads: int | None = option(None, "Instead of the preset's.")
    intermediate_size: int | None = option(None, "Instead of 4 x hidden_size.")
    dropout: float = option(0.1, "Of hidden states and attention.")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2; None: transformers chooses.")


@dataclass
class DataArguments:
    """Which text, and how it is masked."""

    _argument_group_name = "data"

    data_dir: str | None = option(None, "Folder written by scripts/prepare_pretraining.py.")
    corpus: str | None = option(
        None, "Without data_dir: a corpus to prepare once into OUTPUT_DIR/data ('embedded' needs no file)."
    )
    seq_length: int = option(128, "Tokens of a pair when a corpus is prepared here.")
    vocab_size: int = option(4096, "Word pieces to train when a corpus is prepared here.")
    eval_documents: float = option(0.05, "Share of the documents to evaluate on when a corpus is prepared here.")
    masking: Literal["exact", "bernoulli"] = option("exact", "exact: a fixed count a sequence; bernoulli: each token.")
    mask_prob: float = option(0.15, "Share of the tokens that are predicted.")
    max_predictions: int = option(20, "Cap of 'exact': 20 at length 128, 80 at 512.")
    max_train_samples: int | None = option(None, "Train on the first so many examples.")
    max_eval_samples: int | None = option(None, "Evaluate on the first so many examples, always masked alike.")

"""The flags of `scripts/pretrain_bert.py` besides those of `SecondOrderTrainingArguments`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.registry import METHODS


def option(default: Any, text: str) -> Any:
    """A dataclass field that is a flag with a line of help.

    Args:
        default: value when the flag is not given.
        text: the help.
    """
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which BERT."""

    model_name_or_path: str | None = option(None, "Folder of a pretrained BERT to start from; phase 1's for phase 2.")
    preset: Literal["tiny", "mini", "base", "large"] = option(
        "mini", "Shape of a new model: tiny 2 x 128, mini 4 x 256, base 12 x 768, large 24 x 1024."
    )
    hidden_size: int | None = option(None, "Instead of the preset's.")
    num_hidden_layers: int | None = option(None, "Instead of the preset's.")
    num_attention_heads: int | None = option(None, "Instead of the preset's.")
    intermediate_size: int | None = option(None, "Instead of 4 x hidden_size.")
    dropout: float = option(0.1, "Of hidden states and attention.")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2; None: transformers chooses.")


@dataclass
class DataArguments:
    """Which text, and how it is masked."""

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


@dataclass
class RunArguments:
    """What is kept of a run, and which other optimizer it is compared with."""

    name: str | None = option(None, "Name of the run's JSON; None: optimizer, base and learning rates.")
    results_dir: str | None = option(None, "Folder of the run JSONs; None: OUTPUT_DIR/runs.")
    target_eval_loss: float | None = option(
        None, "Record the steps and seconds to this loss; compare_with: to its own."
    )
    restart: bool = option(False, "Start over although OUTPUT_DIR holds checkpoints, which are deleted.")
    traceback: bool = option(False, "Show the traceback of an error.")
    compare_with: str | None = option(None, "A second optimizer, run on the same data from the same weights.")
    compare_learning_rate: float | None = option(None, "The second optimizer's; None: the first one's.")
    compare_optim_args: str | None = option(None, "The second optimizer's k=v,k=v.")
    compare_base_optim: str | None = option(None, "The second optimizer's base.")
    compare_base_optim_args: str | None = option(None, "The second optimizer's base's k=v,k=v.")

    def __post_init__(self) -> None:
        """Refuse settings of a comparison that is not asked for.

        Raises:
            ValueError: a compare_* setting without compare_with.
        """
        if self.compare_with is not None:
            return
        for name in ("compare_learning_rate", "compare_optim_args", "compare_base_optim", "compare_base_optim_args"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r} without compare_with; say which optimizer it is for.")


@dataclass
class PretrainingArguments(SecondOrderTrainingArguments):
    """The Trainer's, with the two defaults that pretraining needs."""

    remove_unused_columns: bool = option(False, "The collator reads columns that the model does not take.")
    logging_nan_inf_filter: bool = option(False, "True hides a loss that is not finite, and so a diverged run.")

    @property
    def folder(self) -> Path:
        """`output_dir`, which the Trainer has set by now."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def compared(self, run: RunArguments, output_dir: str) -> PretrainingArguments:
        """The same for the second optimizer.

        Args:
            run: says which one.
            output_dir: where its checkpoints go.
        """
        assert run.compare_with is not None
        method = METHODS.get(run.compare_with)
        layers: dict[str, Any] = (
            {} if method and method.config else {"precondition_include": None, "precondition_exclude": None}
        )
        return dataclasses.replace(
            self,
            optim=run.compare_with,
            learning_rate=self.learning_rate if run.compare_learning_rate is None else run.compare_learning_rate,
            optim_args=run.compare_optim_args,
            base_optim=run.compare_base_optim,
            base_optim_args=run.compare_base_optim_args,
            output_dir=output_dir,
            **layers,
        )

"""The flags of `scripts/run_squad.py` besides the model's and every script's; names as in `run_qa.py`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_soo.runs.flags import option

POSITIVE = ("max_seq_length", "max_query_length", "n_best_size", "max_answer_length")
COUNTS = ("max_train_samples", "max_eval_samples", "max_predict_samples")


@dataclass
class QaDataArguments:
    """Which questions, and how answers are chosen."""

    _argument_group_name = "data"

    dataset_name: str | None = option(None, "squad, squad_v2 or another data set of the hub with their columns.")
    train_file: str | None = option(None, "SQuAD's JSON, or JSON lines with the hub's columns.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    test_file: str | None = option(None, "The same, for --do_predict; answers may be missing.")
    max_seq_length: int = option(384, "Tokens of a window, question and special tokens included.")
    doc_stride: int = option(128, "Context tokens that consecutive windows share.")
    max_query_length: int = option(64, "Tokens that are kept of a question.")
    pad_to_max_length: bool = option(False, "Pad every batch to max_seq_length, not to its longest window.")
    version_2_with_negative: bool = option(
        False, "Some questions have no answer (SQuAD v2.0); not needed where the data say so."
    )
    null_score_diff_threshold: float = option(
        0.0, "v2.0: no answer where its score is better than the best answer's by more than this."
    )
    n_best_size: int = option(20, "Candidates that are kept of a question.")
    max_answer_length: int = option(30, "Tokens of an answer.")
    max_train_samples: int | None = option(None, "Train on the first so many questions.")
    max_eval_samples: int | None = option(None, "Evaluate on the first so many questions.")
    max_predict_samples: int | None = option(None, "Predict the first so many questions.")

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            ValueError: a length or count below 1, or a negative stride.
        """
        for name in (*POSITIVE, *COUNTS):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed; give at least 1.")
        if self.doc_stride < 0:
            raise ValueError(f"doc_stride={self.doc_stride} is not allowed; give at least 0.")

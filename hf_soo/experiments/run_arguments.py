"""The flags that every training script has besides those of `SecondOrderTrainingArguments`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_soo.flags import option
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.registry import METHODS


@dataclass
class RunArguments:
    """What is kept of a run, and which other optimizer it is compared with."""

    _argument_group_name = "run"

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
class RunTrainingArguments(SecondOrderTrainingArguments):
    """The Trainer's, with the two defaults that recorded runs need."""

    _argument_group_name = "training: all fields of transformers' TrainingArguments, and ours"

    remove_unused_columns: bool = option(False, "The collator reads columns that the model does not take.")
    logging_nan_inf_filter: bool = option(False, "True hides a loss that is not finite, and so a diverged run.")

    def __post_init__(self) -> None:
        """Without --do_train, --do_eval and --do_predict a script trains and evaluates."""
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = True
        super().__post_init__()

    @property
    def folder(self) -> Path:
        """`output_dir`, which the Trainer has set by now."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def compared(self, run: RunArguments, output_dir: str) -> RunTrainingArguments:
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

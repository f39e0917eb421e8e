"""The flags that every training script has besides those of `SecondOrderTrainingArguments`."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_soo.engine.checks import Checked, Count, NonNegative, Positive, require, shown
from hf_soo.files import in_turn
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.registry import METHODS
from hf_soo.runs.arguments import option
from hf_soo.runs.record import LONGEST_NAME, is_file_name


@dataclass
class RunArguments(Checked):
    """What is kept of a run, and which other optimizer it is compared with."""

    _argument_group_name = "run"

    task: str | None = option(None, "What a recipe trains: bert, lm, glue, squad or vision; other commands refuse it.")
    name: str | None = option(None, "Name of the run's JSON; None: optimizer, base and learning rates.")
    results_dir: str | None = option(None, "Folder of the run JSONs; None: OUTPUT_DIR/runs.")
    target_eval_loss: Positive | None = option(
        None, "Stop at this loss, and record the steps and seconds to it; compare_with stops the first run alone."
    )
    restart: bool = option(False, "Start over although OUTPUT_DIR holds checkpoints, which are deleted.")
    traceback: bool = option(False, "Show the traceback of an error.")
    compare_with: str | None = option(None, "A second optimizer, run on the same data from the same weights.")
    compare_learning_rate: NonNegative | None = option(None, "The second optimizer's; None: the first one's.")
    compare_optim_args: dict[str, Any] | str | None = option(None, "The second optimizer's k=v,k=v.")
    compare_base_optim: str | None = option(None, "The second optimizer's base.")
    compare_base_optim_args: dict[str, Any] | str | None = option(None, "The second optimizer's base's k=v,k=v.")

    def __post_init__(self) -> None:
        """Refuse a name that is none, and settings of a comparison that is not asked for.

        Raises:
            ValueError: a value is not allowed, or a compare_* setting is there without compare_with.
        """
        super().__post_init__()
        if self.name is not None and not is_file_name(self.name):
            raise ValueError(
                f"name={shown(self.name)} is not allowed; give a file's name of at most {LONGEST_NAME} bytes, without "
                "folders."
            )
        if self.compare_with is not None:
            return
        for name in ("compare_learning_rate", "compare_optim_args", "compare_base_optim", "compare_base_optim_args"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r} without compare_with; say which optimizer it is for.")


@dataclass
class RunTrainingArguments(SecondOrderTrainingArguments):
    """The Trainer's, with the two defaults that recorded runs need, and the global batch in one number."""

    _argument_group_name = "training: all fields of transformers' TrainingArguments, and ours"

    remove_unused_columns: bool = option(False, "The collator reads columns that the model does not take.")
    logging_nan_inf_filter: bool = option(False, "True hides a loss that is not finite, and so a diverged run.")
    global_batch_size: Count | None = option(
        None, "Examples of one optimizer step, over all processes; the accumulation follows from it."
    )
    gradient_accumulation_steps: int = option(None, "Micro-batches of one optimizer step; None: 1, or what follows.")

    def __post_init__(self) -> None:
        """Without --do_train, --do_eval and --do_predict a script trains and evaluates.

        Raises:
            ValueError: the global batch cannot be made, or settings that the Trainer's arguments refuse.
        """
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = True
        require("global_batch_size", self.global_batch_size, Count | None)
        require("per_device_train_batch_size", self.per_device_train_batch_size, Count)
        self._settle_accumulation()
        super().__post_init__()
        if self.global_batch_size is not None and self.n_gpu > 1:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} with {self.n_gpu} GPUs in one process; start one process "
                "for each GPU with torchrun or accelerate launch."
            )

    def _settle_accumulation(self) -> None:
        """Before the Trainer's arguments are made: they fill the numbers into DeepSpeed's configuration.

        Raises:
            ValueError: the global batch cannot be made of whole micro-batches.
        """
        given = self.gradient_accumulation_steps
        if self.global_batch_size is None:
            self.gradient_accumulation_steps = 1 if given is None else given
            return
        if self.auto_find_batch_size:
            raise ValueError(
                f"auto_find_batch_size=True changes the micro-batch, and global_batch_size={self.global_batch_size} "
                "would be another one; leave one of them out."
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # what the Trainer will see: `script.check_processes`
        steps = _accumulation_steps(self.global_batch_size, self.per_device_train_batch_size, processes)
        if given not in {None, steps}:
            raise ValueError(
                f"gradient_accumulation_steps={given}, but global_batch_size={self.global_batch_size} with "
                f"per_device_train_batch_size={self.per_device_train_batch_size} on {processes} processes is {steps}; "
                "leave one of them out."
            )
        self.gradient_accumulation_steps = steps

    @property
    def optimizer_name(self) -> str:
        """``optim`` as text, also where the Trainer made an enum of it."""
        return str(getattr(self.optim, "value", self.optim))

    @property
    def base_name(self) -> str:
        """The base that steps: the one asked for, else the method's own; the optimizer itself where it has none."""
        settings = self.parsed.optimizer
        return str(settings.base) if settings is not None else self.optimizer_name

    @property
    def folder(self) -> Path:
        """`output_dir`, which the Trainer has set by now."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def in_turn(self) -> AbstractContextManager[None]:
        """The run's processes one after the other: the first makes what the others find, on any node."""
        return in_turn(self.folder / "processes.lock") if self.world_size > 1 else nullcontext()

    def check_on(self, model: nn.Module) -> None:
        """Refuse an optimizer that could not be built for a model; see ``OptimizerSettings.check_on``."""
        if (settings := self.parsed.optimizer) is not None:
            settings.check_on(model, self.learning_rate, self.weight_decay, self.world_size)

    def compared(self, run: RunArguments, output_dir: str) -> RunTrainingArguments:
        """The same for the second optimizer, which ``run`` names."""
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


def _accumulation_steps(global_batch: int, micro_batch: int, processes: int) -> int:
    """Micro-batches that make a global batch.

    Args:
        global_batch: examples of one optimizer step.
        micro_batch: examples that one process takes at once.
        processes: that train together.

    Raises:
        ValueError: they do not make it; says what would.
    """
    each = micro_batch * processes
    if global_batch % each == 0:
        return global_batch // each
    share, rest = divmod(global_batch, processes)
    divisors = [size for size in range(1, share + 1) if share % size == 0] if rest == 0 else []
    nearest = sorted(sorted(divisors, key=lambda size: abs(size - micro_batch))[:3])
    below = max(global_batch // each, 1) * each
    fits = f"global_batch_size {below} or {below + each}"
    if nearest:
        fits += f", or per_device_train_batch_size {' or '.join(map(str, nearest))}"
    raise ValueError(
        f"global_batch_size={global_batch} is no multiple of {each}, per_device_train_batch_size={micro_batch} on "
        f"{processes} processes; {fits} would fit."
    )

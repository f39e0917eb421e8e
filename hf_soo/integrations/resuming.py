"""Trainer's checkpoints with our optimizer in them: written whole, checked, and read under any strategy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.integrations.accelerate import bind, unwrap_optimizer
from hf_soo.integrations.agreement import compare_arguments, compare_run, refuse_alone
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.integrations.checkpoints import (
    BASE_FILE,
    PRECONDITIONER_FILE,
    SAVING,
    TRAINER_STATE_FILE,
    hashes,
    load_renamed_weights,
    load_whole,
    manifest_mark,
    newest_whole,
    on_all_ranks,
    require_weights,
    require_whole,
    strategy_in,
)
from hf_soo.integrations.losses import LOSS_FILE, load_loss_state, loss_state
from hf_soo.integrations.reshard import WHOLE, adapter_files, load_base, load_weights, strategy_of
from hf_soo.integrations.saving import begin_save, finish_save, hold, write_error
from hf_soo.registry import METHODS

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # a mixin at run time; typed as what it is mixed into


class ResumingMixin(_Base):
    """What SecondOrderTrainerMixin does about checkpoints.

    The factors are one file (``preconditioner.pt``), the same for every strategy and world size. Where the base's state
    is sharded it is written once more in whole tensors, and a run that goes on under another strategy, or on another
    number of ranks, reads it from there. How a save goes is said in ``saving``.
    """

    _saving = False

    @property
    def second_order(self) -> PreconditionedOptimizer | None:
        """Our optimizer, without accelerate's wrapper; None before training or with one of transformers' own."""
        return unwrap_optimizer(self.optimizer)

    @property
    def _names_ours(self) -> bool:
        """Whether ``args.optim`` names one of ours."""
        return isinstance(self.args, SecondOrderTrainingArguments) and self.args.optim in METHODS

    def _attach(self) -> None:
        """Once everything is prepared: DeepSpeed's engine is there only then."""
        bind(self.accelerator, self.optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, in a folder that no other process writes to; a checkpoint that is not whole is refused.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest in ``output_dir`` that is whole.
            *args: Trainer's.
            **kwargs: Trainer's.

        Raises:
            ValueError: the checkpoint is not whole; or True, and none is; or another process trains in ``output_dir``;
                or the ranks were given different things.
        """
        if str(resume_from_checkpoint).lower() == "true":  # a script that hands on --resume_from_checkpoint true
            resume_from_checkpoint = True
        if getattr(getattr(self.args, "parsed", None), "optimizer", None) is not None:  # one of ours
            refuse_alone(self.args)
        compare_arguments(self.args, resume_from_checkpoint)
        self._show(False)
        trial = kwargs.get("trial", args[0] if args else None)
        lock = on_all_ranks(lambda: self._hold(trial))
        try:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = newest_whole(self.args)
                if resume_from_checkpoint is None:
                    raise ValueError(
                        f"resume_from_checkpoint=True, but {self.args.output_dir!r} has no whole checkpoint that every "
                        "rank sees; leave it out."
                    )
            elif resume_from_checkpoint:
                require_whole(self.args, resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if lock is not None:
                os.close(lock)

    def _hold(self, trial: Any) -> int | None:
        """The lock of the folder, where this process is the one that has it and checkpoints will be written."""
        if not self.is_world_process_zero() or self.args.save_strategy == SaveStrategy.NO:
            return None
        return hold(Path(self._get_output_dir(trial)))

    def _foreign(self, checkpoint: str | None) -> str | None:
        """The strategy a checkpoint was written under if it is another one than this run's, else None."""
        written_by = strategy_in(checkpoint) if checkpoint is not None and self._names_ours else None
        return written_by if written_by != strategy_of(self) else None

    def _show(self, shown: bool) -> None:
        """Give the model the weights that it is evaluated with, or those that it is trained with, if there are two."""
        if self.second_order is not None and self.second_order.wrappers is not None:
            (self.second_order.eval if shown else self.second_order.train)()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, of the weights that the model is evaluated with; checkpoints have those it is trained with."""
        if not self._saving:
            self._show(True)
        super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being written, where it is until it is whole."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._show(False)
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        saved = run / SAVING / name
        try:
            self._in_turn(lambda: begin_save(run))
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self._finish_save(run, saved)
        except Exception as error:
            failed = write_error(error, saved)
            if failed is None:
                raise
            raise failed from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _finish_save(self, run: Path, saved: Path) -> None:
        """Name the best checkpoint as it will be called, and then this one."""
        state = self.state
        best = run / f"checkpoint-{state.best_global_step}"
        if best.name == saved.name or best.is_dir():
            state.best_model_checkpoint = str(best)
        callbacks: Any = state.stateful_callbacks
        callbacks |= manifest_mark(state.global_step)

        def finish() -> None:
            if saved.is_dir():  # with save_on_each_node: not where all nodes share one disk
                state.save_to_json(str(saved / TRAINER_STATE_FILE))
                finish_save(saved, strategy_of(self), state.global_step, hashed=hashes(self.args))

        self.accelerator.wait_for_everyone()
        self._in_turn(finish)

    def _in_turn(self, call: Callable[[], None]) -> None:
        """Process 0, then what other processes save (``save_on_each_node``); all wait for it."""
        for first in (True, False):
            if self.args.should_save and (self.args.process_index == 0) == first:
                call()
            self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # else it is pushed when it is whole
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        loss = loss_state(self, self._bare())  # sentence-transformers' checkpoints hold the model alone
        if loss and self.args.should_save:
            torch.save(loss, os.path.join(output_dir, LOSS_FILE))
        ours = self.second_order
        if ours is None or ours.carries_state:
            return
        state = ours.second_order_state()  # on every rank: they may have to exchange factors
        if self.args.should_save:
            state["global_step"] = self.state.global_step
            torch.save(state, os.path.join(output_dir, PRECONDITIONER_FILE))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            base = ours.base_state(keep=self.args.should_save)
            if self.args.should_save:
                torch.save(base, os.path.join(output_dir, BASE_FILE))

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """DeepSpeed refuses checkpoints of others before anybody is asked, so those are read afterwards."""
        compare_run(self, max_steps, train_dataloader, resume_from_checkpoint)
        later = self.is_deepspeed_enabled and self._foreign(resume_from_checkpoint) is not None
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, None if later else resume_from_checkpoint
        )
        if later and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        written_by = self._foreign(resume_from_checkpoint)
        if written_by is not None:
            load_weights(self._bare(), resume_from_checkpoint, written_by)
            if self.is_deepspeed_enabled:
                engine = self.accelerator.deepspeed_engine_wrapped.engine
                getattr(engine.optimizer, "refresh_fp32_params", lambda: None)()  # ZeRO's copies of the weights
        elif not self._load_ourselves(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        require_weights(self.args, best)
        self._show(False)
        if not self._load_ourselves(best):
            super()._load_best_model()
        ours = self.second_order
        if ours is not None and ours.wrappers is not None and ours.wrappers.shows and not self.is_deepspeed_enabled:
            load_base(ours, best)  # what was best were its averages

    def _load_ourselves(self, checkpoint: str) -> bool:
        """Whether the weights were loaded here: where Trainer would load others than were saved, and say nothing."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        model = self._bare()
        if any((Path(checkpoint) / file).is_file() for file in adapter_files(model).values()):
            load_weights(model, checkpoint, WHOLE)
            return True
        return load_renamed_weights(checkpoint, model)

    def _bare(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def _refuse_ours(self, checkpoint: str) -> None:
        """Torch would load the state of one of our bases into any other optimizer, and say nothing.

        Raises:
            ValueError: the checkpoint is one of ours.
        """
        saved, optim = load_whole(checkpoint, PRECONDITIONER_FILE), self.args.optim
        if saved is not None:
            raise ValueError(
                f"{checkpoint} was written with optimizer {saved['optimizer']!r}, this run has "
                f"{getattr(optim, 'value', optim)!r}; resume with {saved['optimizer']!r}, or start a new run from the "
                "model's weights alone."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_loss_state(self, self._bare(), load_whole(checkpoint, LOSS_FILE), checkpoint)
        ours = self.second_order
        if ours is None and checkpoint is not None:
            self._refuse_ours(checkpoint)
        if ours is None or checkpoint is None or ours.carries_state:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self._attach()
        saved = load_whole(checkpoint, PRECONDITIONER_FILE)
        if saved is None and not _has_optimizer(checkpoint):
            logger.warning("%s holds no optimizer state; %s starts fresh", checkpoint, ours.name)
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        step = self.state.global_step
        if saved is not None and saved.get("global_step", step) != step:
            raise ValueError(
                f"{checkpoint}: {PRECONDITIONER_FILE} is of step {saved['global_step']}, {TRAINER_STATE_FILE} of step "
                f"{step}; resume from a checkpoint whose files are its own."
            )
        # Ours first: it tells another optimizer's checkpoint in one line, before torch complains about groups.
        ours.check_second_order_state(saved)
        if self._foreign(checkpoint) is not None:
            self._load_scheduler(checkpoint)
            load_base(ours, checkpoint)
        else:
            with ours.base_alone():  # torch's FSDP2 loader takes a step to make the state that it fills
                super()._load_optimizer_and_scheduler(checkpoint)
        ours.load_second_order_state(saved)

    def _load_scheduler(self, checkpoint: str) -> None:
        """The learning rates' state, of a checkpoint that another strategy wrote.

        Raises:
            ValueError: it has none outside DeepSpeed's own files.
        """
        scheduler = load_whole(checkpoint, "scheduler.pt")
        if scheduler is None:
            raise ValueError(
                f"{checkpoint} has no scheduler.pt: a 'scheduler' block in the DeepSpeed config keeps the learning "
                "rates in DeepSpeed's own files; resume under the strategy it was written under, and let Trainer "
                "make the schedule (lr_scheduler_type) where runs shall change it."
            )
        self.lr_scheduler.load_state_dict(scheduler)  # type: ignore[union-attr]


def _has_optimizer(checkpoint: str) -> bool:
    """Whether any optimizer's state is there; ``save_only_model`` writes none."""
    return any(file for pattern in ("optimizer*", "global_step*", BASE_FILE) for file in Path(checkpoint).glob(pattern))

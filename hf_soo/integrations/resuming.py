"""Trainer's checkpoints with our optimizer in them: written whole, checked, and read under any strategy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.integrations.accelerate import bind, unwrap_optimizer
from hf_soo.integrations.agreement import compare_ranks
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.integrations.checkpoints import (
    BASE_FILE,
    PRECONDITIONER_FILE,
    last_whole_checkpoint,
    load_renamed_weights,
    load_whole,
    save_whole,
    strategy_in,
    why_not_whole,
    write_manifest,
)
from hf_soo.integrations.losses import LOSS_FILE, load_loss_state, loss_state
from hf_soo.integrations.reshard import load_base, load_weights, strategy_of
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
    number of ranks, reads it from there.
    """

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
        """As Trainer's; a checkpoint that is not whole is refused, or passed over.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one in ``output_dir``.
            *args: Trainer's.
            **kwargs: Trainer's.

        Raises:
            ValueError: the folder is not whole; or True, and there is no whole checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir!r} has no whole checkpoint; leave it out."
                )
        elif resume_from_checkpoint and Path(resume_from_checkpoint).is_dir():
            reason = why_not_whole(resume_from_checkpoint)
            if reason is not None:
                raise ValueError(
                    f"{resume_from_checkpoint} cannot be resumed from: {reason}; give an earlier checkpoint, or True "
                    "for the newest whole one."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _foreign(self, checkpoint: str | None) -> str | None:
        """The strategy a checkpoint was written under if it is another one than this run's, else None."""
        written_by = strategy_in(checkpoint) if checkpoint is not None and self._names_ours else None
        return written_by if written_by != strategy_of(self) else None

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:
            if not isinstance(error, SafetensorError) and "PytorchStreamWriter" not in str(error):
                raise  # neither library raises OSError for a full disk
            raise OSError(
                f"the checkpoint of step {self.state.global_step} in {self.args.output_dir!r} could not be written "
                f"({error}); free space or choose another output_dir, then resume from the last whole checkpoint."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        loss = loss_state(self, self._bare())  # sentence-transformers' checkpoints hold the model alone
        if loss and self.args.should_save:
            save_whole(output_dir, LOSS_FILE, loss)
        ours = self.second_order
        if ours is None or ours.carries_state:
            return
        state = ours.second_order_state()  # on every rank: they may have to exchange factors
        if self.args.should_save:
            save_whole(output_dir, PRECONDITIONER_FILE, state)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            base = ours.base_state(keep=self.args.should_save)
            if self.args.should_save:
                save_whole(output_dir, BASE_FILE, base)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every rank writes; then the one that saves lists it all, before ``trainer_state.json``."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(output_dir, strategy_of(self))

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """DeepSpeed refuses checkpoints of others before anybody is asked, so those are read afterwards."""
        compare_ranks(self, max_steps, train_dataloader, resume_from_checkpoint)
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
        elif not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))

    def _load_best_model(self) -> None:
        if not self._load_renamed(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not sharded and load_renamed_weights(checkpoint, self._bare())

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

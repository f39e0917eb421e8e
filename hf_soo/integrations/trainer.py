"""Second-order optimizers in transformers' Trainer.

``SecondOrderTrainer`` is Trainer with ``optim`` extended; ``SecondOrderTrainerMixin`` does the same for any subclass:
``class MyTrainer(SecondOrderTrainerMixin, SFTTrainer)``. ``optimizer_factory`` serves the stock Trainer in a single
process or under DistributedDataParallel.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.generic import find_labels

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.engine.routing import summary
from hf_soo.integrations.accelerate import bind
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.integrations.card import add_section
from hf_soo.integrations.loss_normalisation import ignores_loss_kwargs
from hf_soo.integrations.losses import average_gradients, loss_parameters
from hf_soo.integrations.mc_fisher import sampled_loss
from hf_soo.integrations.ranges import POLY_WARMUP
from hf_soo.integrations.resuming import ResumingMixin
from hf_soo.optimizers.groups import given_groups
from hf_soo.optimizers.schedules import poly_warmup
from hf_soo.registry import METHODS, OptimizerSettings, bare_model, build_optimizer, takes_batch_size

__all__ = [
    "SecondOrderTrainer",
    "SecondOrderTrainerMixin",
    "SecondOrderTrainingArguments",
    "ignores_loss_kwargs",
    "optimizer_factory",
]

logger = logging.getLogger(__name__)


class SecondOrderTrainerMixin(ResumingMixin):
    """Put before Trainer, or a subclass of it, in a class's bases.

    With ``args`` that are SecondOrderTrainingArguments, ``args.optim`` may name one of ours; with any other
    TrainingArguments it is Trainer with the loss of models that ignore ``num_items_in_batch`` put right.
    """

    args: SecondOrderTrainingArguments
    corrects_stock_losses = True
    """Whether transformers' own optimizers, too, train on a loss that was put right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer."""
        super().__init__(*args, **kwargs)
        self._check_deepspeed_config()
        others = {c for c in type(self).__mro__ if "compute_loss" in vars(c)} - {SecondOrderTrainerMixin, Trainer}
        own_loss = self.compute_loss_func is not None or bool(others)
        if not own_loss and ignores_loss_kwargs(self.accelerator.unwrap_model(self.model)):
            # Trainer takes **kwargs in forward for a promise to divide the loss by num_items_in_batch. BERT's heads
            # break it, and the loss would be (accumulation steps x processes) times too large.
            self._correct_loss()
        self.add_callback(_LoopCallback(self))

    def _correct_loss(self) -> None:
        if self._names_ours or self.corrects_stock_losses:
            self.model_accepts_loss_kwargs = False
        elif "labels" in self.label_names and (self.args.gradient_accumulation_steps * self.args.world_size) > 1:
            logger.warning(
                "%s ignores num_items_in_batch, but Trainer believes otherwise: with optim=%r, which runs as without "
                "hf_soo, its loss and gradient are (accumulation steps x processes) times too large. Optimizers of "
                "hf_soo are given the right ones; to compare with them take adamw for adamw_torch.",
                type(self.model).__name__, str(getattr(self.args.optim, "value", self.args.optim)),
            )  # fmt: skip

    def _check_deepspeed_config(self) -> None:
        """Make the arguments hold under DeepSpeed.

        Raises:
            ValueError: DeepSpeed would step the optimizer of its own config, and ours would never be built.
        """
        if not (self.is_deepspeed_enabled and self._names_ours):
            return
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        configured = config.get("optimizer")
        if configured is not None:
            raise ValueError(
                f"the DeepSpeed config has an 'optimizer' block ({configured.get('type')!r}), which would replace "
                f"--optim {self.args.optim}; take the block out of the config."
            )
        # A config without it leaves DeepSpeed at its default of 1.0, whatever max_grad_norm says.
        config.setdefault("gradient_clipping", self.args.max_grad_norm or 0.0)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As Trainer's, or an override's; see ``get_optimizer_cls_and_kwargs``."""
        optimizer: Optimizer = super().create_optimizer(*(() if model is None else (model,)))
        bind(self.accelerator, optimizer)
        return optimizer

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """Ours, if ``args.optim`` names one: a class that Trainer calls with its groups.

        What a subclass returns for AdamW tells its groups and its rate, and ours takes them as they are.

        Args:
            args: the arguments.
            model: the model.

        Raises:
            ValueError: a subclass returns another optimizer, or arguments for it.
            NotImplementedError: several GPUs in one process.
        """
        if not self._names_ours:
            made: tuple[Any, Any] = super().get_optimizer_cls_and_kwargs(args, model)
            return made
        if args.n_gpu > 1:
            raise NotImplementedError(
                f"{args.optim} with {args.n_gpu} GPUs in one process (DataParallel): replicas lose their statistics; "
                "start one process for each GPU with torchrun or accelerate launch."
            )
        stand_in = copy.copy(args)
        stand_in.optim, stand_in.optim_args = OptimizerNames.ADAMW_TORCH, None
        stock, stock_kwargs = Trainer.get_optimizer_cls_and_kwargs(stand_in, model)
        found, kwargs = super().get_optimizer_cls_and_kwargs(stand_in, model)
        groups = {key: value for key, value in kwargs.items() if key in ("params", "model", "optimizer_dict")}
        theirs, stock_rest = kwargs.keys() - groups.keys() - {"lr"}, stock_kwargs.keys() - {"lr"}
        changed = [key for key in sorted(theirs | stock_rest) if kwargs.get(key) != stock_kwargs.get(key)]
        if found is not stock or changed:
            raise ValueError(
                f"get_optimizer_cls_and_kwargs of a subclass returns {found.__name__} with arguments of its own "
                f"({changed}), but optim={args.optim!r}, which takes groups and learning rate from it; set others as "
                "base_optim_args, or let optim name what is returned."
            )
        trained = bare_model(self.model if model is None else model)  # type: ignore[arg-type]
        others = loss_parameters(self, trained)
        return _Ours, {"lr": kwargs["lr"], "settings": self._settings(), "trained": trained, "others": others, **groups}

    def _check_optimizer(self) -> None:
        """Before the first step.

        Raises:
            ValueError: the optimizer is not the one asked for, or does not have every trainable parameter.
        """
        ours, args = self.second_order, self.args
        if type(self).create_optimizer_and_scheduler is not Trainer.create_optimizer_and_scheduler:
            logger.warning("transformers 5 never calls create_optimizer_and_scheduler; override create_optimizer.")
        if self._names_ours and (ours is None or ours.name != args.optim):
            what = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__ if ours is None else ours.name
            raise ValueError(
                f"optim={args.optim!r}, but the optimizer is {what!r}, which was handed over or made by an override of "
                "create_optimizer; return hf_soo.build_optimizer(..., params=groups) there, override "
                "get_optimizer_cls_and_kwargs to change groups alone, or let optim name what it is."
            )
        if ours is None:
            return
        if args.load_best_model_at_end and args.save_only_model and ours.wrappers is not None and ours.wrappers.shows:
            raise ValueError(
                "load_best_model_at_end with save_only_model, but the averages that the model is evaluated with are in "
                "the optimizer's state; leave save_only_model out."
            )
        model = self._bare()
        names = {name for group in ours.parameter_index.parameters for name in group}
        held = {id(p) for group in ours.param_groups for p in group["params"]}
        of_loss = {name: getattr(*place) for name, place in loss_parameters(self, model).items()}
        trained = {**dict(model.named_parameters()), **of_loss}
        left = [n for n, p in trained.items() if p.requires_grad and n not in names and id(p) not in held]
        if left:
            raise ValueError(
                f"{len(left)} trainable parameters are in no group of the optimizer and would never move: "
                f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}; put them into a group, or freeze them with "
                "requires_grad_(False). Adapters and losses belong into the model before its optimizer is made."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; where the optimizer wants a sampled loss (``fisher="mc"``), its backward pass runs here."""
        optimizer = self.second_order
        given: dict[str, Any] = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if optimizer is None or not (optimizer.wants_sampled_loss and model.training):
            return super().compute_loss(model, inputs, **given, **({"return_outputs": True} if return_outputs else {}))
        seen = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **given)
        sampled = sampled_loss(self.accelerator.unwrap_model(model), seen, outputs)
        # The real loss is weighted so that a window's micro-batches add up to a mean; this one by their number.
        optimizer.backward_sampled(sampled / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As Trainer's; tells the optimizer the loss."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.second_order is not None and not self.is_deepspeed_enabled:  # its engine has reported it, and stepped
            self.second_order.report_loss(loss)
        return loss

    def _settings(self) -> OptimizerSettings:
        """The optimizer's settings; the batch size is filled in for methods that need one."""
        args, settings = self.args, self.args.parsed.optimizer
        assert settings is not None
        if args.learning_rate == type(args).learning_rate:
            logger.warning(
                "learning_rate=%s is the default of %s, meant for AdamW; %s starts from %s.",
                args.learning_rate, type(args).__name__, settings.title,
                "a rate of its own: tune it" if settings.rates is None else "{:g} to {:g}".format(*settings.rates),
            )  # fmt: skip
        if takes_batch_size(settings.name) and args.max_grad_norm is not None and args.max_grad_norm > 0:
            logger.warning(
                "%s with max_grad_norm=%s: there is no square root in its curvature, so a gradient that is clipped to "
                "1/c of its length makes a step c times longer; set max_grad_norm=0.",
                args.optim, args.max_grad_norm,
            )  # fmt: skip
        if not settings.lacks_batch_size:
            return settings
        if args.auto_find_batch_size:
            raise ValueError(
                f"auto_find_batch_size=True changes the global batch, which {args.optim!r} is scaled with, after "
                "it was built; set it to False, or give optim_args batch_size=... yourself."
            )
        return settings.with_batch_size(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Add "poly_warmup" to Trainer's schedules."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type == POLY_WARMUP:
            self.lr_scheduler = poly_warmup(
                optimizer or self.optimizer,  # type: ignore[arg-type]
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                **self.args.parsed.lr_scheduler_kwargs,
            )
            self._created_lr_scheduler = True
        given = {} if optimizer is None else {"optimizer": optimizer}
        scheduler: LRScheduler = super().create_scheduler(num_training_steps=num_training_steps, **given)
        return scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the run's health to each training log, as "soo/..."."""
        if self.second_order is not None and "loss" in logs:
            logs = logs | {f"soo/{key}": value for key, value in self.second_order.health().items()}
        super().log(logs, *(() if start_time is None else (start_time,)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; after training with one of ours with a section on it (``card``)."""
        schedule = self.args.lr_scheduler_type
        if schedule == POLY_WARMUP:  # where transformers looks for the value of its enum
            self.args.lr_scheduler_type = cast("str", SimpleNamespace(value=POLY_WARMUP))
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args.lr_scheduler_type = schedule
        trained = self.second_order is not None or (self._names_ours and self.state.global_step > 0)
        if self.is_world_process_zero() and trained:
            add_section(self, self.second_order)


class _Ours(Optimizer):
    """What Trainer takes for a class of optimizers: called with groups of its or of an override's, it makes ours."""

    def __new__(  # type: ignore[misc]
        cls,
        params: Iterable[Any],
        *,
        lr: float,
        settings: OptimizerSettings,
        trained: nn.Module,
        others: dict[str, tuple[nn.Module, str]],
    ) -> PreconditionedOptimizer:
        optimizer = settings.build(trained, given_groups(params), lr)
        optimizer.parameter_index.slots.update(others)
        optimizer.parameter_index.number(optimizer.param_groups, optimizer.layers)
        optimizer.carries_state = False  # the factors have a file of their own beside optimizer.pt
        return optimizer


class SecondOrderTrainer(SecondOrderTrainerMixin, Trainer):
    """Trainer whose ``args`` are SecondOrderTrainingArguments."""


class _LoopCallback(TrainerCallback):
    """Says at the start which rule moves what, and starts each accumulation window clean.

    A skipped step or an out-of-memory retry leaves partial statistics.
    """

    def __init__(self, trainer: SecondOrderTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._check_optimizer()
        self.trainer._attach()
        optimizer = self.trainer.second_order
        if optimizer is not None and self.trainer.is_world_process_zero():
            # write, not print: the Trainer's progress bar stands on this line already
            tqdm.write(f"{optimizer.name}: which rule moves which parameters\n{summary(optimizer.routing())}")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.second_order is not None and trainer.args.world_size > 1 and not trainer.is_deepspeed_enabled:
            places = loss_parameters(trainer, trainer._bare()).values()
            average_gradients([getattr(*place) for place in places], trainer.accelerator)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.second_order is not None:
            self.trainer.second_order.begin_window()


class _Factory:
    """What Trainer's ``optimizer_cls_and_kwargs`` wants: a class whose instance is called with the model."""

    def __call__(self, model: nn.Module, name: str, **kwargs: Any) -> PreconditionedOptimizer:
        bare = bare_model(model)
        computes = find_labels(type(getattr(bare, "get_base_model", lambda: bare)()))  # type: ignore[no-untyped-call]
        if computes and not hasattr(bare, "accepts_loss_kwargs") and ignores_loss_kwargs(bare):
            logger.warning(
                "%s ignores num_items_in_batch, but the stock Trainer believes otherwise: with gradient accumulation "
                "or several processes its loss is too large. Set model.accepts_loss_kwargs = False before Trainer, or "
                "use SecondOrderTrainer.",
                type(model).__name__,
            )
        return build_optimizer(name, model, **kwargs)


def optimizer_factory(name: str, **kwargs: Any) -> tuple[type[_Factory], dict[str, Any]]:
    """For the stock Trainer: ``Trainer(..., optimizer_cls_and_kwargs=optimizer_factory("mkor", lr=4e-3))``.

    Args:
        name: one of ``hf_soo.available()``.
        **kwargs: ``hf_soo.build_optimizer``'s.

    Raises:
        ValueError: the name is unknown or lr is missing.
    """
    if name not in METHODS or "lr" not in kwargs:
        raise ValueError(f"optimizer_factory({name!r}, {kwargs}) needs lr=... and a name from {', '.join(METHODS)}.")
    return _Factory, {"name": name, **kwargs}

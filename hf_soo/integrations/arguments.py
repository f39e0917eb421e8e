"""TrainingArguments that know this project's optimizers, and settings written as text."""

from __future__ import annotations

import ast
import copy
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_soo.engine.checks import Positive, hints_of, once, options, require, shown, unknown_key
from hf_soo.integrations.ranges import POLY_WARMUP, check_fields, check_schedule
from hf_soo.optimizers.bases import ADAM_FIELDS, with_adam_fields
from hf_soo.registry import METHODS, OptimizerSettings

_SCHEDULES: Any = Literal[tuple([POLY_WARMUP, *(each.value for each in SchedulerType)])]
# The fields that are read once; whoever sets one later (a search over hyperparameters) has all of them read again.
_READ = (
    "optim", "optim_args", "base_optim", "base_optim_args", "precondition_include", "precondition_exclude",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim_target_modules", *ADAM_FIELDS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Parsed:
    """What the arguments say of optimizer and schedule, read and checked.

    Args:
        optim_args: key -> value.
        base_optim_args: key -> value.
        lr_scheduler_kwargs: of "poly_warmup"; transformers reads those of its own schedules.
        optimizer: what ours is built from; None: it is one of transformers' own.
    """

    optim_args: dict[str, Any]
    base_optim_args: dict[str, Any]
    lr_scheduler_kwargs: dict[str, Any]
    optimizer: OptimizerSettings | None


@dataclass
class SecondOrderTrainingArguments(TrainingArguments):
    """TrainingArguments whose ``optim`` may also be a name in ``hf_soo.available()``.

    Those names are ours even where transformers has the same one ("sgd", "rmsprop"). ``lr_scheduler_type`` may also
    be "poly_warmup", the schedule of BERT's LAMB recipes. Everything else is as in TrainingArguments.
    """

    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={"help": f"The optimizer: one of {', '.join(METHODS)}, or any of transformers' OptimizerNames."},
    )
    optim_args: dict[str, Any] | str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Settings of the method, 'update_period=10,factor_decay=0.95' or a JSON object; for a base "
            "optimizer alone, its own arguments."
        },
    )
    base_optim: str | None = field(
        default=None,
        metadata={
            "help": "The optimizer under a second-order method: lamb, adamw, sgd, rmsprop, muon or module:Class."
        },
    )
    base_optim_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Its arguments: 'rest_lr=0.01', or JSON: '{\"betas\": [0.9, 0.99]}'."}
    )
    precondition_include: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: precondition only modules whose name matches one."}
    )
    precondition_exclude: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: leave modules whose name matches one to the base."}
    )
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "A transformers SchedulerType, or 'poly_warmup' (LAMB's BERT recipes)."}
    )
    hash_checkpoints: bool = field(
        default=True,
        metadata={"help": "Write the SHA-256 of a checkpoint's files into its manifest, and compare it on resume."},
    )

    def __post_init__(self) -> None:
        """Let TrainingArguments check its own fields, and keep our values of the two that it would refuse.

        Raises:
            ValueError: the optimizer is unknown, or settings cannot be read or are for one of transformers' own.
        """
        if str(self.optim) not in METHODS and str(getattr(self.optim, "value", self.optim)) not in list(OptimizerNames):
            known = dict.fromkeys([*METHODS, *(name.value for name in OptimizerNames)])
            raise ValueError(unknown_key("optimizer", str(self.optim), list(known)))
        ours = {
            name: str(getattr(self, name))
            for name, known in (("optim", METHODS), ("lr_scheduler_type", (POLY_WARMUP,)))
            if str(getattr(self, name)) in known
        }
        require("lr_scheduler_type", str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)), _SCHEDULES)
        for name, hint in hints_of(TrainingArguments).items():
            value = getattr(self, name)
            is_mapping = dict in {get_origin(part) or part for part in options(hint)}
            if is_mapping and isinstance(value, str) and value.startswith("{"):
                _read(name, value)  # transformers reads it, and would not say which it is
        stand_in = {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
        for name in ours:
            setattr(self, name, stand_in[name])
        check_fields(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, value in ours.items():
            setattr(self, name, value)
        check_schedule(self, self.parsed.lr_scheduler_kwargs)  # wrong settings show now, not after the data

    @property
    def parsed(self) -> _Parsed:
        """The optimizer's and the schedule's settings; read once, and again when one of them was set to another value.

        Raises:
            ValueError: a setting that cannot be read, is unknown, out of range or without effect.
        """
        given = {name: getattr(self, name) for name in _READ}
        if self.__dict__.get("_parsed_of") != given:
            self._parsed, self._parsed_of = self._parse(), copy.deepcopy(given)
        return self._parsed

    def _parse(self) -> _Parsed:
        optim_args = parse_settings("optim_args", self.optim_args)
        base_args = parse_settings("base_optim_args", self.base_optim_args)
        schedule: dict[str, Any] = {}
        if self.lr_scheduler_type == POLY_WARMUP:
            schedule = parse_settings("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
            for key, value in schedule.items():
                if key != "degree":
                    raise ValueError(unknown_key(f"argument of {POLY_WARMUP}", key, ["degree"]))
                require(f"lr_scheduler_kwargs: {key}", value, Positive)
        if self.optim in METHODS:
            if self.optim_target_modules is not None:
                raise ValueError(
                    f"optim_target_modules={self.optim_target_modules!r} has no effect with optim={self.optim!r}; "
                    "use precondition_include, a list of regular expressions."
                )
            method = METHODS[self.optim]
            if method.config is None:
                optim_args = with_adam_fields(method.base, optim_args, self._adam_fields())
            else:
                base_args = with_adam_fields(self.base_optim or method.base, base_args, self._adam_fields())
            optimizer = OptimizerSettings.of(
                self.optim,
                optim_args,
                base=self.base_optim,
                base_args=base_args,
                include=self.precondition_include,
                exclude=self.precondition_exclude,
            )
            return _Parsed(optim_args, base_args, schedule, optimizer)
        for name in ("base_optim", "base_optim_args", "precondition_include", "precondition_exclude"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with optim={str(self.optim)!r}, which is "
                    f"transformers' own; leave it out, or use one of {', '.join(METHODS)}."
                )
        return _Parsed(optim_args, base_args, schedule, None)

    def _adam_fields(self) -> dict[str, float]:
        """The Trainer's fields for Adam that are set; LAMB keeps its own ε where theirs is left alone."""
        values = {name: getattr(self, name) for name in ADAM_FIELDS}
        return {name: value for name, value in values.items() if value != getattr(TrainingArguments, name)}


def parse_settings(what: str, text: str | dict[str, Any] | None) -> dict[str, Any]:
    """Settings from "key=value,key=value" or a JSON object.

    Args:
        what: where the text came from, for the message.
        text: the settings; values are read as Python literals ("none" is None), else as strings.

    Raises:
        ValueError: the text is neither form.
    """
    require(what, text, dict[str, Any] | str | None)
    return _read(what, text) if isinstance(text, str) else dict(text or {})


def _read(what: str, text: str) -> dict[str, Any]:
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text, object_pairs_hook=once))
        parts = [part.partition("=") for part in filter(None, map(str.strip, text.split(",")))]
        if wrong := ["".join(part) for part in parts if not part[1] or not part[0].strip()]:
            raise ValueError(f"{wrong[0]!r} is no 'key=value'; for lists give a JSON object")
        return once((key.strip(), _literal(value.strip())) for key, _, value in parts)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{what}={shown(text)}: {error}; give 'key=value,key=value' or '{{\"key\": value}}'."
        ) from error


def _literal(text: str) -> Any:
    named = {"none": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # a word: "dense", "unit"
        return text

"""The model card's section on the optimizer: which, in which settings, how it went, and how to run it again.

It stands between two comments at the end of what the Trainer writes, so that a second call replaces it; the card's
metadata have the tag ``hf_soo``, and optimizer, base and version under a key of that name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load, metadata_save
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from hf_soo import machine
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.files import jsonable, write_atomically
from hf_soo.registry import METHODS

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "max_grad_norm",
    "bf16", "fp16", "precondition_include", "precondition_exclude",
)  # fmt: skip
"""What is said of the Trainer's settings; with the task's they decide whether two runs can be compared."""

_BEGIN, _END = "<!-- hf_soo -->", "<!-- /hf_soo -->"
_SECTION = re.compile(rf"\s*{_BEGIN}.*{_END}\s*", re.DOTALL)
_SECRET_FLAG = re.compile(r"-.*(token|secret|password|key)", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HIDDEN = "..."
# what transformers says of a model that has no name, with a link to nowhere, and what it means
_FROM_SCRATCH = ("is a fine-tuned version of [](https://huggingface.co/) on", "was trained from scratch on")


class RunCallback(TrainerCallback):
    """A callback of a Trainer that knows its run's JSON; the card shows it."""

    def document(self) -> dict[str, Any]:
        """The JSON, of plain values."""
        raise NotImplementedError


def add_section(trainer: Trainer, optimizer: PreconditionedOptimizer | None) -> None:
    """Add the section to the card in ``output_dir``, or replace it.

    Args:
        trainer: which has written its own card there.
        optimizer: that it trains with; None: none was built.
    """
    file = Path(str(trainer.args.output_dir)) / "README.md"
    known = (each.document() for each in trainer.callback_handler.callbacks if isinstance(each, RunCallback))
    run = next(known, None) or _document(trainer, optimizer)
    settings = {} if optimizer is None else {"optimizer": optimizer.config, "base": _settings_of(optimizer.base)}
    metadata: dict[str, Any] = metadata_load(file) or {}
    tags = metadata.get("tags") or []
    metadata["tags"] = [*dict.fromkeys([*([tags] if isinstance(tags, str) else tags), "hf_soo"])]
    metadata["hf_soo"] = {
        "optimizer": run["optimizer"], "base": run["base"], "version": run["versions"]["hf-soo"]
    }  # fmt: skip
    metadata_save(file, metadata)
    section = "\n".join(_lines(run, jsonable(settings), _command(sys.orig_argv), trainer.args.world_size))
    text = _SECTION.sub("\n", file.read_text(encoding="utf-8")).replace(*_FROM_SCRATCH)
    write_atomically(file, f"{text.rstrip()}\n\n{_BEGIN}\n{section}\n{_END}\n")


def plain_settings(args: Any) -> dict[str, Any]:
    """`SETTINGS` of the Trainer's arguments, those that they have."""
    values = {key: getattr(args, key) for key in SETTINGS if hasattr(args, key)}
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}


def _document(trainer: Trainer, optimizer: PreconditionedOptimizer | None) -> dict[str, Any]:
    """What a run's JSON says, as far as a Trainer by itself knows it."""
    args: Any = trainer.args
    parsed = getattr(args, "parsed", None)
    own = {} if parsed is None else {"optim_args": parsed.optim_args, "base_optim_args": parsed.base_optim_args}
    if parsed is not None and parsed.optimizer is not None:
        name, base = str(args.optim), str(parsed.optimizer.base)
    else:
        assert optimizer is not None
        name, base = optimizer.name, type(optimizer.base).__name__.lower()
    curve = [{"step": row["step"], "eval_loss": row["eval_loss"]} for row in _evaluations(trainer)]
    measured = [{key: value for key, value in row.items() if key.startswith("eval_")} for row in _evaluations(trainer)]
    count = get_model_param_count(trainer.model)  # type: ignore[no-untyped-call]
    document: dict[str, Any] = jsonable({
        "optimizer": name, "base": base, "config": plain_settings(args) | own, "seed": args.seed,
        "device": machine.device_name(args.device), "versions": machine.versions(), "commit": machine.commit(),
        "code": machine.code(), "parameters": count, "steps": trainer.state.global_step,
        "curve": curve, "final": measured[-1] if measured else {},
    })  # fmt: skip
    return document


def _settings_of(base: Optimizer) -> dict[str, Any]:
    """What its groups are given, at the start of a schedule; of groups that differ each value, {"groups": [...]}."""
    found: dict[str, list[Any]] = {key: [] for key in base.defaults}
    for (key, values), group in product(found.items(), base.param_groups):
        if (value := group.get(f"initial_{key}", group.get(key, base.defaults[key]))) not in values:
            values.append(value)
    return {key: values[0] if len(values) == 1 else {"groups": values} for key, values in found.items()}


def _evaluations(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def _lines(
    run: Mapping[str, Any], settings: Mapping[str, Any], command: Sequence[str], processes: int
) -> Iterator[str]:
    """The section's lines. All that is given by a user stands as code, which no Markdown or HTML in it can end."""
    title = METHODS[run["optimizer"]].title
    yield from ("## Optimizer", "", f"Trained with `hf_soo` {run['versions']['hf-soo']}:", "")
    recipes = [after for before, after in pairwise(command) if before == "--config"]
    recipes += [word.removeprefix("--config=") for word in command if word.startswith("--config=")]
    said = {"base": run["base"], "recipe": ", ".join(recipes) or None, "status": run.get("status")}
    said |= {key: run.get(key) for key in ("parameters", "steps", "seconds", "seed", "device")}
    said |= {_code(key): value for key, value in run["final"].items()}
    yield f"- optimizer: {_code(run['optimizer'])}, {title}"
    for key, value in said.items():
        if value is not None:
            yield f"- {key}: {_code(f'{value:.6g}' if isinstance(value, float) else str(value))}"
    yield from ("", "Its settings, and those of its base:", "", *_block("json", _json(settings)))
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    commit = f", at commit {run['commit']}" if run["commit"] else ""
    many = f", on {processes} processes" if processes > 1 else ""
    yield from ("", "### How to reproduce", "", *(_block("bash", shlex.join(command)) if command else ()), "")
    yield from (f"With {versions}{commit}{many}.", "")
    # of the curve the evaluations: what each logged step said is in the run's own file
    points = [{key: point[key] for key in point if key != "health"} for point in run["curve"]]
    shown = {key: value for key, value in run.items() if key not in ("workload", "method")}  # which `config` has both
    shown["curve"] = [point for point in points if point["eval_loss"] is not None]
    yield from ("<details><summary>The run's JSON</summary>", "", *_block("json", _json(shown)), "", "</details>")


def _json(value: Any) -> str:
    """JSON in which no comment of HTML begins or ends."""
    return json.dumps(value, indent=1, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _code(text: str) -> str:
    """A text on one line, as code."""
    text = " ".join(text.split())
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _block(language: str, text: str) -> list[str]:
    """A text in a fence that is longer than any in it."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return [f"{fence}{language}", text, fence]


def _command(words: Sequence[str]) -> list[str]:
    """A process's command line, to be given again: paths of this machine as their last part, and nothing secret.

    Args:
        words: with the interpreter; those of a notebook's kernel are no command.
    """
    found: list[str] = []
    for word in words[1:]:
        flag, equals, value = word.partition("=") if word.startswith("-") and "=" in word else ("", "", word)
        before = flag or "".join(found[-1:])
        if _SECRET_FLAG.fullmatch(before) and not value.startswith("-"):
            value = _HIDDEN
        elif os.path.isabs(value):
            value = os.path.basename(value.rstrip(os.sep))
        found.append(flag + equals + _HUB_TOKEN.sub(_HIDDEN, value))
    if any("kernel_launcher" in word for word in found):
        return []
    return found if found[:1] == ["hf-soo"] else ["python", *found]

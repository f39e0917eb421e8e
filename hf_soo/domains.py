"""Pretrain BERT, or a language model over bytes, with any optimizer of hf_soo, from a YAML file and flags over it.

    hf-soo pretrain --config smoke/mkor
    hf-soo pretrain --config smoke/mkor --compare_with lamb
    hf-soo pretrain --config bert_mini_wiki --config mkor
    accelerate launch -m hf_soo.pretrain --config byte_gpt_embedded

The task is the recipe's, or --task: bert (masked words and next sentence) or lm (a small GPT, or BERT, over bytes);
`--task lm --help` lists the flags of the latter. Every field of TrainingArguments is a flag and a YAML key. The run
goes on from the last checkpoint in --output_dir unless --restart is given. It leaves one JSON in OUTPUT_DIR/runs; with
--compare_with, two and a picture of both curves.

`accelerate launch -m hf_soo.pretrain` is the same in any number of processes, and so is scripts/pretrain_bert.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from hf_soo.runs import arguments
from hf_soo.runs.recipes import COMMANDS
from hf_soo.runs.script import Domain, guarded

DOMAINS = {
    "bert": "hf_soo.bert.task",
    "glue": "hf_soo.glue.task",
    "lm": "hf_soo.lm.task",
    "squad": "hf_soo.squad.task",
    "vision": "hf_soo.vision.task",
}
"""What a recipe's ``task`` may be -> the module whose DOMAIN trains it, imported when it is asked for."""

_DEFAULT = "bert"
_PRETRAINED = {"bert", "lm"}


def domain_of(flags: Sequence[str]) -> Domain:
    """The domain of a command line: the ``task`` of its recipes, or "bert" where none is said.

    Args:
        flags: of a command line, with ``--config``; a name is one of `hf-soo pretrain`'s first.

    Raises:
        ValueError: no such task, or a recipe that cannot be read.
    """
    task = arguments.task_of(flags, COMMANDS[_DEFAULT]) or _DEFAULT
    if task not in DOMAINS:
        raise ValueError(f"task={task!r} is none of {', '.join(DOMAINS)}.")
    domain: Domain = importlib.import_module(DOMAINS[task]).DOMAIN
    return domain


def main(flags: list[str] | None = None) -> int:
    """Run; 0 when it trained (also when it diverged), 1 with one line on stderr for an error, 130 after Ctrl-C."""
    return guarded(_pretrain, flags)


def _pretrain(flags: list[str]) -> None:
    domain = domain_of(flags)
    if domain.name not in _PRETRAINED:
        domain = domain_of([])  # which refuses the recipe, and says whose it is
    domain.run(flags, __doc__ or "")

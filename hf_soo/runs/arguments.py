"""Arguments of a script: YAML files first, flags over them, both checked alike.

A YAML key is the flag of the same name, so ``learning_rate: 0.02`` and ``--learning_rate 0.02`` go through one parser.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from hf_soo.engine.checks import hints_of
from hf_soo.runs.recipes import read_recipe, unknown_name, values_of
from hf_soo.runs.shipped import find


def option(default: Any, text: str) -> Any:
    """A dataclass field that is a flag with a line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and a description with the line breaks it has."""


class _Parser(HfArgumentParser):
    """The parser of `transformers`, whose errors are exceptions instead of a page of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every flag.")


def parse(
    classes: Sequence[Any], arguments: Sequence[str] | None = None, description: str = "", command: str = ""
) -> tuple[Any, ...]:
    """One object of each dataclass, from each ``--config`` (`recipes`, found by `shipped`) and the flags over them.

    Args:
        classes: dataclasses, whose fields are the flags.
        arguments: the command line without the program's name; None: that of the process.
        description: for ``--help``.
        command: of hf-soo, whose recipes come first; "": none.

    Raises:
        ValueError: an unknown flag or YAML key (the nearest name is given), a value of the wrong
            type, a file that is no recipe, a name of none or of several.
    """
    usage = "%(prog)s [--config FILE.yaml] [--flag value ...]"
    prog = f"hf-soo {command}" if command else None
    parser = _Parser(
        classes, prog=prog, description=description, usage=usage, formatter_class=_Help, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="append", metavar="FILE.yaml",
        help="YAML file of the same names, or the name of one of `hf-soo recipes`; later ones and flags win",
    )  # fmt: skip
    flags = list(sys.argv[1:] if arguments is None else arguments)
    files = _find(flags, command).config
    known = {key: hint for cls in classes for key, hint in hints_of(cls).items()}
    settings = read_recipe(files, known, {flag.split("=")[0].removeprefix("--") for flag in flags})
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*_as_flags(settings), *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(unknown_name("flag", unknown[0].split("=")[0], {f"--{name}" for name in known}))
    return tuple(parsed)


def task_of(flags: Sequence[str], command: str = "") -> str | None:
    """The ``task`` of a command line: the flag, else that of the last recipe which says one; None: none says it.

    Args:
        flags: the command line without the program's name.
        command: as in `parse`.

    Raises:
        ValueError: a recipe that cannot be found or read.
    """
    given = _find(flags, command)
    named = [str(task) for task in (given.task, *reversed(values_of("task", given.config))) if task is not None]
    return named[0] if named else None


def _find(flags: Sequence[str], command: str) -> argparse.Namespace:
    """The recipes' files of a command line and its task, before it is known which other flags there are."""
    finder = _Parser([], add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    finder.add_argument("--task")
    given = finder.parse_known_args(flags)[0]
    given.config = find(given.config, command)
    return given


def _as_flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """A scalar as ``--key=value``, a list as ``--key a b``, a mapping as JSON; None is the default."""
    for key, value in settings.items():
        if isinstance(value, list):
            yield from (f"--{key}", *map(str, value))
        elif value is not None:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"

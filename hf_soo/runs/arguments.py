"""Arguments of a script: a YAML file first, flags over it, both checked alike.

A YAML key is the flag of the same name, so ``learning_rate: 0.02`` and ``--learning_rate 0.02`` go through one parser.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and a description with the line breaks it has."""


class _Parser(HfArgumentParser):
    """The parser of `transformers`, whose errors are exceptions instead of a page of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every flag.")


def parse(classes: Sequence[Any], arguments: Sequence[str] | None = None, description: str = "") -> tuple[Any, ...]:
    """One object of each dataclass, from ``--config FILE.yaml`` and the flags after it.

    Args:
        classes: dataclasses, whose fields are the flags.
        arguments: the command line without the program's name; None: that of the process.
        description: for ``--help``.

    Raises:
        ValueError: an unknown flag or YAML key (the nearest name is given), a value of the wrong
            type, an unreadable file.
    """
    usage = "%(prog)s [--config FILE.yaml] [--flag value ...]"
    parser = _Parser(classes, description=description, usage=usage, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the same names; flags override it")
    flags = list(sys.argv[1:] if arguments is None else arguments)
    finder = _Parser([], add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(flags)[0].config
    names = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*(yaml_flags(file, names) if file else ()), *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown("flag", unknown[0].split("=")[0], {f"--{name}" for name in names}))
    return tuple(parsed)


def yaml_flags(file: str | Path, names: Iterable[str]) -> Iterator[str]:
    """A YAML file as flags: a scalar ``--key=value``, a list ``--key a b``, a mapping as JSON; ``null`` is the default.

    Args:
        file: the YAML file, one mapping.
        names: the known keys.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has an unknown key.
    """
    known = set(names)
    for key, value in read_yaml(file).items():
        if key not in known:
            raise ValueError(f"--config {file}: {_unknown('key', str(key), known)}")
        if isinstance(value, list):
            yield from (f"--{key}", *map(str, value))
        elif value is not None:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        file: of settings.

    Raises:
        ValueError: the file cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {file}: holds a {type(content).__name__}, not 'key: value' lines.")
    return content


def _unknown(kind: str, got: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(got, list(known), n=1)
    return f"unknown {kind} {got!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists every flag.")

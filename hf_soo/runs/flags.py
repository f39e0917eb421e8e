"""Dataclass fields that are flags of a script."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A dataclass field that is a flag with a line of help.

    Args:
        default: value when the flag is not given.
        text: the help.
    """
    return field(default=default, metadata={"help": text})

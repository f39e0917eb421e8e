"""Checks of arguments: each error says what, the value got, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def require_in(name: str, value: object, allowed: Sequence[object]) -> None:
    """Check that a value is one of a few.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; use one of {list(allowed)}.")


def require_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Check that a number is in [low, high), or in (low, high) with ``open_low``.

    Raises:
        ValueError: it is not, or it is no number.
    """
    bracket = "(" if open_low else "["
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number; give one in {bracket}{low}, {high}).")
    if not (low < value if open_low else low <= value) or not value < high:
        raise ValueError(f"{name}={value!r} is out of range; give a number in {bracket}{low}, {high}).")


def require_count(name: str, value: int, low: int) -> None:
    """Check that a value is an integer >= low.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} is not allowed; give a whole number >= {low}.")


def unknown_key(what: str, key: str, valid: Sequence[str]) -> str:
    """The message for an unknown key, with the nearest valid one."""
    near = difflib.get_close_matches(key, valid, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key!r} is no {what}.{hint} Valid: {', '.join(valid) if valid else '(none)'}."

"""Checks of settings: what a value may be stands in its type, and each error says what, the value got, what is allowed.

    damping: Positive = 0.1                     (0, inf); every number must be finite, and True is none
    update_period: Count = 10                   a whole number from 1 on
    betas: tuple[Share, Share] = (0.9, 0.999)   two numbers of [0, 1)
    form: Literal["joint", "separable"]         one of these

So one walk over a type (`require`) checks the fields of a dataclass (`Checked`) as well as arguments that are not ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_LARGEST_WHOLE = 2**63  # what a tensor, a checkpoint and a file of JSON hold
_LONGEST = 120  # characters of a value in a message


class Bounds(NamedTuple):
    """[low, high) of a number; the ends may be the other way."""

    low: float
    high: float = math.inf
    open_low: bool = False
    closed_high: bool = False


Whole = Annotated[int, Bounds(0)]
Count = Annotated[int, Bounds(1)]
Seed = Annotated[int, Bounds(0, 2**32)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_low=True)]
Share = Annotated[float, Bounds(0, 1)]
OpenShare = Annotated[float, Bounds(0, 1, open_low=True)]
Portion = Annotated[float, Bounds(0, 1, closed_high=True)]
Weight = Annotated[float, Bounds(0, 1, open_low=True, closed_high=True)]


class Checked:
    """A dataclass whose fields are checked against their types when it is made."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: one of them is not allowed.
        """
        cls: Any = type(self)
        for name, hint in hints_of(cls).items():
            require(name, getattr(self, name), hint)


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by name, with their bounds."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def require(name: str, value: object, hint: Any) -> None:
    """Check a value against a type.

    Args:
        name: what it is, for the message.
        value: to check.
        hint: the type, with `Bounds` where it is a number that has some.

    Raises:
        ValueError: the value is not allowed.
    """
    if not fits(value, hint):
        raise ValueError(f"{name}={shown(value)} is not allowed; give {allowed(hint)}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, and in its bounds; a number that is not finite never is."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, parts[0]) and _inside(value, parts[1])
    if len(options(hint)) > 1:
        return any(fits(value, part) for part in options(hint))
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple and parts[-1] is not ...:
        return _is_sequence(value) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin in {list, tuple, Sequence}:
        return _is_sequence(value) and all(fits(each, parts[0]) for each in value)
    if hint is int:
        return type(value) is int and abs(value) < _LARGEST_WHOLE
    if hint is float or (hint is Any and isinstance(value, int | float)):
        number = isinstance(value, int | float) and (hint is Any or not isinstance(value, bool))
        return number and abs(value) <= sys.float_info.max
    if hint is None:
        return value is None
    return hint is Any or isinstance(value, origin or hint)


def options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a type that is none."""
    return get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,)


def _is_sequence(value: object) -> bool:
    return isinstance(value, list | tuple)


def _inside(value: Any, bounds: Bounds) -> bool:
    above = bounds.low < value if bounds.open_low else bounds.low <= value
    return bool(above and (value <= bounds.high if bounds.closed_high else value < bounds.high))


def allowed(hint: Any) -> str:
    """A type in words: "a number in [0, 1)", "one of 'a', 'b'", "a whole number >= 1 or None"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _interval(parts[0], parts[1])
    if len(options(hint)) > 1:
        return " or ".join(dict.fromkeys(map(allowed, options(hint))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin is tuple and parts[-1] is not ...:
        return f"{len(parts)} values, {' and '.join(dict.fromkeys(map(allowed, parts)))}"
    if origin in {list, tuple, Sequence}:
        return f"a list, of {allowed(parts[0])} each"
    words: dict[Any, str] = {
        int: "a whole number", float: "a finite number", bool: "True or False", str: "text", Any: "anything finite",
        type(None): "None", None: "None", dict: "a mapping", Mapping: "a mapping", type: "a class",
    }  # fmt: skip
    return words.get(origin or hint) or str(getattr(hint, "__name__", hint))


def _interval(kind: type, bounds: Bounds) -> str:
    if kind is int and bounds.high == math.inf:
        return f"a whole number >= {bounds.low}"
    ends = f"{'(' if bounds.open_low else '['}{bounds.low}, {bounds.high}{']' if bounds.closed_high else ')'}"
    return f"a {'whole ' if kind is int else ''}number in {ends}"


def shown(value: object) -> str:
    """A value in a message, on one line and never longer than one."""
    if isinstance(value, int) and abs(value) >= _LARGEST_WHOLE:
        return f"{'-' if value < 0 else ''}(a number of {value.bit_length()} bits)"  # Python may refuse to write it
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key!r}: {shown(each)}" for key, each in value.items()) + "}"
    elif isinstance(value, list | tuple) and len(value) <= _LONGEST:
        text = ", ".join(map(shown, value))
        text = f"[{text}]" if isinstance(value, list) else f"({text}{',' * (len(value) == 1)})"
    else:
        text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 23]}...{text[-20:]}"


def unknown_key(what: str, key: str, valid: Sequence[str]) -> str:
    """The message for an unknown key, with the nearest valid one."""
    near = difflib.get_close_matches(key, valid, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{key!r} is no {what}.{hint} Valid: {', '.join(valid) if valid else '(none)'}."


def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs, none of which stands there twice.

    Raises:
        ValueError: a key does.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice; give it once")
        found[key] = value
    return found

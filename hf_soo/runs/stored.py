"""What a stored run must be for tables and pictures to read it: a damaged one shows here, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from hf_soo.engine.checks import allowed, fits, shown

# What tables and pictures look at inside of a run's mappings.
_CONFIG = {
    **dict.fromkeys(("model", "data", "optim_args", "base_optim_args"), dict | None), "learning_rate": float | None,
    **dict.fromkeys(("precondition_include", "precondition_exclude"), list[str] | None), "max_steps": int | None,
}  # fmt: skip
_SEARCH = {
    "study": str, "space": str, "stage": Literal["wide", "narrow", "confirm"], "number": int, "trials": int,
    "params": dict,
}  # fmt: skip
_RATES = ("learning_rate", "_lr")  # ends of the names of rates
_ROUTE = {"parameters": int, "first": list[str]}
_POINT = {"step": int, "seconds": float | None, "train_loss": float | None, "eval_loss": float | None}
NO_POINT = dict.fromkeys(_POINT)  # of a curve; older runs say less


def check_stored(path: Path, run: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse a run in which a value is not what reports take it for.

    Args:
        path: of its JSON.
        run: its values by field, of which an older one may lack some.
        hints: the fields' types.

    Raises:
        ValueError: a value is of another type, or is missing where one belongs.
    """
    _check(path, run, hints)
    _check(path, run["config"], _CONFIG)
    for point in run.get("curve", []):
        _check(path, point, _POINT | {"health": dict}, needed=("step",))
    for numbers in (run.get("final", {}), run.get("health", {}), *(p.get("health", {}) for p in run.get("curve", []))):
        _check(path, numbers, dict.fromkeys(numbers, float | None))
    for route in run.get("routing", {}).values():
        _check(path, {"routing": route}, {"routing": dict})
        _check(path, route, _ROUTE, needed=_ROUTE)
    if search := run.get("search"):
        _check(path, search, _SEARCH, needed=_SEARCH)
        _check(path, search["params"], {key: float for key in search["params"] if key.endswith(_RATES)})


def flat(nest: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nest of mappings, by dotted names; None is as good as no key."""
    for key, value in nest.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def _check(path: Path, values: Mapping[str, Any], hints: Mapping[str, Any], needed: Collection[str] = ()) -> None:
    for key in needed:
        if key not in values:
            raise ValueError(f"{path}: not a run, it has no {key!r} where one belongs; write it again.")
    for key, hint in hints.items():
        if key in values and not fits(values[key], hint):
            raise ValueError(f"{path}: {key!r} is {shown(values[key])}, not {allowed(hint)}; write it again.")

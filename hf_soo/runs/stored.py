"""What a stored run must be for tables and pictures to read it: a damaged one shows here, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    for numbers in (run.get("final", {}), run.get("health", {})):
        _check(path, numbers, dict.fromkeys(numbers, float | None))
    if search := run.get("search"):
        _check(path, search, _SEARCH, needed=_SEARCH)
        _check(path, search["params"], {key: float for key in search["params"] if key.endswith(_RATES)})
    for point in run.get("curve", []):
        _check(path, point, _POINT, needed=("step",))


def _check(path: Path, values: Mapping[str, Any], hints: Mapping[str, Any], needed: Collection[str] = ()) -> None:
    for key in needed:
        if key not in values:
            raise ValueError(f"{path}: not a run, it has no {key!r} where one belongs; write it again.")
    for key, hint in hints.items():
        if key in values and not fits(values[key], hint):
            raise ValueError(f"{path}: {key!r} is {shown(values[key])}, not {allowed(hint)}; write it again.")

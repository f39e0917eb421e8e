"""What a step of one method takes beside another's: of benchmarks that timed both in alternation, never of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_soo.registry import METHODS
from hf_soo.runs.record import RunRecord, kind_of, read_documents

Benchmarks = Sequence[Mapping[str, Any]]
_AS_THE_MACHINE = ("ns_dtype", "share")  # how a base computes what it computes


def benchmarks(folder: Path) -> Benchmarks:
    """Those in the folder ``bench`` beside a folder of trials, or one above; of several ranks none: they wait."""
    places = [parent / "bench" for parent in folder.resolve().parents[:2] if (parent / "bench").is_dir()]
    found = read_documents(places[0], {}).values() if places else ()
    return [each for each in found if kind_of(each) == "bench" and "ranks" not in each["workload"]]


def step_time(documents: Benchmarks, run: RunRecord, baseline: RunRecord) -> tuple[float, str] | None:
    """A run's whole train step over a baseline's, and where both were timed: of several the one of most tokens."""
    found = []
    for document in documents:
        batch, length = (document["workload"][key] for key in ("batch_size", "seq_length"))
        ours, theirs = (_measured(document, each) for each in (run, baseline))
        if ours and theirs:
            where = f"{document['preset']}, {batch} x {length} tokens"
            found.append((batch * length, document["parameters"], ours / theirs, where))
    return max(found)[2:] if found else None


def _measured(document: Mapping[str, Any], run: RunRecord) -> float | None:
    """The whole train step of a run's method, over that of AdamW, which every benchmark has beside its methods."""
    ratios = [row["train_step_ratio"] for row in document["rows"] if _is(row, run)]
    return next((float(ratio) for ratio in ratios if ratio), 1.0 if run.optimizer == "adamw" else None)


def _is(row: Mapping[str, Any], run: RunRecord) -> bool:
    """Whether a row is of a run's method and settings; numbers between values, as decays, change no cost."""
    if (row["optimizer"], row["base"]) != (run.optimizer, run.base):
        return False
    method, given = METHODS[run.optimizer], dict(run.method.get("optim_args") or {})
    of_base = (run.method.get("base_optim_args") or {}) if method.config else given
    if any(key not in _AS_THE_MACHINE and not isinstance(of_base[key], float | list) for key in of_base):
        return False  # every benchmark has its bases as they come
    place = {"apply_to": given.pop("apply_to", method.apply_to)}
    try:
        settings = place | asdict(method.config(**given)) if method.config else {}
    except (TypeError, ValueError):  # what is put around any base, or was a setting once
        return False
    return all(isinstance(value, float) or settings.get(key) == value for key, value in row["config"].items())

"""The trials that have ended: the run JSONs of a results folder, which are the truth about a search."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_soo.runs.record import RunRecord, read_run

STAGES = ("wide", "narrow", "confirm")


@dataclass(frozen=True, slots=True)
class Finished:
    """What a search needs to know of a trial that has ended, however it did."""

    name: str
    space: str
    stage: str
    number: int
    params: dict[str, Any]
    seed: int
    status: str
    evaluations: tuple[tuple[int, float], ...]
    seconds: float
    code: str

    @classmethod
    def of(cls, record: RunRecord) -> Finished:
        """A trial's record, in short."""
        said, points = record.search, record.curve
        losses = [(int(point["step"]), point["eval_loss"]) for point in points if point["eval_loss"] is not None]
        return cls(
            record.name, said["space"], said["stage"], said["number"], said["params"], record.seed, record.status,
            tuple((step, float(loss)) for step, loss in losses), record.seconds, record.code,
        )  # fmt: skip

    @property
    def value(self) -> float:
        """The last evaluation's loss; infinite for a trial that did not come to its end."""
        if self.status != "completed" or not self.evaluations:
            return math.inf
        return self.evaluations[-1][1] if math.isfinite(self.evaluations[-1][1]) else math.inf

    @property
    def setting(self) -> str:
        """Its parameters as one text, equal for equal ones."""
        return setting(self.params)


def setting(params: dict[str, Any]) -> str:
    """Parameters as one text, equal for equal ones."""
    return json.dumps(params, sort_keys=True)


@dataclass
class Evidence:
    """The trials of one workload in a results folder, as they were when it was last looked at."""

    folder: Path
    _read: dict[tuple[str, int], Finished | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look."""
        self.look()

    def look(self) -> None:
        """Read the JSONs that are new, or were written again.

        Raises:
            ValueError: one is no run's.
        """
        files = {(file.name, file.stat().st_mtime_ns): file for file in sorted(self.folder.glob("*.json"))}
        for key, file in files.items():
            if key not in self._read:
                record = read_run(file)
                self._read[key] = Finished.of(record) if record.search else None
        self._read = {key: self._read[key] for key in files}

    def trials(self, space: str | None = None, *stages: str) -> list[Finished]:
        """The trials that have ended, by name; those of a space and of stages, or all.

        Args:
            space: name of a space; None: any.
            *stages: names of stages; none: any.
        """
        found = [each for each in self._read.values() if each is not None]
        return [each for each in found if space in {None, each.space} and (not stages or each.stage in stages)]

    def seconds(self, space: str) -> float | None:
        """Seconds that a whole run takes: the median of the space's, else of all; None: there was none yet."""
        whole = [trial for trial in self.trials() if trial.status == "completed" and trial.seconds > 0]
        own = [trial.seconds for trial in whole if trial.space == space]
        return statistics.median(own or [trial.seconds for trial in whole]) if whole else None


def best_settings(trials: Iterable[Finished]) -> list[tuple[float, dict[str, Any]]]:
    """Mean loss over seeds and parameters of every setting whose trials all came to their end, best first.

    Args:
        trials: of one space.
    """
    groups: dict[str, list[Finished]] = {}
    for trial in trials:
        groups.setdefault(trial.setting, []).append(trial)
    means = [(statistics.fmean(trial.value for trial in group), group[0].params) for group in groups.values()]
    return sorted(((mean, params) for mean, params in means if math.isfinite(mean)), key=lambda each: each[0])

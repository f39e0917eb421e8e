"""A stage as a study of Optuna: it hands out trials to the workers that share it, and stops those that fall behind.

What has ended is read from the run JSONs; the storage file only says what is planned, what is at work and which losses
were reported. Without it, it is made again from the JSONs.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from hf_soo.search.evidence import Evidence, Finished
from hf_soo.search.locks import StorageLock, locked, try_lock
from hf_soo.search.spaces import coded
from hf_soo.search.stages import Stage, Trial

_logger = logging.getLogger(__name__)
_HALVING = 2  # of the trials that reach a rung the better half goes on
_OPEN = (TrialState.WAITING, TrialState.RUNNING)


def open_storage(file: Path) -> JournalStorage:
    """The storage that workers share.

    Args:
        file: made when absent.

    Raises:
        ValueError: it is no such file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(JournalFileBackend(str(file), lock_obj=cast("Any", StorageLock(file))))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"Storage {str(file)!r} cannot be read ({error}); delete it, it is made again from the run JSONs."
        ) from error


@dataclass
class Claim:
    """A trial that this process alone may run, until it lets it go."""

    trial: Trial
    planned: int
    asked: optuna.Trial
    lock: int
    stage: Stage

    def report(self, step: int, loss: float) -> bool:
        """Take the loss of an evaluation; whether the stopping rule says to stop: at a quarter or half of the run.

        Args:
            step: at which.
            loss: of the evaluation.
        """
        if (rung := self.stage.first_rung) is None or step >= 3 * rung:
            return False
        self.asked.report(loss, step)
        return self.asked.should_prune() and not self.stage.whole  # it counts for others all the same

    def release(self) -> None:
        """Let others have it."""
        os.close(self.lock)


class Study:
    """One stage's study in the shared storage."""

    def __init__(self, stage: Stage, evidence: Evidence, storage: JournalStorage, state: Path) -> None:
        """Open it; nothing is planned yet.

        Args:
            stage: of a search.
            evidence: what has ended.
            storage: shared.
            state: folder of the locks.
        """
        self.stage, self.evidence, self._locks = stage, evidence, state / "locks" / stage.study
        pruner = NopPruner() if (rung := stage.first_rung) is None else SuccessiveHalvingPruner(rung, _HALVING)
        with locked(state / "locks" / "studies.lock"):
            self._study = optuna.create_study(
                storage=storage, study_name=stage.title, pruner=pruner, load_if_exists=True
            )

    def claim(self) -> Claim | None:
        """The next trial that nobody has run or is running, and the lock on it; None: there is none.

        A trial whose process died is handed out again.

        Raises:
            ValueError: the stage cannot be planned yet.
        """
        with locked(self._locks / f"{self.stage.space.name}-{self.stage.name}.lock"):
            self.evidence.look()
            plan = self._plan()
            while any(trial.state == TrialState.WAITING for trial in self._open()):
                asked = self._study.ask()
                trial = _trial(asked.user_attrs)
                ended = self._ended().get(trial.key)
                lock = try_lock(self._lock_of(trial)) if ended is None else None
                if lock is not None:
                    self.evidence.look()  # it may have ended before the lock was free
                    ended = self._ended().get(trial.key)
                if ended is not None:
                    self._tell(asked.number, ended)
                    if lock is not None:
                        os.close(lock)
                elif lock is not None:
                    self._suggest(asked, trial)
                    return Claim(trial, len(plan), asked, lock, self.stage)
            return None

    def finish(self, claim: Claim) -> Finished | None:
        """Take a claimed trial's end from its JSON, or, without one, plan it again; let it go."""
        with locked(self._locks / f"{self.stage.space.name}-{self.stage.name}.lock"):
            self.evidence.look()
            ended = self._ended().get(claim.trial.key)
            if ended is not None:
                self._tell(claim.asked.number, ended)
                self._lock_of(claim.trial).unlink(missing_ok=True)
            else:
                self._study.tell(claim.asked.number, state=TrialState.FAIL)
                self._enqueue(claim.trial)
            claim.release()
        return ended

    def _plan(self) -> list[Trial]:
        """Bring the storage in line with the JSONs and the plan."""
        ended, found = self._ended(), self._study.get_trials(deepcopy=False)
        for each in found:
            trial = _trial(each.user_attrs)
            if each.state != TrialState.RUNNING:
                continue
            if trial.key in ended:
                self._tell(each.number, ended[trial.key])
            elif (lock := try_lock(self._lock_of(trial))) is not None:  # its process died, or has just ended
                os.close(lock)
                self._study.tell(each.number, state=TrialState.FAIL)
                self._enqueue(trial)
        known = [_trial(each.user_attrs) for each in self._study.get_trials(deepcopy=False)]
        plan = self.stage.plan(self.evidence, [trial for trial in known if trial.key not in ended])
        there = {trial.key for trial in known}
        for trial in plan:
            if trial.key in ended and trial.key not in there:
                self._study.add_trial(self._frozen(trial, ended[trial.key]))
        gone = {_trial(each.user_attrs).key for each in self._open()} | set(ended)
        for trial in plan:
            if trial.key not in gone:
                self._enqueue(trial)
        return plan

    def _open(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=_OPEN)

    def _ended(self) -> dict[tuple[str, int], Finished]:
        trials = self.evidence.trials(self.stage.space.name, self.stage.name)
        return {(trial.setting, trial.seed): trial for trial in trials}

    def _lock_of(self, trial: Trial) -> Path:
        return self._locks / f"{self.stage.run_name(trial)}.lock"

    def _enqueue(self, trial: Trial) -> None:
        attributes = {"number": trial.number, "params": trial.params, "seed": trial.seed}
        params = {key: coded(value) for key, value in trial.params.items()}
        self._study.enqueue_trial(params, user_attrs=attributes)

    def _suggest(self, asked: optuna.Trial, trial: Trial) -> None:
        """Tell Optuna which parameters the trial has: those it was enqueued with."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a narrowed range may go beyond the space's
            for key in trial.params:
                each = self.stage.space.ranges[key]
                if each.kind == "choices":
                    asked.suggest_categorical(key, [coded(value) for value in each.values])
                else:
                    asked.suggest_float(key, *each.values, log=each.kind == "log_uniform")

    def _tell(self, number: int, ended: Finished) -> None:
        """Close a trial that is at work."""
        state, value = _end(ended)
        self._study.tell(number, value, state, skip_if_finished=True)

    def _frozen(self, trial: Trial, ended: Finished) -> FrozenTrial:
        """A trial that ended in another life of the storage, with what the stopping rule remembers of it."""
        state, value = _end(ended)
        losses, rungs = dict(ended.evaluations), {}
        first = self.stage.first_rung or 0
        for number, rung in enumerate((first, _HALVING * first) if first else ()):
            if reached := [step for step in losses if rung <= step < 3 * first]:
                rungs[f"completed_rung_{number}"] = losses[min(reached)]
        return optuna.create_trial(
            state=state, value=value, intermediate_values=losses, system_attrs=rungs,
            user_attrs={"number": trial.number, "params": trial.params, "seed": trial.seed},
        )  # fmt: skip


def _trial(attributes: Mapping[str, Any]) -> Trial:
    return Trial(attributes["number"], attributes["params"], attributes["seed"])


def _end(ended: Finished) -> tuple[TrialState, float | None]:
    """How Optuna calls the end of a trial, and its value."""
    if ended.status == "completed" and ended.value != float("inf"):
        return TrialState.COMPLETE, ended.value
    if ended.status == "stopped" and ended.evaluations:
        return TrialState.PRUNED, None
    return TrialState.FAIL, None

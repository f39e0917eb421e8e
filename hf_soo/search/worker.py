"""A worker: takes trials of stages one by one, each in a process of its own, until none is left or it must end."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import hf_soo
from hf_soo import machine
from hf_soo.progress import Progress
from hf_soo.search.evidence import Evidence, Finished
from hf_soo.search.orders import GIVEN_BACK, Order
from hf_soo.search.stages import Stage
from hf_soo.search.study import Claim, Study, open_storage

TRIAL = (sys.executable, "-m", "hf_soo.search.trial")
_GRACE = 300  # seconds that a trial has to end with a checkpoint
_POLL = 5.0  # seconds between looks at trials of other workers, on which the next ones wait
_MOST_DEATHS = 2  # of the process of one trial before it is left
_OVERHEAD = 1.25  # seconds of a whole process to those of its training steps


class _Ending(Exception):
    """The worker must end: its deadline, or SIGTERM."""


@dataclasses.dataclass
class Place:
    """Where trials are kept: JSONs in ``results/WORKLOAD``; storage, locks, logs and checkpoints apart."""

    results: Path
    storage: Path
    state: Path

    @classmethod
    def of(cls, results: Path, storage: Path | None = None) -> Place:
        """Everything that is not evidence lies in ``results/.search``.

        Args:
            results: folder of the workloads' folders.
            storage: file that Optuna's workers share; None: in there too.
        """
        state = results / ".search"
        return cls(results, storage or state / "storage.jsonl", state)


class Worker:
    """Runs the trials of stages; any number of workers, on one or several searches, may share a place."""

    def __init__(
        self,
        stages: Sequence[Stage],
        place: Place,
        *,
        until: float | None = None,
        any_code: bool = False,
        command: Sequence[str] = TRIAL,
    ) -> None:
        """Open the storage.

        Args:
            stages: most telling first; a stage waits for earlier ones of its space and workload.
            place: where trials are kept.
            until: when to end, in seconds since the epoch; None: when all is done.
            any_code: go on with trials that other code began.
            command: what runs a trial's order.

        Raises:
            ValueError: a storage that cannot be read.
        """
        self.stages, self.place, self.until = stages, place, until
        self._any_code, self._command = any_code, command
        storage = open_storage(place.storage)
        self._evidence = {stage.study: Evidence(place.results / stage.study) for stage in stages}
        self._studies = [Study(stage, self._evidence[stage.study], storage, place.state) for stage in stages]
        self._left: dict[tuple[str, str], str] = {}  # studies and spaces that are left, and why
        self._deaths: Counter[str] = Counter()
        self._told_to_end = False

    def run(self) -> int:
        """Work; the exit code: 0, or 1 when a stage had to be left."""
        before = signal.signal(signal.SIGTERM, self._end)
        self._say_other_code()
        trials = sum(stage.settings * len(stage.seeds) for stage in self.stages)
        try:
            with Progress(desc="search", unit="trial", total=trials, initial=trials - self._open()) as bar:
                while (found := self._next()) is not None:
                    self._try(*found, bar)
                    bar.update(trials - self._open() - bar.n)  # other workers' as well
        except _Ending as reason:
            _say(f"{reason}; {self._open()} trials are left, the same command goes on")
        finally:
            signal.signal(signal.SIGTERM, before)
        return int(bool(self._left))

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = True

    def _check_end(self) -> None:
        if self._told_to_end:
            raise _Ending("told to end")
        if self.until is not None and time.time() >= self.until:
            raise _Ending("the time is over")

    def _next(self) -> tuple[Study, Claim] | None:
        """The first trial that can be taken, waiting for other workers where that may bring one; None: all is done.

        Raises:
            _Ending: the worker must end, or no trial fits the time.
        """
        while True:
            self._check_end()
            waiting, too_long = False, False
            for evidence in self._evidence.values():
                evidence.look()
            for number, study in enumerate(self._studies):
                stage = study.stage
                if (stage.study, stage.space.name) in self._left:
                    continue
                if not self._is_ready(number):
                    waiting = True
                    continue
                if not self._fits(stage):
                    too_long = too_long or self._open_of(stage) > 0
                    continue
                if (claim := self._claim(study)) is not None:
                    return study, claim
                waiting = waiting or ((stage.study, stage.space.name) not in self._left and self._open_of(stage) > 0)
            if too_long:
                raise _Ending("no trial fits the time")
            if not waiting:
                return None
            time.sleep(_POLL)

    def _claim(self, study: Study) -> Claim | None:
        stage = study.stage
        try:
            self._check_code(stage)
            return study.claim()
        except ValueError as error:
            self._leave(stage, str(error))
            return None

    def _check_code(self, stage: Stage) -> None:
        """Refuse to mix trials of different code in one search.

        Raises:
            ValueError: the space has trials of other code.
        """
        others = {trial.code for trial in self._evidence[stage.study].trials(stage.space.name)} - {machine.code()}
        if others and not self._any_code:
            raise ValueError(
                f"{self.place.results / stage.study} has trials of {stage.space.name} that ran with other code "
                f"({', '.join(sorted(others))}, here {machine.code()}); give another --results, a checkout of that "
                "code, or --any_code."
            )

    def _say_other_code(self) -> None:
        """Name the trials of other methods that will not be ranked with those to come."""
        for name, evidence in self._evidence.items():
            others = [trial for trial in evidence.trials() if trial.code != machine.code()]
            if others:
                codes = ", ".join(sorted({trial.code for trial in others}))
                _say(f"{name}: {len(others)} trials are of other code ({codes}, here {machine.code()})")

    def _leave(self, stage: Stage, why: str) -> None:
        self._left[stage.study, stage.space.name] = why
        Progress.write(f"error: {stage.title}: {why}", sys.stderr)

    def _is_ready(self, number: int) -> bool:
        """Whether the stages before, of the same space and workload, have ended."""
        this = self._studies[number].stage
        before = (study.stage for study in self._studies[:number])
        same = [stage for stage in before if (stage.study, stage.space.name) == (this.study, this.space.name)]
        return all(self._open_of(stage) == 0 for stage in same)

    def _open_of(self, stage: Stage) -> int:
        return stage.open_trials(self._evidence[stage.study])

    def _open(self) -> int:
        return sum(self._open_of(stage) for stage in self.stages)

    def _seconds(self, stage: Stage) -> float:
        return _OVERHEAD * (stage.seconds(self._evidence[stage.study]) or 0.0)

    def _fits(self, stage: Stage) -> bool:
        return self.until is None or time.time() + self._seconds(stage) < self.until

    def _try(self, study: Study, claim: Claim, bar: Progress) -> None:
        """Run a trial, and say how it went.

        Raises:
            _Ending: the worker must end.
            KeyboardInterrupt: Ctrl-C; the trial is given back, as it always is without a JSON.
        """
        stage, name = study.stage, study.stage.run_name(claim.trial)
        _say(f"{stage.study}/{name}: {stage.command(claim.trial)}")
        log = self.place.state / "logs" / stage.study / f"{name}.log"
        try:
            code = self._run(stage, claim, log, bar)
        finally:
            ended = study.finish(claim)
        if ended is not None:
            log.unlink(missing_ok=True)
            _say(self._progress(stage, ended))
        elif code == 1:
            self._leave(stage, f"{_last_line(log)} ({log})")
        elif code != GIVEN_BACK and not self._told_to_end:
            self._deaths[name] += 1
            if self._deaths[name] >= _MOST_DEATHS:
                self._leave(stage, f"the process of {name} ended with {code} twice ({log})")

    def _run(self, stage: Stage, claim: Claim, log: Path, bar: Progress) -> int:
        """The exit code of a trial's process.

        Raises:
            _Ending: the worker must end; the process has ended.
        """
        name, trial = stage.run_name(claim.trial), claim.trial
        search = {
            "study": stage.study, "space": stage.space.name, "stage": stage.name, "number": trial.number,
            "trials": claim.planned, "params": trial.params, "command": stage.command(trial),
        }  # fmt: skip
        here, there = socket.socketpair()
        scratch = self.place.state / "runs" / stage.study / name
        order = Order(
            stage.flags(trial), name, str(self.place.results / stage.study), str(scratch), search, there.fileno()
        )
        package = str(Path(hf_soo.__file__).resolve().parents[1])
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output, here:
            process = subprocess.Popen(
                [*self._command, json.dumps(dataclasses.asdict(order))],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                pass_fds=(there.fileno(), claim.lock), start_new_session=True,
            )  # fmt: skip
            there.close()
            try:
                self._listen(here, claim, bar)
                return process.wait()
            except BaseException:
                here.shutdown(socket.SHUT_RDWR)  # it may be waiting for an answer
                _end_process(process)
                raise

    def _listen(self, channel: socket.socket, claim: Claim, bar: Progress) -> None:
        """Answer a trial's reports, and show them, until it hangs up.

        Raises:
            _Ending: the worker must end.
        """
        stream = channel.makefile("rw", encoding="utf-8")
        while True:
            self._check_end()
            if not select.select([channel], [], [], 0.5)[0]:
                continue
            line = stream.readline()
            if not line.endswith("\n"):
                return
            said = json.loads(line)
            bar.say(step=said["step"], loss=said["loss"])
            bar.refresh()
            stops = claim.report(said["step"], said["loss"])
            stream.write("stop\n" if stops else "go\n")
            stream.flush()

    def _progress(self, stage: Stage, ended: Finished) -> str:
        """A line: trials done, best so far, time left."""
        trials = self._evidence[stage.study].trials(stage.space.name, stage.name)
        left = sum(self._open_of(each) * self._seconds(each) for each in self.stages)
        done = f"{len(trials)} of {len(trials) + self._open_of(stage)} trials done"
        return (
            f"{stage.title}: {ended.name} {ended.status} after {ended.seconds:.0f} s; {done}; "
            f"{stage.best_line(trials)}; {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Seconds in words: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Tell a trial to end, and wait until it has."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no word"


def _say(line: str) -> None:
    Progress.write(f"{time.strftime('%H:%M:%S')} {line}")

"""A pipeline of commands that picks up where it stopped, whatever stopped it.

    OUTPUT/done/STAGE.json   the stage ended well: its command, its settings and how long it took; it is not run again
    OUTPUT/logs/STAGE.log    what it printed; locked as long as one of its processes lives

A stage is a command that goes on by itself when it is given again. The lock is what a killed pipeline leaves behind
while its stages go on without it: the next one waits for them instead of starting them twice. It lies on the log's
open file, which every process of a stage inherits, so the system takes it away with the last of them.

Each stage is a session of its own, so that a signal reaches all its processes and not only its launcher: Ctrl-C and
SIGTERM (a batch system that wants its node back) and SIGHUP stop them with the pipeline.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hf_soo.files import write_atomically
from hf_soo.progress import Progress
from hf_soo.runs.recipes import read_recipe
from hf_soo.runs.record import differing

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    Args:
        name: also of its log.
        command: program and arguments.
        needs: stages that must have ended well before.
        product: a file that is there only when the stage has ended well, for commands that refuse to be given again.
        alone: nothing runs beside it, and it has all cores: what everything else waits for.
        how: flags after the command that change how it works, not what comes out; they may be others once it is done.
        configs: YAML files that the command reads.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    product: Path | None = None
    alone: bool = False
    how: tuple[str, ...] = ()
    configs: tuple[Path, ...] = ()

    @property
    def whole(self) -> tuple[str, ...]:
        """What is run."""
        return (*self.command, *self.how)

    def settings(self) -> dict[str, Any]:
        """What the configs say now, comments apart."""
        return read_recipe(self.configs)


@dataclass(slots=True)
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float
    log_size: int  # of the log before
    settings: dict[str, Any]  # when it began


class Pipeline:
    """Stages, in an order in which each comes after those that it needs."""

    def __init__(self, stages: Sequence[Stage], folder: str | Path, *, jobs: int = 1, cores: int | None = None) -> None:
        """Look at what is done already; nothing is started or written.

        Args:
            stages: all of them.
            folder: where logs and marks go.
            jobs: how many stages run at once.
            cores: that they share by OMP_NUM_THREADS, unless the user has set it; None: it is left alone.

        Raises:
            ValueError: a stage was done by another command or with other settings than it has now, or its config cannot
                be read.
        """
        self.folder, self.jobs, self.cores = Path(folder), jobs, cores
        self.stages = list(stages)
        self.done = {stage.name for stage in stages if self._is_done(stage)}
        self.failed: dict[str, str] = {}
        self.running: list[_Running] = []
        self._told: set[str] = set()

    def _is_done(self, stage: Stage) -> bool:
        mark = self._mark(stage)
        if not mark.is_file():
            return stage.product is not None and stage.product.is_file()
        kept = json.loads(mark.read_text(encoding="utf-8"))
        before, then, now = kept["command"], kept["settings"], stage.settings()
        changed = differing(then, now)
        if before[: len(before) - len(stage.how)] != list(stage.command):
            change = f"with {shlex.join(before)!r}, now it is {shlex.join(stage.whole)!r}"
        elif changed:
            change = f"with other values of {', '.join(changed)} than {' and '.join(map(str, stage.configs))} give now"
        else:
            return True
        raise ValueError(
            f"stage {stage.name} was done {change}; use another output folder, or delete {mark} and what the stage "
            "wrote."
        )

    def run(self) -> dict[str, str]:
        """Run what is not done. A stage that fails stops those that need it, and no others.

        Returns:
            The stages that failed, or could not start, and why.

        Raises:
            KeyboardInterrupt: Ctrl-C; the stages have stopped by then.
            SystemExit: SIGTERM or SIGHUP, with 128 and its number; the stages have stopped by then.
        """
        stages = {"total": len(self.stages), "initial": len(self.done)}
        with _exits(signal.SIGTERM, signal.SIGHUP), Progress(desc="reproduce", unit="stage", **stages) as bar:
            try:
                while self._start() or self.running:
                    bar.set_postfix_str(", ".join(each.stage.name for each in self.running))
                    time.sleep(POLL_SECONDS)
                    self._collect()
                    bar.update(len(self.done) - bar.n)
            except KeyboardInterrupt:
                self._stop(signal.SIGINT)
                raise
            finally:
                self._stop(signal.SIGTERM)
        return self.failed

    def _stop(self, number: signal.Signals) -> None:
        """Send a signal to every process of the stages that run, and wait for them."""
        alive = [each.process for each in self.running if each.process.poll() is None]
        for process in alive:
            os.killpg(process.pid, number)
        for process in alive:
            process.wait()

    def _start(self) -> bool:
        """Start what can start; whether something still waits for another pipeline's process."""
        locked = False
        active = {each.stage.name for each in self.running}
        for stage in self.stages:
            if stage.name in self.done | self.failed.keys() | active:
                continue
            if broken := [need for need in stage.needs if need in self.failed]:
                self._fail(stage, f"it needs {broken[0]}, which failed")
            elif self._has_room(stage) and self.done.issuperset(stage.needs):
                log = self._lock(stage)
                locked |= log is None
                if log is not None:
                    self._spawn(stage, log)
        return locked

    def _has_room(self, stage: Stage) -> bool:
        if any(each.stage.alone for each in self.running):
            return False
        return len(self.running) < (1 if stage.alone else self.jobs)

    def _lock(self, stage: Stage) -> IO[bytes] | None:
        """The stage's log, locked; None while a process of an earlier pipeline has it."""
        file = self.folder / "logs" / f"{stage.name}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        log = file.open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            if stage.name not in self._told:
                self._told.add(stage.name)
                self._say(f"{stage.name}: is still running from before; waiting for it")
            return None
        return log

    def _spawn(self, stage: Stage, log: IO[bytes]) -> None:
        with log:
            if self._is_done(stage):  # it ended while we waited for the lock
                self.done.add(stage.name)
                return
            size, settings = os.fstat(log.fileno()).st_size, stage.settings()
            process = subprocess.Popen(
                stage.whole, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(stage),
                start_new_session=True,
            )  # fmt: skip
        self.running.append(_Running(stage, process, time.monotonic(), size, settings))
        self._say(f"{stage.name}: started ({len(self.done) + 1} of {len(self.stages)})")

    def _environment(self, stage: Stage) -> Mapping[str, str]:
        """Said also to a stage that has all cores: `accelerate launch` gives a process one thread otherwise."""
        if self.cores is None:
            return os.environ
        return {"OMP_NUM_THREADS": str(max(1, self.cores // (1 if stage.alone else self.jobs))), **os.environ}

    def _collect(self) -> None:
        for each in [each for each in self.running if each.process.poll() is not None]:
            self.running.remove(each)
            seconds = round(time.monotonic() - each.began, 1)
            if each.process.returncode == 0:
                mark = self._mark(each.stage)
                mark.parent.mkdir(parents=True, exist_ok=True)
                kept = {"command": each.stage.whole, "settings": each.settings, "seconds": seconds}
                write_atomically(mark, json.dumps(kept) + "\n")
                self.done.add(each.stage.name)
                self._say(f"{each.stage.name}: done in {seconds:.0f} s")
            else:
                self._fail(each.stage, f"exit code {each.process.returncode}, {self._last_words(each)}")

    def _fail(self, stage: Stage, reason: str) -> None:
        self.failed[stage.name] = reason
        self._say(f"{stage.name}: failed: {reason}")

    def _last_words(self, ended: _Running) -> str:
        """The line that says why, or the last one, of what this start printed."""
        file = self.folder / "logs" / f"{ended.stage.name}.log"
        lines = file.read_bytes()[ended.log_size :].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        return f"{(errors or lines or ['nothing was printed'])[-1]} (see {file})"

    def _mark(self, stage: Stage) -> Path:
        return self.folder / "done" / f"{stage.name}.json"

    @staticmethod
    def _say(line: str) -> None:
        Progress.write(f"{time.strftime('%H:%M:%S')} {line}")


@contextmanager
def _exits(*numbers: signal.Signals) -> Iterator[None]:
    """While it lasts these signals raise SystemExit, unless they are ignored (nohup)."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])

"""A training script of any task: flags, checks, the runs, what is printed after, and errors of one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from hf_soo.integrations.agreement import refuse_alone
from hf_soo.outputs import folder_to_write
from hf_soo.runs import arguments, report
from hf_soo.runs.recipes import COMMANDS
from hf_soo.runs.record import RunRecord, status_of
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.training import Job, Task, compared, train

GOES_ON = "stopped; the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Domain:
    """One kind of tasks: the dataclasses of its flags, and what makes a task of them.

    `make_task` is called with an object of each of `classes` and the `RunTrainingArguments`; `sketch`, before any data
    are read, with those of `classes`: a model of the same layers, whatever their widths, or None where that is not
    known. `smooths_labels`: the Trainer's label smoothing is that of this loss.
    """

    name: str
    make_task: Callable[..., Task]
    classes: Sequence[type]
    sketch: Callable[..., nn.Module | None]
    smooths_labels: bool = True

    def settings(self, flags: Sequence[str], description: str = "", more: Sequence[type] = ()) -> tuple[Any, ...]:
        """An object of each dataclass: those of `classes`, of `more`, the run's and the Trainer's.

        Args:
            flags: of the command line.
            description: for --help.
            more: further dataclasses of flags.

        Raises:
            ValueError: a recipe of another domain, or flags that cannot be.
        """
        command = COMMANDS[self.name]
        task = arguments.task_of(flags, command)
        if task is not None and task not in COMMANDS:
            raise ValueError(f"task={task!r} is none of {', '.join(COMMANDS)}; a task of GLUE is named by task_name.")
        if task not in {None, self.name}:
            raise ValueError(
                f"task={task!r}, and this trains {self.name!r}; give these recipes to hf-soo {COMMANDS[str(task)]}."
            )
        classes = (*self.classes, *more, RunArguments, RunTrainingArguments)
        settings = arguments.parse(classes, flags, description, command)
        if (factor := settings[-1].label_smoothing_factor) and not self.smooths_labels:
            raise ValueError(f"label_smoothing_factor={factor}: the loss of {self.name!r} smooths none; leave it out.")
        return settings

    def parse(self, flags: Sequence[str], description: str = "") -> tuple[Job, Callable[[], Task]]:
        """A run's settings, checked, and what makes its task: reading data is left to the second.

        Args:
            flags: of the command line.
            description: for --help.

        Raises:
            ValueError: a recipe of another domain, or settings that cannot be.
        """
        *settings, run, training = self.settings(flags, description)
        job = Job(run, training)
        check(job, lambda: self.sketch(*settings))
        return job, lambda: self.make_task(*settings, training)

    def run(self, flags: Sequence[str], description: str = "") -> None:
        """Train, and print the table.

        Args:
            flags: of the command line.
            description: for --help.

        Raises:
            ValueError: settings or data that cannot be.
        """
        job, make_task = self.parse(flags, description)
        task = make_task()
        present(job, train(job, task), task.title)


def run_script(domain: Domain, description: str, flags: list[str] | None = None) -> int:
    """A whole script: 0 when it trained (also when it diverged), 1 after an error, 130 after Ctrl-C.

    An error is one line on stderr; --traceback shows where it came from.

    Args:
        domain: what is trained.
        description: for --help.
        flags: None: those of the process.
    """
    return guarded(lambda given: domain.run(given, description), flags)


def guarded(body: Callable[[list[str]], None], flags: list[str] | None = None, stopped: str = GOES_ON) -> int:
    """Run a script's body: its exit code, with one line on stderr for an error.

    Args:
        body: called with the flags.
        flags: None: those of the process.
        stopped: what is said after Ctrl-C.

    Raises:
        ValueError: with --traceback, settings that cannot be.
        OSError: with --traceback, a file that cannot be read or written.
        RuntimeError: with --traceback, or an error that no setting explains.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_soo").setLevel(logging.INFO)
    given = sys.argv[1:] if flags is None else flags
    try:
        body(given)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        expected = not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError)
        if "--traceback" in given or not (expected or status_of(error) == "oom"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def check(job: Job, sketch: Callable[[], nn.Module | None]) -> None:
    """Refuse, before any data is read, what could not end well.

    Args:
        job: all settings.
        sketch: as a ``Domain``'s, of these settings.

    Raises:
        ValueError: a folder that cannot be written to, a picture that cannot be drawn, a target that is never looked
            at, an optimizer that cannot be built for the model, or processes that would each train alone: what torchrun
            starts without a GPU, unless the Trainer is told.
    """
    if job.run.target_eval_loss is not None and job.training.eval_strategy == "no":
        raise ValueError(
            f"target_eval_loss={job.run.target_eval_loss} and nothing is evaluated while the run trains; set "
            "eval_strategy to steps or epoch."
        )
    for name, folder in (("output_dir", job.training.folder), ("results_dir", job.results_dir)):
        folder_to_write(name, folder)
    if job.run.compare_with is not None and find_spec("matplotlib") is None:
        raise ValueError("compare_with draws a picture and matplotlib is not installed; pip install 'hf-soo[report]'.")
    refuse_alone(job.training)
    try:
        get_reporting_integration_callbacks(job.training.report_to)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(f"report_to={job.training.report_to}: {error}") from error
    jobs = (job,) if job.run.compare_with is None else compared(job)  # refuses settings of the second optimizer
    with torch.device("meta"):
        model = sketch()
    if model is not None:
        for each in jobs:
            each.training.check_on(model)


def present(job: Job, records: Sequence[RunRecord], title: str) -> None:
    """On the first process print the table, and draw the picture of a comparison.

    Args:
        job: all settings.
        records: of the run, or of the two that were compared.
        title: over the picture.
    """
    if job.training.process_index != 0:
        return
    print(report.table(records), end="")
    if job.run.compare_with is not None:
        picture = job.training.folder / "comparison.png"
        report.save(report.figure(records, f"{title}, {records[0].parameters / 1e6:.1f} M parameters"), picture)
        print(f"wrote {picture}")

"""One run of GLUE, or a table of them: every task with every seed, resumable, one JSON a run."""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_soo.engine.checks import Checked, Seed
from hf_soo.files import write_atomically
from hf_soo.glue import table as glue_table
from hf_soo.glue.data import GlueDataArguments
from hf_soo.glue.metrics import check_installed
from hf_soo.glue.model import find_classifier
from hf_soo.glue.task import DOMAIN, GlueFineTuning, sketch
from hf_soo.glue.tasks import GlueTask, find_tasks
from hf_soo.integrations.checkpoints import last_whole_checkpoint, why_not_whole
from hf_soo.progress import Progress
from hf_soo.runs import script
from hf_soo.runs.record import RunRecord, check_same, file_name, read_runs
from hf_soo.runs.resume import is_finished, kept_record
from hf_soo.runs.training import Job, describe, train

logger = logging.getLogger(__name__)

_TABLE_FILE = "table.md"


@dataclass
class _SeedArguments(Checked):
    """How often each task is run."""

    _argument_group_name = "seeds"

    seeds: list[Seed] | None = field(
        default=None, metadata={"help": "Run each task with each of these; the table has medians. None: --seed."}
    )

    def __post_init__(self) -> None:
        """Check the seeds.

        Raises:
            ValueError: one of them stands there twice.
        """
        super().__post_init__()
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds} has one twice; each must be there once.")


@dataclass(frozen=True, slots=True)
class _Planned:
    """A run to come, or one that is there already."""

    job: Job
    task: GlueFineTuning

    @property
    def file(self) -> Path:
        """The run's JSON."""
        return self.job.results_dir / f"{self.job.name}.json"


def run(flags: list[str], description: str) -> None:
    """Check everything, train what is not there yet, print the table and write it beside the JSONs.

    Args:
        flags: of the command line.
        description: for --help.

    Raises:
        ValueError: settings, files or a model that cannot be used.
        OSError: the results cannot be written.
    """
    model, data, seeds, settings, training = DOMAIN.settings(flags, description, (_SeedArguments,))
    check_installed()
    tasks = find_tasks(data.names)
    job = Job(settings, training)
    script.check(job, lambda: sketch(model, data))
    _check_sweep(data, seeds, job, tasks)
    pretrained = find_classifier(model, data.max_seq_length)
    fine_tunings = [GlueFineTuning(task, pretrained, data, training) for task in tasks]
    for folder in (job.results_dir, training.folder):
        folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows now
    if settings.compare_with is not None:
        script.present(job, train(job, fine_tunings[0]), fine_tunings[0].title)
        return
    planned = _plan(job, fine_tunings, seeds.seeds)
    ended = [_ended_record(each) for each in planned]  # all of them before the first is trained: it may refuse
    if any(job.results_dir.glob("*.json")):
        read_runs(job.results_dir)  # the table is of all of them: one that cannot be read shows now
    both = zip(ended, planned, strict=True)
    shown = len(planned) > 1 and training.process_index == 0 and not training.disable_tqdm
    runs = Progress(iterable=both, desc="GLUE", unit="run", total=len(planned), disable=not shown)
    records = [record or _train_anew(each) for record, each in runs]
    if training.process_index == 0:
        _present(job, records)


def _present(job: Job, records: Sequence[RunRecord]) -> None:
    """Print the table, and write that of all runs of the folder; of evaluations alone, print the metrics."""
    if not job.training.do_train:
        for record in records:
            print(f"{record.name}: {', '.join(f'{key} {value}' for key, value in record.final.items())}")
        return
    print(glue_table.table(records), end="")
    write_atomically(job.results_dir / _TABLE_FILE, glue_table.table(read_runs(job.results_dir)))


def _check_sweep(data: GlueDataArguments, seeds: _SeedArguments, job: Job, tasks: Sequence[GlueTask]) -> None:
    """Refuse flags that mean one run where several are asked for."""
    if len(tasks) == 1 and len(seeds.seeds or [0]) == 1:
        return
    single = {"compare_with": job.run.compare_with, "resume_from_checkpoint": job.training.resume_from_checkpoint}
    if len(tasks) > 1:
        single |= data.files
    for name, value in single.items():
        if value is not None:
            count = f"{len(tasks)} tasks, {len(seeds.seeds or [0])} seeds"
            raise ValueError(f"{name}={value!r} is for one run, and there are {count}; leave it out, or give one each.")


def _plan(job: Job, fine_tunings: Sequence[GlueFineTuning], seeds: list[int] | None) -> list[_Planned]:
    """All runs: task by task, seed by seed, each with a name and, where there are several, a folder of its own."""
    several = len(fine_tunings) > 1 or seeds is not None
    planned = []
    for fine_tuning in fine_tunings:
        for seed in seeds or [job.training.seed]:
            task = fine_tuning.task.name
            folder = job.training.folder / task / f"seed{seed}" if several else job.training.folder
            training = dataclasses.replace(job.training, output_dir=str(folder), seed=seed)
            name = job.run.name if job.run.name and not several else file_name(f"{task}-{_method(job)}-seed{seed}")
            settings = dataclasses.replace(job.run, name=name, results_dir=str(job.results_dir))
            planned.append(_Planned(Job(settings, training), fine_tuning))
    return planned


def _method(job: Job) -> str:
    """What a run's name says besides task and seed; an evaluation must not replace the JSON of a training run."""
    if job.training.do_train:
        return job.name
    return "-".join(filter(None, (job.run.name, "evaluation" if job.training.do_eval else "prediction")))


def _ended_record(planned: _Planned) -> RunRecord | None:
    """The record of a run that has ended before, with the same settings; None where there is something to do."""
    job = planned.job
    found = kept_record(planned.file) if job.training.do_train and not job.run.restart else None
    if found is None:
        return None
    new = describe(job, planned.task, planned.task.make_model(job.training.seed))
    way_out = "give another --results_dir or --name, or --restart to replace it"
    check_same(found.settings, new.settings, f"{planned.file} is", way_out)
    logger.info("%s is finished already; --restart runs it again", found.name)
    if job.training.do_predict:
        logger.warning("It predicts nothing now; --model_name_or_path %s --do_predict does", job.training.output_dir)
    return found


def _train_anew(planned: _Planned) -> RunRecord:
    """Train, from the last checkpoint of an interrupted run where there is one."""
    job = planned.job
    if job.training.do_train and not job.run.restart:
        with job.training.in_turn():
            _drop_last_of_finished(job)
    (record,) = train(job, planned.task)
    gc.collect()  # Trainer and model hold each other; the next run needs their memory
    return record


def _drop_last_of_finished(job: Job) -> None:
    """A run that was killed between its last step and its JSON: its last part is trained again, and then measured."""
    last = last_whole_checkpoint(job.training.folder, lambda path: why_not_whole(path, hashed=False))
    if last is not None and is_finished(str(last), job.training):
        logger.warning("%s is of the last step, but the run was not measured: training that part again", last)
        shutil.rmtree(last)

"""One JSON a run: what was run, on what, how it went, and how it ended.

A run that diverged, ran out of memory or was stopped leaves its JSON too: results are data, the bad ones included.
The keys are fixed (more may be added)::

    {"name", "kind", "workload": {...}, "method": {...}, "status", "optimizer", "base", "config", "seed", "device",
     "versions", "commit", "parameters", "steps", "seconds",
     "curve": [{"step", "seconds", "train_loss", "eval_loss", "health": {...}}], "final": {metric: value},
     "target": {"eval_loss", "steps", "seconds"} | null, "peak_memory_bytes", "health": {...}, "code",
     "routing": {rule: {"parameters", "first": [name]}}, "search": {...}}

``health`` is of the last step (|F - I| of the layers that rank 0 preconditions), ``routing`` of the end of the run.
``code`` is a digest of the numerical packages (`machine.code`). ``search`` is empty but in trials of a search::

    {"study": recipe of the workload, "space": file of the search space, "stage": "wide" | "narrow" | "confirm",
     "number": of the trial within these, "trials": planned, "params": {flag: value}, "stopped_at": step | null}

A trial that the stopping rule stopped has the status ``stopped``.

``kind`` says which report reads it. Runs can be compared when their ``workload`` is equal; what is compared is their
``method``. Both together are ``seed``, ``optimizer``, ``base`` and ``config``. ``target.stopped`` says, where the run
had a loss to stop at, whether it stopped there before its last step. ``arithmetic`` is what an optimizer chose by the
machine that it ran on (Muon: the dtype of its iterations). Numbers that are not finite are written as
``null``, and a path of the machine as its last part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from hf_soo.engine.checks import hints_of
from hf_soo.files import jsonable, parse_json, readable, write_atomically
from hf_soo.runs.markdown import plain
from hf_soo.runs.stored import NO_POINT, check_stored

logger = logging.getLogger(__name__)

Status = Literal["completed", "diverged", "oom", "stopped", "failed"]
LONGEST_NAME = 210
"""Bytes of a run's name: a file's has 255, with what is put after it while it is written."""
_STATUSES: tuple[str, ...] = get_args(Status)
CurvePoint = dict[str, Any]
_Read = TypeVar("_Read")
# Settings of the method itself; all others of a run are its workload.
_METHOD = frozenset({
    "learning_rate", "optim_args", "base_optim_args", "max_grad_norm", "weight_decay", "precondition_include",
    "precondition_exclude", "moments",  # whether its base could take those of the phase before
})  # fmt: skip
# The key, in itself or in its settings, by which a JSON is known that was written before each said its kind.
_OLD_KINDS = {
    "bench": "preset", "plan": "layout", "prepare": "vocab_sha256", "equality": "tolerance",
    "glue": "task", "squad": "version_2", "vision": "dataset", "pretraining": "seq_length",
}  # fmt: skip


@dataclasses.dataclass(slots=True)
class RunRecord:
    """What a run's JSON holds; ``seconds`` is training alone, ``curve`` has an entry a logged or evaluated step."""

    name: str
    optimizer: str
    base: str
    config: dict[str, Any]
    seed: int
    status: str = "failed"  # until something better is known: one written in the middle of a crash is no success
    kind: str = "run"
    device: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    arithmetic: dict[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None
    code: str = ""
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    curve: list[CurvePoint] = dataclasses.field(default_factory=list)
    final: dict[str, float | None] = dataclasses.field(default_factory=dict)
    target: dict[str, float | None] | None = None
    peak_memory_bytes: int = 0
    health: dict[str, float | None] = dataclasses.field(default_factory=dict)
    routing: dict[str, Any] = dataclasses.field(default_factory=dict)
    search: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def workload(self) -> dict[str, Any]:
        """What must be equal for two runs to be compared: model, data, batch, schedule, seed."""
        return {"seed": self.seed, **{key: value for key, value in self.config.items() if key not in _METHOD}}

    @property
    def method(self) -> dict[str, Any]:
        """What is compared: optimizer and base with their settings."""
        settings = {key: value for key, value in self.config.items() if key in _METHOD}
        return {"optimizer": self.optimizer, "base": self.base, **settings}

    @property
    def settings(self) -> dict[str, Any]:
        """Workload and method in one mapping, as they are read back from a file."""
        settings: dict[str, Any] = jsonable(self.method | self.workload)
        return settings

    def document(self) -> dict[str, Any]:
        """What is written: plain values of JSON."""
        what = {"name": self.name, "kind": self.kind, "workload": self.workload, "method": self.method}
        document: dict[str, Any] = jsonable(what | dataclasses.asdict(self))
        return document

    def write(self, folder: str | Path, *, indent: int | None = 1) -> Path:
        """Write ``folder/NAME.json`` atomically (a reader sees the old file or the whole new one) and return its path.

        Args:
            folder: where to; made when absent.
            indent: None: all on one line, for runs by the thousand.

        Raises:
            ValueError: the status is unknown.
        """
        if self.status not in _STATUSES:
            raise ValueError(f"Run status {self.status!r} is unknown; use one of {', '.join(_STATUSES)}.")
        text = json.dumps(self.document(), indent=indent, allow_nan=False, ensure_ascii=False)
        path = Path(folder) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text + "\n")
        return path


def is_file_name(name: str) -> bool:
    """Whether a run may be called so: its JSON then lies in its folder, whatever the folder."""
    plain = name.isprintable() and not set(name) & {"/", "\\"} and name not in {"", ".", ".."}
    return plain and len(name.encode()) <= LONGEST_NAME


def file_name(text: str) -> str:
    """A text as the name of a run: what no name holds becomes "_", and the end of a long one a digest of all."""
    name = re.sub(r"[^\w.+-]+", "_", text)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{name.encode()[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"


def differing(*settings: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """The keys, but for ``free``, in which mappings differ, sorted; None is as good as no key."""
    keys = sorted(set().union(*settings).difference(free))
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings[1:])]


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], whose: str, way_out: str, free: Collection[str] = ()
) -> None:
    """Refuse what a run with other settings wrote.

    Args:
        before: that run's settings.
        now: those of the run to come.
        whose: what was found: "FILE is".
        way_out: what the user can do.
        free: settings that may differ.

    Raises:
        ValueError: another setting differs.
    """
    if changed := differing(before, now, free=free):
        was, wanted = before.get(changed[0]), now.get(changed[0])
        raise ValueError(f"{whose} of a run with {changed[0]}={was!r}, now {wanted!r}; {way_out}.")


Damaged = dict[Path, str]  # files that cannot be read, and why


def read_documents(folder: str | Path, damaged: Damaged | None = None) -> dict[Path, Any]:
    """Every JSON of a folder (not of folders inside it), by file name.

    Args:
        folder: of run JSONs, or of others.
        damaged: takes the files that cannot be read, which are passed over then; None: the first is an error.

    Raises:
        ValueError: no such folder, no ``*.json`` in it, or one that is no JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"No folder {str(folder)!r}; give the folder that holds the run JSONs.")
    with readable(folder):
        files = sorted(folder / name for name in os.listdir(folder) if name.endswith(".json"))
    if not files:
        below = f", {str(folder / 'runs')!r} for example" if (folder / "runs").is_dir() else ""  # of an output_dir
        raise ValueError(f"Folder {str(folder)!r} holds no *.json; give the folder that holds the run JSONs{below}.")
    return _each(_read, files, damaged)


def folders_of(folder: str | Path) -> list[Path]:
    """The folder itself, or, where it holds no JSON, the folders inside it that do, by name; none of ``.NAME``."""
    inside = sorted(each for each in Path(folder).glob("[!.]*") if each.is_dir() and any(each.glob("*.json")))
    return [Path(folder)] if any(Path(folder).glob("*.json")) else inside


def read_runs(folder: str | Path, damaged: Damaged | None = None) -> list[RunRecord]:
    """Every run JSON of a folder, by file name.

    Args:
        folder: where ``RunRecord.write`` wrote.
        damaged: as in `read_documents`.

    Raises:
        ValueError: no such folder, no JSON in it, or a JSON that is not a run.
    """
    documents = read_documents(folder, damaged)
    return list(_each(lambda path: _upgraded(path, documents[path]), documents, damaged).values())


def _each(read: Callable[[Path], _Read], paths: Iterable[Path], damaged: Damaged | None) -> dict[Path, _Read]:
    """What is read of each file, but for the damaged ones where they are passed over."""
    found = {}
    for path in paths:
        try:
            found[path] = read(path)
        except ValueError as error:
            if damaged is None:
                raise
            damaged[path] = str(error).removeprefix(f"{path}: ")
    return found


def passed_over(damaged: Damaged) -> str:
    """What a report says of the files that it could not read; nothing where there are none."""
    said = "; ".join(plain(f"{path.name} ({reason.rstrip('.')})") for path, reason in damaged.items())
    return f"\nDamaged, and passed over: {said}.\n" if said else ""


def read_run(path: Path) -> RunRecord:
    """One run JSON.

    Raises:
        ValueError: it is not the JSON of a run.
    """
    return _upgraded(path, _read(path))


def _read(path: Path) -> Any:
    try:
        with readable(path):
            return parse_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it or write it again.") from error


def _upgraded(path: Path, data: Any) -> RunRecord:
    """A run of this version or an older one, which says less, or a newer one, whose further keys are passed over."""
    fields = dataclasses.fields(RunRecord)
    needed = {"name", "optimizer", "base", "config", "seed", "status"}
    missing = sorted(needed.difference(data if isinstance(data, dict) else ()))
    if missing:
        raise ValueError(f"{path}: not a run, it lacks {', '.join(missing)}; keep other JSONs in another folder.")
    known = {field.name: data[field.name] for field in fields if field.name in data}
    check_stored(path, known, hints_of(RunRecord) | {"status": Status})
    known["curve"] = [NO_POINT | point for point in known.get("curve", [])]
    return RunRecord(**known | {"kind": kind_of({**data, "search": {}})})  # a trial, too, is of some task


def kind_of(document: Any) -> str:
    """What a JSON is of: "pretraining", "glue", "bench"; "search": a trial of one; "run" where it does not say."""
    if not isinstance(document, dict):
        return "run"
    if document.get("search"):
        return "search"
    config = document.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    keys = {key for each in (document, config, data) if isinstance(each, dict) for key in each}
    return str(document.get("kind") or next((kind for kind, key in _OLD_KINDS.items() if key in keys), "run"))


@contextmanager
def recording(record: RunRecord, folder: str | Path | None) -> Iterator[RunRecord]:
    """Give ``record`` the status the block ends with, write it, and pass every exception on.

    A block that ends by itself is ``completed``, unless a callback said ``diverged`` meanwhile. Settings that are
    refused before the first step are no run: nothing is written.

    Args:
        record: filled by the block; written also when the block fails, with what it has until then.
        folder: where to write; None: nowhere (ranks other than 0).
    """
    began = True
    try:
        record.status = "completed"
        yield record
    except BaseException as error:
        record.status = status_of(error)
        began = record.steps > 0 or not isinstance(error, ValueError | NotImplementedError)
        raise
    finally:
        if folder is not None and began:
            logger.info("Run %s: %s, written to %s", record.name, record.status, record.write(folder))


def status_of(error: BaseException) -> Status:
    """The status of a run that ended with ``error``: out of memory, stopped by the user, or failed."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    # The CPU allocator raises a plain RuntimeError ("can't allocate memory"), CUDA libraries "... out of memory".
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    memory = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return "oom" if memory or "out of memory" in said or "can't allocate memory" in said else "failed"


def reach(curve: Sequence[CurvePoint], eval_loss: float) -> dict[str, float | None]:
    """Where a curve first comes down to an evaluation loss, linearly between its evaluations.

    Args:
        curve: a run's curve; entries without an evaluation are passed over.
        eval_loss: the loss to come down to.

    Returns:
        The ``target`` entry of a run: the loss asked for, and the steps and seconds it took (None: not reached).
    """
    points = [point for point in curve if point["eval_loss"] is not None]
    for before, point in itertools.pairwise([*points[:1], *points]):
        if point["eval_loss"] <= eval_loss:
            steps, seconds = (_between(before, point, key, eval_loss) for key in ("step", "seconds"))
            return {"eval_loss": eval_loss, "steps": steps, "seconds": seconds}
    return {"eval_loss": eval_loss, "steps": None, "seconds": None}


def _between(before: CurvePoint, after: CurvePoint, key: str, eval_loss: float) -> float:
    """The value of ``key`` where the straight line between two evaluations passes ``eval_loss``."""
    x0, x1, y0, y1 = (float(point[k] or 0.0) for k in (key, "eval_loss") for point in (before, after))
    return x1 if y0 == y1 else x0 + (x1 - x0) * (y0 - eval_loss) / (y0 - y1)

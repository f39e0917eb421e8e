"""The Trainer callbacks of a run: its record (curve, training seconds, divergence, target, health), and its bar."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, has_length

from hf_soo import machine
from hf_soo.integrations.accelerate import unwrap_optimizer
from hf_soo.integrations.card import RunCallback
from hf_soo.progress import Progress
from hf_soo.runs.record import CurvePoint, RunRecord

# Where a checkpoint's trainer_state.json keeps the record so far, among the states of callbacks.
STATE_KEY = "hf_soo_run"
_MOST_RULES = 16  # of a record's routing


class RecordCallback(RunCallback):
    """Fills a ``RunRecord`` while the Trainer runs; its curve travels in the checkpoints: a resumed run has all of it.

    The clock runs from the end of one step to the end of the next (data loading included) and stands while the Trainer
    evaluates or saves. A loss that is not finite stops the run with the status ``diverged``; that needs
    ``logging_nan_inf_filter=False``, since the Trainer otherwise logs the last finite loss in its place.
    """

    def __init__(self, record: RunRecord, metrics: Sequence[str] = (), target: float | None = None) -> None:
        """Start with an empty curve.

        Args:
            record: the record to fill; its status is left alone unless the run diverges.
            metrics: what an evaluation measures besides its loss, to be kept too: "accuracy".
            target: the evaluation loss to stop at, with a checkpoint if the run keeps any.
        """
        self.record = record
        self.metrics = tuple(metrics)
        self.target = math.nan if target is None else target  # no loss is <= NaN
        self._mark = 0.0

    def document(self) -> dict[str, Any]:
        """The record as its JSON has it, for the model card."""
        return self.record.document()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start the clock; after a resume, with what the checkpoint kept."""
        self.restore(state)
        groups = getattr(optimizer, "param_groups", [])
        self.record.arithmetic = {key: group[key] for key in ("ns_dtype",) for group in groups if key in group}
        machine.reset_peak_memory(args.device)
        self._mark = time.perf_counter()

    def restore(self, state: TrainerState) -> None:
        """Take the record so far out of a checkpoint's state; nothing where there is none."""
        kept = _kept(state).get(STATE_KEY) if state.global_step else None
        if not kept:
            return
        self.record.steps, self.record.seconds, self.record.curve = state.global_step, kept["seconds"], kept["curve"]
        for point in self.record.curve:
            losses = {key: loss for key in ("train_loss", "eval_loss") if (loss := point[key]) is not None}
            self.record.final |= losses | {key: point[key] for key in self.metrics if key in point}
            if not all(math.isfinite(loss) for loss in losses.values()):
                self.record.status = "diverged"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the clock run up to here."""
        now = time.perf_counter()
        self.record.seconds += now - self._mark
        self.record.steps = state.global_step
        # Not an ExportableState: the Trainer rebuilds those from JSON, without our record. The list is shared, no copy.
        _kept(state)[STATE_KEY] = {"seconds": self.record.seconds, "curve": self.record.curve}
        self._mark = now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take losses, metrics and the layers' health into the curve; stop at the target, or at a loss not finite."""
        for key, entry in (("loss", "train_loss"), ("eval_loss", "eval_loss")):
            if logs is None or key not in logs:
                continue
            loss = float(logs[key])
            self._point(state.global_step)[entry] = self.record.final[entry] = loss
            if entry == "train_loss" and (health := _health(optimizer)):
                began = time.perf_counter()  # by then the device is done: the health was read from it
                self._point(state.global_step)["health"] = health | _distances(optimizer)
                self._mark += time.perf_counter() - began
            if not math.isfinite(loss):
                self.record.status = "diverged"
                control.should_training_stop = True
            elif entry == "eval_loss" and loss <= self.target:
                control.should_training_stop = True
                control.should_save = args.save_strategy != SaveStrategy.NO
        for metric in self.metrics:
            if logs is not None and f"eval_{metric}" in logs:
                self._point(state.global_step)[metric] = self.record.final[metric] = float(logs[f"eval_{metric}"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation is not training time."""
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor is saving."""
        self._mark = time.perf_counter()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Ask the optimizer how it fared."""
        self.record.health = _health(optimizer) | _distances(optimizer)
        self.record.routing = _routing(optimizer)

    def _point(self, step: int) -> CurvePoint:
        """The curve's entry for this step, a new one unless the last is of the same step."""
        if not self.record.curve or self.record.curve[-1]["step"] != step:
            point: CurvePoint = {"step": step, "seconds": self.record.seconds, "train_loss": None, "eval_loss": None}
            self.record.curve.append(point)
        return self.record.curve[-1]


class RunProgress(ProgressCallback):
    """The Trainer's bar as ``Progress``: beside steps and time left the loss, the best one so far, and the target."""

    training_bar: Any  # a `Progress`, or None
    prediction_bar: Any

    def __init__(self, record: RunRecord, target: float | None) -> None:
        """Nothing is shown yet.

        Args:
            record: of the run, filled by its `RecordCallback`.
            target: the evaluation loss to stop at.
        """
        super().__init__()
        self._record, self._target = record, target

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin where the checkpoint was."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = Progress(desc=self._record.name, unit="step", **steps)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """A bar of its own, which goes when the evaluation is over."""
        if self.prediction_bar is None and state.is_world_process_zero and has_length(eval_dataloader):
            self.prediction_bar = Progress(desc="evaluation", unit="batch", total=len(eval_dataloader), leave=False)
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print what is logged, and keep its losses in sight."""
        super().on_log(args, state, control, logs, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            losses = [point["eval_loss"] for point in self._record.curve if point["eval_loss"] is not None]
            best = min(losses, default=None)
            self.training_bar.say(loss=self._record.final.get("train_loss"), best_eval=best, target=self._target)


class EpochCallback(TrainerCallback):
    """Tells what draws the training examples, by its `set_epoch`, which epoch it is."""

    def __init__(self, drawn: Any) -> None:
        """Remember what to tell."""
        self.drawn = drawn

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also right after a resume in the middle of an epoch: the whole part is the epoch's number."""
        self.drawn.set_epoch(int(state.epoch or 0))


def _health(optimizer: Any) -> dict[str, float | None]:
    """A few numbers over all layers; an optimizer that is not ours has none."""
    ours = unwrap_optimizer(optimizer)  # under accelerate's wrapper, and DeepSpeed's
    return {} if ours is None else dict(ours.health())


def _distances(optimizer: Any) -> dict[str, float | None]:
    """Over the layers that this rank preconditions, |F - I| of the side of each that is farther from I."""
    ours = unwrap_optimizer(optimizer)
    rows = () if ours is None else ours.diagnostics().values()
    sides = [[float(value) for key, value in row.items() if key.endswith("_distance")] for row in rows]
    farther = [max(each) for each in sides if each]
    return {"distance_median": statistics.median(farther), "distance_max": max(farther)} if farther else {}


def _routing(optimizer: Any) -> dict[str, Any]:
    """Which rule moves how many parameters, and the first of them; the rules that move the most."""
    rules: dict[str, list[str]] = {}
    ours = unwrap_optimizer(optimizer)
    for name, rule in ({} if ours is None else ours.routing()).items():
        rules.setdefault(rule, []).append(name)
    most = sorted(rules, key=lambda rule: -len(rules[rule]))[:_MOST_RULES]
    return {rule: {"parameters": len(rules[rule]), "first": rules[rule][:2]} for rule in most}


def kept_curve(state: TrainerState) -> list[CurvePoint]:
    """The curve that a checkpoint keeps."""
    kept: dict[str, Any] = _kept(state).get(STATE_KEY, {})
    return list(kept.get("curve", []))


def _kept(state: TrainerState) -> dict[str, Any]:
    """The part of the trainer state that travels with checkpoints and is free for callbacks."""
    kept = cast("dict[str, Any]", state.stateful_callbacks)  # typed as a list, always a dict once the state is built
    assert isinstance(kept, dict)
    return kept

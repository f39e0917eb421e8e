"""One trial in a process of its own: the run that its command line would make, and its JSON.

    python -m hf_soo.search.trial ORDER

The order is JSON. A socket to the worker takes the loss of every evaluation and answers whether to go on. A trial that
is told to end (SIGTERM), or whose worker is gone, ends after the step at hand, with a checkpoint where the recipe
keeps any; it leaves no JSON and is taken up again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_soo.domains import domain_of
from hf_soo.runs.record import read_run
from hf_soo.runs.training import train
from hf_soo.search.orders import GIVEN_BACK, Channel, Order, write


class _Reporter(TrainerCallback):
    """Tells the worker of every evaluation, and ends the run when it must."""

    def __init__(self, channel: Channel) -> None:
        """Nothing is said yet.

        Args:
            channel: to the worker.
        """
        self._channel = channel

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report, and stop where the rule says so."""
        if metrics and "eval_loss" in metrics and not self._channel.ask(state.global_step, float(metrics["eval_loss"])):
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End, or first ask for a checkpoint."""
        if not self._channel.is_ending():
            return
        if args.save_strategy == SaveStrategy.NO:
            raise KeyboardInterrupt
        control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End, with a checkpoint."""
        if self._channel.is_ending():
            raise KeyboardInterrupt


def _run(order: Order) -> None:
    channel = Channel(order.channel)
    places = ["--name", order.name, "--output_dir", order.scratch, "--results_dir", f"{order.scratch}/runs"]
    flags = [*order.flags, *places]
    job, make_task = domain_of(flags).parse(flags)
    try:
        record = train(dataclasses.replace(job, callbacks=(_Reporter(channel),)), make_task())[0]
    except KeyboardInterrupt:
        sys.exit(GIVEN_BACK)
    except RuntimeError:
        file = Path(order.scratch, "runs", f"{order.name}.json")
        if not file.is_file():
            raise
        logging.exception("The run failed, and its JSON says so.")
        record = read_run(file)
    write(order, record, channel.stopped_at)


def main(arguments: list[str]) -> int:
    """Run a trial: 0 with its JSON written, 75 given back, 1 after an error that is one line.

    Args:
        arguments: the order, as JSON.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    try:
        _run(Order(**json.loads(arguments[0])))
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

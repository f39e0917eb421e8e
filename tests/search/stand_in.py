"""What a worker starts instead of a training run: a formula's losses, reported and kept as a run's are."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path

from hf_soo import machine
from hf_soo.runs.record import RunRecord
from hf_soo.search.orders import GIVEN_BACK, Channel, Order, write

STEPS = 8


def loss_at(rate: float, seed: int, step: int) -> float:
    """Best at .02, falling with the steps."""
    return 2 + abs(math.log(rate / 0.02)) + 0.01 * seed + 1 / step


def main(order: Order) -> int:
    settings = dict(zip(order.flags[::2], order.flags[1::2], strict=True))
    rate, seed = float(settings["--learning_rate"]), int(settings["--seed"])
    Path(order.results).mkdir(parents=True, exist_ok=True)
    with Path(order.results, "starts.txt").open("a") as stream:  # one line a start, for the tests to count
        stream.write(f"{order.name}\n")
    if settings.get("--optim") == "broken":
        print("error: no such optimizer.", file=sys.stderr)
        return 1
    channel = Channel(order.channel)
    record = RunRecord(order.name, "sgd", "sgd", {"learning_rate": rate}, seed, status="completed", code=machine.code())
    for step in range(1, STEPS + 1):
        time.sleep(float(settings.get("--warmup_steps", "0.01")))
        if channel.is_ending():
            return GIVEN_BACK
        loss = math.nan if rate > 0.1 else loss_at(rate, seed, step)
        record.steps, record.seconds = step, 0.01 * step
        record.curve.append({"step": step, "seconds": record.seconds, "train_loss": None, "eval_loss": loss})
        record.final["eval_loss"] = loss
        if not math.isfinite(loss):
            record.status = "diverged"
            break
        if not channel.ask(step, loss):
            break
    if channel.is_ending():
        return GIVEN_BACK
    write(order, record, channel.stopped_at)
    return 0


if __name__ == "__main__":
    logging.disable()
    sys.exit(main(Order(**json.loads(sys.argv[1]))))

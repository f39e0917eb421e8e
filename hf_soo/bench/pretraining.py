"""So many minutes of pretraining on sequences that lie ready in one file: which method comes further in the time.

    hf-soo bench --tensors_from data/phase1 --tensors phase1.safetensors          where `datasets` is installed
    hf-soo bench --train_minutes 4 --tensors phase1.safetensors --preset bert-base --device cuda --autocast true \
        --batch_size 256 --optim mkor+lamb --learning_rate 0.004 --json pretraining/mkor.json

The rate warms up over a tenth of the time and falls as a square root, by the clock. Evaluations stand outside of it.
Without a file the sequences are made up, a Markov chain over 2,000 words, and the run's `data.source` says "synthetic".
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from hf_soo import machine
from hf_soo.bench.workload import BenchConfig, model_size, predictions_of
from hf_soo.bert.data.folder import load_prepared
from hf_soo.bert.data.wordpiece import SpecialIds
from hf_soo.bert.masking import PretrainingCollator
from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.engine.checks import Checked, Count, Positive
from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.progress import Progress
from hf_soo.runs.arguments import option
from hf_soo.runs.record import RunRecord, recording

_WORDS = 2000  # of a made-up text
_FOLLOWERS = 4  # of each
_WARMUP = 0.1  # of the time
_LOOKS = 5  # evaluations
_HELD_OUT = 512  # sequences, at most a tenth
_AT_ONCE = 64  # sequences of an evaluation
_READ = 10  # steps between two looks at the loss, which wait for the device


@dataclass
class TrainConfig(Checked):
    """A comparison of methods in pretraining."""

    _argument_group_name = "pretraining"

    train_minutes: Positive | None = option(None, "Pretrain for so long, instead of timing steps.")
    learning_rate: Positive = option(4e-3, "Of the pretraining, at its highest.")
    tensors: str | None = option(None, "File of sequences ready to train on; None: made-up ones.")
    tensors_from: str | None = option(None, "Write --tensors from this folder of hf-soo prepare, and do nothing else.")
    most_sequences: Count = option(60_000, "So many are written at most.")


class Sequences(Dataset[dict[str, Any]]):
    """Pairs of sentences as the collator of pretraining takes them, from one array of ids."""

    def __init__(self, tensors: dict[str, Tensor], ids: SpecialIds, source: str) -> None:
        """Take "input_ids" of all sequences in a row, their "ends", and each one's "segment_b" and "label"."""
        self.tensors, self.ids, self.source = tensors, ids, source

    def __len__(self) -> int:
        return len(self.tensors["ends"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = (int(self.tensors["ends"][i]) if i >= 0 else 0 for i in (index - 1, index))
        return {
            "input_ids": self.tensors["input_ids"][start:end].numpy(),
            "segment_b_start": int(self.tensors["segment_b"][index]),
            "next_sentence_label": int(self.tensors["label"][index]),
            "example_id": index,
        }

    @classmethod
    def read(cls, path: str) -> Sequences:
        """What `write` wrote."""
        with safe_open(path, framework="pt") as file:
            ids = SpecialIds(**json.loads(file.metadata()["ids"]))
            return cls({name: file.get_tensor(name) for name in file.keys()}, ids, Path(path).name)  # noqa: SIM118

    def write(self, path: str) -> None:
        """One safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path, {"ids": json.dumps(asdict(self.ids))})

    @classmethod
    def prepared(cls, folder: str, most: int) -> Sequences:
        """The first ones of a folder of ``hf-soo prepare``."""
        found = load_prepared(folder)
        rows = found["train"].select(range(min(most, len(found["train"]))))[:]
        tensors = _in_a_row(rows["input_ids"], rows["segment_b_start"], rows["next_sentence_label"])
        return cls(tensors, SpecialIds.of(found["vocab_file"]), Path(folder).name)

    @classmethod
    def synthetic(cls, size: int, length: int, count: int = 8192) -> Sequences:
        """Made up: each word has four that may follow it; B goes on where A ends, or (label 1) somewhere else."""
        ids, random = SpecialIds(size, pad=0, unk=1, cls=2, sep=3, mask=4), np.random.default_rng(0)
        words = min(_WORDS, size - 5)
        followers = random.integers(0, words, (words, _FOLLOWERS))
        half = (length - 3) // 2
        state, labels = random.integers(0, words, count), random.integers(0, 2, count)
        text = np.empty((count, 2 * half), dtype=np.int64)
        for i in range(2 * half):
            if i == half:
                state = np.where(labels == 1, random.integers(0, words, count), state)
            text[:, i] = state = followers[state, random.integers(0, _FOLLOWERS, count)]
        rows = [[ids.cls, *(row[:half] + 5), ids.sep, *(row[half:] + 5), ids.sep] for row in text]
        return cls(_in_a_row(rows, [half + 2] * count, labels), ids, "synthetic")


def _in_a_row(rows: Any, segment_b: Any, labels: Any) -> dict[str, Tensor]:
    return {
        "input_ids": torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])),
        "ends": torch.tensor(np.cumsum([len(row) for row in rows])),
        "segment_b": torch.tensor(segment_b, dtype=torch.int32),
        "label": torch.tensor(labels, dtype=torch.int32),
    }


@dataclass
class _Run:
    """Model and optimizer on their way through the batches."""

    model: nn.Module
    optimizer: PreconditionedOptimizer
    autocast: bool
    device: torch.device

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(**batch).loss
        return loss

    def step(self, batch: dict[str, Tensor], rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["initial_lr"]
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.report_loss(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batches: DataLoader[Any]) -> float:
        self.model.eval()
        found = float(torch.stack([self.loss(batch).float() for batch in batches]).mean())
        self.model.train()
        return found


def pretrain(
    config: BenchConfig, how: TrainConfig, make: Callable[..., PreconditionedOptimizer], given: Mapping[str, Any]
) -> RunRecord:
    """Train for the given time, and write the record beside ``config.json``.

    Args:
        config: model, batch, device.
        how: time, rate, data.
        make: (model, rate) -> the optimizer.
        given: the method's settings.

    Returns:
        The record.
    """
    torch.manual_seed(0)
    device, size = torch.device(config.device), model_size(config)
    data = Sequences.read(how.tensors) if how.tensors else Sequences.synthetic(size.vocab_size, config.seq_length)
    size.vocab_size = data.ids.size
    model = GatheredBertForPreTraining(size).train().to(device)
    optimizer = make(model, how.learning_rate)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    settings = {name: getattr(config, name) for name in ("preset", "batch_size", "seq_length", "autocast", "threads")}
    settings |= {"data": {"source": data.source}, "minutes": how.train_minutes, "learning_rate": how.learning_rate}
    record = RunRecord(
        name=Path(config.json).stem if config.json else optimizer.name,
        optimizer=optimizer.name,
        base=type(optimizer.base).__name__.lower(),
        config={**settings, "optim_args": dict(given)},
        seed=0,
        kind="pretraining",
        device=machine.device_name(device),
        versions=machine.versions(),
        commit=machine.commit(),
        code=machine.code(),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    folder, budget = Path(config.json).parent if config.json else None, 60 * (how.train_minutes or 0.0)
    with recording(record, folder), Progress(desc=record.name, unit="s", total=round(budget)) as bar:
        _train(_Run(model, optimizer, config.autocast, device), data, config, budget, record, bar)
    return record


def _train(run: _Run, data: Sequences, config: BenchConfig, budget: float, record: RunRecord, bar: Progress) -> None:
    """Step until the time is over; the curve has the losses at each evaluation."""
    held_out = min(_HELD_OUT, len(data) // 10)
    most = predictions_of(config.seq_length)
    collate, fixed_masks = (
        PretrainingCollator(data.ids, max_predictions=most, pad_to=config.seq_length, seed=seed) for seed in (0, 1)
    )
    fixed = Subset(data, range(len(data) - held_out, len(data)))
    evaluation: DataLoader[Any] = DataLoader(fixed, max(config.batch_size, _AT_ONCE), collate_fn=fixed_masks)
    train = Subset(data, range(len(data) - held_out))
    seconds, looks = 0.0, 1
    _look(run, evaluation, record, None, 0.0)
    began = time.perf_counter()
    for step, batch in enumerate(_batches(train, config, collate, run.device), 1):
        share = min(1.0, seconds / budget)
        loss = run.step(batch, min(1.0, share / _WARMUP + 1e-3) * math.sqrt(1 - share))
        if step % _READ and step > 1:
            seconds = time.perf_counter() - began
            continue
        value = float(loss)  # waits for the device
        seconds = time.perf_counter() - began
        record.steps, record.seconds = step, seconds
        bar.say(step=step, loss=value, eval=record.final["eval_loss"])
        bar.update(min(int(seconds), bar.total) - bar.n)
        if not math.isfinite(value):
            record.status = "diverged"
            return
        if seconds >= budget * looks / _LOOKS:
            _look(run, evaluation, record, value, seconds)
            looks = int(seconds / budget * _LOOKS) + 1
            began = time.perf_counter() - seconds
        if seconds >= budget:
            return


def _look(run: _Run, batches: DataLoader[Any], record: RunRecord, train_loss: float | None, seconds: float) -> None:
    loss = run.evaluate(batches)
    point = {"step": record.steps, "seconds": seconds, "train_loss": train_loss, "eval_loss": loss}
    record.curve.append(point)
    record.final = {"eval_loss": loss}
    record.peak_memory_bytes = machine.peak_memory_bytes(run.device)


def _batches(
    data: Dataset[Any], config: BenchConfig, collate: PretrainingCollator, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Masked batches without an end; each epoch has masks and an order of its own, the same for every method."""
    workers = 4 if device.type == "cuda" else 0
    for epoch in itertools.count():
        collate.set_epoch(epoch)
        order = torch.Generator().manual_seed(epoch)
        yield from DataLoader(
            data, config.batch_size, True, num_workers=workers, collate_fn=collate, drop_last=True, generator=order
        )

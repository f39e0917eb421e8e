"""What an optimizer costs, as ratios to AdamW(foreach=True) stepped in the same process and the same round.

A round interleaves the reference's steps with the method's, then takes one update step on the statistics of a real
forward and backward pass. Between steps the gradients of that pass are copied back, outside the clock. Absolute times
drift with whatever else the machine does; ratios within a round hold.

On one CPU thread the clock is the process's CPU time, else wall time after a synchronisation.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BertConfig

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.experiments import machine
from hf_soo.optimizers.bases import decay_groups
from hf_soo.registry import METHODS, build_optimizer
from hf_soo.tasks.bert import GatheredBertForPreTraining

SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "large2": {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 4096},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
VOCABULARY = {"tiny": 200}  # the others have BERT's 30,522
LEARNING_RATE = 1e-5  # the cost does not depend on it; a small one keeps the weights sane
WEIGHT_DECAY = 0.01
RECORDED = ("threads", "rounds", "steps", "batch_size", "seq_length", "autocast")
SETTLED = 1000  # optimizer steps after which no method is in its warm-up


@dataclass
class BenchConfig:
    """What to measure."""

    preset: str = field(default="large2", metadata={"help": f"Model: {', '.join(SIZES)}."})
    optim: str = field(
        default="mkor,lamb",
        metadata={"help": "Methods, comma-separated: NAME, NAME+BASE, NAME:key=value:key=value+BASE."},
    )
    base: str | None = field(default=None, metadata={"help": "Base of the methods that name none; default: their own."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    rounds: int = field(default=5, metadata={"help": "Rounds for each method."})
    steps: int = field(default=5, metadata={"help": "Plain steps timed in a round, at most."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a batch."})
    seq_length: int = field(default=128, metadata={"help": "Tokens in a sequence; 15 % of them are predicted."})
    autocast: bool = field(default=False, metadata={"help": "Forward pass in bfloat16 autocast."})
    memory: bool = field(default=True, metadata={"help": "Measure the peak memory too, in a process for each method."})
    json: str | None = field(default=None, metadata={"help": "File to write."})

    def __post_init__(self) -> None:
        """Check the values before a model is built."""
        if self.preset not in SIZES:
            raise ValueError(f"preset={self.preset!r} is unknown; use one of {', '.join(SIZES)}")
        for name in ("threads", "rounds", "steps", "batch_size", "seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}, but torch {torch.__version__} sees no GPU; use --device cpu")


@dataclass(frozen=True)
class Pair:
    """A method, its base (None: its own) and its settings."""

    name: str
    base: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def build(self, model: nn.Module) -> PreconditionedOptimizer:
        """Build it for a model."""
        return build_optimizer(
            self.name, model, lr=LEARNING_RATE, base=self.base, weight_decay=WEIGHT_DECAY, **dict(self.settings)
        )


def parse_pairs(text: str, base: str | None = None) -> list[Pair]:
    """Read `NAME[:key=value...][+BASE],...`.

    Args:
        text: The flag's value.
        base: For methods that name no base and take one.

    Returns:
        The pairs.

    Raises:
        ValueError: If a name is unknown or a setting is not `key=value`.
    """
    pairs = []
    for item in text.split(","):
        method, _, own_base = item.strip().partition("+")
        name, *settings = method.split(":")
        if name not in METHODS:
            raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(METHODS)}")
        if not all("=" in setting for setting in settings):
            raise ValueError(f"{method!r}: settings are written NAME:key=value:key=value")
        values = tuple((key, yaml.safe_load(value)) for key, value in (s.split("=", 1) for s in settings))
        takes_base = METHODS[name].config is not None
        pairs.append(Pair(name, own_base or (base if takes_base else None), values))
    return pairs


class Clock:
    """Seconds of a call: CPU time on one thread, else wall time between synchronisations."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._now = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        """Time a call."""
        self._synchronize()
        start = self._now()
        call()
        self._synchronize()
        return self._now() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Workload:
    """BERT with random weights and one batch of random tokens; `twin` shares its parameters but never its hooks."""

    def __init__(self, config: BenchConfig) -> None:
        torch.manual_seed(0)
        self.device = torch.device(config.device)
        self.autocast = config.autocast
        size = BertConfig(vocab_size=VOCABULARY.get(config.preset, 30522), **SIZES[config.preset])  # type: ignore[arg-type]
        self.model = GatheredBertForPreTraining(size).to(self.device).train()
        self.twin = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        self.parameters = list(self.model.parameters())
        self.batch = random_batch(config, size.vocab_size, self.device)
        self.gradients: list[Tensor] = []

    def forward_backward(self, model: nn.Module) -> None:
        """One pass of either model; the gradients are the parameters'."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = model(**self.batch).loss
        loss.backward()

    def keep_gradients(self) -> None:
        """Remember the gradients of the last pass."""
        self.gradients = [p.grad.clone() for p in self.parameters if p.grad is not None]

    def restore_gradients(self) -> None:
        """Bring them back: some optimizers write into them."""
        for param, gradient in zip(self.parameters, self.gradients, strict=True):
            assert param.grad is not None
            param.grad.copy_(gradient)


def random_batch(config: BenchConfig, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Random token ids with labels for both losses, as the pretraining collator shapes them."""
    rows, length = config.batch_size, config.seq_length
    predictions = max(1, round(0.15 * length))
    positions = torch.stack([torch.randperm(length)[:predictions] for _ in range(rows)])
    batch = {
        "input_ids": torch.randint(0, vocabulary, (rows, length)),
        "token_type_ids": torch.randint(0, 2, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "masked_positions": positions,
        "labels": torch.randint(0, vocabulary, (rows, predictions)),
        "next_sentence_label": torch.randint(0, 2, (rows,)),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(slots=True)
class Round:
    """Seconds of one round; None where the method has no such step."""

    reference: float
    forward_backward: float  # without any hook
    plain: float | None
    update: float | None
    capturing: float | None  # forward and backward of an update step
    idle: float | None  # the same with hooks that do not collect

    def amortised(self, period: int | None) -> float:
        """Seconds of an optimizer step, averaged over a period."""
        return _average(self.plain, self.update, period)

    def train_step(self, period: int | None) -> float:
        """Seconds of a whole train step, averaged over a period."""
        plain = self.forward_backward if self.idle is None else self.idle
        return _average(plain, self.capturing, period) + self.amortised(period)

    @property
    def reference_train_step(self) -> float:
        """Seconds of a whole train step with the reference."""
        return self.forward_backward + self.reference


def _average(plain: float | None, update: float | None, period: int | None) -> float:
    if period is None or update is None:
        assert plain is not None
        return plain
    return update if plain is None else (update + (period - 1) * plain) / period


class Stepper:
    """One optimizer over the workload, moved between its plain and its update steps."""

    def __init__(self, work: Workload, optimizer: PreconditionedOptimizer) -> None:
        """Take the first steps, up to an update outside the warm-up."""
        self.work, self.optimizer = work, optimizer
        self.clock = Clock(work.device)
        updates = (t for t in range(SETTLED, 3 * SETTLED) if optimizer.preconditioner.updates_at(t))
        self.next_update = next(updates, None)
        self.period = None if self.next_update is None else next(updates) - self.next_update
        for last in (False, False, True):  # allocate, and let kernels choose themselves
            self._pass(work.model)
            work.keep_gradients()
            self._step_before_update() if last else optimizer.step()

    def round(self, reference: Optimizer, steps: int) -> Round:
        """Take a round: the passes and an update step, then plain steps in turn with the reference's.

        Args:
            reference: Stepped between the plain steps.
            steps: Plain steps, at most; the period allows no more than period - 1.
        """
        bare = self._pass(self.work.twin)
        capturing = update = idle = None
        if self.period is not None:
            capturing = self._pass(self.work.model)
        self.work.keep_gradients()
        if self.period is not None:
            update = self.clock(self.optimizer.step)
        plain, references = [], []
        for index in range(steps):
            references.append(self._timed(reference))
            if self.period is None or index < self.period - 1:
                plain.append(self._timed(self.optimizer))
        if plain and self.period is not None:
            idle = self._pass(self.work.model)
            self._step_before_update()
        between = statistics.median(plain) if plain else None
        return Round(statistics.median(references), bare, between, update, capturing, idle)

    def _pass(self, model: nn.Module) -> float:
        self.optimizer.zero_grad()
        return self.clock(lambda: self.work.forward_backward(model))

    def _timed(self, optimizer: Optimizer) -> float:
        self.work.restore_gradients()
        return self.clock(optimizer.step)

    def _step_before_update(self) -> None:
        """Jump to the last step before an update, and take it."""
        self.work.restore_gradients()
        if self.next_update is not None and self.period is not None:
            self.optimizer.steps = self.next_update - 1
            self.next_update += self.period
        self.optimizer.step()


def run(config: BenchConfig, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure all methods of a configuration.

    Args:
        config: What to measure.
        report: Called with the results so far after each method, so that an interruption loses one method at most.

    Returns:
        The results, as the JSON file has them.

    Raises:
        ValueError: If a method or a setting is unknown.
    """
    torch.set_num_threads(config.threads)
    pairs = parse_pairs(config.optim, config.base)
    work = Workload(config)
    for pair in pairs:  # a wrong setting shows now, not after half an hour
        pair.build(work.model).remove_hooks()
    results: dict[str, Any] = {
        "device": machine.device_name(work.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "preset": config.preset,
        "parameters": sum(p.numel() for p in work.parameters),
        "settings": {name: getattr(config, name) for name in RECORDED},
        "reference": measure_reference(work, config),
        "rows": [],
    }
    reference_memory = peak_memory_apart(config, None)
    for pair in pairs:
        row = measure(work, config, pair)
        memory = peak_memory_apart(config, pair)
        row["peak_memory_ratio"] = None if memory is None or reference_memory is None else memory / reference_memory
        results["rows"].append(row)
        report(results)
    return results


def adamw(model: nn.Module, **kind: bool) -> Optimizer:
    """The reference: AdamW over decay and no-decay groups, `foreach=True` or `fused=True`."""
    return torch.optim.AdamW(decay_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, **kind)  # type: ignore[arg-type]


def measure_reference(work: Workload, config: BenchConfig) -> dict[str, float]:
    """Time AdamW(foreach) alone, and AdamW(fused) relative to it."""
    clock, optimizers = Clock(work.device), [adamw(work.twin, foreach=True), adamw(work.twin, fused=True)]
    work.forward_backward(work.twin)
    work.keep_gradients()
    rounds = []
    for _ in range(config.rounds + 1):
        seconds = []
        for optimizer in optimizers:
            work.restore_gradients()
            seconds.append(clock(optimizer.step))
        rounds.append(seconds)
    return {
        "adamw_foreach_seconds": statistics.median(foreach for foreach, _ in rounds[1:]),
        "adamw_fused_ratio": statistics.median(fused / foreach for foreach, fused in rounds[1:]),
    }


def measure(work: Workload, config: BenchConfig, pair: Pair) -> dict[str, Any]:
    """Time one method.

    Args:
        work: The model and its batch.
        config: Rounds and steps.
        pair: The method.

    Returns:
        Its row, without the memory ratio.
    """
    optimizer = pair.build(work.model)
    try:
        stepper, reference = Stepper(work, optimizer), adamw(work.twin, foreach=True)
        stepper.round(reference, 1)
        rounds = [stepper.round(reference, config.steps) for _ in range(config.rounds)]
        return {
            "optimizer": pair.name,
            "base": type(optimizer.base).__name__.lower(),
            "config": {**optimizer.config, **dict(pair.settings)},
            "update_period": stepper.period,
            **ratios(rounds, stepper.period),
            "state_bytes_per_parameter": state_bytes(optimizer) / sum(p.numel() for p in work.parameters),
        }
    finally:
        optimizer.remove_hooks()
        optimizer.zero_grad()


def ratios(rounds: list[Round], period: int | None) -> dict[str, float | None]:
    """Medians over the rounds of each ratio, and the spread of the step's; None where a method has no such step.

    Args:
        rounds: At least one.
        period: Steps from update to update, None without updates.

    Returns:
        The row's ratios.
    """

    def median(of: Callable[[Round], float | None]) -> float | None:
        values = [value for value in map(of, rounds) if value is not None]
        return statistics.median(values) if values else None

    steps = [r.amortised(period) / r.reference for r in rounds]
    return {
        "step_ratio": statistics.median(steps),
        "step_ratio_min": min(steps),
        "step_ratio_max": max(steps),
        "plain_step_ratio": median(lambda r: r.plain and r.plain / r.reference),
        "update_step_ratio": median(lambda r: r.update and r.update / r.reference),
        "capture_ratio": median(lambda r: r.capturing and r.capturing / r.forward_backward),
        "train_step_ratio": median(lambda r: r.train_step(period) / r.reference_train_step),
        "forward_backward_seconds": median(lambda r: r.forward_backward),
    }


def state_bytes(optimizer: PreconditionedOptimizer) -> int:
    """Bytes of the base's state, the preconditioner's factors and the capture's buffers."""
    buffers = [tensor for each in optimizer.capture.buffers.values() for tensor in each.tensors()]
    return sum(t.numel() * t.element_size() for t in [*tensors_in([optimizer.state, optimizer.states]), *buffers])


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings and lists (keys are not looked at)."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        yield from tensors_in(list(nest.values()))
    elif isinstance(nest, (list, tuple)):
        for each in nest:
            yield from tensors_in(each)


def peak_memory_apart(config: BenchConfig, pair: Pair | None) -> int | None:
    """`peak_memory` in a process of its own, where nothing else has left its mark; None if it is not wanted."""
    if not config.memory:
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, config, pair).result()


def peak_memory(config: BenchConfig, pair: Pair | None) -> int:
    """Bytes that three whole train steps need over what the process held before the model was built.

    Args:
        config: The model and batch.
        pair: The method, or None for AdamW(foreach).

    Returns:
        Bytes.
    """
    torch.set_num_threads(config.threads)
    before = machine.peak_memory_bytes(torch.device(config.device))
    work = Workload(config)
    optimizer = adamw(work.model, foreach=True) if pair is None else pair.build(work.model)
    for _ in range(3):
        optimizer.zero_grad()
        work.forward_backward(work.model)
        optimizer.step()
    return machine.peak_memory_bytes(work.device) - before

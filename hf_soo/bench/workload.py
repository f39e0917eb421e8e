"""What a benchmark times: BERT with random weights, a batch of random tokens, a clock."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import BertConfig

from hf_soo.bert.model import SIZES, GatheredBertForPreTraining
from hf_soo.engine.checks import Checked, Count

PRESETS = {
    **{name: SIZES[name] for name in ("toy", "mini", "large2")},
    "bert-base": SIZES["base"],
    "bert-large": SIZES["large"],
}
VOCABULARY = {"toy": 200}  # the others have BERT's 30,522
AXES = ("width", "layers", "batch_size", "ranks")  # flags that a curve may be over


@dataclass
class BenchConfig(Checked):
    """What to measure."""

    preset: Literal["toy", "mini", "large2", "bert-base", "bert-large"] = field(
        default="large2", metadata={"help": f"Model: {', '.join(PRESETS)}."}
    )
    width: Count | None = field(default=None, metadata={"help": "Instead of the preset's; a multiple of 64."})
    layers: Count | None = field(default=None, metadata={"help": "Instead of the preset's."})
    vocabulary: Count | None = field(default=None, metadata={"help": "Instead of the preset's."})
    optim: str = field(
        default="mkor,lamb",
        metadata={"help": "Methods, comma-separated: NAME, NAME+BASE, NAME:key=value:key=value+BASE."},
    )
    base: str | None = field(default=None, metadata={"help": "Base of the methods that name none; default: their own."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: Count = field(default=1, metadata={"help": "CPU threads."})
    rounds: Count = field(default=5, metadata={"help": "Rounds for each method."})
    steps: Count = field(default=5, metadata={"help": "Steps of each kind timed in a round; refreshes once."})
    batch_size: Count = field(default=8, metadata={"help": "Sequences in a batch."})
    seq_length: Count = field(default=128, metadata={"help": "Tokens in a sequence; 15 %% of them are predicted."})
    autocast: bool = field(default=False, metadata={"help": "Forward pass in bfloat16 autocast."})
    memory: bool = field(default=True, metadata={"help": "Measure the peak memory too, in a process for each method."})
    bare: bool = field(default=True, metadata={"help": "Time the bare products of methods that have some."})
    launches: bool = field(
        default=False, metadata={"help": "Count the kernels of the commonest step (CUDA), or torch's operations (CPU)."}
    )
    peer: str | None = field(
        default=None,
        metadata={
            "help": "PACKAGE:CLASS, an optimizer stepped in each round on the hidden matrices, AdamW on the rest."
        },
    )
    ranks: Count = field(default=1, metadata={"help": "Processes over gloo that share a step; wall time then."})
    curve: str | None = field(
        default=None, metadata={"help": "The flag that this is a point of a curve over: width, layers, ..."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Keep the rows of --json FILE, and go on where a method fails."}
    )
    json: str | None = field(default=None, metadata={"help": "File to write."})

    def __post_init__(self) -> None:
        """Check the values before a model is built."""
        super().__post_init__()
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} is not allowed; give cpu or cuda.")
        if self.width is not None and self.width % 64:
            raise ValueError(f"width={self.width} is not allowed; give a multiple of 64, the width of a head.")
        if self.curve is not None and self.curve not in AXES:
            raise ValueError(f"curve={self.curve!r} is not allowed; give one of {', '.join(AXES)}.")
        if self.ranks > 1 and self.device != "cpu":
            raise ValueError(f"ranks={self.ranks} on {self.device!r} is not allowed; they share a step on cpu.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}, but torch {torch.__version__} sees no GPU; use --device cpu.")


class Clock:
    """Seconds of a call: CPU time of one process on one thread, else wall time between synchronisations."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1 and not dist.is_initialized()
        self._now = time.process_time if alone else time.perf_counter

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
        if dist.is_initialized():
            dist.barrier()


class Workload:
    """BERT with random weights and one batch of random tokens; `twin` shares its parameters but never its hooks."""

    def __init__(self, config: BenchConfig) -> None:
        torch.manual_seed(0)
        self.device = torch.device(config.device)
        self.autocast = config.autocast
        self.size = model_size(config)
        self.model: nn.Module = GatheredBertForPreTraining(self.size).train()
        self.model.to(self.device)
        self.twin = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        self.parameters = list(self.model.parameters())
        if dist.is_initialized():
            torch.manual_seed(dist.get_rank())  # each rank has a batch of its own
        self.batch = _random_batch(config, self.size.vocab_size, self.device)
        self.gradients: list[Tensor] = []

    def forward_backward(self, model: nn.Module) -> None:
        """One pass of either model; the gradients are the parameters'."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = model(**self.batch).loss
        loss.backward()
        if dist.is_initialized():
            given = [p for p in self.parameters if p.grad is not None]
            flat = torch.cat([p.grad.view(-1) for p in given]).div_(dist.get_world_size())
            dist.all_reduce(flat)
            for param, mean in zip(given, torch.split(flat, [p.numel() for p in given]), strict=True):
                param.grad = mean.view_as(param)

    def keep_gradients(self) -> None:
        """Remember the gradients of the last pass."""
        self.gradients = [p.grad.clone() for p in self.parameters if p.grad is not None]

    def restore_gradients(self) -> None:
        """Bring them back: some optimizers write into them."""
        for param, gradient in zip(self.parameters, self.gradients, strict=True):
            assert param.grad is not None
            param.grad.copy_(gradient)


def model_size(config: BenchConfig) -> BertConfig:
    """The preset, with what is given instead of parts of it."""
    size = dict(PRESETS[config.preset])
    if config.width is not None:
        size |= {"hidden_size": config.width, "intermediate_size": 4 * config.width}
        size["num_attention_heads"] = config.width // 64
    if config.layers is not None:
        size["num_hidden_layers"] = config.layers
    return BertConfig(vocab_size=config.vocabulary or VOCABULARY.get(config.preset, 30522), **size)  # type: ignore[arg-type]


def place_on(curve: str, config: BenchConfig) -> int:
    """Where a benchmark lies on a curve."""
    size = model_size(config)
    own = {"width": size.hidden_size, "layers": size.num_hidden_layers}
    return int(own[curve] if curve in own else getattr(config, curve))


def predictions_of(length: int) -> int:
    """Masked positions of a sequence: 15 %."""
    return max(1, round(0.15 * length))


def _random_batch(config: BenchConfig, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Random token ids with labels for both losses, as the pretraining collator shapes them."""
    rows, length = config.batch_size, config.seq_length
    predictions = predictions_of(length)
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

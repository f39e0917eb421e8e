"""What a benchmark times: BERT with random weights, a batch of random tokens, a clock."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BertConfig

from hf_soo.bert.model import SIZES, GatheredBertForPreTraining
from hf_soo.engine.checks import Checked, Count

PRESETS = {"toy": SIZES["toy"], "mini": SIZES["mini"], "large2": SIZES["large2"], "bert-large": SIZES["large"]}
VOCABULARY = {"toy": 200}  # the others have BERT's 30,522


@dataclass
class BenchConfig(Checked):
    """What to measure."""

    preset: Literal["toy", "mini", "large2", "bert-large"] = field(
        default="large2", metadata={"help": f"Model: {', '.join(PRESETS)}."}
    )
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
    json: str | None = field(default=None, metadata={"help": "File to write."})

    def __post_init__(self) -> None:
        """Check the values before a model is built."""
        super().__post_init__()
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} is not allowed; give cpu or cuda.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}, but torch {torch.__version__} sees no GPU; use --device cpu.")


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
        size = BertConfig(vocab_size=VOCABULARY.get(config.preset, 30522), **PRESETS[config.preset])  # type: ignore[arg-type]
        self.model: nn.Module = GatheredBertForPreTraining(size).train()
        self.model.to(self.device)
        self.twin = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        self.parameters = list(self.model.parameters())
        self.batch = _random_batch(config, size.vocab_size, self.device)
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


def _random_batch(config: BenchConfig, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
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

"""What ``hf-soo plan`` is asked: a model, a method, ranks and how they share the work; checked before it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from hf_soo.engine.checks import Checked, Count, require
from hf_soo.optimizers.bases import BASES
from hf_soo.registry import METHODS
from hf_soo.runs.arguments import option

_Strategy = Literal["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"]
_COUNTABLE = ("ddp", "fsdp2")  # what a dry run can build
_LARGEST_DEFAULT_MICRO_BATCH = 16
MEASURE = "measure"
"""The profile of this machine."""


@dataclass(frozen=True)
class PlanConfig(Checked):
    """The flags of ``hf-soo plan``."""

    model: str = option("bert-large-uncased", "a BERT known by name, a folder with config.json, or a name on the hub")
    optim: str = option("mkor", "the method; `hf-soo list` shows all")
    optim_args: str | None = option(None, "its settings, key=value,key=value or a JSON object")
    base: str | None = option(None, f"its base optimizer, {', '.join(BASES)}; default: its own")
    beside: str = option(
        "lamb,kaisa,eva",
        "methods beside it, NAME[:key=value...][+BASE],...; without +BASE: --base; '' for none",
    )
    gpus: Count = option(1, "ranks of the data-parallel run")
    strategy: _Strategy = option("ddp", f"{', '.join(get_args(_Strategy))}")
    seq: Count = option(512, "tokens in a sequence")
    batch: Count = option(256, "sequences in a step, over all ranks")
    micro_batch: Count | None = option(
        None, "sequences in a forward pass of one rank; accumulation follows. Default: the largest divisor of "
        f"batch / gpus up to {_LARGEST_DEFAULT_MICRO_BATCH}"
    )  # fmt: skip
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "fp32 (no TF32), or bf16: autocast, under DeepSpeed bf16 weights and a master copy"
    )
    gradient_checkpointing: bool = option(False, "keep each block's input alone, and run the block again")
    profile: str = option("a100-80gb-4", "hardware: a100-80gb-4, cpu, a YAML or JSON file, or `measure`: this machine")
    json: str | None = option(None, "file for all numbers")
    dry_run: bool = option(False, "build the ranks' collectives on fake tensors, take the steps, count the bytes asked")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range, or they do not go together.
        """
        super().__post_init__()
        if self.optim not in METHODS:
            raise ValueError(f"optim={self.optim!r} is unknown; use one of {', '.join(METHODS)}.")
        if self.base is not None:
            require("base", self.base, Literal[tuple(BASES)])
            if METHODS[self.optim].config is None:
                raise ValueError(f"base={self.base!r} has no effect with optim={self.optim!r}; leave it out.")
        self._check_batch()
        if self.dry_run and self.strategy not in _COUNTABLE:
            raise ValueError(
                f"dry_run with strategy={self.strategy!r}: DeepSpeed does not run on torch's fake process group; use "
                f"one of {', '.join(_COUNTABLE)}, or leave --dry-run out."
            )
        if self.dry_run and self.gpus == 1:
            raise ValueError("dry_run with gpus=1: one rank sends nothing; give more gpus, or leave --dry-run out.")

    def _check_batch(self) -> None:
        if self.batch % self.gpus:
            raise ValueError(f"batch={self.batch} does not divide by gpus={self.gpus}; choose a multiple of it.")
        if self.micro_batch is not None and self.batch % (self.gpus * self.micro_batch):
            raise ValueError(
                f"batch={self.batch} does not divide by gpus x micro_batch = {self.gpus} x {self.micro_batch}; "
                f"choose a micro_batch that divides {self.batch // self.gpus}."
            )


@dataclass(frozen=True)
class Layout:
    """How a step's batch and the training state are spread over the ranks.

    Args:
        ranks: W.
        strategy: who keeps what.
        micro_batch: sequences in a forward pass.
        accumulation: forward passes in a step.
        seq: tokens in a sequence.
        bf16: whether the products are in bfloat16.
        checkpointing: whether blocks are run again in the backward pass.
        iteration_dtype: what Muon's "auto" comes to: fp16, but on a CPU fp32.
    """

    ranks: int
    strategy: str
    micro_batch: int
    accumulation: int
    seq: int
    bf16: bool
    checkpointing: bool
    iteration_dtype: str = "float16"

    @classmethod
    def of(cls, config: PlanConfig) -> Layout:
        """From the flags."""
        share = config.batch // config.gpus
        fitting = (n for n in range(min(share, _LARGEST_DEFAULT_MICRO_BATCH), 0, -1) if share % n == 0)
        micro = config.micro_batch or next(fitting)
        on_cpu = config.profile == MEASURE and not torch.cuda.is_available()
        return cls(
            ranks=config.gpus,
            strategy=config.strategy,
            micro_batch=micro,
            accumulation=share // micro,
            seq=config.seq,
            bf16=config.precision == "bf16",
            checkpointing=config.gradient_checkpointing,
            iteration_dtype="float32" if config.profile == "cpu" or on_cpu else "float16",
        )

    @property
    def tokens(self) -> int:
        """Of one rank in one step."""
        return self.micro_batch * self.accumulation * self.seq

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed keeps the weights."""
        return self.strategy.startswith("zero")

    @property
    def sharded(self) -> bool:
        """Whether a rank's base optimizer sees a part of each gradient alone."""
        return self.strategy in ("zero1", "zero2", "zero3", "fsdp2")

    @property
    def weight_bytes(self) -> int:
        """Of a parameter as the forward pass holds it, or as it is stored."""
        return 2 if self.deepspeed and self.bf16 else 4

    @property
    def sent_bytes(self) -> int:
        """Of a parameter or gradient on the wire: FSDP2 casts both in mixed precision, DDP under autocast neither."""
        return 2 if self.bf16 and self.strategy != "ddp" else 4

    def share(self, whole: int, *strategies: str) -> int:
        """A rank's part of ``whole`` if the strategy is one of those that cut it, rounded up."""
        return -(-whole // self.ranks) if self.strategy in strategies else whole

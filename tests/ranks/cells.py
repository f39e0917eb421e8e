"""One training run by Trainer, under each way to spread it over processes: the rows and columns, and what runs a cell.

Nothing of hf_soo but its public API is used here, so that the comparison of two versions can run it with either.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from tests.ranks.distributed import run_ranks

STEPS, RESUME_AT, ACCUMULATION, GLOBAL_BATCH, LENGTH, VOCABULARY = 6, 3, 2, 8, 12, 100
TOLERANCE = 1e-6  # fp32: weights of order 0.1 to 1, moved by about 6 x lr = 6e-3


@dataclass(frozen=True)
class Strategy:
    """How a run is spread: ``kind`` is "single", "ddp", "fsdp2" or "zero"; ``stage`` is ZeRO's.

    ``extra`` is more of DeepSpeed's config, or of FSDP2's.
    """

    name: str
    kind: str
    world: int
    stage: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def arguments(self, *, bf16: bool) -> dict[str, Any]:
        """TrainingArguments' fields that choose it."""
        if self.kind == "fsdp2":
            wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
            return {"fsdp": True, "fsdp_config": {"version": 2, **wrap, **self.extra}}
        if self.kind == "zero":
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                # without the threshold, so small a model's parameters would all stay whole
                "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            }
            return {"deepspeed": config | self.extra | ({"bf16": {"enabled": True}} if bf16 else {})}
        return {}


@dataclass(frozen=True)
class Method:
    """A column: what ``SecondOrderTrainingArguments`` is given."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


SINGLE = Strategy("single", "single", 1)
STRATEGIES = [
    Strategy("DDP x 2", "ddp", 2),
    Strategy("DDP x 4", "ddp", 4),
    Strategy("FSDP2 x 2", "fsdp2", 2),
    Strategy("FSDP2 x 4", "fsdp2", 4),
    *(Strategy(f"ZeRO-{stage} x 2", "zero", 2, stage) for stage in range(4)),
]

# In bf16 DeepSpeed has another optimizer class for ZeRO-1 with sums of gradients in fp32.
SUMS_IN_FP32 = Strategy("ZeRO-1 x 2, fp32 sums", "zero", 2, 1, {"data_types": {"grad_accum_dtype": "fp32"}})

# AdamW divides by |g| + ε: with ε = 1e-8 an entry whose gradient cancels to 1e-9 makes lr / 10 of a rounding.
EPSILON = "eps=1e-4"
# Periods that make a run of six steps see steps with an update and steps without.
PERIODS = "warmup_updates=2,update_period=2"
AROUND = {
    "slow_momentum": 0.9, "slow_weight": 1.0, "cautious": True, "ema_decay": 0.8, "lookahead": 0.5,
    "lookahead_decay": 0.9,
}  # fmt: skip
# Six iterations that converge, in fp32: five of Jordan's amplify a rounding where a singular value is tiny.
MUON = "rest_lr=1e-3,rest_eps=1e-4,ns_dtype=float32,ns_coefficients=polar_express,ns_steps=6"
OVER_MUON = {"base_optim": "muon", "base_optim_args": MUON}
METHODS = {
    method.name: method
    for method in (
        Method("mkor", {"optim": "mkor", "optim_args": PERIODS}),
        Method("mkor dense", {"optim": "mkor", "optim_args": f"{PERIODS},representation=dense"}),
        Method("mkor_h", {"optim": "mkor_h", "optim_args": f"{PERIODS},patience=1,min_steps=3,rate_fraction=100"}),
        Method("eva", {"optim": "eva"}),
        Method("eva_f", {"optim": "eva_f"}),
        Method("kfac_expand", {"optim": "kfac_expand", "optim_args": f"{PERIODS},inverse_period=4,damping=0.3"}),
        Method("if_shampoo", {"optim": "if_shampoo"}),
        # in fp32 the eigenvectors of small eigenvalues are rounding's, but for what ties and ε make of them
        Method("soap", {"optim": "soap", "optim_args": "inverse_period=2,ties=0.1,eps=5e-3"}),
        # the default rate of 0.01 leaves its curvature at 1, and the run an AdamW run, for so few steps
        Method("rf_rmsprop", {"optim": "rf_rmsprop", "optim_args": "factor_lr=0.5"}),
        Method("mkor over lamb", {"optim": "mkor", "optim_args": PERIODS, "base_optim": "lamb"}),
        # P has entries where the gradients, and so √v̂, are nearly 0: Adam's ε bounds what is made of their rounding
        Method(
            "all around lamb", {"optim": "mkor", "optim_args": PERIODS, "base_optim": "lamb", "base_optim_args": AROUND}
        ),
        Method(
            "mkor on momentum",
            {"optim": "mkor", "optim_args": f"{PERIODS},apply_to=momentum", "base_optim_args": "eps=1e-3"},
        ),
        Method(
            "mkor on lamb's momentum",
            {"optim": "mkor", "optim_args": f"{PERIODS},apply_to=momentum", "base_optim": "lamb"},
        ),
        Method(
            "eva on sgd's momentum",
            {"optim": "eva", "optim_args": "apply_to=momentum", "base_optim": "sgd", "base_optim_args": None},
        ),
        Method("muon", {"optim": "muon", "optim_args": MUON, "base_optim": None, "base_optim_args": None}),
        Method("mkor over muon", {"optim": "mkor", "optim_args": PERIODS, **OVER_MUON}),
        Method("foof over muon", {"optim": "foof", "optim_args": f"{PERIODS},inverse_period=4", **OVER_MUON}),
        Method("mkor on muon's momentum", {"optim": "mkor", "optim_args": f"{PERIODS},apply_to=momentum", **OVER_MUON}),
        Method("eva on muon's update", {"optim": "eva", "optim_args": "apply_to=update", **OVER_MUON}),
    )
}
# transformers' own AdamW, for which nothing here does anything: what Trainer and the strategies differ by alone
CONTROL = Method("adamw", {"optim": "adamw_torch", "base_optim": None, "base_optim_args": None, "adam_epsilon": 1e-4})

# Halves of each micro-batch of each rank tell how far b is to be trusted: another number of ranks has other halves.
BY_HALVES = Method("mkor by halves", {"optim": "mkor", "optim_args": f"{PERIODS},gate=true,exponent=0.25"})

# What is changed beside strategy and method. "resume" saves at step 3 and continues in a second Trainer.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "resume": {},
    "clip": {"max_grad_norm": 1.0},
    # With accumulation ZeRO-1 sums before it reduces and ZeRO-2 after, and in bf16 that shows without us as well.
    "bf16": {"bf16": True, "gradient_accumulation_steps": 1},
}

Cell = tuple[str, str]  # method, way
Result = Tensor | str  # final weights, or why the run was refused


class Sentences(Dataset[dict[str, Tensor]]):
    """Fixed random sequences with three masked words each, so that every micro-batch's mean has the same weight."""

    def __init__(self, *, other_on: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        size = STEPS * ACCUMULATION * GLOBAL_BATCH
        self.ids = torch.randint(5, VOCABULARY, (size, LENGTH), generator=generator)
        masked = torch.rand(size, LENGTH, generator=generator).argsort(1) < 3
        self.labels = torch.where(masked, self.ids, -100)
        if other_on is not None and other_on == int(os.environ["RANK"]):
            self.ids = self.ids.flip(0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[index],
            "attention_mask": torch.ones_like(self.ids[index]),
            "labels": self.labels[index],
            "next_sentence_label": torch.tensor(index % 2),
        }


def tiny_bert(**sizes: int) -> Any:
    """A model of these sizes, or of 2 layers of width 32."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    usual = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 32,
    }  # fmt: skip
    model = BertForPreTraining(BertConfig(**(usual | sizes), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    # The bias has two names, and FSDP2 refuses a parameter that two of its groups manage; the decoder keeps it.
    del model.cls.predictions._parameters["bias"]
    return model


SOME = ("mkor", "eva", "kfac_expand")
PLAIN: list[Cell] = [(method, "plain") for method in [*METHODS, CONTROL.name]]
BF16: list[Cell] = [(method, "bf16") for method in (*SOME, CONTROL.name)]
OTHER_WAYS: list[Cell] = [
    *(("mkor", way) for way in ("checkpointing", "resume", "clip")),
    *(("eva", way) for way in ("reentrant", "clip", "compile")),  # it collects on both sides in every step
    *(("kfac_expand", way) for way in ("checkpointing", "resume")),
    ("mkor on momentum", "clip"),
    ("mkor on lamb's momentum", "resume"),
    ("all around lamb", "resume"),
    ("muon", "resume"),
]


FEW = ("mkor", "eva", "kfac_expand", "muon", "mkor over muon", "foof over muon", CONTROL.name)
# What differs from the columns before by what it does to pieces, wherever they lie: a row for each kind of pieces.
OF_PIECES = ("mkor on muon's momentum", "eva on muon's update", "all around lamb")


def cells_of(strategy: Strategy) -> list[Cell]:
    """The four ranks differ from the two by their number alone, ZeRO-1 from ZeRO-2 by when gradients are reduced."""
    if strategy.kind == "fsdp2" and strategy.world == 4:
        return [cell for cell in PLAIN if cell[0] in FEW]
    every = PLAIN if strategy.world == 4 else PLAIN + OTHER_WAYS
    if strategy.world == 4 or strategy.stage in (0, 1):  # and a compiler takes as long as all the rest
        return [cell for cell in every if cell[0] not in OF_PIECES and cell[1] != "compile"]
    return every


# ------------------------------------------------------------------------------------------------ inside a process


def forget(strategy: Strategy) -> None:
    """Put aside what accelerate, DeepSpeed and transformers remember of the run before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if strategy.kind != "zero":  # accelerate has no DeepSpeed with this variable, and the arguments say it too
        os.environ["ACCELERATE_USE_CPU"] = "true"


def stay_on_gloo() -> None:
    """DeepSpeed would compile kernels for shared memory first, whose names all runs on a machine share."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_trainer(strategy: Strategy, method: Method, way: str, folder: Path, data: Dataset[Any], **sizes: int) -> Any:
    from accelerate import DistributedType
    from accelerate.state import PartialState

    from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments

    forget(strategy)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": GLOBAL_BATCH // strategy.world,
        "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-3, "weight_decay": 0.01,
        "lr_scheduler_type": "constant", "base_optim": "adamw", "base_optim_args": EPSILON, "max_grad_norm": 0.0,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    settings |= method.settings | WAYS[way]
    if way == "resume":
        settings |= {"save_strategy": "steps", "save_steps": RESUME_AT}
    spread = strategy.arguments(bf16=way == "bf16")
    args = SecondOrderTrainingArguments(**settings, **spread)
    if strategy.kind == "fsdp2":
        # accelerate has a list of distributed types that may use FSDP, and the CPU's is not on it
        assert PartialState().distributed_type == DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return SecondOrderTrainer(model=tiny_bert(**sizes), args=args, train_dataset=data)


def run_cell(strategy: Strategy, method: Method, way: str, folder: Path, data: Dataset[Any]) -> Result:
    """One run; its final weights, or the words of a refusal."""
    try:
        try:
            trainer = make_trainer(strategy, method, way, folder, data)
        except ValueError as error:  # in a comparison, a setting that the older version does not know
            return f"ValueError: {error}"
        trainer.train()
        if way == "resume":
            trainer = make_trainer(strategy, method, way, folder, data)
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{RESUME_AT}"))
    except NotImplementedError as refusal:
        return str(refusal)
    assert trainer.state.global_step == STEPS
    assert_spread(strategy, trainer)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (graphs > 0) == (way == "compile"), f"{graphs} compiled graphs"
    if method.name == "mkor_h":
        assert trainer.second_order.switched, "the switch is what this column is about"
    return whole_weights(trainer)


def assert_spread(strategy: Strategy, trainer: Any) -> None:
    """The run was what the strategy's name says: accelerate falls back to something else without a word."""
    assert trainer.args.world_size == strategy.world, (trainer.args.world_size, strategy)
    wrapped, model = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped), bare(trainer)
    kind, parameters = type(wrapped).__name__, list(model.parameters())
    sharded = [isinstance(parameter, DTensor) for parameter in parameters]
    if strategy.kind in ("single", "ddp"):
        assert not any(sharded)
        assert ("DistributedDataParallel" in kind) == (strategy.kind == "ddp"), kind
    elif strategy.kind == "fsdp2":
        assert all(sharded) and all(p.device_mesh.size() == strategy.world for p in parameters), kind
    else:
        assert kind == "DeepSpeedEngine" and wrapped.zero_optimization_stage() == strategy.stage, kind
        assert wrapped.world_size == strategy.world and not any(sharded)
        if strategy.stage == 3:
            assert all(p.shape == (0,) and p.ds_tensor.numel() * strategy.world >= p.ds_numel for p in parameters)
        if strategy.stage in (1, 2):
            zero = wrapped.optimizer
            name = "fp32_groups_flat_partition" if strategy.extra else "single_partition_of_fp32_groups"
            own = sum(group.numel() for group in getattr(zero, name))
            assert own < 0.6 * sum(p.numel() for p in parameters), "the optimizer's share is not a share"


def bare(trainer: Any) -> nn.Module:
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model


def whole_weights(trainer: Any) -> Tensor:
    """All parameters, whole, in fp32, in the order of their names."""
    named = sorted(bare(trainer).named_parameters())
    if not hasattr(named[0][1], "ds_id"):
        return flat([p.full_tensor() if isinstance(p, DTensor) else p for _, p in named])
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for _, p in named]):
        return flat([p for _, p in named])


def flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in parameters])


def run_cells(
    rank: int, world: int, strategy: Strategy, cells: Sequence[Cell], folder: str, other_on: int | None
) -> dict[Cell, Result]:
    """On one rank: every cell, one after the other."""
    assert strategy.world == world
    if strategy.kind == "zero":
        stay_on_gloo()
    data = Sentences(other_on=other_on)
    methods = METHODS | {method.name: method for method in (CONTROL, BY_HALVES)}
    results: dict[Cell, Result] = {}
    for method, way in cells:
        place = Path(folder) / re.sub(r"\W", "_", f"{method} {way}")
        results[method, way] = run_cell(strategy, methods[method], way, place, data)
    forget(SINGLE)
    return results


# ------------------------------------------------------------------------------------------------- from outside


def run(strategy: Strategy, cells: Sequence[Cell], *, other_on: int | None = None) -> dict[Cell, Result]:
    """Every cell under one strategy, in one set of processes.

    Args:
        strategy: the row.
        cells: methods and ways.
        other_on: a rank that is given other data than it should have.

    Raises:
        AssertionError: the ranks ended with different weights, or only some refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        if strategy.kind == "single":
            return run_cells(0, 1, strategy, cells, folder, other_on)
        first, *others = run_ranks(strategy.world, run_cells, strategy, cells, folder, other_on)
    for cell, result in first.items():
        for other in others:
            assert same(other[cell], result), f"{strategy.name}, {cell}: the ranks differ"
    return first


def same(one: Result, other: Result) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other if isinstance(one, str) and isinstance(other, str) else False
    return torch.equal(one, other)

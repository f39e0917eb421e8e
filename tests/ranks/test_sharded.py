"""Settings and ways around the sharded code that would change a result, or lose the factors, without a word."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_soo
from hf_soo.optimizers.bases import check_flat
from tests.ranks.distributed import run_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)) for _ in range(steps)]


def build(model: nn.Module, base: str = "adamw") -> hf_soo.PreconditionedOptimizer:
    return hf_soo.build_optimizer("mkor", model, lr=1e-2, base=base, weight_decay=0.0)


def engine_of(optimizer: torch.optim.Optimizer, model: nn.Module, **extra: Any) -> Any:
    import deepspeed

    from tests.ranks.cells import stay_on_gloo

    stay_on_gloo()
    config = {
        "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config | extra)
    return engine


# ---- the clip of a DeepSpeed config that does not name one ----


def clip_of_trainers(rank: int, world: int, folder: str) -> dict[float, float]:
    """max_grad_norm -> what the engine clips at, with a config without "gradient_clipping"."""
    from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments
    from tests.ranks.cells import Sentences, Strategy, forget, stay_on_gloo, tiny_bert

    stay_on_gloo()
    clips = {}
    for norm in (0.0, 0.25):
        forget(Strategy("ZeRO-2 x 1", "zero", 1, 2))
        args = SecondOrderTrainingArguments(
            output_dir=folder, max_steps=1, optim="mkor", base_optim="adamw", max_grad_norm=norm, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
            deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}},
        )  # fmt: skip
        trainer = SecondOrderTrainer(model=tiny_bert(), args=args, train_dataset=Sentences())
        trainer.train()
        assert trainer.model_wrapped.optimizer.clip_grad == 0.0, "DeepSpeed must not clip what is preconditioned"
        clips[norm] = trainer.model_wrapped.optimizer._hf_soo_step.clip
    return clips


def test_trainer_clips_at_its_own_norm_under_deepspeed(tmp_path: Path) -> None:
    assert run_ranks(1, clip_of_trainers, str(tmp_path)) == [{0.0: 0.0, 0.25: 0.25}]


def clip_warnings(rank: int, world: int) -> list[list[str]]:
    from hf_soo.integrations.deepspeed import attach

    said: list[list[str]] = []
    logger = logging.getLogger("hf_soo.integrations.deepspeed")
    handler = logging.Handler()
    handler.emit = lambda record: said[-1].append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for extra in ({}, {"gradient_clipping": 1.0}, {"gradient_clipping": 0.0}):
        said.append([])
        model = Net()
        optimizer = build(model)
        attach(engine_of(optimizer, model, **extra), optimizer)
    return said


def test_attach_warns_of_a_clip_nobody_asked_for() -> None:
    ((silent_config, clip, no_clip),) = run_ranks(1, clip_warnings)
    assert len(silent_config) == 1 and "at a norm of 1.0" in silent_config[0]
    assert clip == [] and no_clip == []


# ---- what ZeRO would do wrong without a word ----


def sampled_refusals(rank: int, world: int) -> list[str]:
    from hf_soo.integrations.deepspeed import attach

    said = []
    for stage in (0, 2):
        model = Net()
        optimizer = hf_soo.build_optimizer("kfac_expand", model, lr=1e-2, fisher="mc")
        engine = engine_of(optimizer, model, zero_optimization={"stage": stage})
        with pytest.raises(NotImplementedError) as refusal:
            attach(engine, optimizer)
        said.append(str(refusal.value))
    return said


def test_a_sampled_fisher_is_refused_under_deepspeed() -> None:
    ((zero_0, zero_2),) = run_ranks(1, sampled_refusals)
    assert zero_0 == zero_2 and "fisher='mc' under DeepSpeed" in zero_0


def refusals(rank: int, world: int) -> dict[str, str]:
    from hf_soo.integrations.deepspeed import attach

    said = {}
    scaled = None
    for case in ("round robin", "base", "base of stage 0", "autocast"):
        model = Net()
        optimizer = build(model)
        handed = optimizer.base if case.startswith("base") else optimizer
        zero = {"stage": 0 if case == "base of stage 0" else 2, "round_robin_gradients": case == "round robin"}
        engine = engine_of(handed, model, zero_optimization=zero)
        if case == "autocast":  # DeepSpeed makes one for float16 alone, which wants a GPU
            scaled = engine.optimizer.torch_autocast_gradscaler = torch.amp.GradScaler("cpu")
        try:
            attach(engine, optimizer)
        except (NotImplementedError, ValueError) as refusal:
            said[case] = str(refusal)
    assert scaled is not None
    return said


def test_set_ups_that_go_wrong_silently_are_refused() -> None:
    (said,) = run_ranks(1, refusals)
    assert "round_robin_gradients" in said["round robin"]
    assert "steps a AdamW, not this mkor" in said["base"] and said["base of stage 0"] == said["base"]
    assert "torch_autocast" in said["autocast"]


# ---- a plain loop over FSDP2 ----


def shard(model: nn.Module, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for module in model.children():
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    for x, y in data:
        optimizer.zero_grad()
        (model(x[rank * 4 :][:4]) - y[rank * 4 :][:4]).square().mean().backward()
        optimizer.step()
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])


def resumed(rank: int, world: int) -> dict[str, Any]:
    """Six steps, and three and three with torch's own way to save in between."""
    data, models = batches(6), [Net(), Net()]
    for model in models:
        shard(model, world)
    first, second = (build(model) for model in models)
    train(models[0], first, rank, data[:3])
    first.carries_state = second.carries_state = False
    with first.base_alone():
        base = copy.deepcopy(get_optimizer_state_dict(models[0], first))  # torch hands out the tensors themselves
    models[1].load_state_dict(models[0].state_dict())
    with second.base_alone():
        set_optimizer_state_dict(models[1], second, base)
    second.load_second_order_state(first.second_order_state())
    steps = second.steps
    second.carries_state = True
    try:
        set_optimizer_state_dict(models[1], second, copy.deepcopy(base))
        said = ""
    except ValueError as error:
        said = str(error)
    one, other = (train(m, o, rank, data[3:]) for m, o in zip(models, (first, second), strict=True))
    return {"steps": steps, "same": torch.equal(one, other), "said": said}


def test_torch_s_way_to_save_a_sharded_optimizer() -> None:
    for rank in run_ranks(2, resumed):
        assert rank["steps"] == 3 and rank["same"]
        assert "keeps the base's state alone" in rank["said"]


# ---- checkpoints that cannot go on elsewhere ----


def written_under_zero(tmp_path: Path, missing: str, added: str) -> str:
    """What resuming says of a single process's checkpoint that is made to look like ZeRO's."""
    from hf_soo.integrations.checkpoints import write_manifest
    from tests.ranks.cells import METHODS, RESUME_AT, SINGLE, Sentences, forget, make_trainer

    data = Sentences()
    make_trainer(SINGLE, METHODS["mkor"], "resume", tmp_path, data).train()
    checkpoint = tmp_path / f"checkpoint-{RESUME_AT}"
    if missing:
        (checkpoint / missing).unlink()
    if added:
        (checkpoint / added).write_bytes(b"")
    write_manifest(checkpoint, "zero2 x 2", RESUME_AT, hashed=True)
    trainer = make_trainer(SINGLE, METHODS["mkor"], "resume", tmp_path, data)
    with pytest.raises(ValueError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    forget(SINGLE)
    return str(caught.value)


@pytest.mark.parametrize(
    ("missing", "added", "words"),
    [("scheduler.pt", "", "'scheduler' block"), ("model.safetensors", "adapter_model.safetensors", "PEFT adapter")],
)
def test_a_checkpoint_without_whole_parts_says_what_to_do(missing: str, added: str, words: str, tmp_path: Path) -> None:
    assert words in written_under_zero(tmp_path, missing, added)


class ShortSteps(torch.optim.SGD):
    """Looks at the norms of whole parameters, as LARS does."""


def test_a_subclass_of_an_elementwise_base_is_unknown() -> None:
    check_flat(torch.optim.SGD, "ZeRO stage 2")
    with pytest.raises(NotImplementedError, match="base ShortSteps under ZeRO stage 2"):
        check_flat(ShortSteps, "ZeRO stage 2")

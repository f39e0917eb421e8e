"""The dry run of hf-soo plan: 64 made-up ranks, and the bytes that a rank really asks for beside those planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from hf_soo import cli
from hf_soo.bench.step_kinds import Kind
from hf_soo.engine.selection import select_layers
from hf_soo.plan.command import _compared, _dry_run
from hf_soo.plan.dry_run import _fake_ranks, _MessageCounter, _run_passes, _wrap
from hf_soo.plan.messages import messages, sent
from hf_soo.plan.method_on_model import asked_methods
from hf_soo.plan.model_shape import ModelShape, build_model
from hf_soo.plan.request import Layout, PlanConfig

LARGE, TINY = "bert-large-uncased", "bert-tiny"


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: build_model(name, 128) for name in (LARGE, TINY)}


def counted(models: dict[str, nn.Module], model: str, **flags: Any) -> dict[str, Any]:
    config = PlanConfig(model=model, gpus=64, batch=64, seq=128, beside="", **flags)
    method, *_ = asked_methods(config, models[model])
    return _dry_run(method, ModelShape.of(models[model]), Layout.of(config), model)


CASES = [  # bases with one kernel for all tensors, but for LAMB alone: its step is many operations, each a fake one
    # method, base, settings -> kinds of message in its steps, and of the memory that is not the base's
    ("mkor", "adamw", None, {"gradients", "statistics"}, {"factors", "capture"}),
    ("eva", "sgd", None, {"gradients", "statistics"}, {"factors", "capture"}),
    ("lamb", None, None, {"gradients"}, set()),
    ("kaisa", "sgd", "grad_workers=1", {"gradients", "statistics", "directions"}, {"factors", "capture_transient"}),
    (
        "kaisa", "sgd", "grad_workers=8", {"gradients", "statistics", "inverses", "directions"},
        {"factors", "capture_transient"},
    ),
    ("kaisa", "sgd", "grad_workers=64", {"gradients", "statistics", "inverses"}, {"factors", "capture_transient"}),
]  # fmt: skip


@pytest.mark.parametrize(("optim", "base", "optim_args", "kinds", "memory"), CASES)
def test_the_plan_is_what_64_ranks_of_bert_large_ask_for(
    optim: str,
    base: str | None,
    optim_args: str | None,
    kinds: set[str],
    memory: set[str],
    models: dict[str, nn.Module],
) -> None:
    dry = counted(models, LARGE, optim=optim, base=base, optim_args=optim_args)
    assert {row["kind"] for step in dry["steps"] for row in step["bytes"]} == kinds
    assert {row["kind"] for row in dry["memory"]} == {"parameters", "gradients", "base_state"} | memory
    for rows in (dry["memory"], *(step["bytes"] for step in dry["steps"])):
        for row in rows:
            assert row["planned"] == pytest.approx(row["counted"], rel=0.05), row
    # The plan counts the same tensors; only LAMB's step counters are left out.
    assert dry["largest_difference"] < 1e-4
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("mkor_h", None),
        ("mkor", "representation=dense"),
        ("mkor", "exponent=0.25,gate=true"),
        ("eva_f", None),
        ("eva_s", None),
        ("foof", "grad_workers=4,input_blocks=4"),
        ("kfac_reduce", "grad_workers=2"),
        ("shampoo", None),
        ("soap", None),
        ("if_shampoo", None),
        ("adamw", None),
        ("muon", None),
    ],
)
def test_other_methods_on_bert_tiny(optim: str, optim_args: str | None, models: dict[str, nn.Module]) -> None:
    dry = counted(models, TINY, optim=optim, optim_args=optim_args)
    assert dry["largest_difference"] < 0.05, dry


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    ("model", "optim", "base"),
    [
        (LARGE, "mkor", "lamb"),
        (LARGE, "eva_f", "adamw"),
        (TINY, "eva", "lamb"),
        (TINY, "mkor", "muon"),
        (TINY, "eva_s", None),
        (TINY, "rf_rmsprop", None),
        (TINY, "foof", None),
        (TINY, "mkor_h", "adamw"),
        (TINY, "kfac_expand", "adamw"),
        (TINY, "if_shampoo", None),
    ],
)
def test_row_shards_on_64_ranks(model: str, optim: str, base: str | None, models: dict[str, nn.Module]) -> None:
    dry = counted(models, model, optim=optim, base=base, strategy="fsdp2")
    assert dry["largest_difference"] < 0.05, dry
    for step in dry["steps"]:
        sent = {row["kind"]: row["counted"] for row in step["bytes"]}
        gathered = sum(4 * n * m for n, m in (layer.shape for layer in select_layers(models[model]).layers))
        if model == LARGE:  # what a gather of the preconditioned gradients would be: a tenth at most
            assert sent["shards"] <= gathered / 10, (sent, gathered)


def test_kfac_counts_the_rank_with_the_most_factors(models: dict[str, nn.Module]) -> None:
    dry = counted(models, TINY, optim="kaisa", optim_args="grad_workers=2")
    method, *_ = asked_methods(PlanConfig(optim="kaisa", optim_args="grad_workers=2", gpus=64, batch=64), models[TINY])
    sizes = {
        rank: sum(t.nbytes for s in states for f in s.values() for t in f.values())
        for rank, states in method.states(64)
    }
    (row,) = (row for row in dry["memory"] if row["kind"] == "factors")
    assert row["counted"] == max(sizes.values()) == sizes[dry["rank"]]
    assert min(sizes.values()) < max(sizes.values())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module", "ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_fsdp2_gathers_and_scatters_what_is_planned(
    precision: str, gradient_checkpointing: bool, models: dict[str, nn.Module]
) -> None:
    config = PlanConfig(
        model=TINY, optim="adamw", gpus=64, batch=64, seq=128, strategy="fsdp2", precision=precision, beside="",
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    layout, shape = Layout.of(config), ModelShape.of(models[TINY])
    with _fake_ranks(64, 0):
        mesh = init_device_mesh("cpu", (64,))
        counter = _MessageCounter()
        with FakeTensorMode(), counter:
            bare = build_model(TINY, 128)
            if gradient_checkpointing:
                bare.gradient_checkpointing_enable()
            _run_passes(_wrap(bare, layout, mesh), layout)
    method, *_ = asked_methods(config, models[TINY])
    planned = sent(messages(method, shape, layout), Kind(False, False))
    assert {k: b for k, b in planned.items() if b} == counter.take()


def test_bytes_of_half_precision_and_of_micro_batches(models: dict[str, nn.Module]) -> None:
    """DDP under autocast sends fp32; a dry run takes one micro-batch, whatever the plan accumulates."""
    config = PlanConfig(model=TINY, gpus=8, batch=64, micro_batch=2, seq=128, precision="bf16", beside="")
    method, *_ = asked_methods(config, models[TINY])
    layout, shape = Layout.of(config), ModelShape.of(models[TINY])
    assert layout.accumulation == 4
    dry = _dry_run(method, shape, layout, TINY)
    assert dry["largest_difference"] < 1e-4
    (row,) = (row for row in dry["steps"][0]["bytes"] if row["kind"] == "gradients")
    assert row["counted"] == 4 * shape.count
    fsdp = dataclasses.replace(layout, strategy="fsdp2")
    once, three = (sent(messages(method, shape, fsdp), Kind(False, False), n) for n in (1, 3))
    assert three["parameters"] == 3 * once["parameters"]
    assert three["gradients"] == once["gradients"]


@pytest.mark.filterwarnings("ignore:`torch.distributed._functional_collectives:FutureWarning")
def test_every_form_of_a_collective_is_counted_whole() -> None:
    """DTensor's functional forms have no result yet when they are seen; what is not known is no silent zero."""
    with _fake_ranks(4, 1):
        counter = _MessageCounter()
        with FakeTensorMode(), counter:
            tensor = torch.zeros(10)
            with counter.labelled("gathered"):
                dist.all_gather([torch.zeros(10) for _ in range(4)], tensor)
                funcol.all_gather_tensor(tensor, 0, dist.group.WORLD).sum()
            with counter.labelled("reduced"):
                dist.reduce(tensor, dst=2)
                funcol.all_reduce(tensor, "sum", dist.group.WORLD).sum()
                funcol.reduce_scatter_tensor(torch.zeros(40), "sum", 0, dist.group.WORLD).sum()
            with counter.labelled("dealt"):
                dist.all_to_all_single(torch.zeros(9), torch.zeros(4), [2, 3, 1, 3], [4, 0, 0, 0])
            dist.barrier()
            with pytest.raises(NotImplementedError, match=r"c10d\.scatter_ is a collective that is not counted"):
                dist.scatter(tensor, src=0)
    assert counter.take() == {"gathered": 2 * 160, "reduced": 40 + 40 + 160, "dealt": 16}


def test_differences_are_seen() -> None:
    rows = _compared({"gradients": 100, "unplanned": 7}, {"gradients": 90, "inverses": 0, "shards": 5})
    assert [(r["kind"], r["difference"]) for r in rows] == [("gradients", 0.1), ("shards", 1.0), ("unplanned", 1.0)]


def test_the_command_says_whether_they_agree(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "bert-tiny", "--gpus", "4", "--batch", "8", "--seq", "64", "--beside", ""]
    assert cli.main(["plan", *flags, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "Dry run of mkor+lamb, rank 0, one micro-batch: bytes planned and counted" in text
    assert text.endswith("Plan and count agree: the largest difference is 0.00% (5% allowed).\n")
    (row,) = (line for line in text.splitlines() if line.startswith("  update step: statistics"))
    planned, real, difference = row.split()[-3:]
    assert planned == real
    assert difference == "0.00%"


def test_a_running_process_group_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert cli.main(["plan", "--model", "bert-tiny", "--gpus", "4", "--batch", "8", "--dry-run"]) == 1
        assert "a process group is running in this process" in capsys.readouterr().err
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()

"""Muon in the plan: its messages to the byte, the ranks' work, and what its settings change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_soo.plan.command import _dry_run
from hf_soo.plan.messages import messages
from hf_soo.plan.method_on_model import asked_methods
from hf_soo.plan.model_shape import ModelShape, build_model
from hf_soo.plan.owners import Share, shares_of_muon
from hf_soo.plan.request import Layout, PlanConfig

RANKS, TINY = 3, "bert-tiny"  # the matrices' rows do not divide by three


def planned(**flags: Any) -> tuple[list[Share], ModelShape]:
    settings = {"optim": "muon", "gpus": RANKS, "batch": 3 * RANKS, "seq": 16, "beside": "", **flags}
    config = PlanConfig(model=TINY, **settings)
    with torch.device("meta"):
        model = build_model(TINY, 16)
    (method,), shape, layout = asked_methods(config, model), ModelShape.of(model), Layout.of(config)
    shares = shares_of_muon(method, shape, layout)
    sent = [each.bytes for each in messages(method, shape, layout) if each.kind == "base"]
    most = [max(getattr(share, part) for share in shares) for part in ("to_owners", "back")]
    assert sent == [bytes_ for bytes_ in most if bytes_]
    return shares, shape


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("settings", ["", "ns_dtype=float32,ns_steps=6", "row_beta=0.95", "share=false"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_plan_is_what_a_rank_asks_for(strategy: str, settings: str) -> None:
    config = PlanConfig(
        model=TINY, optim="muon", optim_args=settings or None, gpus=RANKS, batch=RANKS, seq=16, strategy=strategy,  # type: ignore[arg-type]
        beside="",
    )  # fmt: skip
    with torch.device("meta"):
        model = build_model(TINY, 16)
    (method,) = asked_methods(config, model)
    dry = _dry_run(method, ModelShape.of(model), Layout.of(config), TINY)
    rows = {row["kind"]: row for row in dry["steps"][0]["bytes"]}
    if strategy == "ddp" and "share" in settings:
        assert "base" not in rows
    else:
        assert rows["base"]["planned"] == rows["base"]["counted"] > 0


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"])
def test_every_matrix_goes_to_one_rank_and_comes_back_whole(strategy: str) -> None:
    shares, shape = planned(strategy=strategy, optim_args="ns_dtype=float32")
    whole = 4 * sum(math.prod(matrix) for matrix in shape.matrices)
    sharded = strategy not in ("ddp", "zero0")
    sent = sum(share.to_owners for share in shares)
    # a slice of all matrices (ZeRO-1, 2) may hold some whole, which its rank need not send if it owns them
    assert (0 < sent <= whole) if strategy in ("zero1", "zero2") else sent == (whole if sharded else 0)
    assert sum(share.back for share in shares) == (whole if sharded else RANKS * whole)
    most, least = max(share.flops for share in shares), min(share.flops for share in shares)
    assert most < 1.5 * least  # twelve matrices over three ranks


def test_half_precision_sends_half_and_a_rank_alone_nothing() -> None:
    single, half = (planned(optim_args=f"ns_dtype={dtype}")[0] for dtype in ("float32", "float16"))
    assert [share.back for share in single] == [2 * share.back for share in half]
    assert [share.back for share in planned()[0]] == [share.back for share in half]  # a GPU's profile
    assert [share.back for share in planned(profile="cpu")[0]] == [share.back for share in single]
    alone, _ = planned(gpus=1)
    assert len(alone) == 1 and alone[0].flops == pytest.approx(sum(share.flops for share in half))

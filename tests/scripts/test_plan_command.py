"""The command hf-soo plan: its flags, its errors, its table and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, GPT2Config, MixtralConfig, ViTConfig

from hf_soo import cli
from hf_soo.plan import cost as plan_cost
from hf_soo.plan import model_shape as plan_model
from hf_soo.plan.cost import PROFILES, Profile, load_profile

SMALL = {"model": "bert-tiny", "gpus": "8", "batch": "64", "seq": "128"}


def arguments(flags: dict[str, str]) -> list[str]:
    """Of the command line; a flag without a value is a switch."""
    both = {**SMALL, **flags}
    return [part for name, value in both.items() for part in (f"--{name}", *([value] if value else ()))]


def planned(capsys: pytest.CaptureFixture[str], folder: Path, **flags: str) -> tuple[str, dict[str, Any]]:
    """What the command prints and writes."""
    file = folder / "plan.json"
    arguments = [
        part for name, value in {**SMALL, **flags}.items() for part in (f"--{name}", *([value] if value else ()))
    ]
    assert cli.main(["plan", *arguments, "--json", str(file)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out, json.loads(file.read_text())


def refused(capsys: pytest.CaptureFixture[str], **flags: str) -> str:
    """The one line of an error."""
    arguments = [
        part for name, value in {**SMALL, **flags}.items() for part in (f"--{name}", *([value] if value else ()))
    ]
    assert cli.main(["plan", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hf-soo: error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("hf-soo: error: ")


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, plan = planned(capsys, tmp_path, optim="mkor", base="lamb", optim_args="update_period=5")
    assert list(plan) == [
        "kind",
        "config",
        "versions",
        "commit",
        "parameters",
        "layout",
        "profile",
        "convention",
        "methods",
        "dry_run",
    ]
    assert [m["method"] for m in plan["methods"]] == ["mkor:update_period=5+lamb", "lamb", "kaisa+lamb", "eva+lamb"]
    first = plan["methods"][0]
    assert list(first) == [
        "method", "optimizer", "base", "settings", "layers", "cycle", "memory", "memory_held", "memory_peak",
        "messages", "bytes_per_step", "flops_per_step", "optimizer_traffic_bytes", "predicted_seconds",
    ]  # fmt: skip
    assert set(first["memory"]) == {
        "parameters", "gradients", "ddp_buckets", "master_weights", "base_state", "factors", "capture",
        "capture_transient", "gradient_copies", "gathered_parameters", "activations",
    }  # fmt: skip
    assert set(first["flops_per_step"]) == {"passes", "precondition", "statistics", "update", "inverse", "base"}
    assert set(first["predicted_seconds"]) == {
        "passes", "precondition", "inverse", "base", "communication", "step",
    }  # fmt: skip
    assert first["cycle"] == {"steps": 5, "updates": 1, "refreshes": 0}
    statistics = sum(m["bytes"] for m in first["messages"] if m["kind"] == "statistics")
    assert first["bytes_per_step"]["statistics"] == pytest.approx(statistics / 5)
    held = first["memory"]
    steady = sum(held[k] for k in ("parameters", "gradients", "ddp_buckets", "base_state", "factors", "capture"))
    assert first["memory_held"] == steady
    assert first["memory_peak"] == steady + held["activations"]
    assert plan["dry_run"] is None
    lines = text.splitlines()
    heads = ["mkor:update_period=5+lamb", "lamb", "kaisa+lamb", "eva+lamb"]
    assert [line.split()[-4:] for line in lines if line.endswith("eva+lamb")] == [heads] * 4
    assert "64 sequences of 128 tokens a step = 8 ranks x micro-batch 8 x 1 accumulated" in text
    assert "The seconds are a prediction, not a measurement: profile a100-80gb-4" in text
    assert "bytes of the message handed to a collective" in text
    (row,) = (line for line in lines if line.startswith("  base optimizer state"))
    assert [float(cell) for cell in row.split()[-4:]] == pytest.approx([8 * plan["parameters"] / 1e9] * 4, rel=1e-3)


FLIPS: dict[str, tuple[str, tuple[str, ...]]] = {  # flag -> another value, and where the plan must differ
    "model": ("bert-mini", ("parameters",)),
    "optim": ("eva_f", ("methods", "0", "bytes_per_step", "statistics")),
    "optim_args": ("history=16", ("methods", "0", "memory", "factors")),
    "base": ("sgd", ("methods", "0", "memory", "base_state")),
    "beside": ("lamb", ("methods",)),
    "gpus": ("4", ("methods", "0", "flops_per_step", "passes")),
    "strategy": ("zero1", ("methods", "0", "memory", "base_state")),
    "seq": ("64", ("methods", "0", "flops_per_step", "passes")),
    "batch": ("128", ("methods", "0", "flops_per_step", "passes")),
    "micro_batch": ("4", ("methods", "0", "memory", "activations")),
    "precision": ("bf16", ("methods", "0", "predicted_seconds", "passes")),
    "gradient_checkpointing": ("", ("methods", "0", "memory", "activations")),
    "profile": ("cpu", ("methods", "0", "predicted_seconds", "step")),
    "dry_run": ("", ("dry_run",)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("plan") / "plain.json"
    assert cli.main(["plan", *arguments({}), "--json", str(file)]) == 0
    made: dict[str, Any] = json.loads(file.read_text())
    return made


@pytest.mark.parametrize("flag", FLIPS)
def test_every_flag_counts(
    flag: str, plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, path = FLIPS[flag]
    _, plan = planned(capsys, tmp_path, **{flag: value})
    before: Any = plain
    after: Any = plan
    for key in path:
        before, after = (each[int(key) if key.isdigit() else key] for each in (before, after))
    assert before != after


def test_every_flag_is_flipped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    flags = {word.strip("[,") for word in capsys.readouterr().out.split() if word.startswith("--")}
    assert {flag.lstrip("-").rstrip("],").replace("-", "_") for flag in flags} - {"help", "json"} >= set(FLIPS)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"optim": "mkorr"}, "optim='mkorr' is unknown; use one of mkor, "),
        ({"optim_args": "histry=3"}, "'histry' is no setting of 'mkor'. Did you mean 'history'?"),
        ({"optim_args": "history"}, "optim_args='history': 'history' is no 'key=value'"),
        ({"optim": "lamb", "optim_args": "beta=3"}, "'beta' is no argument of 'lamb'. Did you mean 'betas'?"),
        ({"base": "adam"}, "base='adam' is not allowed; give one of 'lamb', "),
        ({"optim": "adamw", "base": "lamb"}, "base='lamb' has no effect with optim='adamw'; leave it out."),
        ({"beside": "kaizen"}, "optimizer 'kaizen' is unknown; use one of mkor, "),
        ({"beside": "eva+torch.optim:SGD"}, "base='torch.optim:SGD' of 'eva' is not known to the plan; use "),
        ({"strategy": "fsdp"}, "strategy='fsdp' is not allowed; give one of 'ddp', 'zero0', 'zero1', "),
        ({"precision": "fp16"}, "precision='fp16' is not allowed; give one of 'fp32', 'bf16'."),
        ({"gpus": "0"}, "gpus=0 is not allowed; give a whole number >= 1."),
        ({"seq": "0"}, "seq=0 is not allowed; give a whole number >= 1."),
        ({"batch": "0"}, "batch=0 is not allowed; give a whole number >= 1."),
        ({"batch": "63"}, "batch=63 does not divide by gpus=8; choose a multiple of it."),
        ({"micro_batch": "3"}, "batch=64 does not divide by gpus x micro_batch = 8 x 3; "),
        ({"micro_batch": "0"}, "micro_batch=0 is not allowed; give a whole number >= 1 or None."),
        ({"optim": "kaisa", "optim_args": "grad_workers=3"}, "grad_workers=3 does not divide the world size 8; "),
        ({"profile": "h100"}, "profile='h100' is no file; give one, or one of a100-80gb-4, cpu, measure."),
        ({"dry_run": "", "strategy": "zero2"}, "dry_run with strategy='zero2': DeepSpeed does not run on "),
        ({"dry_run": "", "gpus": "1"}, "dry_run with gpus=1: one rank sends nothing; "),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(
    flags: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, **flags).startswith(says)


def test_models_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a pretraining head if the architecture has one; long sequences and images are refused."""
    bert = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    bert.save_pretrained(tmp_path / "bert")
    GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100).save_pretrained(tmp_path / "gpt2")
    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "vit")
    text, _ = planned(capsys, tmp_path)
    folder, _ = planned(capsys, tmp_path, model=str(tmp_path / "bert"))
    assert folder.splitlines()[1:] == text.splitlines()[1:]  # bert-tiny by another name
    _, plan = planned(capsys, tmp_path, model=str(tmp_path / "gpt2"), optim="mkor")
    assert plan["methods"][0]["layers"] == 8  # two blocks of four Conv1D
    assert "takes 'pixel_values'" in refused(capsys, model=str(tmp_path / "vit"))
    too_long = refused(capsys, model=str(tmp_path / "bert"), seq="1024")
    assert "seq=1024 is longer than the 512 positions" in too_long


def test_experts_do_the_work_of_the_tokens_they_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token passes 2 of 8 experts: their products and statistics are a quarter of those of dense layers."""
    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    }  # fmt: skip
    plans, options = {}, {"optim": "kfac_expand", "beside": "sgd"}
    for each in (2, 8):
        MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=each).save_pretrained(tmp_path / str(each))
        _, plan = planned(capsys, tmp_path, model=str(tmp_path / str(each)), **options)
        plans[each] = plan["methods"][0]
    assert plans[2]["layers"] == plans[8]["layers"] == 4 + 1 + 2 * 8  # attention, router, experts
    tokens = plans[8]["flops_per_step"]["passes"] - plans[2]["flops_per_step"]["passes"]
    experts, per_step = 8 * 3 * 64 * 96, 6 * 64 / 8 * 128
    assert tokens == pytest.approx(per_step * 0.75 * experts, rel=1e-6)
    refusal = refused(capsys, model=str(tmp_path / "2"), dry_run="")
    assert "which expert a token goes to follows from values" in refusal
    monkeypatch.setattr(plan_model, "_PER_TOKEN", ("experts_of_a_token",))
    assert "has none of experts_of_a_token" in refused(capsys, model=str(tmp_path / "2"))


def test_a_model_that_is_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **settings: object) -> None:
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    (tmp_path / "empty").mkdir()
    assert "has no config.json of a known model" in refused(capsys, model=str(tmp_path / "empty"))
    monkeypatch.setattr(plan_model.AutoConfig, "from_pretrained", offline)
    says = "model='owner/name' cannot be read from the hub (We couldn't connect to the hub.); give a folder with a "
    assert refused(capsys, model="owner/name").startswith(says)


def test_long_sequences_of_a_named_bert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, short = planned(capsys, tmp_path, seq="512")
    _, long = planned(capsys, tmp_path, seq="1024")
    assert long["parameters"] - short["parameters"] == 512 * 128  # positions


def test_profiles(tmp_path: Path) -> None:
    values = {k: v for k, v in vars(PROFILES["cpu"]).items() if k not in ("name", "source")}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**values, "flops_fp32": 5e12}))
    read = load_profile(str(file))
    assert (read.flops_fp32, read.name, read.gpus_per_node) == (5e12, str(file), 64)
    file.write_text(json.dumps({**values, "memory_bandwidth": "3e9"}))  # YAML 1.1 reads 3e9 as a word
    assert load_profile(str(file)).memory_bandwidth == 3e9
    file.write_text(yaml.safe_dump({**values, "flop": 1}))
    with pytest.raises(ValueError, match="'flop' is no field of a profile"):
        load_profile(str(file))
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "latency"}))
    with pytest.raises(ValueError, match="lacks latency; give all of name, source, flops_bf16"):
        load_profile(str(file))
    file.write_text(yaml.safe_dump({**values, "latency": 0}))
    with pytest.raises(ValueError, match=r"latency=0 is not allowed; give a number in \(0, inf\)"):
        load_profile(str(file))
    file.write_text(yaml.safe_dump({**values, "gpus_per_node": 0}))
    with pytest.raises(ValueError, match="gpus_per_node=0 is not allowed"):
        load_profile(str(file))
    for text, says in (("[1]", "holds a list, not"), ("{", "mine.yaml: ")):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            load_profile(str(file))


def test_this_machine_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says two seconds for each call."""
    monkeypatch.setattr(plan_cost, "_seconds", lambda call, device: 2.0 if call() is not None else 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    profile = load_profile("measure")
    assert isinstance(profile, Profile)
    assert profile.flops_fp32 == profile.flops_bf16 == 2 * 1024**3 / 2
    assert profile.flops_factorisation == 1024**3 / 2
    assert profile.memory_bandwidth == 2 * 4 * 2**26 / 2
    assert profile.source.startswith("measured on ")


def test_an_absent_folder_for_the_json_is_made_and_a_file_in_its_place_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "file' is a file; give another folder." in refused(capsys, json=str(tmp_path / "file" / "plan.json"))
    arguments = [f"--{name}={value}" for name, value in SMALL.items() if value]
    assert cli.main(["plan", *arguments, "--json", str(tmp_path / "absent" / "plan.json")]) == 0
    assert json.loads((tmp_path / "absent" / "plan.json").read_text(encoding="utf-8"))

"""The examples do what their texts say, in small: they train, keep what they trained, and go on to the last bit."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_soo.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FILES = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "tiny.py")
HERE = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
SAVES = ["--save_strategy", "steps", "--save_steps", "3", "--max_steps", "6", "--logging_steps", "1"]
SIZE = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "8", "--eval_strategy", "no"]
SMALL = {
    "sft_lora": [*HERE, *SAVES, *SIZE, "--max_length", "64"],
    "sentence_embeddings": [*HERE, *SAVES, *SIZE],
    "stock_trainer": [*HERE, *SAVES, *SIZE],
    "accelerate_loop": ["--steps", "6", "--save_steps", "3", "--batch_size", "2"],
}
Run = Callable[..., float]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(example, flags) of each command line in a text that needs no model of the hub."""
    lines = re.findall(r"^ *(?:\$ )?python examples/(\w+)\.py ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    found = [(name, shlex.split(flags.replace("\\\n", " "))) for name, flags in lines]
    return [(name, flags) for name, flags in found if "--model_name_or_path" not in flags]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as a shell would from the repository, with an output folder of its own; its evaluation loss."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name: str, flags: list[str], folder: str = "out") -> float:
        given = [str(ROOT / word) if word.startswith("configs/") else word for word in flags]
        argv = [f"examples/{name}.py", *given, *SMALL[name], "--output_dir", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        (loss,) = re.findall(r"evaluation loss ([\d.]+)", capsys.readouterr().out)
        return float(loss)

    return run


def test_every_example_says_how_it_is_run() -> None:
    assert {path.stem for path in FILES} == set(SMALL)
    for path in FILES:
        assert commands(path.read_text(encoding="utf-8")), path


def test_the_guide_s_commands_are_those_that_run_here() -> None:
    """The first of the example's own text, and the same that goes on."""
    name, flags = commands((EXAMPLES / "sft_lora.py").read_text(encoding="utf-8"))[0]
    goes_on = (name, [*flags, "--resume_from_checkpoint", "out/sft_lora/checkpoint-50"])
    assert commands((ROOT / "docs" / "guides" / "lora.md").read_text(encoding="utf-8")) == [(name, flags), goes_on]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trains_and_goes_on(path: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle, and the weights are those of a run that nobody stopped."""
    name, flags = commands(path.read_text(encoding="utf-8"))[0]
    loss = run(name, flags)
    assert 0 < loss < 6  # 5.5 is ln 256, a guess among all bytes
    if name == "accelerate_loop":
        last, weights = "state-000006", "model.safetensors"
        resumed: list[str] = []
        (tmp_path / "out" / last).rename(tmp_path / "whole")  # the newest that is there is gone on from
    else:
        last, weights = "checkpoint-6", "adapter_model.safetensors" if name == "sft_lora" else "model.safetensors"
        resumed = ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-3")]
        (tmp_path / "out" / last).rename(tmp_path / "whole")
    assert run(name, [*flags, *resumed]) == loss
    assert sha256_of(tmp_path / "out" / last / weights) == sha256_of(tmp_path / "whole" / weights)


def test_adapters_are_put_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``output_dir`` holds is the adapters alone, of every linear layer but the decoder; AdamW by its recipe."""
    run("sft_lora", ["--config", "configs/lora/sft_lora_adamw.yaml", "--lora_r", "2"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(kept) == 2 * 7 * 2 and all(min(tensor.shape) == 2 for tensor in kept.values())
    llama = runpy.run_path(str(EXAMPLES / "tiny.py"))["llama"]
    back = PeftModel.from_pretrained(llama(seed=42), tmp_path / "out").state_dict()
    assert all(torch.equal(back[name.replace(".weight", ".default.weight")], tensor) for name, tensor in kept.items())


def test_a_model_and_a_text_of_ones_own(run: Run, tmp_path: Path) -> None:
    """A folder with a model over bytes, as ``hf-soo pretrain --task lm`` leaves it, and a file of text."""
    llama = runpy.run_path(str(EXAMPLES / "tiny.py"))["llama"]
    llama(seed=1).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text {i} of mine, of several words." for i in range(40)))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--source", str(tmp_path / "text.txt")]
    assert 0 < run("sft_lora", ["--config", "configs/lora/sft_lora_mkor.yaml", *flags]) < 6


def test_the_bytes_are_the_tokens() -> None:
    """As in ``hf-soo pretrain --task lm``: a token's number is its byte."""
    tokenizer = runpy.run_path(str(EXAMPLES / "tiny.py"))["byte_tokenizer"]()
    text = "An é, and\nanother line: ~%"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(range(32, 127))) == bytes(range(32, 127)).decode()

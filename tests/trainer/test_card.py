"""The model card: what transformers writes, and a section on the optimizer that nothing in it can break."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import Trainer
from transformers import trainer as trainer_module

import hf_soo
from hf_soo.integrations.card import _command
from hf_soo.integrations.trainer import SecondOrderTrainer
from tests.trainer.test_trainer import Examples, arguments, bert, run_trainer

FENCE = re.compile(r"^(`{3,})(\w+)\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return [(language, content) for _, language, content in FENCE.findall(text)]


def stock(trainer: Trainer) -> str:
    """The card that transformers writes by itself."""
    Trainer.create_model_card(trainer)
    return Path(str(trainer.args.output_dir), "README.md").read_text()


def written(trainer: Trainer) -> str:
    trainer.create_model_card()
    return Path(str(trainer.args.output_dir), "README.md").read_text()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> SecondOrderTrainer:
    settings = {"base_optim": "lamb", "optim_args": "update_period=3", "max_steps": 2, "eval_strategy": "steps"}
    settings |= {"lr_scheduler_type": "linear"}  # the stock card stumbles over ours
    folder = str(tmp_path_factory.mktemp("card") / "mine")
    made = SecondOrderTrainer(
        model=bert(), args=arguments(folder, eval_steps=1, **settings), train_dataset=Examples(),
        eval_dataset=Examples(8),
    )  # fmt: skip
    made.train()
    return made


def test_the_section_comes_after_what_transformers_writes(
    trainer: SecondOrderTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "train.py", "--config", "mine.yaml", "--optim", "mkor"])
    # the model has no name, which transformers takes for that of another
    nameless = "This model is a fine-tuned version of [](https://huggingface.co/) on"
    plain = ModelCard(stock(trainer).replace(nameless, "This model was trained from scratch on"))
    text = written(trainer)
    assert "This model was trained from scratch on an unknown dataset." in text
    card = ModelCard(text)
    said = {"optimizer": "mkor", "base": "lamb", "version": hf_soo.__version__}
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata.pop("hf_soo") == said and metadata["tags"].pop() == "hf_soo"
    assert metadata == yaml.safe_load(str(plain).split("---\n")[1])
    assert card.text.startswith(plain.text.rstrip())
    section = card.text.removeprefix(plain.text.rstrip())
    assert section.startswith("\n\n<!-- hf_soo -->\n## Optimizer\n") and section.endswith("\n<!-- /hf_soo -->\n")
    assert "- optimizer: `mkor`, MKOR, low-rank form (Mozaffari et al., NeurIPS 2023)\n- base: `lamb`\n" in section
    assert "- recipe: `mine.yaml`\n" in section and "- steps: `2`\n" in section
    (_, settings), command, (_, run) = blocks(section)
    assert command == ("bash", "python train.py --config mine.yaml --optim mkor")
    assert json.loads(settings)["optimizer"]["update_period"] == 3 and json.loads(settings)["base"]["lr"] == 0.01
    assert json.loads(settings)["base"]["weight_decay"] == {"groups": [0.01, 0.0]}
    assert json.loads(settings)["base"]["betas"] == [0.9, 0.999]
    found = json.loads(run)
    assert (found["optimizer"], found["base"], found["steps"], found["seed"]) == ("mkor", "lamb", 2, 42)
    assert found["config"]["optim_args"] == {"update_period": 3}
    assert found["config"]["lr_scheduler_type"] == "linear"
    assert [point["step"] for point in found["curve"]] == [1, 2]
    assert found["final"]["eval_loss"] == found["curve"][-1]["eval_loss"]
    assert f"With python {found['versions']['python']}, hf-soo {hf_soo.__version__}, torch " in section
    assert written(trainer) == text  # a second one replaces it


def test_settings_are_those_of_the_run_and_not_the_bases_own(tmp_path: Path) -> None:
    made = run_trainer(str(tmp_path), base_optim="lamb", weight_decay=0.0, lr_scheduler_type="linear", max_steps=1)
    (_, settings), *_ = blocks(written(made).partition("<!-- hf_soo -->")[2])
    assert json.loads(settings)["base"]["weight_decay"] == 0.0  # LAMB by itself decays


def test_a_run_with_an_optimizer_of_transformers_keeps_the_stock_card(tmp_path: Path) -> None:
    made = run_trainer(str(tmp_path), optim="adamw_torch", lr_scheduler_type="linear", max_steps=2)
    assert written(made) == stock(made)


def test_an_optimizer_that_is_handed_over_is_named(tmp_path: Path) -> None:
    model = bert()
    optimizer = hf_soo.build_optimizer("eva", model, lr=0.1)
    args = arguments(str(tmp_path), optim="adamw_torch", max_steps=2)
    made = SecondOrderTrainer(model=model, args=args, train_dataset=Examples(), optimizers=(optimizer, None))
    made.train()
    assert "- optimizer: `eva`, Eva, rank-1" in written(made)


def test_names_and_settings_cannot_break_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML, tables, code, comments and HTML, wherever a user's text goes."""
    wild = "a: 'b' | `c` ``` --- # <!-- /hf_soo --> </details> \"d\"\n```\n&"
    words = ["/usr/bin/python", "train.py", "--precondition_exclude", wild, "--config", wild]
    monkeypatch.setattr(sys, "orig_argv", words)
    made = run_trainer(str(tmp_path / "a: `b` | 'c' # d"), max_steps=2, precondition_exclude=[re.escape(wild)])
    made.state.log_history.append({"eval_loss": 1.5, "eval_`x` | <b>": 2.5, "step": 1, "epoch": 1.0})
    text = written(made)
    assert written(made) == text and "- lr_scheduler_type: poly_warmup\n" in text
    assert made.args.lr_scheduler_type == "poly_warmup"
    assert ModelCard(text).data["hf_soo"]["optimizer"] == "mkor"
    section = text[text.index("<!-- hf_soo -->") :]
    assert section.endswith("\n</details>\n<!-- /hf_soo -->\n")
    found = blocks(section)
    assert [language for language, _ in found] == ["json", "bash", "json"]
    assert json.loads(found[2][1])["config"]["precondition_exclude"] == [re.escape(wild)]
    assert "<" not in found[0][1] + found[2][1]
    rest = FENCE.sub("", section)
    (recipe,) = (line for line in rest.splitlines() if line.startswith("- recipe: "))
    assert recipe.startswith("- recipe: ```` a: 'b' | `c` ``` --- #") and recipe.endswith('"d" ``` & ````')
    assert "- `` eval_`x` | <b> ``: `2.5`\n" in rest


def test_a_command_shows_no_secret_and_no_path_of_the_machine() -> None:
    token = "hf_" + "aB3" * 12
    words = [
        "/v/bin/python", "/v/bin/hf-soo", "glue", "--data_dir", "/home/me/glue/", "--hub_token", "s3cret",
        "--wandb_api_key=s3cret", "--optim_args={\"rank\": 2}", f"--hub_model_id={token}", "--pad_to_max_length",
        "--output_dir=/home/me/out", token,
    ]  # fmt: skip
    assert _command(words) == [
        "hf-soo", "glue", "--data_dir", "glue", "--hub_token", "...", "--wandb_api_key=...",
        "--optim_args={\"rank\": 2}", "--hub_model_id=...", "--pad_to_max_length", "--output_dir=out", "...",
    ]  # fmt: skip
    assert _command(["python", "-m", "hf_soo.cli", "glue"]) == ["python", "-m", "hf_soo.cli", "glue"]
    assert _command(["python", "-m", "ipykernel_launcher", "-f", "/home/me/kernel.json"]) == []


class LocalHub:
    """What the Trainer asks of the hub, for a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path: str, repo_id: str, **_: Any) -> Any:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(is_done=lambda: True, result=lambda: None)


def test_what_is_pushed_has_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "hf_api", lambda: LocalHub(tmp_path / "hub"))
    made = run_trainer(str(tmp_path / "mine"), max_steps=2)
    made.push_to_hub()
    pushed = tmp_path / "hub" / "me" / "mine"
    assert "## Optimizer\n" in (pushed / "README.md").read_text() and (pushed / "model.safetensors").is_file()

"""Code that lies in a model's folder (``auto_map``) never runs, whatever is answered on standard input."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_soo.lm.data import _Tokens
from hf_soo.plan.model_shape import build_model
from hf_soo.runs.pretrained import PretrainedArguments, find_pretrained, load_weights

ROOT = Path(__file__).resolve().parents[2]
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
class Config(BertConfig):
    model_type = "foreign"
class Model(BertForSequenceClassification):
    config_class = Config
class Tokenizer(BertTokenizer):
    pass
"""
AUTO = {
    "AutoConfig": "foreign.Config",
    "AutoModel": "foreign.Model",
    "AutoModelForPreTraining": "foreign.Model",
    "AutoModelForSequenceClassification": "foreign.Model",
}


def test_every_load_says_so() -> None:
    """Of a configuration, a tokenizer, a model or an empty model, in the package and its scripts."""
    calls = [
        (f"{file.relative_to(ROOT)}:{node.lineno}", {k.arg: k.value for k in node.keywords})
        for folder in ("hf_soo", "scripts")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("from_pretrained", "from_config")
    ]
    said = {place: getattr(keywords.get("trust_remote_code"), "value", None) for place, keywords in calls}
    assert len(said) >= 7 and all(value is False for value in said.values()), said


def folder_with_code(folder: Path, kind: str) -> tuple[str, Path]:
    """A model whose configuration names code beside it; the code leaves a file behind when it runs."""
    marker = folder / "it_ran"
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO, "model_type": kind}))
    (folder / "model" / "foreign.py").write_text(CODE.format(marker=str(marker)))
    (folder / "model" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"])
    )
    tokenizer = {"auto_map": {"AutoTokenizer": ["foreign.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder / "model"), marker


def test_it_would_run_where_nobody_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, marker = folder_with_code(tmp_path, "foreign")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoConfig.from_pretrained(folder)
    assert marker.exists()


def find(folder: str) -> Any:
    return find_pretrained(PretrainedArguments(model_name_or_path=folder), 8, {BertConfig}, "classify")


LOADS: dict[str, Callable[[str], Any]] = {
    "configuration and tokenizer": find,
    "weights": lambda folder: load_weights(AutoModelForSequenceClassification, folder),
    "plan": lambda folder: build_model(folder, 8),
    "tokens": _Tokens,
}


@pytest.mark.parametrize("kind", ["foreign", "bert"])
@pytest.mark.parametrize("load", LOADS)
def test_yes_on_standard_input_runs_nothing(
    load: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = folder_with_code(tmp_path, kind)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    needed = kind == "foreign" or load in ("configuration and tokenizer", "tokens")  # transformers knows "bert" itself
    if needed:
        with pytest.raises(ValueError, match=re.escape(folder)):
            LOADS[load](folder)
    else:
        LOADS[load](folder)
    assert not marker.exists()

"""What the tests of other libraries' Trainers share: words, tiny random models, and a run that is cut and goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import hf_soo
from hf_soo.integrations.accelerate import unwrap_optimizer

WORDS = [
    "a", "the", "cat", "dog", "bird", "sleeps", "runs", "sings", "in", "on", "house", "tree", "rain", "sun", "is", "it",
    "dry", "wet", "good", "bad",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]

COMMON: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 5e-3,
    "weight_decay": 0.01, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "bf16": False,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "mkor": {"optim": "mkor", "base_optim": "adamw", "optim_args": "update_period=2,queries_and_keys=true"},
    "kfac": {"optim": "kfac_expand", "base_optim": "sgd", "optim_args": "update_period=2,inverse_period=2"},
}
"""Arguments of SecondOrderTrainingArguments: one method that keeps means, one that keeps factors."""
FACTORY: dict[str, Any] = {
    "lr": 5e-3,
    "weight_decay": 0.01,
    "base": "adamw",
    "update_period": 2,
    "queries_and_keys": True,
}
"""Arguments of optimizer_factory and of build_optimizer for mkor."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[EOS]", model_max_length=16,
    )  # fmt: skip


def sentence(index: int, length: int = 6) -> str:
    generator = torch.Generator().manual_seed(index)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=4,
            bos_token_id=2,
        )
    )  # fmt: skip


def bert_folder(folder: Path) -> str:
    """A saved encoder with its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def ours(trainer: Trainer) -> hf_soo.PreconditionedOptimizer:
    """The optimizer, whoever has wrapped it."""
    found = unwrap_optimizer(trainer.optimizer)
    assert found is not None
    return found


def tensors(*modules: Any) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t.detach().clone() for i, m in enumerate(modules) for name, t in m.state_dict().items()}


def assert_exact(make: Callable[[], Any], folder: Path, more: Callable[[Any], tuple[Any, ...]] = lambda _: ()) -> Any:
    """A run, and one that goes on from its middle, come to the same weights, losses and evaluations.

    Args:
        make: a fresh Trainer that writes into ``folder``.
        folder: its output_dir.
        more: further modules of a trainer that are trained.

    Returns:
        The Trainer of the whole run.
    """
    whole = make()
    before = tensors(whole.model, *more(whole))
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    first, second = (tensors(trainer.model, *more(trainer)) for trainer in (whole, resumed))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name in first if not torch.equal(first[name], before[name])] != []
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)]
    assert losses[0][3:] == losses[1][3:] and len(losses[0]) == 6
    scores = []
    for trainer in (whole, resumed):
        torch.manual_seed(0)  # some evaluate what they generate
        scores.append([value for key, value in trainer.evaluate().items() if key.endswith("loss")])
    assert scores[0] == scores[1] and scores[0] and all(math.isfinite(value) for value in scores[0])
    assert ours(whole).steps == ours(resumed).steps == 6
    return whole

"""What the examples take where you give them nothing: real text, a tokenizer over bytes, tiny models of random weights.

They show that a script runs, and how; what such a model learns says nothing of a pretrained one.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_soo.text.corpus import Corpus

WIDTH, LAYERS, POSITIONS = 64, 2, 512


def texts(source: str) -> tuple[list[str], list[str]]:
    """The documents of a source (Python's own help, or any file, folder or hub data set), and every 20th apart."""
    documents = list(Corpus(source).texts())
    held_out = documents[19::20] or documents[-1:]
    return [text for i, text in enumerate(documents) if i % 20 != 19], held_out


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, its number the byte's, as in ``hf-soo pretrain --task lm``; a new line ends a text."""
    character = {ord(each): each for each in pre_tokenizers.ByteLevel.alphabet() if ord(each) < 256}
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(character.values()))
    character |= dict(zip((byte for byte in range(256) if byte not in character), others, strict=True))
    tokenizer = Tokenizer(models.BPE({each: byte for byte, each in character.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = character[ord("\n")]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def windows(source: str, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list[dict[str, Tensor]], ...]:
    """Examples of ``length`` tokens, one after the other, to train on and to evaluate on; every token is a label."""

    def cut(documents: list[str]) -> list[dict[str, Tensor]]:
        ids = torch.tensor(tokenizer("\n".join(documents))["input_ids"])
        return [{"input_ids": each, "labels": each} for each in ids.split(length) if len(each) == length]

    train, held_out = texts(source)
    return cut(train), cut(held_out)


def llama(seed: int, symbols: int = 256) -> LlamaForCausalLM:
    """A decoder for so many symbols."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=symbols, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=POSITIONS, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert_config(symbols: int = 256) -> BertConfig:
    """An encoder's for so many symbols."""
    return BertConfig(
        vocab_size=symbols, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=POSITIONS,
    )  # fmt: skip

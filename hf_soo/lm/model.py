"""Small language models of transformers with random weights: decoders and encoders, with rotary or learnt positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerForCausalLM,
    RoFormerForMaskedLM,
    set_seed,
)

from hf_soo.engine.checks import Checked, Count, Share
from hf_soo.lm.data import TextArguments, TextData
from hf_soo.runs.arguments import option

_WITH_BIASES: dict[str, tuple[Any, Any, Any]] = {  # config, encoder, decoder
    "bert": (BertConfig, BertForMaskedLM, BertLMHeadModel),
    "roformer": (RoFormerConfig, RoFormerForMaskedLM, RoFormerForCausalLM),
}


@dataclass
class LanguageModelArguments(Checked):
    """Which model; `objective` says whether it is a decoder or an encoder.

    llama has a RMS norm before each part, rotary positions and no biases, bert a layer norm after each part, learnt
    positions and biases; roformer is bert with rotary positions (Su et al., arXiv 2104.09864).
    """

    _argument_group_name = "model"

    family: Literal["llama", "bert", "roformer"] | None = option(
        None, "Of models: llama (causal only), bert, roformer; None: llama if causal, bert if masked."
    )
    hidden_size: Count = option(128, "Width.")
    num_hidden_layers: Count = option(2, "Layers.")
    num_attention_heads: Count | None = option(None, "Heads; None: of 64, or one.")
    intermediate_size: Count | None = option(None, "Width of the MLP; None: 4 x hidden_size, gated: 8/3.")
    tie_word_embeddings: bool | None = option(None, "One matrix for input and output; None: in encoders alone.")
    dropout: Share = option(0.0, "Of hidden states and attention; not llama's.")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2; None: transformers chooses.")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is out of its range, or two do not fit each other.
        """
        super().__post_init__()
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} is no even number for each of num_attention_heads={self.heads}."
            )

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.num_attention_heads or max(1, self.hidden_size // 64)


def make_language_model(
    given: LanguageModelArguments, text: TextArguments, data: TextData, seed: int
) -> PreTrainedModel:
    """A new model for the symbols of a text.

    Args:
        given: its shape.
        text: says objective and window.
        data: says how many symbols there are.
        seed: of the initial weights.

    Raises:
        ValueError: dropout is asked of llama, which has none, or masking.
    """
    set_seed(seed)
    return shaped_model(given, text, data.symbols, data.mask)


def shaped_model(
    given: LanguageModelArguments, text: TextArguments, symbols: int, mask: int | None = None
) -> PreTrainedModel:
    """A model with the weights that it happens to have.

    Args:
        given: its shape.
        text: says objective and window.
        symbols: that there are, without the mask.
        mask: the symbol in place of what is predicted.

    Raises:
        ValueError: dropout is asked of llama, which has none, or masking.
    """
    shape: dict[str, Any] = {
        "hidden_size": given.hidden_size,
        "num_hidden_layers": given.num_hidden_layers,
        "num_attention_heads": given.heads,
        "max_position_embeddings": text.window,
        "attn_implementation": given.attn_implementation,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    causal = text.objective == "causal"
    family = given.family or ("llama" if causal else "bert")
    if family == "llama":
        if not causal:
            raise ValueError("family=llama with objective=masked: it is a decoder; allowed: bert, roformer.")
        if given.dropout:
            raise ValueError(f"dropout={given.dropout} with family=llama, which has none; leave it out.")
        wide = given.intermediate_size or -(-given.hidden_size * 8 // 3 // 8) * 8
        tied = bool(given.tie_word_embeddings)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=symbols, intermediate_size=wide, tie_word_embeddings=tied, **shape)
        )
    if family == "roformer":
        shape["embedding_size"] = given.hidden_size
    config, masked, decoder = _WITH_BIASES[family]
    model: PreTrainedModel = (decoder if causal else masked)(
        config(
            vocab_size=max(symbols, (mask or 0) + 1),
            intermediate_size=given.intermediate_size or 4 * given.hidden_size,
            tie_word_embeddings=not causal if given.tie_word_embeddings is None else given.tie_word_embeddings,
            hidden_dropout_prob=given.dropout,
            attention_probs_dropout_prob=given.dropout,
            type_vocab_size=1,
            is_decoder=causal,
            **shape,
        )
    )
    return model

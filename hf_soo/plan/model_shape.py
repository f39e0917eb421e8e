"""The model that a plan is about, on the meta device, and the numbers that follow from it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_PRETRAINING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    BertConfig,
    BertForPreTraining,
)

from hf_soo.bert.model import SIZES
from hf_soo.engine.passes.reads import read_layers
from hf_soo.registry import hidden_weights

BERTS = {  # the hub's names
    **{f"bert-{name}": SIZES[name] for name in ("tiny", "mini", "small", "medium")},
    **{f"bert-{name}-uncased": SIZES[name] for name in ("base", "large")},
}
LONGEST = 512  # BERT's positions
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")  # how configs call the experts that a token passes


def build_model(name: str, seq: int) -> nn.Module:
    """The model on the current default device (meta, for a plan), with its pretraining head if it has one.

    Args:
        name: of ``BERTS``; or a folder with config.json; or a name on the hub.
        seq: tokens in a sequence; a named BERT gets as many positions as that needs.

    Raises:
        ValueError: no such model, or it does not take so many tokens.
    """
    if name in BERTS:
        config = BertConfig(max_position_embeddings=max(LONGEST, seq), **BERTS[name])  # type: ignore[arg-type]
        bert: nn.Module = BertForPreTraining(config).train()
        return bert
    config = _read_config(name)
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(f"model={name!r} has no hidden_size; the plan is for transformers over tokens.")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq > positions:
        raise ValueError(f"seq={seq} is longer than the {positions} positions of {name!r}; give --seq {positions}.")
    has_head = type(config) in MODEL_FOR_PRETRAINING_MAPPING
    auto: Any = AutoModelForPreTraining if has_head else AutoModel
    model = auto.from_config(config, trust_remote_code=False)
    if model.main_input_name != "input_ids":
        raise ValueError(f"model={name!r} takes {model.main_input_name!r}; the plan is for transformers over tokens.")
    made: nn.Module = model.train()
    return made


def _read_config(name: str) -> Any:
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it warns of every attempt, and we say what came of them
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "has no config.json of a known model" if Path(name).is_dir() else "cannot be read from the hub"
        raise ValueError(
            f"model={name!r} {where} ({str(error).splitlines()[0]}); give a folder with a config.json, or one of "
            f"{', '.join(BERTS)}."
        ) from error
    finally:
        hub.setLevel(level)


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a plan needs."""

    parameters: dict[str, torch.Size]  # name -> shape, tied ones once
    embeddings: int  # parameters of embeddings among them
    matrices: list[torch.Size]  # shapes of the hidden layers' weights, Muon's part
    blocks: list[list[str]]  # the names of the parameters of each block, what FSDP2 cuts as one
    hidden: int  # length of a token's vector
    intermediate: int  # the longest vector inside a block
    vocabulary: int  # entries of the vocabulary
    used: float  # share of a stack's experts that a token passes
    idle: int  # parameters of the experts that it does not pass
    masked: bool  # whether 15 % of the tokens alone go through the vocabulary decoder (BERT)

    @classmethod
    def of(cls, model: nn.Module) -> ModelShape:
        """Look at a model.

        Raises:
            ValueError: it has experts, and its config does not say how many a token passes.
        """
        config: Any = model.config
        names = {id(p): name for name, p in model.named_parameters()}
        embedded = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        hidden, used = int(config.hidden_size), 1.0
        found = [layer for path, module in model.named_modules() for layer in read_layers(path, module)]
        if experts := [layer for layer in found if layer.stack]:
            each = next((getattr(config, key) for key in _PER_TOKEN if isinstance(getattr(config, key, None), int)), 0)
            if not each:
                raise ValueError(
                    f"the config of this {config.model_type!r} has none of {', '.join(_PER_TOKEN)}, so the work of its "
                    "experts cannot be told; add num_experts_per_tok."
                )
            used = each / experts[0].count
        idle = round((1 - used) * sum(math.prod(layer.shape) for layer in experts))
        return cls(
            parameters={name: p.shape for name, p in model.named_parameters()},
            embeddings=sum(p.numel() for p in embedded.values()),
            matrices=[weight.shape for weight in hidden_weights(model)],
            blocks=[[names[id(p)] for p in block.parameters()] for block in blocks_of(model)],
            hidden=hidden,
            intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            vocabulary=int(getattr(config, "vocab_size", 0)),
            used=used,
            idle=idle,
            masked="bert" in config.model_type,
        )

    @property
    def count(self) -> int:
        """Of parameters."""
        return sum(shape.numel() for shape in self.parameters.values())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the outermost modules that stand in a list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found

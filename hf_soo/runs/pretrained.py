"""Pretrained models of folders and of the hub: configuration, tokenizer and weights, checked against each other.

What cannot be used is an error of one line that names the flag, and all but damaged weights show before any data are
read. Weights are fp32 whatever the checkpoint's type: in half precision small steps are lost.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertConfig, PretrainedConfig, set_seed

from hf_soo.engine.checks import Checked
from hf_soo.runs.arguments import option

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass
class PretrainedArguments(Checked):
    """Which pretrained model; flags of the scripts that fine-tune one."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        None, "Folder of a pretrained encoder (also OUTPUT_DIR of `hf-soo pretrain`), or its name on the hub."
    )
    config_name: str | None = option(None, "Folder or hub name of the configuration; None: the model's.")
    tokenizer_name: str | None = option(None, "Folder or hub name of the tokenizer; None: the model's.")
    cache_dir: str | None = option(None, "Where models are kept, in run_squad.py data, too; None: the hub's folder.")
    model_revision: str = option("main", "Branch, tag or commit of model, configuration and tokenizer.")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model that is not loaded yet: where it is, its configuration and its tokenizer."""

    arguments: PretrainedArguments
    config: PretrainedConfig
    tokenizer: Any

    @property
    def name(self) -> str:
        """For a record: the folder's name, or the hub's."""
        assert self.arguments.model_name_or_path is not None
        path = Path(self.arguments.model_name_or_path).expanduser()
        return path.absolute().name if path.is_dir() else str(path)

    def positions(self) -> int | None:
        """The longest input; None where positions are relative."""
        count: int | None = getattr(self.config, "max_position_embeddings", None)
        if count is None or self.config.model_type == "bert":
            return count
        if "roberta" in self.config.model_type or self.config.model_type == "camembert":
            first: int = self.config.pad_token_id + 1  # they number their positions from there
            return count - first
        # MPNet and others do, too, and only their tokenizers say so; one that does not know has a huge number.
        longest: int = self.tokenizer.model_max_length
        return min(count, longest)

    def load(self, auto: Any, config: PretrainedConfig, seed: int, **settings: Any) -> nn.Module:
        """The model under a head.

        Args:
            auto: the Auto class of the head.
            config: the model's, with what the head needs.
            seed: of the weights that the checkpoint does not have.
            **settings: of `from_pretrained`.

        Raises:
            ValueError: the weights cannot be loaded, or are not those of the model.
        """
        set_seed(seed)
        assert self.arguments.model_name_or_path is not None
        place = {"cache_dir": self.arguments.cache_dir, "revision": self.arguments.model_revision}
        return load_weights(auto, self.arguments.model_name_or_path, config=config, **place, **settings)


def find_pretrained(
    arguments: PretrainedArguments, max_seq_length: int, kinds: Container[Any], purpose: str
) -> Pretrained:
    """Read configuration and tokenizer, and refuse what would fail in training.

    Args:
        arguments: which model.
        max_seq_length: of the inputs.
        kinds: classes of configurations whose models have the head.
        purpose: of the head, for the message: "classify sequences".

    Raises:
        ValueError: there is no such model, it has no such head, its tokenizer does not fit, or it has fewer positions.
    """
    name = arguments.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing; give a folder, or a name on the hub: bert-base-uncased.")
    config = _load(AutoConfig, "config_name" if arguments.config_name else "model_name_or_path", arguments)
    if type(config) not in kinds:
        raise ValueError(f"{name!r} is a model of the kind {config.model_type!r}, which does not {purpose}.")
    tokenizer = _load(AutoTokenizer, "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path", arguments)
    found = Pretrained(arguments, config, tokenizer)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no padding token; use a model of the kind of BERT.")
    _check_tokenizer(config, len(tokenizer), arguments.tokenizer_name or name)
    if (positions := found.positions()) is not None and max_seq_length > positions:
        raise ValueError(f"max_seq_length={max_seq_length}, but {name} has {positions} positions; give {positions}.")
    return found


def sketch_pretrained(arguments: PretrainedArguments, kinds: Mapping[Any, Any]) -> nn.Module | None:
    """A model of the same layers, before its weights are read; None where none is named, or it has no such head.

    Args:
        arguments: which model.
        kinds: class of a configuration -> class of its model with the head.

    Raises:
        ValueError: there is no such model.
    """
    name = arguments.config_name or arguments.model_name_or_path
    if name is None or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        return None  # what loads it says so
    config = _load(AutoConfig, "config_name" if arguments.config_name else "model_name_or_path", arguments)
    model: nn.Module | None = kinds[type(config)](config) if type(config) in kinds else None
    return model


def _check_tokenizer(config: PretrainedConfig, size: int, name: str) -> None:
    """Refuse a tokenizer that was not made for the checkpoint.

    Args:
        config: of the model.
        size: entries of the tokenizer's vocabulary.
        name: of the tokenizer, for the message.

    Raises:
        ValueError: the two sizes do not belong together.
    """
    try:
        if isinstance(config, BertConfig):
            check_vocabulary(config, size)
        elif not 0.95 * config.vocab_size <= size <= config.vocab_size:  # some are rounded up, by less than 1 %
            raise ValueError(f"the vocabulary has {size} entries but config.vocab_size is {config.vocab_size}")
    except ValueError as error:
        raise ValueError(f"The tokenizer of {name!r} does not fit the model: {error}.") from error


def check_vocabulary(config: BertConfig, vocab_size: int) -> None:
    """Refuse a vocabulary that the model was not built for, before training reads wrong rows of the embedding.

    A model vocabulary rounded up to a multiple of 8 (30,522 -> 30,528), for the sake of tensor cores, is accepted.

    Args:
        config: the model's configuration.
        vocab_size: number of entries of the vocabulary that made the data.

    Raises:
        ValueError: the two sizes do not belong together.
    """
    extra = config.vocab_size - vocab_size
    if extra == 0 or (0 < extra < 128 and config.vocab_size % 8 == 0):
        return
    raise ValueError(
        f"the vocabulary has {vocab_size} entries but the model's config.vocab_size is {config.vocab_size}; they "
        "must be equal (or the model's larger by less than 128 and a multiple of 8): build the model with "
        f"vocab_size={vocab_size}, or prepare the data with the model's vocabulary"
    )


def sizes(config: Any, *more: str) -> dict[str, int | float]:
    """What a record says of a model's shape: those of ``SIZES``, and ``more``, that its configuration has."""
    return {key: value for key in (*SIZES, *more) if (value := getattr(config, key, None)) is not None}


def load_weights(loader: Any, name: str, **settings: Any) -> nn.Module:
    """The model of a folder or of the hub, in fp32.

    Args:
        loader: a class with `from_pretrained`.
        name: what `model_name_or_path` says.
        **settings: of `from_pretrained`.

    Raises:
        ValueError: the weights cannot be loaded, or lack some of the encoder's, which would be random.
    """
    try:
        model, found = loader.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False, **settings
        )
    except Exception as error:  # safetensors, pickle, OSError, RuntimeError: none of them says which flag it was
        raise ValueError(_not_loaded("model_name_or_path", name, error)) from error
    encoder = f"{model.base_model_prefix}."
    missing = sorted(key for key in found["missing_keys"] if key.startswith(encoder) and "pooler" not in key)
    if missing:
        raise ValueError(
            f"model_name_or_path={name!r}: its weights lack {len(missing)} of the tensors of a "
            f"{model.config.model_type} (the first is {missing[0]}); it is another model's folder."
        )
    assert isinstance(model, nn.Module)
    return model


def _load(loader: Any, flag: str, arguments: PretrainedArguments) -> Any:
    name = getattr(arguments, flag)
    if (folder := Path(name).expanduser()).is_dir() and not (folder / "config.json").is_file() and loader is AutoConfig:
        raise ValueError(f"{flag}={name!r} is a folder without config.json; give one that save_pretrained wrote.")
    try:
        return loader.from_pretrained(
            name, cache_dir=arguments.cache_dir, revision=arguments.model_revision, trust_remote_code=False
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError and the hub's own
        raise ValueError(_not_loaded(flag, name, error)) from error


def _not_loaded(flag: str, name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{flag}={name!r} needs code of its own (auto_map), which is never run; give a model of transformers."
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{flag}={name!r} is no folder of a model, nor a model of the hub that can be read: {said[0]}"

"""Small image classifiers of transformers with random weights: ViT and ResNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_soo.engine.checks import Checked, Count, Share
from hf_soo.runs.arguments import option
from hf_soo.vision.data import ImageData
from hf_soo.vision.images import Shape

# What each takes, with its default; None follows from other settings.
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {
        "patch_size": None,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": None,
        "dropout": 0.0,
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"},
}


@dataclass
class ImageModelConfig(Checked):
    """Which classifier; also flags of scripts/run_vision.py. A setting of the other model is refused."""

    _argument_group_name = "model"

    model: Literal["vit", "resnet"] = option("vit", "ViTForImageClassification or ResNetForImageClassification.")
    patch_size: Count | None = option(None, "vit: side of a patch in pixels; None: a quarter of the image's.")
    hidden_size: Count | None = option(None, "vit: width; None: 64.")
    num_hidden_layers: Count | None = option(None, "vit: layers; None: 3.")
    num_attention_heads: Count | None = option(None, "vit: heads; None: 4.")
    intermediate_size: Count | None = option(None, "vit: width of the MLP; None: 4 x hidden_size.")
    dropout: Share | None = option(None, "vit: of hidden states and attention; None: 0.")
    embedding_size: Count | None = option(None, "resnet: channels after the stem; None: 16.")
    hidden_sizes: list[Count] | None = field(
        default=None, metadata={"help": "resnet: channels of each stage; None: 16 32 64."}
    )
    depths: list[Count] | None = field(default=None, metadata={"help": "resnet: layers of each stage; None: 1 1 1."})
    layer_type: Literal["basic", "bottleneck"] | None = option(None, "resnet: basic or bottleneck; None: basic.")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a setting is of the other model, or its value is not allowed.
        """
        super().__post_init__()
        given = {key: value for key, value in dataclasses.asdict(self).items() if key != "model" and value is not None}
        for key, value in given.items():
            if key not in DEFAULTS[self.model]:
                known = ", ".join(DEFAULTS[self.model])
                raise ValueError(f"{key}={value!r} has no effect with model={self.model!r}, which takes {known}.")

    def shape(self, image_size: int) -> dict[str, Any]:
        """Every setting of the model, complete.

        Args:
            image_size: side of the images in pixels.

        Raises:
            ValueError: the settings do not fit each other, or the images.
        """
        full = {
            key: default if (value := getattr(self, key)) is None else value
            for key, default in DEFAULTS[self.model].items()
        }
        return _vit(full, image_size) if self.model == "vit" else _resnet(full)


def make_image_model(config: ImageModelConfig, data: ImageData, seed: int) -> PreTrainedModel:
    """A new classifier for the shape and the classes of a data set.

    Args:
        config: which.
        data: says image shape and classes.
        seed: of the initial weights.

    Raises:
        ValueError: no such model can be built.
    """
    set_seed(seed)
    return shaped_model(config, data.shape, data.classes)


def shaped_model(config: ImageModelConfig, image: Shape, classes: Sequence[str]) -> PreTrainedModel:
    """A classifier with the weights that it happens to have.

    Args:
        config: which.
        image: its shape, [C, H, W].
        classes: their names.

    Raises:
        ValueError: no such model can be built.
    """
    channels, image_size, _ = image
    shape = config.shape(image_size)
    shape |= {
        "num_channels": channels,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    if config.model == "resnet":
        return ResNetForImageClassification(ResNetConfig(**shape))
    dropout = shape.pop("dropout")
    shape |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "image_size": image_size}
    return ViTForImageClassification(ViTConfig(**shape))


def _vit(full: dict[str, Any], image_size: int) -> dict[str, Any]:
    full["patch_size"] = full["patch_size"] or max(1, image_size // 4)
    full["intermediate_size"] = full["intermediate_size"] or 4 * full["hidden_size"]
    if image_size % full["patch_size"]:
        raise ValueError(f"patch_size={full['patch_size']} does not divide image_size={image_size}; change one.")
    if full["hidden_size"] % full["num_attention_heads"]:
        raise ValueError(
            f"num_attention_heads={full['num_attention_heads']} does not divide hidden_size={full['hidden_size']}."
        )
    return full


def _resnet(full: dict[str, Any]) -> dict[str, Any]:
    if len(full["hidden_sizes"]) != len(full["depths"]):
        raise ValueError(f"hidden_sizes={full['hidden_sizes']} and depths={full['depths']} must be equally long.")
    if full["layer_type"] == "bottleneck" and min(full["hidden_sizes"]) < 4:
        raise ValueError(f"hidden_sizes={full['hidden_sizes']} must be 4 or more with layer_type='bottleneck'.")
    return full

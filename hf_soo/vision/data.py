"""Image classification: data sets whose rows are pixels of one shape, and small models with random weights.

Whatever the source, a data set has the columns ``pixels`` (the bytes of a uint8 array [C, H, W], see ``images.py``) and
``label``. Where the source has no evaluation part of its own, a share of every class is held out, the same one in every
run. All images are decoded, and so checked, before training; ``datasets`` keeps the result in its cache.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_soo.engine.checks import Checked, Count, OpenShare
from hf_soo.files import files_below
from hf_soo.runs.arguments import option
from hf_soo.vision.images import Shape, decode, fit, shape_of

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # of the held-out share and the order, whatever the run's seed: losses of different seeds compare
EVALUATION_PARTS = ("test", "validation", "val")  # the first of these that a source has
DIGITS = "digits"
NO_IMAGES = "holds no images (a folder should hold FOLDER/class_name/*.png)"


@dataclass
class ImageDataConfig(Checked):
    """Which images, and what they become; also flags of scripts/run_vision.py."""

    _argument_group_name = "data"

    dataset: str = option(
        DIGITS,
        "'digits' (scikit-learn's, 8 x 8 pixels); a folder (FOLDER/class_name/*.png, or that under FOLDER/train and "
        "FOLDER/test); or a data set of the hub as 'name' or 'name:configuration'.",
    )
    image_column: str | None = option(None, "Of a hub data set; None: its only column of images.")
    label_column: str | None = option(None, "Of a hub data set; None: its only column of class labels.")
    image_size: Count | None = option(None, "Side in pixels that all images are resized to; None: the first image's.")
    num_channels: Literal[1, 3] | None = option(None, "1 (grey) or 3 (RGB); None: the first image's.")
    eval_share: OpenShare = option(0.25, "Held out of each class where there is no test part; the same in every run.")
    max_train_samples: Count | None = option(
        None, "Train on so many examples, a random choice that is always the same."
    )
    max_eval_samples: Count | None = option(None, "Evaluate on so many examples.")


@dataclass(frozen=True, slots=True)
class ImageData:
    """Examples to train and to evaluate on, their classes, and the shape [C, H, W] of each."""

    train: Any
    eval: Any
    classes: tuple[str, ...]
    shape: Shape

    def digest(self) -> str:
        """What tells two data sets apart: a hash of all pixels and labels of both parts, in order."""
        sha = hashlib.sha256(repr((self.shape, self.classes)).encode())
        for part in (self.train, self.eval):
            for batch in part.iter(batch_size=1000):
                sha.update(b"".join(batch["pixels"]) + repr(batch["label"]).encode())
        return sha.hexdigest()[:12]

    @classmethod
    def load(cls, config: ImageDataConfig) -> ImageData:
        """Read a data set, bring its images to one shape, and hold out a share where it has no evaluation part.

        Args:
            config: where from, and what to make of it.

        Raises:
            ValueError: there is no such data set, or it cannot be used as it is.
        """
        parts, classes, shape = _digits(config) if config.dataset == DIGITS else _stored(config)
        if len(parts) == 1:
            train, held_out = _stratified_split(parts[0]["label"], config.eval_share, classes)
            parts = [parts[0].select(train), parts[0].select(held_out)]
        else:
            parts = [part.select(np.random.RandomState(SPLIT_SEED).permutation(len(part))) for part in parts]
        if unseen := set(parts[1]["label"]) - set(parts[0]["label"]):
            names = ", ".join(repr(classes[label]) for label in sorted(unseen))
            raise ValueError(
                f"dataset={config.dataset!r}: no image to train on is of class {names}, to evaluate on some."
            )
        train_set, eval_set = _head(parts[0], config.max_train_samples), _head(parts[1], config.max_eval_samples)
        return cls(train_set, eval_set, classes, shape)


def _head(part: Any, count: int | None) -> Any:
    return part if count is None else part.select(range(min(count, len(part))))


def _stratified_split(labels: Sequence[int], share: float, classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices to train on and held out: ``share`` of each class, at least one; random, but the same in every run."""
    random = np.random.RandomState(SPLIT_SEED)  # a generator whose numbers numpy has promised never to change
    array, train, held_out = np.asarray(labels), [], []
    for label, name in enumerate(classes):
        indices = random.permutation(np.flatnonzero(array == label))
        if len(indices) < 2:
            raise ValueError(f"class {name!r} has {len(indices)} images; at least 2 are needed to hold one out.")
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        held_out.append(indices[:count])
        train.append(indices[count:])
    return random.permutation(np.concatenate(train)).tolist(), random.permutation(np.concatenate(held_out)).tolist()


def _digits(config: ImageDataConfig) -> tuple[list[Any], tuple[str, ...], Shape]:
    """scikit-learn's 1,797 handwritten digits (UCI ML, 8 x 8 pixels, 17 grey levels), which need no download."""
    from datasets import Dataset

    for key in ("image_column", "label_column"):
        if getattr(config, key) is not None:
            raise ValueError(f"{key}={getattr(config, key)!r} has no effect with dataset='digits'; leave it out.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("dataset='digits' comes with scikit-learn; pip install 'hf-soo[vision]'.") from error
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    shape = shape_of(images[0], config.image_size, config.num_channels)
    rows = {"pixels": [fit(image, shape).tobytes() for image in images], "label": raw.target.tolist()}
    return [Dataset.from_dict(rows)], tuple(map(str, range(10))), shape


def _stored(config: ImageDataConfig) -> tuple[list[Any], tuple[str, ...], Shape]:
    """Images of a folder or of the hub: the train part, and the evaluation part if there is one."""
    from datasets import Image

    parts = _open(config)
    if "train" not in parts:
        raise ValueError(f"dataset={config.dataset!r} has the parts {', '.join(parts)}; one named 'train' is needed.")
    used = ["train", *[name for name in EVALUATION_PARTS if name in parts][:1]]
    image, label = _columns(parts["train"].features, config)
    undecoded = [parts[name].select_columns([image, label]).cast_column(image, Image(decode=False)) for name in used]
    if empty := [name for name, part in zip(used, undecoded, strict=True) if len(part) == 0]:
        raise ValueError(f"dataset={config.dataset!r}: the part {empty[0]!r} holds no images.")
    numbers, classes = _classes(undecoded, label)
    if len(classes) < 2:
        raise ValueError(f"dataset={config.dataset!r} has one class, {classes[0]!r}; two or more are needed.")
    first = decode(undecoded[0][0][image], f"the first image of {config.dataset!r}")
    encoder = _Encoder(image, label, numbers, shape_of(first, config.image_size, config.num_channels))
    return [encoder.encode(part) for part in undecoded], classes, encoder.shape


def _open(config: ImageDataConfig) -> Any:
    """The parts of an image folder, or of whatever else ``datasets`` loads, undecoded."""
    import datasets

    name, folder = config.dataset, Path(config.dataset).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise ValueError(f"dataset={name!r} is no folder; give 'digits', an existing folder, or a name on the hub.")
    patterns = _image_folder(folder) if folder.is_dir() else None
    try:
        if patterns is not None:
            return datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=False)
        if folder.is_dir():
            return datasets.load_dataset(str(folder))
        path, _, configuration = name.partition(":")
        return datasets.load_dataset(path, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = "is neither 'digits' nor a folder here, and cannot be loaded from the hub"
        if folder.is_dir():
            what = NO_IMAGES if patterns is None else "cannot be loaded"
        raise ValueError(f"dataset={name!r} {what}: {error}") from error


def _image_folder(folder: Path) -> dict[str, list[str]] | None:
    """The files of each part, for ``imagefolder``; None where there are no images."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if not any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in files_below(folder)):
        return None
    train = folder / "train"
    if not (train.is_dir() and any(path.is_dir() for path in train.iterdir())):
        return {"train": _patterns(folder)}
    parts = ["train", *[name for name in EVALUATION_PARTS if (folder / name).is_dir()][:1]]
    return {name: _patterns(folder / name) for name in parts}


def _patterns(folder: Path) -> list[str]:
    """Patterns of the files under a folder; ``**`` stops at links, so each linked folder has one of its own."""
    root = folder.resolve()
    holders = {file.parent for file in files_below(root)}
    links = {path for holder in holders for path in (holder, *holder.parents) if path.is_symlink()}
    return [f"{glob.escape(str(path))}/**" for path in (root, *sorted(links))]


def _columns(features: Mapping[str, Any], config: ImageDataConfig) -> tuple[str, str]:
    """The names of the image and of the label column."""
    from datasets import ClassLabel, Image

    found: list[str] = []
    for key, kind in (("image_column", Image), ("label_column", ClassLabel)):
        fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
        name = getattr(config, key) or (fitting[0] if len(fitting) == 1 else None)
        if name not in features or (kind is Image and name not in fitting):
            columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
            if kind is Image and not fitting:
                raise ValueError(f"dataset={config.dataset!r} {NO_IMAGES}: its columns are {columns}.")
            raise ValueError(f"{key}={name!r} does not name a column to use; dataset={config.dataset!r} has {columns}.")
        found.append(str(name))
    return found[0], found[1]


def _classes(parts: Sequence[Any], label: str) -> tuple[dict[Any, int], tuple[str, ...]]:
    """The number of each value of the label column, and the name of each number."""
    names = getattr(parts[0].features[label], "names", None)
    values = range(len(names)) if names else sorted({value for part in parts for value in part.unique(label)} - {None})
    return {value: number for number, value in enumerate(values)}, tuple(map(str, names or values))


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Turns the rows of a part into ``pixels`` and ``label``."""

    image: str
    label: str
    numbers: dict[Any, int]
    shape: Shape

    def encode(self, part: Any) -> Any:
        """Every row, decoded; from the cache of ``datasets`` where it has been done before."""
        from datasets import Features, Value

        features = Features({"pixels": Value("binary"), "label": Value("int64")})
        return part.map(self.row, with_indices=True, remove_columns=part.column_names, features=features)

    def row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """One row."""
        pixels = decode(row[self.image], where := f"image {index}")
        if row[self.label] not in self.numbers:
            raise ValueError(f"{where} of a part has no label (it is {row[self.label]!r}); leave such images out.")
        return {"pixels": fit(pixels, self.shape).tobytes(), "label": self.numbers[row[self.label]]}


@dataclass(frozen=True, slots=True)
class ImageCollator:
    """Samples to a batch: ``pixel_values`` [B, C, H, W] between -1 and 1, and ``labels`` [B]."""

    shape: Shape

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Put samples, with ``pixels`` and ``label``, together."""
        pixels = np.frombuffer(b"".join(sample["pixels"] for sample in samples), dtype=np.uint8)
        values = torch.from_numpy(pixels.reshape(-1, *self.shape).astype(np.float32))
        return {"pixel_values": values / 127.5 - 1, "labels": torch.tensor([sample["label"] for sample in samples])}

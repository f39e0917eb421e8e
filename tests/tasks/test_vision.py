"""Image data sets and models: digits, folders of PNGs written here, Parquet, and every way to be refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_soo.runs.training import _weights_hash
from hf_soo.vision.data import ImageCollator, ImageData, ImageDataConfig, _stratified_split
from hf_soo.vision.images import Pixels, fit
from hf_soo.vision.models import ImageModelConfig, make_image_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pixels(data: ImageData, part: str = "train") -> Pixels:
    rows = getattr(data, part)["pixels"]
    return np.stack([np.frombuffer(row, np.uint8).reshape(data.shape) for row in rows])


def write(folder: Path, colours: dict[str, list[Any]], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """`folder/NAME/0.png, ...` of one colour each."""
    for name, values in colours.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, value in enumerate(values):
            Image.new(mode, size, value).save(folder / name / f"{index}.png")
    return folder


def reds_and_blues(folder: Path, count: int = 8) -> Path:
    shades = range(100, 100 + count)
    return write(folder, {"red": [(s, 0, 0) for s in shades], "blue": [(0, 0, s) for s in shades]})


def test_digits_are_scikit_learns_and_their_split_is_fixed_and_disjoint() -> None:
    raw = load_digits()
    data = ImageData.load(ImageDataConfig())
    assert (data.shape, data.classes) == ((1, 8, 8), tuple("0123456789"))
    assert (len(data.train), len(data.eval)) == (1347, 450)
    both = np.concatenate([pixels(data), pixels(data, "eval")]).reshape(-1, 64)
    assert sorted(np.rint(both * (16 / 255)).astype(int).tolist()) == sorted(raw.data.astype(int).tolist())
    counts = [np.bincount(part["label"]) for part in (data.train, data.eval)]
    assert np.abs(counts[1] - 0.25 * np.bincount(raw.target)).max() <= 0.5
    assert (counts[0] + counts[1]).tolist() == np.bincount(raw.target).tolist()
    # pinned: results of different machines and versions are of the same images
    assert data.digest() == "7075c9d71ef1" == ImageData.load(ImageDataConfig()).digest()


def test_stratified_split_is_disjoint_complete_and_takes_of_every_class() -> None:
    labels = [0] * 50 + [1] * 2 + [2] * 9
    train, held_out = _stratified_split(labels, 0.2, "abc")
    assert sorted(train + held_out) == list(range(61))
    assert np.bincount([labels[i] for i in held_out]).tolist() == [10, 1, 2]
    assert (train, held_out) == _stratified_split(labels, 0.2, "abc")
    assert train != sorted(train)  # the first n are of all classes
    assert np.bincount([labels[i] for i in _stratified_split(labels, 0.99, "abc")[0]]).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="class 'd' has 1 images; at least 2"):
        _stratified_split([*labels, 3], 0.2, "abcd")


def test_sizes_and_channels_of_digits() -> None:
    small = ImageData.load(ImageDataConfig(num_channels=3, max_train_samples=5, max_eval_samples=7))
    assert small.shape == (3, 8, 8) and (len(small.train), len(small.eval)) == (5, 7)
    assert (pixels(small)[:, 0] == pixels(small)[:, 2]).all()
    large = ImageData.load(ImageDataConfig(image_size=16))
    original, resized = pixels(ImageData.load(ImageDataConfig()))[0, 0], pixels(large)[0, 0]
    assert resized.shape == (16, 16)
    expected = Image.fromarray(original).resize((16, 16), Image.Resampling.BILINEAR)
    assert (resized == np.asarray(expected)).all()


def test_a_folder_of_one_folder_a_class(tmp_path: Path) -> None:
    data = ImageData.load(ImageDataConfig(dataset=str(reds_and_blues(tmp_path / "photos"))))
    assert (data.classes, data.shape, len(data.train), len(data.eval)) == (("blue", "red"), (3, 8, 8), 12, 4)
    seen = set()
    for part in ("train", "eval"):
        for image, label in zip(pixels(data, part), getattr(data, part)["label"], strict=True):
            channel = 2 if data.classes[label] == "blue" else 0
            assert image[channel].min() >= 100 and np.delete(image, channel, axis=0).max() == 0
            seen.add((label, image[channel, 0, 0]))
    assert len(seen) == 16
    again = ImageData.load(ImageDataConfig(dataset=str(tmp_path / "photos")))
    assert again.digest() == data.digest()
    Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / "photos" / "red" / "3.png")
    assert 7 in np.concatenate(
        [
            pixels(ImageData.load(ImageDataConfig(dataset=str(tmp_path / "photos"))), part)[:, 0, 0, 0]
            for part in ("train", "eval")
        ]
    )


def test_names_that_look_like_patterns_or_parts(tmp_path: Path) -> None:
    """Neither brackets in a path nor files called test are taken for more than names."""
    folder = tmp_path / "a[b] c*"
    for name in ("test", "x"):
        for index in range(4):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 10 * index).save(folder / name / f"test_{index}.png")
    data = ImageData.load(ImageDataConfig(dataset=str(folder)))
    assert (data.classes, data.shape, len(data.train), len(data.eval)) == (("test", "x"), (1, 4, 4), 6, 2)


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_folder_with_its_own_evaluation_part(tmp_path: Path, name: str) -> None:
    reds_and_blues(tmp_path / "train")
    write(tmp_path / name, {"red": [(50, 0, 0)], "blue": [(0, 0, 50), (0, 0, 51)]})
    data = ImageData.load(ImageDataConfig(dataset=str(tmp_path)))
    assert (len(data.train), len(data.eval)) == (16, 3)
    assert sorted(pixels(data, "eval").max(axis=(1, 2, 3)).tolist()) == [50, 50, 51]
    assert data.train["label"][:8] not in ([0] * 8, [1] * 8)
    write(tmp_path / name, {"green": [(0, 9, 0)]})
    with pytest.raises(ValueError, match="no image to train on is of class 'green'"):
        ImageData.load(ImageDataConfig(dataset=str(tmp_path)))


def test_a_train_part_alone_is_split(tmp_path: Path) -> None:
    reds_and_blues(tmp_path / "train")
    data = ImageData.load(ImageDataConfig(dataset=str(tmp_path), eval_share=0.5))
    assert (data.classes, len(data.train), len(data.eval)) == (("blue", "red"), 8, 8)


def test_other_sizes_and_modes_come_to_one_shape(tmp_path: Path) -> None:
    """A first image of 8 x 8 in colour decides; grey, alpha, palette, 16 bit and other sizes follow."""
    write(tmp_path, {"a": [(200, 100, 50)] * 3})
    write(tmp_path, {"b": [77, 78]}, size=(20, 6), mode="L")
    Image.new("RGBA", (5, 9), (1, 2, 3, 40)).save(tmp_path / "b" / "alpha.png")
    Image.fromarray(np.full((8, 8), 0x1234, np.uint16)).save(tmp_path / "b" / "deep.png")
    Image.new("RGB", (8, 8), (51, 51, 51)).convert("P").save(tmp_path / "b" / "palette.png")
    data = ImageData.load(ImageDataConfig(dataset=str(tmp_path)))
    assert data.shape == (3, 8, 8)
    found = {tuple(image[:, 4, 4].tolist()) for part in ("train", "eval") for image in pixels(data, part)}
    assert found == {(200, 100, 50), (77, 77, 77), (78, 78, 78), (1, 2, 3), (0x12, 0x12, 0x12), (51, 51, 51)}
    grey = ImageData.load(ImageDataConfig(dataset=str(tmp_path), num_channels=1, image_size=4))
    assert grey.shape == (1, 4, 4)
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert {luma, 77, 78, 2, 0x12, 51} == {
        int(image[0, 2, 2]) for part in ("train", "eval") for image in pixels(grey, part)
    }


def test_luma_is_pils() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    assert np.abs(fit(image, (1, 16, 16))[0].astype(int) - expected).max() <= 1  # PIL rounds its weights to 16 bits


@pytest.mark.parametrize("plain", [False, True])
def test_a_data_set_that_datasets_loads(tmp_path: Path, plain: bool) -> None:
    """Parquet files in a folder take the way of a hub name: columns by their type, or by the name given."""
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.Value("string") if plain else names, "id": datasets.Value("int64")}
    )
    for part, count in (("train", 6), ("test", 2)):
        images = [Image.new("L", (8, 8), index) for index in range(count)]
        kinds: list[Any] = [("cat", "dog")[index % 2] if plain else index % 2 for index in range(count)]
        rows = datasets.Dataset.from_dict({"photo": images, "kind": kinds, "id": list(range(count))}, features=features)
        rows.to_parquet(tmp_path / f"{part}.parquet")
    config = ImageDataConfig(dataset=str(tmp_path), label_column="kind" if plain else None)
    data = ImageData.load(config)
    assert (data.classes, data.shape, len(data.train), len(data.eval)) == (("cat", "dog"), (1, 8, 8), 6, 2)
    assert all(int(image[0, 0, 0]) % 2 == label for image, label in zip(pixels(data), data.train["label"], strict=True))
    with pytest.raises(
        ValueError, match=r"image_column='id' does not name a column to use; .* has photo \(Image\), kind"
    ):
        ImageData.load(ImageDataConfig(dataset=str(tmp_path), image_column="id", label_column="kind"))
    with pytest.raises(ValueError, match="label_column='breed' does not name"):
        ImageData.load(ImageDataConfig(dataset=str(tmp_path), label_column="breed"))


def test_a_hub_name_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: Any) -> datasets.DatasetDict:
        asked.append(names)
        rows = {"img": [Image.new("L", (4, 4), 9)] * 4, "label": [0, 1, 0, 1]}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        return datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = ImageData.load(ImageDataConfig(dataset="owner/photos:small"))
    assert asked == [("owner/photos", "small")] and (len(data.train), len(data.eval)) == (2, 2)


def test_images_without_a_label_are_refused(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("L", (4, 4))] * 3, "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"image 2 .* has no label \(it is -1\)"):
        ImageData.load(ImageDataConfig(dataset=str(tmp_path)))


def refused(tmp_path: Path, message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData.load(ImageDataConfig(dataset=str(tmp_path), **settings))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    reds_and_blues(tmp_path)
    whole = (tmp_path / "red" / "4.png").read_bytes()
    (tmp_path / "red" / "4.png").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, r"image '.*red/4\.png' cannot be read \(.*\); delete it")
    (tmp_path / "red" / "4.png").write_bytes(whole)
    (tmp_path / "blue" / "0.png").write_text("no image")
    refused(tmp_path, r"image '.*blue/0\.png' cannot be read")


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent' is no folder; give 'digits', an existing folder, or a name on the hub")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no images here")
    refused(tmp_path / "empty", r"holds no images \(.*FOLDER/class_name/\*\.png\): its columns are text")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "bare' holds no images")
    write(tmp_path / "one", {"cat": [(1, 2, 3)] * 4})
    refused(tmp_path / "one", "one' has one class, 'cat'; two or more are needed")
    write(tmp_path / "flat", {".": [(1, 2, 3)] * 4})
    refused(tmp_path / "flat", "has one class, 'flat'")
    write(tmp_path / "few", {"cat": [(1, 2, 3)] * 4, "dog": [(1, 2, 3)]})
    refused(tmp_path / "few", "class 'dog' has 1 images")
    write(tmp_path / "wide", {"cat": [(1, 2, 3)] * 4, "dog": [(1, 2, 3)] * 4}, size=(9, 4))
    refused(tmp_path / "wide", "image_size=None, but the first image is 9 x 4 pixels, no square; give a size")
    assert ImageData.load(ImageDataConfig(dataset=str(tmp_path / "wide"), image_size=8)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0 is not allowed; give a whole number >= 1"),
        ({"max_train_samples": 0}, "max_train_samples=0 is not allowed; give a whole number >= 1"),
        ({"num_channels": 2}, "num_channels=2 is not allowed; give one of 1, 3"),
        ({"eval_share": 1.0}, r"eval_share=1.0 is not allowed; give a number in \(0, 1\)"),
        ({"label_column": "x"}, "label_column='x' has no effect with dataset='digits'"),
        ({"dataset": __file__}, "is no folder"),
    ],
)
def test_settings_of_the_data_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData.load(ImageDataConfig(**settings))


@pytest.mark.parametrize(("module", "message"), [("sklearn.datasets", "scikit-learn"), ("PIL", "needs pillow")])
def test_what_is_not_installed_is_named(module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{message}.*; pip install 'hf-soo\[vision\]'"):
        ImageData.load(ImageDataConfig(image_size=16))


def test_collator_scales_to_minus_one_and_one() -> None:
    rows = [{"pixels": bytes([0, 255, 51, 204]), "label": 3}, {"pixels": bytes(4), "label": 1}]
    batch = ImageCollator((1, 2, 2))(rows)
    assert batch["labels"].tolist() == [3, 1] and batch["pixel_values"].shape == (2, 1, 2, 2)
    torch.testing.assert_close(batch["pixel_values"][0].flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))


def tiny_data(shape: tuple[int, int, int] = (1, 8, 8)) -> ImageData:
    return ImageData(None, None, ("a", "b", "c"), shape)


def test_default_models() -> None:
    vit = make_image_model(ImageModelConfig(), tiny_data(), seed=0)
    config = vit.config
    assert (config.patch_size, config.hidden_size, config.num_hidden_layers) == (2, 64, 3)
    assert (config.num_attention_heads, config.intermediate_size, config.id2label) == (4, 256, {0: "a", 1: "b", 2: "c"})
    resnet = make_image_model(ImageModelConfig("resnet"), tiny_data((3, 32, 32)), seed=0)
    assert (resnet.config.hidden_sizes, resnet.config.depths, resnet.config.layer_type) == (
        [16, 32, 64],
        [1, 1, 1],
        "basic",
    )
    for model, shape in ((vit, (2, 1, 8, 8)), (resnet, (2, 3, 32, 32))):
        assert model(pixel_values=torch.zeros(shape)).logits.shape == (2, 3)
    assert _weights_hash(vit) == _weights_hash(make_image_model(ImageModelConfig(), tiny_data(), seed=0))
    assert _weights_hash(vit) != _weights_hash(make_image_model(ImageModelConfig(), tiny_data(), seed=1))


def test_model_settings_reach_the_model() -> None:
    flags = {
        "patch_size": 4,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 20,
    }
    config = make_image_model(ImageModelConfig(**flags, dropout=0.5), tiny_data(), seed=0).config
    assert {key: getattr(config, key) for key in flags} == flags
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.5, 0.5)
    flags = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "bottleneck"}
    config = make_image_model(ImageModelConfig("resnet", **flags), tiny_data(), seed=0).config
    assert {key: getattr(config, key) for key in flags} == flags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "vgg"}, "model='vgg' is not allowed; give one of 'vit', 'resnet'"),
        ({"model": "resnet", "hidden_size": 8}, "hidden_size=8 has no effect with model='resnet', which takes embed"),
        ({"depths": [1]}, r"depths=\[1\] has no effect with model='vit', which takes patch_size"),
        ({"patch_size": 3}, "patch_size=3 does not divide image_size=8"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=64"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not allowed; give a whole number >= 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is not allowed; give a number in \[0, 1\)"),
        (
            {"model": "resnet", "depths": [1, 0, 1]},
            r"depths=\[1, 0, 1\] is not allowed; give a list, of a whole number >= 1 each",
        ),
        ({"model": "resnet", "depths": [1]}, r"hidden_sizes=\[16, 32, 64\] and depths=\[1\] must be equally long"),
        (
            {"model": "resnet", "layer_type": "wide"},
            "layer_type='wide' is not allowed; give one of 'basic', 'bottleneck'",
        ),
        ({"model": "resnet", "layer_type": "bottleneck", "hidden_sizes": [2, 4, 8]}, "must be 4 or more"),
    ],
)
def test_models_that_cannot_be_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_image_model(ImageModelConfig(**settings), tiny_data(), seed=0)


def test_digest_sees_pixels_labels_and_shape() -> None:
    def data(pixel: int = 0, label: int = 0, shape: tuple[int, int, int] = (1, 1, 2)) -> str:
        rows = datasets.Dataset.from_dict({"pixels": [bytes([pixel, 0])], "label": [label]})
        return ImageData(rows, rows, ("a", "b"), shape).digest()

    assert len({data(), data(pixel=1), data(label=1), data(shape=(1, 2, 1))}) == 4
    assert data() == data() != hashlib.sha256(b"").hexdigest()[:12]


def test_linked_folders_of_images_are_read(tmp_path: Path) -> None:
    reds_and_blues(tmp_path / "elsewhere")
    write(tmp_path / "images", {"green": [(0, s, 0) for s in range(100, 104)]})
    (tmp_path / "images" / "crimson").symlink_to("../elsewhere/red")
    (tmp_path / "images" / "more").mkdir()
    (tmp_path / "images" / "more" / "azure").symlink_to(tmp_path / "elsewhere" / "blue")
    data = ImageData.load(ImageDataConfig(dataset=str(tmp_path / "images")))
    assert data.classes == ("azure", "crimson", "green")
    assert len(data.train) + len(data.eval) == 20
    (tmp_path / "images" / "green" / "lost.png").symlink_to("nowhere.png")
    refused(tmp_path / "images", "lost.png' is no file")

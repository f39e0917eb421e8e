"""Images as arrays of one shape: decoding, grey and colour, size.

An image becomes uint8 [C, H, W], C = 1 (grey) or 3 (RGB), H = W. One of another size is resized by PIL, bilinear, to
the square (its proportions are not kept); grey is repeated for three channels, and colour becomes ITU-R 601 luma for
one. An alpha channel is dropped, and 16-bit grey keeps its upper 8 bits. PIL is needed to decode and to resize alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
Pixels = NDArray[np.uint8]

LUMA = (0.299, 0.587, 0.114)
GREY_MODES = ("1", "L", "LA")


def decode(value: Any, where: str) -> Pixels:
    """The pixels of an encoded image, [H, W] if it is grey, else [H, W, 3].

    Args:
        value: what a ``datasets.Image`` column holds: a path or bytes.
        where: names the image if it cannot be read and has no path.

    Raises:
        ValueError: the image cannot be read, or PIL is not there to read it.
    """
    import datasets

    _require_pillow()
    path = value.get("path") if isinstance(value, dict) else None
    named = f"image {str(path)!r}" if path else where
    try:
        return _array(datasets.Image().decode_example(value))
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"{named} cannot be read ({error}); delete it or write it again.") from error


def _array(image: Any) -> Pixels:
    if image.mode in GREY_MODES:
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} has 32 bits a pixel, allowed are 8 and 16.")
    return np.asarray(image.convert("RGB"))


def fit(image: Pixels, shape: Shape) -> Pixels:
    """Bring pixels [H, W] or [H, W, 3], as ``decode`` gives them, to ``shape``: channels, height and width."""
    channels, *size = shape
    if image.ndim == 3 and channels == 1:
        image = np.rint(image @ np.array(LUMA)).astype(np.uint8)
    if list(image.shape[:2]) != size:
        _require_pillow()
        from PIL import Image

        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    if image.ndim == 2:
        return np.repeat(image[None], channels, axis=0)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def shape_of(image: Pixels, image_size: int | None, num_channels: int | None) -> Shape:
    """The shape that a data set's images get: what was asked for, else that of the first one.

    Args:
        image: the first image.
        image_size: side in pixels, or None.
        num_channels: 1 or 3, or None.

    Raises:
        ValueError: the first image is no square and ``image_size`` is not given.
    """
    height, width = image.shape[:2]
    if image_size is None and height != width:
        raise ValueError(f"image_size=None, but the first image is {width} x {height} pixels, no square; give a size.")
    side = image_size or height
    return num_channels or (1 if image.ndim == 2 else 3), side, side


def _require_pillow() -> None:
    """Say what to install where PIL is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ValueError("Decoding and resizing images needs pillow; pip install 'hf-soo[vision]'.") from error

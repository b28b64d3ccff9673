"""PIL image -> model input: OpenAI's preprocessing, to the bit."""

import os
from typing import Any

import numpy as np
from PIL import Image

from .arrays import as_tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def image_transform(resolution: int) -> "ImageTransform":
    """The preprocessing of a model whose images are `resolution` pixels wide and high (OpenAI's `_transform`).

    Returns:
        A callable taking a PIL image of any mode that PIL resizes and converts to RGB, the path of an image, or a uint8
        array [H, W], [H, W, 3] or [H, W, 4], and returning a float32 Tensor [3, R, R]. It resizes the short side to R
        (bicubic), crops the centre, converts to RGB, scales to [0, 1] and normalises. An EXIF orientation is not
        applied, as in OpenAI's code: use `PIL.ImageOps.exif_transpose` before it for that.
    """
    return ImageTransform(resolution)


class ImageTransform:
    """What `image_transform` returns."""

    def __init__(self, resolution: int):
        self.resolution = resolution
        # A pixel has 256 values: their normalised forms, computed in float32 as torchvision does, are looked up.
        scaled = np.arange(256, dtype=np.float32) / np.float32(255)  # [256]
        self._values = (scaled - np.array(MEAN, np.float32)[:, None]) / np.array(STD, np.float32)[:, None]  # [3, 256]

    def __call__(self, image: Any) -> Any:
        return as_tensor(self.array(image))  # [3, R, R]

    def array(self, image: Any) -> np.ndarray:
        """The same as a numpy array, for worker threads: they need not touch Paddle."""
        image = resize_and_crop(open_image(image), self.resolution).convert("RGB")
        pixels = np.asarray(image)  # [R, R, 3]
        return np.stack([self._values[channel][pixels[..., channel]] for channel in range(3)])  # [3, R, R]


def open_image(image: Any) -> Image.Image:
    """The PIL image that an image, path or uint8 array is; raises ValueError if it is none."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, os.PathLike)):
        try:
            opened = Image.open(image)
            opened.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's on damaged files
            raise ValueError(f"cannot read {image} as an image: {error}") from error
        return opened
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"an image is a PIL image, a path, or a uint8 array [H, W], [H, W, 3] or [H, W, 4]; found {array.dtype} "
            f"{list(array.shape)}"
        )
    return Image.fromarray(array)


def resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """torchvision's Resize of the short side, then CenterCrop, both before the conversion to RGB."""
    width, height = image.size
    if not width or not height:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to see")
    short, long = min(width, height), max(width, height)
    long = int(resolution * long / short)
    size = (resolution, long) if width <= height else (long, resolution)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left = round((size[0] - resolution) / 2)
    top = round((size[1] - resolution) / 2)
    return image.crop((left, top, left + resolution, top + resolution))

"""PIL image -> model input: OpenAI's preprocessing, to the bit."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .arrays import as_tensor
from .config import INTERPOLATIONS, MEAN, RESIZE_MODES, STD

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def image_transform(
    resolution: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    interpolation: str = INTERPOLATIONS[0],
    resize_mode: str = RESIZE_MODES[0],
    fill_color: int = 0,
) -> "ImageTransform":
    """The preprocessing of a model whose images are `resolution` pixels wide and high (OpenAI's `_transform`).

    `load` returns it with the settings of the model's file; the defaults are OpenAI's.

    Args:
        resolution: side R of the result, in pixels.
        mean: what is subtracted of red, green and blue, which are 0 to 1.
        std: what they are divided by then.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" makes the short side R and crops the long one, "longest" makes the long side R and fills
            up the short one, "squash" makes both sides R, whatever their ratio (open_clip's names).
        fill_color: grey of what "longest" fills up, 0 to 255.

    Returns:
        A callable taking a PIL image of any mode that PIL resizes and converts to RGB, the path of an image, or a uint8
        array [H, W], [H, W, 3] or [H, W, 4], and returning a float32 Tensor [3, R, R]. It resizes the short side to R,
        crops the centre, converts to RGB, scales to [0, 1] and normalises. An EXIF orientation is not
        applied, as in OpenAI's code: use `PIL.ImageOps.exif_transpose` before it for that.

    Raises:
        ValueError: if the interpolation or the resize mode is unknown, or mean or std are not three numbers.
    """
    return ImageTransform(resolution, mean, std, interpolation, resize_mode, fill_color)


class ImageTransform:
    """What `image_transform` returns."""

    def __init__(
        self,
        resolution: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        interpolation: str = INTERPOLATIONS[0],
        resize_mode: str = RESIZE_MODES[0],
        fill_color: int = 0,
    ):
        if interpolation not in INTERPOLATIONS or resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"interpolation={interpolation!r}, resize_mode={resize_mode!r}: choose one of "
                f"{', '.join(INTERPOLATIONS)} and one of {', '.join(RESIZE_MODES)}"
            )
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean={mean} and std={std}: give three numbers each, of red, green and blue")
        self.resolution = resolution
        self.resample = _RESAMPLING[interpolation]
        self.resize_mode = resize_mode
        self.fill_color = fill_color
        # A pixel has 256 values: their normalised forms, computed in float32 as torchvision does, are looked up.
        scaled = np.arange(256, dtype=np.float32) / np.float32(255)  # [256]
        self._values = (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]  # [3, 256]

    def __call__(self, image: Any) -> Any:
        return as_tensor(self.array(image))  # [3, R, R]

    def array(self, image: Any) -> np.ndarray:
        """The same as a numpy array, for worker threads: they need not touch Paddle."""
        if not self.resolution:
            raise ValueError("the model is a text tower alone and takes no images")
        pixels = np.asarray(self._resize(open_image(image)))  # [R, R, 3]
        return np.stack([self._values[channel][pixels[..., channel]] for channel in range(3)])  # [3, R, R]

    def _resize(self, image: Image.Image) -> Image.Image:
        """The picture as RGB, R x R."""
        if self.resize_mode == "shortest":
            return resize_and_crop(image, self.resolution, self.resample).convert("RGB")
        if not all(image.size):
            raise ValueError(f"an image of {image.width} x {image.height} pixels has nothing to see")
        if self.resize_mode == "squash":
            return image.resize((self.resolution, self.resolution), self.resample).convert("RGB")
        return resize_and_pad(image, self.resolution, self.resample, self.fill_color)


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


def resize_and_crop(
    image: Image.Image, resolution: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """torchvision's Resize of the short side, then CenterCrop, both before the conversion to RGB."""
    width, height = image.size
    if not width or not height:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to see")
    short, long = min(width, height), max(width, height)
    long = int(resolution * long / short)
    size = (resolution, long) if width <= height else (long, resolution)
    if image.size != size:
        image = image.resize(size, resample)
    left = round((size[0] - resolution) / 2)
    top = round((size[1] - resolution) / 2)
    return image.crop((left, top, left + resolution, top + resolution))


def resize_and_pad(image: Image.Image, resolution: int, resample: Image.Resampling, fill_color: int) -> Image.Image:
    """open_clip's resize of the long side, then borders of a grey, as RGB."""
    ratio = max(image.size) / resolution
    width, height = (max(1, round(side / ratio)) for side in image.size)
    canvas = Image.new("RGB", (resolution, resolution), (fill_color, fill_color, fill_color))
    image = image.resize((width, height), resample).convert("RGB")
    canvas.paste(image, ((resolution - width) // 2, (resolution - height) // 2))
    return canvas

"""PIL image -> model input: OpenAI's preprocessing, to the bit."""

import contextlib
import io
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .arrays import as_array, as_tensor
from .config import INTERPOLATIONS, MEAN, RESIZE_MODES, STD
from .shards import Picture

# PIL's names of the formats that are read; HEIF is that of plug-ins, AVIF of newer PIL.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF", "HEIF")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Pixels of the resized picture up to which it is resized whole, as OpenAI's code does: 64 MB in four channels.
_RESIZED_WHOLE = 1 << 24
_BICUBIC_REACH = 3  # pixels on either side that a pixel of an enlarged picture depends on, with one to spare
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_SHOWN = 24  # bytes of a file that is no image, in a message
# What PIL raises for damaged files, beside its own errors.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def image_transform(
    resolution: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    interpolation: str = INTERPOLATIONS[0],
    resize_mode: str = RESIZE_MODES[0],
    fill_color: int = 0,
    exif: bool = False,
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
        exif: whether a picture is turned as its EXIF orientation says. OpenAI's code does not turn it. The attribute
            `exif` of what `load` returns can be set, too.

    Returns:
        A callable taking a PIL image of any mode that PIL resizes and converts to RGB, the path of an image, the bytes
        of its file, a file open for reading bytes, or an array or Tensor [H, W], [H, W, 3], [H, W, 4] or [3, H, W], in
        uint8 or of floats from 0 to 1, and returning a float32 Tensor [3, R, R]. It resizes the short side to R, crops
        the centre, converts to RGB, scales to [0, 1] and normalises. Of an animation it takes the first frame. Pictures
        with numbers beyond 8 bits are cut off at 0 and 255, as in OpenAI's code, and a warning says so. It raises
        ValueError for what is no picture. In a worker process of a `paddle.io.DataLoader` it returns an array, of which
        the loader makes a Tensor.

    Raises:
        ValueError: if the resolution is no number of pixels, the interpolation or the resize mode is unknown, or mean
            or std are not three numbers, those of std not 0.
    """
    return ImageTransform(resolution, mean, std, interpolation, resize_mode, fill_color, exif)


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
        exif: bool = False,
    ):
        if interpolation not in INTERPOLATIONS or resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"interpolation={interpolation!r}, resize_mode={resize_mode!r}: choose one of "
                f"{', '.join(INTERPOLATIONS)} and one of {', '.join(RESIZE_MODES)}"
            )
        if not isinstance(resolution, (int, np.integer)) or resolution < 0:
            raise ValueError(f"resolution={resolution!r}; give the side of square images in pixels, such as 224")
        if np.shape(mean) != (3,) or np.shape(std) != (3,) or not np.all(np.isfinite([mean, std])) or 0 in std:
            raise ValueError(
                f"mean={mean} and std={std}: give three numbers each, of red, green and blue, and none of std 0"
            )
        self.resolution = resolution
        self.mean, self.std, self.interpolation = tuple(mean), tuple(std), interpolation
        self.resample = _RESAMPLING[interpolation]
        self.resize_mode = resize_mode
        self.fill_color = fill_color
        self.exif = exif
        # A pixel has 256 values: their normalised forms, computed in float32 as torchvision does, are looked up.
        scaled = np.arange(256, dtype=np.float32) / np.float32(255)  # [256]
        self._values = (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]  # [3, 256]

    def __repr__(self) -> str:
        return (
            f"ImageTransform({self.resolution}, mean={self.mean}, std={self.std}, "
            f"interpolation={self.interpolation!r}, resize_mode={self.resize_mode!r}, fill_color={self.fill_color}, "
            f"exif={self.exif})"
        )

    def __call__(self, image: Any) -> Any:
        return as_tensor(self.array(image))  # [3, R, R]

    def array(self, image: Any) -> np.ndarray:
        """The same as a numpy array, for worker threads: they need not touch Paddle."""
        if not self.resolution:
            raise ValueError("the model is a text tower alone and takes no images")
        with _opened(image, self.exif) as picture:
            _warn_of_depth(picture)
            pixels = np.asarray(self._resize(picture))  # [R, R, 3]
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


def is_picture(value: Any) -> bool:
    """Whether a value is one picture, whole: a PIL image, the bytes of a file, or an open file."""
    return isinstance(value, (Image.Image, bytes, bytearray, memoryview)) or hasattr(value, "read")


def open_image(image: Any, exif: bool = False) -> Image.Image:
    """The PIL image that an image, path, file, its bytes or a uint8 array is; raises ValueError if it is none."""
    with _opened(image, exif) as picture:
        return picture


@contextlib.contextmanager
def _opened(image: Any, exif: bool) -> Iterator[Image.Image]:
    """The same while a block uses it: other threads decode no more meanwhile than there is room for."""
    if isinstance(image, Image.Image):
        yield _turned(image) if exif else image
        return
    if isinstance(image, io.TextIOBase):
        raise ValueError(f"{getattr(image, 'name', 'the file')} is open for reading text: open it with mode 'rb'")
    file: Any
    if isinstance(image, Picture):
        file, name = io.BytesIO(image.read()), f"{image!s:.300}"
    elif isinstance(image, (str, os.PathLike)):
        file, name = os.path.expanduser(image), f"{os.fspath(image):.300}"
    elif hasattr(image, "read"):
        file, name = image, f"{getattr(image, 'name', None) or type(image).__name__}"
    elif isinstance(image, (bytes, bytearray, memoryview)):
        file, name = io.BytesIO(image), f"{len(image):,} {type(image).__name__}"
    else:
        yield _image_of_array(image)
        return
    with contextlib.ExitStack() as stack:
        try:
            picture: Image.Image = stack.enter_context(Image.open(file, formats=_formats()))
            stack.enter_context(_ROOM.taken(picture.width * picture.height))
            picture.load()
            picture = _turned(picture) if exif else picture
        except _DAMAGED as error:
            raise ValueError(f"cannot read {name} as an image: {_reason(error, file)}") from error
        yield picture


def _reason(error: Exception, file: Any) -> str:
    """What is wrong with a file that is no image, and the way out where there is one."""
    if isinstance(error, Image.DecompressionBombError):
        return f"{error!s:.200} If you trust it, set PIL.Image.MAX_IMAGE_PIXELS to a larger number"
    if isinstance(file, str) and _ADDRESS.match(file):
        return "addresses are not fetched: download it, and give the file or its bytes"
    if not isinstance(error, UnidentifiedImageError):
        return f"{error!s:.300}"
    words = f"it is in none of the formats {', '.join(_formats())}"
    if isinstance(file, str):
        with open(file, "rb") as opened:
            return f"{words}; it begins with {opened.read(_SHOWN)!r}"
    return f"{words}; it begins with {file.getvalue()[:_SHOWN]!r}" if isinstance(file, io.BytesIO) else words


def _image_of_array(image: Any) -> Image.Image:
    """The picture that an array or Tensor is."""
    array = as_array(image) if hasattr(image, "__array__") else np.empty(0, object)
    grey_or_last = array.ndim == 2 or array.shape[2:] in ((3,), (4,))
    is_float = array.dtype.kind == "f"
    if not (is_float or array.dtype == np.uint8) or not (grey_or_last or (array.ndim == 3 and len(array) == 3)):
        found = f"{array.dtype} {list(array.shape)}" if hasattr(image, "__array__") else type(image).__name__
        raise ValueError(
            "an image is a PIL image, the bytes of a file or an open one, a path, or an array or Tensor [H, W], "
            f"[H, W, 3], [H, W, 4] or [3, H, W] in uint8 or of floats from 0 to 1; found {found}"
        )
    if is_float:
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"an image of floats has numbers from 0 to 1; found {array.min():g} to {array.max():g}. Give those up "
                "to 255 in uint8; what preprocess returned needs no second time"
            )
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array if grey_or_last else array.transpose(1, 2, 0)))


def _formats() -> list[str]:
    """The formats that PIL may find in a file. It guesses among all it knows otherwise, and some start programs."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class _Room:
    """Bounds the pixels that threads have decoded at once. A picture of more than all is decoded alone."""

    def __init__(self, pixels: int):
        self.pixels = self.free = pixels
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


_ROOM = _Room(1 << 27)  # eight photos of 16 megapixels, half a GB


def _turned(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it should be shown."""
    turned = ImageOps.exif_transpose(image)
    assert turned is not None  # as it is where PIL changes the image in place
    return turned


def _warn_of_depth(image: Image.Image) -> None:
    """Warns of numbers that 8 bits do not hold: they become white or black, as in OpenAI's code."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return
    pixels = np.asarray(image)
    if pixels.size and not (pixels.min() >= 0 and (1 < pixels.max() <= 255 or not pixels.any())):
        warnings.warn(
            f"a picture of mode {image.mode} has numbers beyond 0 to 255, or up to 1 only: cut off to 8 bits, as in "
            "OpenAI's code, it is mostly white or black. Scale it to 0 to 255 and give a uint8 array to see more",
            RuntimeWarning,
            stacklevel=2,
        )


def resize_and_crop(
    image: Image.Image, resolution: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """torchvision's Resize of the short side, then CenterCrop, both before the conversion to RGB.

    Of a picture so long that this would take much memory, only what the crop keeps is resized.
    """
    width, height = image.size
    if not width or not height:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to see")
    short, long = min(width, height), max(width, height)
    resized = int(resolution * long / short)
    start = round((resized - resolution) / 2)
    if resolution * resized > max(_RESIZED_WHOLE, width * height):
        return _resize_centre(image, resolution, start, long / resized, resample)
    size = (resolution, resized) if width <= height else (resized, resolution)
    if image.size != size:
        image = image.resize(size, resample)
    left, top = (0, start) if width <= height else (start, 0)
    return image.crop((left, top, left + resolution, top + resolution))


def _resize_centre(
    image: Image.Image, resolution: int, start: int, scale: float, resample: Image.Resampling
) -> Image.Image:
    """The crop of an enlarged image, made of the pixels it depends on alone.

    Args:
        image: the whole image.
        resolution: side of the result, in pixels.
        start: where the crop begins on the long side of the enlarged image.
        scale: pixels of the image for one of the enlarged image, less than 1.
        resample: the filter, of PIL; bicubic has the widest reach.
    """
    low, high = start * scale, (start + resolution) * scale
    first = max(0, math.floor(low) - _BICUBIC_REACH)
    last = min(max(image.size), math.ceil(high) + _BICUBIC_REACH)
    # PIL takes the box in float32, which holds small numbers with more digits: what is cut off comes before.
    kept, box = (first, 0, last, image.height), (low - first, 0.0, high - first, float(image.height))
    if image.width <= image.height:
        kept, box = (0, first, image.width, last), (0.0, low - first, float(image.width), high - first)
    return image.crop(kept).resize((resolution, resolution), resample, box)


def resize_and_pad(image: Image.Image, resolution: int, resample: Image.Resampling, fill_color: int) -> Image.Image:
    """open_clip's resize of the long side, then borders of a grey, as RGB."""
    ratio = max(image.size) / resolution
    width, height = (max(1, round(side / ratio)) for side in image.size)
    canvas = Image.new("RGB", (resolution, resolution), (fill_color, fill_color, fill_color))
    image = image.resize((width, height), resample).convert("RGB")
    canvas.paste(image, ((resolution - width) // 2, (resolution - height) // 2))
    return canvas

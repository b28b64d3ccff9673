"""Images in bulk: found in folders, decoded in threads, put into batches."""

import collections
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn, Optional, Union

import numpy as np

from .arrays import as_array, is_tensor
from .checkpoints.files import StrPath, expanded
from .shards import EXTENSION, Picture, members_of, shards_of
from .threads import available_cores
from .transforms import is_picture

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MOST_WORKERS = 8
_BATCHES_AHEAD = 2  # decoded or being decoded while one is encoded

Name = Union[str, int]  # of an image: its path, or its index where it has none


def image_files(folder: StrPath) -> list[str]:
    """The paths of all images in a folder and the folders in it, sorted; those with a name in `EXTENSIONS`.

    Hidden files and folders are left out, links are followed.

    Raises:
        OSError: if the folder or one in it does not exist or cannot be read.
        ValueError: if there is no image.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    paths: list[str] = []
    seen: set[str] = set()
    folder = expanded(folder)
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we came from
            folders.clear()
            continue
        seen.add(real)
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(EXTENSIONS))
        paths += [os.path.join(place, name) for name in names]
    if not paths:
        raise ValueError(f"{folder} has no images: looked for {' '.join('*' + end for end in EXTENSIONS)}, also deeper")
    return sorted(paths)


def samples() -> list[str]:
    """The paths of the pictures in the package, drawings of coloured shapes that the model "tiny" knows; sorted."""
    return image_files(os.path.join(os.path.dirname(__file__), "data", "samples"))


def pictures_of(shard: str) -> list[Picture]:
    """The images in a tar shard, in its order.

    Raises:
        OSError, ValueError: if the shard cannot be read.
    """
    found = (member for member in members_of(shard) if member.name.lower().endswith(EXTENSIONS))
    return [Picture(shard, *member) for member in found]


def shards_at(source: Union[StrPath, Sequence[StrPath]]) -> list[str]:
    """The tar shards that a source names, see `shards_of`; none for a folder that has images, in folders in it too."""
    shards = shards_of(source)
    if shards and isinstance(source, (str, os.PathLike)) and os.path.isdir(expanded(source)):
        with contextlib.suppress(ValueError):  # that there are no images
            image_files(source)
            return []
    return shards


def images_at(path: StrPath) -> list[Any]:
    """The images that a path names: a file, a folder, or tar shards, see `shards_of`.

    Raises:
        OSError, ValueError: if there is nothing to read.
    """
    path = expanded(path)
    shards = shards_at(path)
    if shards:
        return [picture for shard in shards for picture in pictures_of(shard)]
    return [path] if os.path.isfile(path) else image_files(path)


class Part:
    """The items of something that can be indexed from one index to another."""

    def __init__(self, items: Any, first: int, end: int):
        self.items, self.first, self.end = items, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> Any:
        return self.items[self.first + index]


def as_images(images: Any) -> tuple[list[Name], Any]:
    """Names and items of what `embed` takes: a folder, an image, shards, several of them, or a `paddle.io.Dataset`.

    Returns:
        A list of paths, with indices for images that have none, and something to index for the images themselves.

    Raises:
        OSError, ValueError: if there is nothing to read.
    """
    if isinstance(images, (str, os.PathLike)):
        images = images_at(images)
    images = [images] if is_picture(images) or _is_one_array(images) else _listed(images)
    if isinstance(images, (list, tuple)) and any(map(_names_shards, images)):
        images = [found for image in images for found in (images_at(image) if _names_shards(image) else [image])]
    if not (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
        raise ValueError(
            "images are a folder, a list of paths, or a paddle.io.Dataset that can be indexed; found "
            f"{type(images).__name__}"
        )
    if not isinstance(images, (list, tuple)):
        return list(range(len(images))), images
    return [_name(index, image) for index, image in enumerate(images)], images


def is_one_image(images: Any) -> bool:
    """Whether what `classify` takes is one image: the path of a file, a picture, or an array or Tensor of one."""
    if isinstance(images, (str, os.PathLike)):
        return not (_names_shards(images) or os.path.isdir(expanded(images)))
    if is_tensor(images) or isinstance(images, np.ndarray):
        return _is_one_array(images)
    several = hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    return is_picture(images) or not several


def _is_one_array(images: Any) -> bool:
    """Whether a value is an array or Tensor of one image, not of several, perhaps grey ones [N, H, W], or of paths."""
    if not (is_tensor(images) or isinstance(images, np.ndarray)) or _holds_objects(images):
        return False
    return images.ndim == 2 or (images.ndim == 3 and (images.shape[0] == 3 or images.shape[2] <= 4))


def _listed(images: Any) -> Any:
    """A list of what is no more than iterable, or holds paths; what makes its items when it is indexed, as it is."""
    if isinstance(images, np.ndarray) and _holds_objects(images):
        return images.reshape(-1).tolist()
    if isinstance(images, (list, tuple, np.ndarray)) or is_tensor(images) or not hasattr(images, "__iter__"):
        return images
    if isinstance(images, Sequence) or _is_dataset(images):
        is_lazy = len(images) == 0 or not isinstance(images[0], (str, os.PathLike))
        return images if is_lazy else list(images)
    return list(images)  # a generator, or a column of pandas, whose labels are not its places


def _holds_objects(array: Any) -> bool:
    return not is_tensor(array) and array.dtype.kind in "OU"


def _is_dataset(images: Any) -> bool:
    paddle = sys.modules.get("paddle")
    return paddle is not None and isinstance(images, paddle.io.Dataset)


def _names_shards(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike)) and os.fspath(image).endswith(EXTENSION)


def _name(index: int, image: Any) -> Name:
    """The path of an image or of an (image, label), or its index."""
    image = image[0] if isinstance(image, (list, tuple)) and image else image
    if isinstance(image, Picture):
        return str(image)
    return str(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else index


class Batch(NamedTuple):
    """Images that were read together."""

    end: int  # index of the first image after it
    pixels: np.ndarray  # [B, 3, R, R]
    indices: list[int]  # of its images; damaged ones are left out
    labels: list[Any]  # what came with the images, or None
    damaged: list[tuple[Name, str]]  # (name, reason)


def batches(
    preprocess: Callable[[Any], Any],
    names: Any,
    items: Any,
    batch_size: int,
    workers: Optional[int] = None,
    on_error: Optional[str] = "raise",
    start: int = 0,
) -> Generator[Batch, None, None]:
    """Decodes images in threads, some batches ahead, and yields them in order.

    A batch is `batch_size` images of the source, less the damaged ones: where it starts and what is in it does not
    depend on where reading started.

    Args:
        preprocess: image -> [3, R, R]. Decoding and resizing let other threads run: two of them are nearly twice as
            fast as one.
        names: of the images, for messages.
        items: images, or tuples of an image and its label. Float arrays and Tensors [3, R, R] have been preprocessed.
        workers: number of threads.
        on_error: "raise" or "skip"; None is "raise" for callers that have no such choice.
        start: index of the first image to read, a multiple of `batch_size`.

    Raises:
        ValueError: at the first image that cannot be read, unless `on_error` is "skip".
    """
    if on_error not in ("raise", "skip", None):
        raise ValueError(f"on_error is {on_error!r}; choose 'raise' or 'skip'")
    numbers = [batch_size] if workers is None else [batch_size, workers]
    if any(not isinstance(number, (int, np.integer)) or number < 1 for number in numbers):
        raise ValueError(f"batch_size={batch_size!r} and workers={workers!r}; each must be a whole number, at least 1")
    to_array = array_maker(preprocess)

    def load(index: int) -> tuple[np.ndarray, Any]:
        item = items[index]
        image, *rest = item if isinstance(item, (tuple, list)) else (item,)
        return as_array(image) if _is_prepared(image) else to_array(image), rest[0] if rest else None

    def collect(begin: int, futures: list[Future[tuple[np.ndarray, Any]]]) -> Batch:
        pixels, indices, labels, damaged = [], [], [], []
        for index, future in enumerate(futures, begin):
            try:
                array, label = future.result()
            except Exception as error:  # damaged files make decoders raise many kinds
                if on_error != "skip":
                    hint = ". on_error='skip' leaves out such images" if on_error else ""
                    raise ValueError(f"image {names[index]} cannot be used: {error}{hint}") from error
                damaged.append((names[index], str(error)))
            else:
                pixels.append(array)
                indices.append(index)
                labels.append(label)
        stacked = np.stack(pixels) if pixels else np.empty([0])
        return Batch(begin + len(futures), stacked, indices, labels, damaged)

    pool = ThreadPoolExecutor(workers or min(available_cores(), _MOST_WORKERS))
    try:
        waiting: collections.deque[tuple[int, list[Future[tuple[np.ndarray, Any]]]]] = collections.deque()
        for begin in range(start, len(items), batch_size):
            indices = range(begin, min(begin + batch_size, len(items)))
            waiting.append((begin, [pool.submit(load, index) for index in indices]))
            if len(waiting) > _BATCHES_AHEAD:
                yield collect(*waiting.popleft())
        while waiting:
            yield collect(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _is_prepared(image: Any) -> bool:
    """Whether an image is [3, R, R] of floats, as a preprocessing returns it."""
    if not (is_tensor(image) or isinstance(image, np.ndarray)) or "float" not in str(image.dtype):
        return False
    return image.ndim == 3 and image.shape[0] == 3 and image.shape[1] == image.shape[2]


def array_maker(preprocess: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    """A function returning what a preprocessing returns, as an array: ours makes arrays without Paddle."""
    return getattr(preprocess, "array", None) or (lambda image: np.asarray(preprocess(image)))


def warn_of_damage(damaged: list[tuple[Name, str]]) -> None:
    """One warning of all images that were skipped."""
    if damaged:
        shown = "; ".join(f"{name}: {reason}" for name, reason in damaged[:3])
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        warnings.warn(f"{len(damaged)} images skipped: {shown}{more}", RuntimeWarning, stacklevel=3)

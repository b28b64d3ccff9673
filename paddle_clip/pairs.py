"""Reads (image, caption) pairs: of a table, a folder of captioned images, a folder per class, or tar shards."""

import bisect
import csv
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from .checkpoints.files import StrPath, expanded
from .defaults import NOT_UTF8, TEMPLATE
from .extras import require
from .images import EXTENSIONS, image_files, shards_at
from .shards import Member, Picture, members_of, read_at
from .threads import available_cores

_SHOWN = 5  # examples in an error message
# Columns of a table: ours, open_clip's, Hugging Face's.
_IMAGES, _CAPTIONS = ["image", "filepath", "file_name"], ["caption", "title", "text"]
_TEXTS = (".txt", ".json")  # of a sample in a shard; the first that is there is taken
_WINDOW = 16  # shards that are shuffled together, and whose indices are in memory


Pair = tuple[str, str]  # path of an image, caption
_Pick = Callable[[Iterable[str], str], tuple[str, str]]


def read_pairs(
    path: Union[StrPath, Sequence[StrPath]],
    template: str = TEMPLATE,
    image_column: Optional[str] = None,
    caption_column: Optional[str] = None,
) -> "Union[list[Pair], ShardPairs]":
    """Reads the (image, caption) pairs of a data set.

    Args:
        path: path of one of
            a table with the columns `image`, paths relative to the file, and `caption`, or open_clip's `filepath` and
            `title`, or Hugging Face's `file_name` and `text`, others are ignored: CSV or separated by tabs; a `.jsonl`
            file, a JSON object in each line; or a `.parquet` file, which needs pyarrow;
            a folder of images, each with its caption in a text file of the same name, such as dog.jpg and dog.txt;
            a folder of one folder per class, whose name, `_` standing for a space, is put into the template;
            tar shards as WebDataset and img2dataset write them, with a .txt or a .json that has a `caption` to each
            image: a `.tar`, a folder of them, a pattern such as `*.tar` or `{000..009}.tar`, or a list of these.
        template: caption of a class, in which `{}` stands for its name.
        image_column: name of the column of paths, where it is another.
        caption_column: name of the column of captions, where it is another.

    Returns:
        (path, caption) of each pair; pairs of a folder are sorted by path. Pairs of shards stay in them until they are
        taken, see `ShardPairs`.

    Raises:
        ValueError: if there are no pairs, columns, captions or images are missing, or the template has no `{}`.
        OSError: if a file or folder cannot be read.
        ImportError: if a `.parquet` file is given and pyarrow is missing.
    """
    if not isinstance(path, (str, os.PathLike)):
        others = [str(part) for part in path if not shards_at(part)]
        if others:
            raise ValueError(f"several sources of pairs are tar shards or folders of them; found {', '.join(others)}")
    shards = shards_at(path)
    if shards or not isinstance(path, (str, os.PathLike)):
        return ShardPairs(shards)
    path = expanded(path)
    pairs = (
        _pairs_of_folder(path, template) if os.path.isdir(path) else _pairs_of_table(path, image_column, caption_column)
    )
    if not pairs:
        raise ValueError(f"{path} holds no (image, caption) pairs")
    _require_none([image for image, _ in pairs if not os.path.isfile(image)], "images named in {} do not exist", path)
    _require_none([image for image, caption in pairs if not caption.strip()], "images of {} have empty captions", path)
    return pairs


def _pairs_of_table(path: str, image_column: Optional[str], caption_column: Optional[str]) -> list[Pair]:
    images, captions = [image_column] if image_column else _IMAGES, [caption_column] if caption_column else _CAPTIONS

    def pick(columns: Iterable[str], where: str) -> tuple[str, str]:
        """The columns of images and captions among those of a table."""
        columns = list(columns)
        image = next((name for name in images if name in columns), None)
        caption = next((name for name in captions if name in columns), None)
        if image is None or caption is None:
            found = ", ".join(columns) or "none"
            raise ValueError(
                f"{path} needs the columns {images[0]} and {captions[0]} in {where}; found {found:.200}. "
                "Name them by image_column='…' and caption_column='…'"
            )
        return image, caption

    kind = os.path.splitext(path)[1]
    read = {".parquet": _rows_of_parquet, ".jsonl": _rows_of_jsonl}.get(kind, _rows_of_csv)
    folder = os.path.dirname(path)
    return [(os.path.join(folder, image or ""), caption or "") for image, caption in read(path, pick)]


def _rows_of_csv(path: str, pick: _Pick) -> list[tuple[Any, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            head = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter="\t" if "\t" in head else ",")
            image, caption = pick(rows.fieldnames or [], "its first line")
            return [(row[image], row[caption]) for row in rows]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} {NOT_UTF8}: {error}") from None
        except csv.Error as error:
            raise ValueError(f"{path} is not a CSV file: {error}") from None


def _rows_of_jsonl(path: str, pick: _Pick) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _json_object(line, f"line {number} of {path}")
                image, caption = pick(row, f"line {number}")
                _require_text(row[image], f"the image in line {number} of {path}")
                found.append((row[image], _require_text(row[caption], f"the caption in line {number} of {path}")))
    return found


def _rows_of_parquet(path: str, pick: _Pick) -> list[tuple[Any, Any]]:
    require("parquet")
    import pyarrow
    from pyarrow import parquet

    with open(path, "rb") as file:
        try:
            columns = pick(parquet.read_schema(file).names, "its schema")
            table = parquet.read_table(file, columns=list(columns))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None
    for name in columns:
        if not (pyarrow.types.is_string(table[name].type) or pyarrow.types.is_large_string(table[name].type)):
            raise ValueError(f"the column {name} of {path} holds {table[name].type}; expected texts")
    return list(zip(*(table[name].to_pylist() for name in columns)))


def _json_object(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r:.80}; expected a JSON object")
    return value


def _require_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.80}; expected a text")
    return value


def _pairs_of_folder(folder: str, template: str) -> list[Pair]:
    images = image_files(folder)
    texts = [os.path.splitext(image)[0] + ".txt" for image in images]
    captioned = [os.path.isfile(text) for text in texts]
    if any(captioned):
        bare = [image for image, has_caption in zip(images, captioned) if not has_caption]
        _require_none(bare, "images of {} have no text file of the same name", folder)
        return [(image, _read_text(text)) for image, text in zip(images, texts)]
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} for the name of the class")
    classless = [image for image in images if os.path.samefile(os.path.dirname(image), folder)]
    _require_none(classless, "images of {} have neither a text file of the same name nor a folder of a class", folder)
    return [(image, template.replace("{}", _class_of(image, folder))) for image in images]


def _class_of(image: str, folder: str) -> str:
    return os.path.relpath(image, folder).split(os.sep)[0].replace("_", " ")


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8-sig") as file:
        try:
            return " ".join(file.read().split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} {NOT_UTF8}: {error}") from None


def _require_none(wrong: list[str], what: str, path: str) -> None:
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{len(wrong)} {what.format(path)}: {', '.join(wrong[:_SHOWN])}{more}")


# --------------------------------------------------------------------------------------------------------------- shards


class _Sample(NamedTuple):
    """An image in a shard and the file that holds its caption."""

    image: Member
    caption: Member


class ShardPairs(Sequence[tuple[Picture, str]]):
    """The (image, caption) pairs of tar shards, which are read from the disk when they are taken.

    In memory are the number of pairs of each shard, and where those of some thirty shards are. An epoch takes the
    shards in a random order and shuffles the pairs of sixteen of them together, so that reading stays within sixteen
    files. The order depends on the seed and the epoch alone: any part of it can be taken by itself, in any thread or
    process.

    Args:
        shards: their paths. Each is read once for its number of pairs, unless img2dataset left it beside the shard, in
            `<shard>_stats.json`.

    Raises:
        ValueError: if a shard is damaged, or an image has no caption.
        OSError: if a shard cannot be read.
    """

    def __init__(self, shards: Sequence[str]):
        self.shards = list(shards)
        self._samples = functools.lru_cache(2 * _WINDOW)(_samples_of)
        self._reading = threading.Lock()  # or several threads would read the same headers at once
        self._drawn = functools.lru_cache(2)(self._draw)  # batches that are read ahead may belong to the next epoch
        with ThreadPoolExecutor(available_cores()) as pool:
            self._counts = list(pool.map(_count_of, self.shards))
        self._ends = list(itertools.accumulate(self._counts))
        if not self._ends[-1]:
            raise ValueError(f"{', '.join(self.shards[:_SHOWN])} hold no (image, caption) pairs")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """A pair, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} pairs, and no {index}")
        index %= len(self)
        place = bisect.bisect_right(self._ends, index)
        shard, row = self.shards[place], index - self._ends[place] + self._counts[place]
        with self._reading:
            samples = self._samples(shard)
        if len(samples) != self._counts[place]:
            expected = f"expected {self._counts[place]}: it, or {_stats_of(shard)}, has changed"
            raise ValueError(f"{shard} has {len(samples)} pairs, {expected}")
        image, caption = samples[row]
        return Picture(shard, *image), _caption(shard, caption)

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """The indices of all pairs in the order an epoch takes them; computed a window of shards at a time."""
        return self._drawn(seed, epoch)

    def _draw(self, seed: int, epoch: int) -> "_Order":
        return _Order(self._counts, self._ends, seed, epoch)

    def digest(self) -> str:
        """The SHA-256 of the shards' names, sizes in bytes, and numbers of pairs."""
        rows = [
            (os.path.basename(shard), os.path.getsize(shard), count) for shard, count in zip(self.shards, self._counts)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class _Order(Sequence[int]):
    """A permutation of the pairs of shards: of the shards, and of the pairs within each window of them."""

    def __init__(self, counts: Sequence[int], ends: Sequence[int], seed: int, epoch: int):
        self.counts, self.ends, self.seed, self.epoch = counts, ends, seed, epoch
        shards = np.random.default_rng([seed, epoch]).permutation(len(counts)).tolist()
        self.windows = [shards[first : first + _WINDOW] for first in range(0, len(shards), _WINDOW)]
        self.window_ends = list(itertools.accumulate(sum(counts[shard] for shard in part) for part in self.windows))
        self._window = functools.lru_cache(2)(self._shuffled)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, place: Any) -> Any:
        window = bisect.bisect_right(self.window_ends, place)
        return int(self._window(window)[place - self.window_ends[window]])  # counted from the window's end

    def _shuffled(self, window: int) -> np.ndarray:
        ranges = [np.arange(self.ends[shard] - self.counts[shard], self.ends[shard]) for shard in self.windows[window]]
        return np.random.default_rng([self.seed, self.epoch, window]).permutation(np.concatenate(ranges))


def _samples_of(shard: str) -> list[_Sample]:
    """The images in a shard, in its order, with their captions."""
    files: dict[str, dict[str, Member]] = {}
    for member in members_of(shard):
        files.setdefault(member.key, {})[os.path.splitext(member.name)[1].lower()] = member
    found: list[tuple[Member, Optional[Member]]] = []
    for sample in files.values():
        caption = next((sample[end] for end in _TEXTS if end in sample), None)
        found += [(member, caption) for end, member in sample.items() if end in EXTENSIONS]
    bare = [image.name for image, caption in found if not caption]
    _require_none(bare, "images of {} have neither a .txt nor a .json", shard)
    return [_Sample(image, caption) for image, caption in found if caption]


def _caption(shard: str, member: Member) -> str:
    content, what = read_at(shard, member.offset, member.size), f"{shard}/{member.name}"
    if member.name.lower().endswith(".json"):
        text = _require_text(_json_object(content, what).get("caption"), f"the caption of {what}")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not a text in UTF-8: {error}") from None
    return " ".join(text.split())


def _stats_of(shard: str) -> str:
    return f"{os.path.splitext(shard)[0]}_stats.json"


def _count_of(shard: str) -> int:
    """The number of pairs of a shard: img2dataset's, or counted."""
    try:
        with open(_stats_of(shard), "rb") as file:
            successes = _json_object(file.read(), _stats_of(shard)).get("successes")
    except FileNotFoundError:
        successes = None
    return successes if isinstance(successes, int) else len(_samples_of(shard))

"""Computes image features of whole folders, keeps them in files, and searches them by text or image.

For example:

    features, paths, damaged = embed(model, preprocess, "photos", "photos.npy", on_error="skip")
    features, paths, damaged = load_features("photos.npy")
    search(model, preprocess, features, paths, "a dog on a beach")
"""

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from .checkpoints.files import (
    StrPath,
    abandon,
    crc32,
    expanded,
    lock,
    naming,
    open_hidden,
    open_regular,
    reading,
    replacing,
    require_place,
)
from .defaults import BATCH_SIZE, IMAGES_FOUND
from .encoding import Encoder, encode_images, inference, progress_bar, unit
from .errors import CheckpointError, listed
from .extras import require
from .images import Batch, Name, Part, array_maker, as_images, batches, warn_of_damage
from .zeroshot import text_features

_CHECKPOINT_SECONDS = 1.0  # seconds of work a killed process loses at most, beside its last batch
_NPY_HEADER = 128  # bytes; numpy pads to a multiple of 64, and no two-dimensional header needs more than this
_CHUNK = 1 << 26  # bytes of features searched, rewritten or checked at once
_EXPECTED = "a file of features: expected what `embed` writes"
# Cosine of two features of one picture. Engines and precisions of one model reach it, and so does a model that was
# trained a little further; unrelated models are far below.
_SAME_MODEL = 0.9
_PART = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})$")  # name of a shard, see `shard_name`

Run = dict[str, Any]  # description of a run: its images, its model, its arguments


class Features(NamedTuple):
    """Image features, the paths of their images, and the damaged images.

    Attributes:
        features: `FeatureArray` [N, E] in float32; memory-mapped if it is in a `.npy` file.
        paths: paths of the N images; the index of an image that has none.
        damaged: (path, reason) of each image that was skipped.
    """

    features: np.ndarray
    paths: list[Name]
    damaged: list[tuple[Name, str]]


class FeatureArray(np.ndarray):
    """An array of features that knows what made them; so do its parts.

    Attributes:
        made_by: {"probe": the feature of a picture of noise, "normalized": whether features were divided by their
            length}; None if it is not known, as of files of before.
    """

    made_by: Optional[dict[str, Any]]

    def __array_finalize__(self, origin: Any) -> None:
        self.made_by = getattr(origin, "made_by", None)


def _known(features: np.ndarray, made_by: Optional[dict[str, Any]]) -> FeatureArray:
    array = features.view(FeatureArray)
    array.made_by = made_by
    return array


class Match(NamedTuple):
    """An image that `search` found, and the cosine of its feature and the query's."""

    path: Any
    score: float


def embed(
    model: Encoder,
    preprocess: Callable[[Any], Any],
    images: Any,
    output: Optional[StrPath] = None,
    batch_size: int = BATCH_SIZE,
    workers: Optional[int] = None,
    on_error: str = "raise",
    normalize: bool = True,
    progress: Optional[bool] = None,
    resume: bool = True,
    shard: Optional[tuple[int, int]] = None,
) -> Features:
    """Computes the image features of a folder, a list or a data set of any length.

    With an output, memory is constant. If the process ends early, hidden files beside the output keep the features
    computed so far, and the next call with the same arguments continues there; the result equals that of an
    uninterrupted run bit for bit. The output gets its name when it is complete.

    Args:
        model: from `load`.
        preprocess: from `load`.
        images: a folder, whose images are found by `image_files`; an image; a list, array, column or generator of
            paths, PIL images, uint8 arrays, or bytes of files; tar shards, whose images have the path
            `shard.tar/name.jpg`: a `.tar`, a folder of them, a pattern such as `{000..009}.tar`; or a
            `paddle.io.Dataset` whose items are such images, preprocessed Tensors, or tuples that start with one. No
            images give no features.
        output: None; or a file to write: `x.npy`, float32 [N, E], with paths and damaged images in `x.json` beside it;
            or `x.parquet`, with columns "path" and "feature", which needs pyarrow. `load_features` reads them.
        batch_size: images encoded at once.
        workers: number of threads that decode; by default one per core, eight at most.
        on_error: "raise", or "skip" to leave out images that cannot be read, list them in the result and warn.
        normalize: whether features are divided by their length, as for cosines. OpenAI's example of a linear probe
            takes them as they are.
        progress: whether to show a bar; by default where standard error is a terminal.
        resume: whether to continue an interrupted run; False starts anew.
        shard: (i, n), to embed the part i, counted from 0, of n parts of the images, for n processes or machines. The
            output `x.npy` is then named `x-0000i-of-0000n.npy`, see `shard_name`. `merge` makes one file of all, the
            same bit for bit as one process would have written.

    Returns:
        The features, their paths, and the damaged images that were skipped.

    Raises:
        ValueError: if an image cannot be read and `on_error` is "raise", or none can be read; if there are no images;
            if an interrupted run was of other images or another model; or if another process is writing.
        OSError: if a folder cannot be read, or the output cannot be written.
    """
    names, items = as_images(images)
    if shard:
        first, end = _bounds(len(names), batch_size, *shard)
        names, items = names[first:end], Part(items, first, end)
    if output is not None:
        output = shard_name(expanded(output), *shard) if shard else expanded(output)
        _require_storable(names, output)
    with inference(model) as model:
        described = describe(model, preprocess, normalize)
        made_by = {"probe": described["probe"], "normalized": normalize}
        opened: contextlib.AbstractContextManager[_Memory]
        if output is None:
            opened = contextlib.nullcontext(_Memory(len(names), made_by))
        else:
            run = {"images": digest(names), "count": len(names), "batch_size": batch_size, "normalize": normalize}
            opened = _File(output, {**run, **described}, resume)
        with opened as store, progress_bar(progress, total=len(names), initial=store.done, unit="image") as bar:
            read = batches(preprocess, names, items, batch_size, workers, on_error, store.done)
            with contextlib.closing(read):
                for batch in read:
                    rows = (
                        _rows(model, batch.pixels, normalize) if batch.indices else np.empty([0, len(made_by["probe"])])
                    )
                    store.add(rows, batch)
                    bar.update(batch.end - store.before)
            if names and not store.rows and not shard:
                raise ValueError(f"none of the {len(names)} images can be read; {store.damaged[0][1]}")
            warn_of_damage(store.damaged)
            skipped = {name for name, _ in store.damaged}
            return store.finish([name for name in names if name not in skipped])


def _bounds(count: int, batch_size: int, shard: int, shards: int) -> tuple[int, int]:
    """First and end of a shard: whole batches, so that each image is encoded with the same others as in one process."""
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: shards are counted from 0 to n - 1")
    batch_count = -(-count // batch_size)
    return tuple(min(count, batch_count * edge // shards * batch_size) for edge in (shard, shard + 1))  # type: ignore


def shard_name(output: str, shard: int, shards: int) -> str:
    """The name of a part of an output: `x-00003-of-00008.npy`."""
    stem, extension = os.path.splitext(output)
    return f"{stem}-{shard:05}-of-{shards:05}{extension}"


def merge(parts: Union[StrPath, Sequence[StrPath]], output: StrPath) -> Features:
    """Puts files of features together, one after the other; memory is constant, but for the paths.

    Args:
        parts: the files; or a folder of parts, as `embed_on_ray` writes it. If their names end with `-0000i-of-0000n`,
            as those of shards, they are put in that order, and all n must be there.
        output: file to write, `.npy` or `.parquet`.

    Returns:
        What `load_features` reads from the output.

    Raises:
        ValueError: if there are no parts, one is missing or no file of features, or they differ in width.
        OSError: if a part cannot be read, or the output cannot be written.
    """
    files = _in_order(parts)
    output = expanded(output)
    if os.path.abspath(output) in map(os.path.abspath, files):
        raise ValueError(f"the output {output} is one of the parts; choose another")
    first, names = load_features(files[0]), []
    width, made_by = first.features.shape[1], getattr(first.features, "made_by", None)
    for file in files:
        part = load_features(file)
        _require_alike(files[0], first.features, file, part.features)
        names += part.paths
    _require_storable(names, output)
    step = max(1, _CHUNK // (4 * width))
    run = {"images": digest(names), "count": len(names), "probe": [0.0] * width, "made_by": made_by}
    with _File(output, run, resume=False) as store:
        for part in map(load_features, files):
            for start in range(0, len(part.features), step):
                rows = part.features[start : start + step]
                store.add(rows, Batch(store.done + len(rows), rows, [], [], []))
            nothing = part.features[:0]
            store.add(nothing, Batch(store.done + len(part.damaged), nothing, [], [], part.damaged))
        return store.finish(names)


def _require_alike(first: str, features: np.ndarray, file: str, others: np.ndarray) -> None:
    """Raises ValueError if two files of features cannot be one: other widths, other models, normalised or not."""
    if features.shape[1] != others.shape[1]:
        told = f"{first} has features of {features.shape[1]} numbers, {file} has {others.shape[1]}"
        raise ValueError(f"the parts are of different models: {told}")
    one, other = getattr(features, "made_by", None), getattr(others, "made_by", None)
    if one is None or other is None:  # what an earlier version wrote
        return
    if one["normalized"] != other["normalized"]:
        raise ValueError(f"the features of one of {first} and {file} are normalised, those of the other are not")
    if np.dot(unit(np.array(one["probe"])), unit(np.array(other["probe"]))) < _SAME_MODEL:
        raise ValueError(f"the parts are of different models: the one of {first} did not make {file}")


def _in_order(parts: Union[StrPath, Sequence[StrPath]]) -> list[str]:
    """The files of parts; those with numbers in their names by these, after a look whether one is missing."""
    if isinstance(parts, (str, os.PathLike)):
        place = expanded(parts)
        files = [os.path.join(place, name) for name in os.listdir(place)] if os.path.isdir(place) else [place]
        files = [file for file in files if file.endswith((".npy", ".parquet")) and os.path.basename(file)[0] != "."]
    else:
        files = [expanded(part) for part in parts]
    if not files:
        raise ValueError(f"there are no parts in {parts}; expected files that `embed` wrote")
    matches = {file: _PART.search(os.path.splitext(file)[0]) for file in files}
    numbers = {file: (match[1], int(match[2]), int(match[3])) for file, match in matches.items() if match}
    if len(numbers) < len(files):
        return files
    stems = {(stem, count) for stem, _, count in numbers.values()}
    if len(stems) > 1:
        raise ValueError(f"the parts are of several outputs: {', '.join(sorted(stem for stem, _ in stems))}")
    ((_, count),) = stems
    missing = sorted(set(range(count)) - {number for _, number, _ in numbers.values()})
    if missing:
        raise ValueError(f"{len(missing)} of {count} parts are missing: {listed(list(map(str, missing)))}")
    return sorted(numbers, key=lambda file: numbers[file][1])


def require_output(path: str) -> None:
    """Raises the error that `embed` would raise for an output it cannot write, before any work is done.

    Raises:
        ValueError: if its name has another extension, or something else would be overwritten.
        FileNotFoundError: if there is no folder for it.
        ImportError: if it needs pyarrow and that is not installed.
    """
    if not path.endswith((".npy", ".parquet")):
        raise ValueError(f"the output is {path!r}; choose a name that ends with .npy or .parquet")
    require_place(path)
    if _is_parquet(path):
        _pyarrow_parquet()
    elif os.path.exists(_json_of(path)) and not os.path.exists(path):
        raise ValueError(f"{_json_of(path)} belongs to something else and would be overwritten; choose another output")


def _require_storable(names: list[Name], output: str) -> None:
    """Raises ValueError for names that a file cannot hold, before any work is done."""
    if not _is_parquet(output):
        return
    for name in names:
        try:
            str(name).encode()
        except UnicodeEncodeError:
            raise ValueError(f"the path {name!r} is no text, which a .parquet file takes: choose an .npy") from None


def load_features(path: StrPath) -> Features:
    """Reads a file of features that `embed` wrote.

    Args:
        path: path of a `.npy` file, which is mapped into memory, or of a `.parquet` file, which is read.

    Returns:
        The features as `embed` returned them.

    Raises:
        CheckpointError: if the file is not one of `embed`'s.
        OSError: if it or its `.json` cannot be read.
    """
    path = expanded(path)
    features, paths, damaged, made_by = _read_parquet(path) if _is_parquet(path) else _read_npy(path)
    if features.ndim != 2 or len(features) != len(paths):
        raise CheckpointError(f"{path} has the shape {list(features.shape)}, and {len(paths)} paths are beside it")
    if features.dtype.kind != "f":
        raise CheckpointError(f"{path} is not {_EXPECTED}")
    return Features(_known(features, made_by), paths, damaged)


# Features, names, damaged images, and what tells the model that made them.
_Read = tuple[np.ndarray, list[Name], list[tuple[Name, str]], Any]


def _read_npy(path: str) -> _Read:
    beside = _json_of(path)
    with open_regular(path), reading(path, _EXPECTED):
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(features, np.ndarray):
            raise TypeError("it holds several arrays")
    with open_regular(beside) as file, reading(beside, _EXPECTED):
        content = json.load(file)
        names, damaged = _as_names(content["paths"]), _as_damaged(content["damaged"])
        return features, names, damaged, _as_origin(content.get("made_by"))


def _read_parquet(path: str) -> _Read:
    parquet = _pyarrow_parquet()
    with open_regular(path) as file, reading(path, _EXPECTED):
        table = parquet.read_table(file)
        column = table.column("feature").combine_chunks()
        features = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
        metadata = table.schema.metadata
        damaged, made_by = _as_damaged(json.loads(metadata[b"damaged"])), json.loads(metadata.get(b"made_by", b"null"))
        return features, _as_names(table.column("path").to_pylist()), damaged, _as_origin(made_by)


def _as_names(value: Any) -> list[Name]:
    if not isinstance(value, list) or any(type(name) not in (str, int) for name in value):
        raise TypeError("its paths are no list of names")
    return value


def _as_origin(value: Any) -> Optional[dict[str, Any]]:
    if value is not None and not all(type(number) is float for number in value["probe"]):
        raise TypeError("its probe is no list of numbers")
    return None if value is None else {"probe": value["probe"], "normalized": bool(value["normalized"])}


def _as_damaged(value: Any) -> list[tuple[Name, str]]:
    pairs = [(name, reason) for name, reason in value]
    _as_names([name for name, _ in pairs])
    if any(type(reason) is not str for _, reason in pairs):
        raise TypeError("a reason is no text")
    return pairs


def _pyarrow_parquet() -> ModuleType:
    require("parquet")
    from pyarrow import parquet

    return parquet


def _rows(model: Encoder, pixels: np.ndarray, normalize: bool = True) -> np.ndarray:
    features = encode_images(model, pixels)  # [B, E]
    return (unit(features) if normalize else features).astype(np.float32)


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


def _json_of(path: str) -> str:
    return os.path.splitext(path)[0] + ".json"


def digest(names: Sequence[Name]) -> str:
    """The SHA-256 of names, in their order."""
    return hashlib.sha256("\0".join(map(str, names)).encode("utf-8", "surrogateescape")).hexdigest()


def describe(model: Encoder, preprocess: Callable[[Any], Any], normalize: bool) -> Run:
    """What a run tells of its model: engine and precision, as engines round differently, and the feature of a probe."""
    with inference(model) as model:
        probe = _rows(model, _probe(preprocess)[None], normalize)[0]  # [E]
    engine, precision = getattr(model, "engine", "eager"), getattr(model, "precision", "float32")
    return {"engine": engine, "precision": precision, "probe": probe.tolist()}


def require_same_run(old: Run, new: Run, output: str, way_out: str) -> None:
    """Raises ValueError, which says how they differ, unless two runs are of the same images, model and arguments."""
    keys = ("batch_size", "normalize", "engine", "precision")
    reasons = [f"{key} {old.get(key)} then, {new[key]} now" for key in keys if old.get(key) != new[key]]
    if (old["images"], old["count"]) != (new["images"], new["count"]):
        reasons.append(f"other images ({old['count']} then, {new['count']} now)")
    tolerance = 1e-5 * np.abs(new["probe"]).max()  # a GPU may choose other kernels this time
    if len(old["probe"]) != len(new["probe"]) or not np.allclose(old["probe"], new["probe"], 0, tolerance):
        reasons.append("another model or preprocessing")
    if reasons:
        raise ValueError(
            f"an earlier run for {output} differs from this one: {'; '.join(reasons)}. "
            f"Repeat its arguments to continue it, or {way_out}"
        )


def _probe(preprocess: Callable[[Any], Any]) -> np.ndarray:
    """A preprocessed image of noise, whose feature tells models and preprocessings apart."""
    noise = np.random.default_rng(0).integers(0, 256, [300, 400, 3], dtype=np.uint8)
    return array_maker(preprocess)(Image.fromarray(noise))  # [3, R, R]


class _Memory:
    """Features kept in memory."""

    def __init__(self, count: int, made_by: dict[str, Any]):
        self.features = _known(np.empty([count, len(made_by["probe"])], np.float32), made_by)
        self.done = self.before = self.rows = 0
        self.damaged: list[tuple[Name, str]] = []

    def add(self, rows: np.ndarray, batch: Batch) -> None:
        self.features[self.rows : self.rows + len(rows)] = rows
        self._count(rows, batch)

    def _count(self, rows: np.ndarray, batch: Batch) -> None:
        self.rows += len(rows)
        self.damaged += batch.damaged
        self.before, self.done = self.done, batch.end

    def finish(self, paths: list[Name]) -> Features:
        return Features(self.features[: self.rows], paths, self.damaged)


class _File(_Memory):
    """Features appended to a `.npy` file under a hidden name, and a journal of the rows that are safely there.

    The first line of the journal describes the run; each other line is a checkpoint: images done, rows written, images
    damaged since the last, CRC-32 of all rows. A checkpoint is noted once its rows are on the disk; resuming cuts off
    rows beyond the last. What is damaged, or does not add up, is done again.
    """

    def __init__(self, output: str, run: dict[str, Any], resume: bool):
        require_output(output)
        folder, name = os.path.split(os.path.abspath(output))
        self.output, self.run, self.resume = output, run, resume
        self.partial = os.path.join(folder, f".{name}.partial")
        self.journal_path = os.path.join(folder, f".{name}.journal")
        self.done = self.before = self.rows = self.rows_noted = self.crc = 0
        self.damaged: list[tuple[Name, str]] = []
        self.unnoted: list[tuple[Name, str]] = []

    def __enter__(self) -> "_File":
        with contextlib.ExitStack() as opened:
            self.journal = open_hidden(self.journal_path)
            opened.callback(abandon, self.journal)  # what counts in it was flushed
            lock(self.journal.fileno(), self.output, self.journal_path)
            self.file = open_hidden(self.partial)
            opened.callback(abandon, self.file)
            self._continue()
            self.opened = opened.pop_all()
        self.noted_at = time.monotonic()
        return self

    def __exit__(
        self,
        error: Optional[type[BaseException]],
        value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if error and not self.rows_noted:
            self._remove()
        self.opened.close()

    def _remove(self) -> None:
        """Deletes both files, where nothing in them is worth keeping."""
        os.unlink(self.partial)
        os.unlink(self.journal_path)

    def _continue(self) -> None:
        """Continues at the last checkpoint and cuts off the rows beyond it, or starts anew."""
        self.journal.seek(0)
        lines = self.journal.read().split(b"\n")[:-1]  # text after the last newline is half a line
        notes = _notes(lines) if self.resume else []
        if len(notes) > 1 and os.path.getsize(self.partial) >= self._size(notes[-1]["rows"]):
            require_same_run(notes[0], self.run, self.output, "give resume=False to start anew")
        if len(notes) > 1 and self._has_rows(notes[-1]):
            self.done = self.before = notes[-1]["done"]
            self.rows = self.rows_noted = notes[-1]["rows"]
            self.crc = notes[-1]["crc32"]
            self.damaged = [(name, reason) for note in notes[1:] for name, reason in note["damaged"]]
            self.journal.truncate(sum(len(line) + 1 for line in lines))
            self.journal.seek(0, os.SEEK_END)
        else:
            self.journal.seek(0)
            self.journal.truncate()
            try:
                self._note(self.run)
            except OSError:
                self._remove()
                raise
        self.file.truncate(self._size(self.rows))
        self.file.seek(0, os.SEEK_END)

    def _has_rows(self, note: dict[str, Any]) -> bool:
        """Whether the rows of a checkpoint are in the file, unchanged."""
        found, left = 0, note["rows"] * len(self.run["probe"]) * 4
        self.file.seek(_NPY_HEADER)
        while left and (block := self.file.read(min(left, _CHUNK))):
            found, left = crc32(block, found), left - len(block)
        return not left and found == note["crc32"]

    def _size(self, rows: int) -> int:
        return _NPY_HEADER + rows * len(self.run["probe"]) * 4

    def add(self, rows: np.ndarray, batch: Batch) -> None:
        content = np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint8).data
        with naming(self.partial):
            self.file.write(content)
        self.crc = crc32(content, self.crc)
        self._count(rows, batch)
        self.unnoted += batch.damaged
        if time.monotonic() - self.noted_at > _CHECKPOINT_SECONDS:
            self._checkpoint()

    def _checkpoint(self) -> None:
        with naming(self.partial):
            self.file.flush()
            os.fsync(self.file.fileno())
        self._note({"done": self.done, "rows": self.rows, "damaged": self.unnoted, "crc32": self.crc})
        self.unnoted, self.rows_noted, self.noted_at = [], self.rows, time.monotonic()

    def _note(self, line: dict[str, Any]) -> None:
        with naming(self.journal_path):
            self.journal.write(json.dumps(line, default=lambda number: number.item()).encode() + b"\n")
            self.journal.flush()
            os.fsync(self.journal.fileno())

    def finish(self, paths: list[Name]) -> Features:
        if len(paths) != self.rows:  # the journal called other images damaged
            raise CheckpointError(f"{self.journal_path} is of other images: give resume=False to start anew")
        header = io.BytesIO()
        shape = (self.rows, len(self.run["probe"]))
        description = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        with naming(self.partial):
            self.file.seek(0)
            self.file.write(header.getvalue())
        self._checkpoint()
        if _is_parquet(self.output):
            self._write_parquet(paths)
        else:
            self._write_npy(paths)
        os.unlink(self.journal_path)
        return load_features(self.output)

    def _made_by(self) -> Optional[dict[str, Any]]:
        return (
            self.run["made_by"]
            if "made_by" in self.run
            else {"probe": self.run["probe"], "normalized": self.run["normalize"]}
        )

    def _write_npy(self, paths: list[Name]) -> None:
        """Renames the file; at no moment do the features have the paths of other images beside them."""
        with replacing(_json_of(self.output)) as (file, _):
            content = {"made_by": self._made_by(), "damaged": self.damaged, "paths": paths}
            file.write(json.dumps(content, indent=0).encode())
            file.flush()
            os.fsync(file.fileno())
            if os.path.exists(_json_of(self.output)):
                os.unlink(_json_of(self.output))
            os.replace(self.partial, self.output)

    def _write_parquet(self, paths: list[Name]) -> None:
        features = _known(np.load(self.partial, mmap_mode="r"), self._made_by())
        with replacing(self.output, ".parquet") as (file, _):
            write_table(file, features, paths, self.damaged)
        os.unlink(self.partial)


def write_table(
    file: Any,
    features: np.ndarray,
    paths: Sequence[Name],
    damaged: Sequence[tuple[Name, str]],
    metadata: Optional[dict[str, str]] = None,
) -> None:
    """Writes features [N, E] and the paths of their images as parquet to an open file; pyarrow is installed."""
    import pyarrow

    parquet, width = _pyarrow_parquet(), features.shape[1]
    kind = pyarrow.list_(pyarrow.float32(), width)
    name = pyarrow.int64() if paths and isinstance(paths[0], int) else pyarrow.string()
    made_by = json.dumps(getattr(features, "made_by", None))
    metadata = {"damaged": json.dumps(damaged), "made_by": made_by, **(metadata or {})}
    schema = pyarrow.schema([("path", name), ("feature", kind)], metadata)
    step = max(1, _CHUNK // (width * 4))
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(paths), step):
            rows = pyarrow.array(features[start : start + step].reshape(-1))
            columns = [
                pyarrow.array(paths[start : start + step], name),
                pyarrow.FixedSizeListArray.from_arrays(rows, width),
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _notes(lines: list[bytes]) -> list[dict[str, Any]]:
    """The lines of a journal, or none if they do not add up."""
    try:
        run, *checkpoints = (json.loads(line) for line in lines)
        counts = [run["count"], run["batch_size"], *(note[key] for note in checkpoints for key in ("done", "rows"))]
        sound = isinstance(run["images"], str) and all(type(number) is float for number in run["probe"])
        sound = sound and all(type(count) is int and count >= 0 for count in counts)
        done = rows = damaged = 0
        for note in checkpoints:
            damaged += len(_as_damaged(note["damaged"]))
            sound = sound and done <= note["done"] <= run["count"] and rows <= note["rows"]
            sound = sound and note["rows"] + damaged == note["done"]
            sound = sound and (note["done"] % run["batch_size"] == 0 or note["done"] == run["count"])
            done, rows = note["done"], note["rows"]
        return [run, *checkpoints] if sound else []
    except (LookupError, RecursionError, TypeError, ValueError, ZeroDivisionError):
        return []


def search(
    model: Encoder,
    preprocess: Callable[[Any], Any],
    features: np.ndarray,
    paths: Union[list[Any], np.ndarray],
    query: Any,
    top_k: int = IMAGES_FOUND,
) -> list[Match]:
    """Finds the images nearest to a text or to an image.

    Args:
        model: model from `load` that made the features.
        preprocess: from `load`.
        features: [N, E], normalised or not, as `embed` and `load_features` return them. An array in a file is read in
            pieces: it may be larger than the memory.
        paths: names of the N images.
        query: a text, if it is a string; an image, if it is a `pathlib.Path`, a PIL image, a uint8 array, the bytes of
            a file or an open one.
        top_k: largest number of images to return.

    Returns:
        The images found, the best first.

    Raises:
        ValueError: if the features do not fit the model or the paths, another model made them, or the image cannot be
            read.
        RuntimeError: if the text is too long.
    """
    target = _query_feature(model, preprocess, query)
    features = features if hasattr(features, "ndim") else np.asarray(features)
    paths = paths if isinstance(paths, (list, np.ndarray)) else list(paths)  # labels of pandas are not places
    if features.ndim != 2 or features.shape[1] != len(target) or len(features) != len(paths):
        raise ValueError(
            f"the features are {list(features.shape)}, expected [{len(paths)}, {len(target)}]: one row for each of the "
            f"{len(paths)} paths, as wide as the model's embedding"
        )
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; it must be at least 1")
    _require_same_model(model, preprocess, getattr(features, "made_by", None))
    best_rows, best_scores = np.empty(0, np.int64), np.empty(0, np.float32)
    step = max(1, _CHUNK // (4 * len(target)))
    for start in range(0, len(features), step):
        chunk = np.asarray(features[start : start + step], np.float32)  # [C, E]
        # BLAS may round equal rows differently: some of its kernels take rows by fours, and the rest alone.
        squares = np.einsum("ce,ce->c", chunk, chunk)  # [C]
        scores = np.einsum("ce,e->c", chunk, target) / np.sqrt(squares)  # [C]
        rows = np.concatenate([best_rows, np.arange(start, start + len(chunk))])
        scores = np.concatenate([best_scores, scores])
        best = np.lexsort([rows, -scores])[:top_k]  # equal scores in the order of rows
        best_rows, best_scores = rows[best], scores[best]
    return [Match(paths[row], float(score)) for row, score in zip(best_rows, best_scores)]


def _require_same_model(model: Encoder, preprocess: Callable[[Any], Any], made_by: Optional[dict[str, Any]]) -> None:
    """Raises ValueError if a picture's feature is not what the model of a file of features gave."""
    if made_by is None or not getattr(preprocess, "resolution", True):  # a text tower alone sees no pictures
        return
    with inference(model) as model:
        cosine = float(_rows(model, _probe(preprocess)[None])[0] @ unit(np.array(made_by["probe"])))
    if cosine < _SAME_MODEL:
        raise ValueError(
            f"another model or preprocessing made the features: for one picture their cosine with this one's is "
            f"{cosine:.2f}. Search with the model that made them, or embed the images again"
        )


def _query_feature(model: Encoder, preprocess: Callable[[Any], Any], query: Any) -> np.ndarray:
    """The feature [E] of a text or an image, of length 1."""
    with inference(model) as model:
        if isinstance(query, str):
            feature = text_features(model, [query])[0].astype(np.float32)  # [E]
        else:
            feature = _rows(model, array_maker(preprocess)(query)[None])[0]  # [E]
    return unit(feature)

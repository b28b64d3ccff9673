"""Image features of whole folders: compute them, keep them in files, search them by text or image.

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
import time
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from .checkpoints.files import StrPath, lock, replacing, require_place
from .defaults import BATCH_SIZE, IMAGES_FOUND
from .encoding import Encoder, encode, inference, progress_bar
from .extras import require
from .images import Batch, Name, as_images, batches, warn_of_damage
from .tokenizer import tokenize

_CHECKPOINT_SECONDS = 1.0  # of work that a killed process loses at most, beside its last batch
_NPY_HEADER = 128  # bytes; numpy pads to a multiple of 64, and no two-dimensional header needs more than this
_CHUNK = 1 << 26  # bytes of features searched or rewritten at once


class Features(NamedTuple):
    """What `embed` returns: features, and the images they are of.

    Attributes:
        features: float32 array [N, E], or a memory-mapped view of it where it is in a `.npy` file.
        paths: N paths as strings; for images that have none, their indices.
        damaged: (path, reason) of each image that was skipped.
    """

    features: np.ndarray
    paths: list[Name]
    damaged: list[tuple[Name, str]]


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
) -> Features:
    """Computes the image features of a folder, a list or a data set of any length.

    With an output, memory is constant. When the process ends early, whatever ends it, what was computed is kept in
    hidden files beside the output, and the next call with the same arguments continues there; the features are those of
    an uninterrupted run, bit for bit. The output gets its name when it is complete.

    Args:
        model: from `load`.
        preprocess: from `load`.
        images: a folder, whose images are found by `image_files`; a path; a list of paths, PIL images or uint8 arrays;
            or a `paddle.io.Dataset` whose items are such images, preprocessed Tensors, or tuples that start with one.
        output: None; or a file to write: `x.npy`, float32 [N, E], with paths and damaged images in `x.json` beside it;
            or `x.parquet`, with columns "path" and "feature", which needs pyarrow. `load_features` reads them.
        batch_size: images encoded at once.
        workers: threads that decode; by default one per core, eight at most.
        on_error: "raise", or "skip" to leave out images that cannot be read, list them in the result and warn.
        normalize: whether features are divided by their length, as for cosines. OpenAI's example of a linear probe
            takes them as they are.
        progress: whether to show a bar; by default where standard error is a terminal.
        resume: False to start anew where an earlier run was interrupted.

    Returns:
        `Features`.

    Raises:
        ValueError: if an image cannot be read and `on_error` is "raise", or none can be read; if there are no images;
            if an interrupted run left features of other images or of another model; or another process is writing.
        OSError: if a folder cannot be read, or the output cannot be written.
    """
    names, items = as_images(images)
    with inference(model):
        probe = _rows(model, _probe(preprocess)[None], normalize)[0]  # [E]
        opened: contextlib.AbstractContextManager[_Memory]
        if output is None:
            opened = contextlib.nullcontext(_Memory(len(names), len(probe)))
        else:
            run = {"images": _digest(names), "count": len(names), "batch_size": batch_size, "normalize": normalize}
            opened = _File(os.fspath(output), {**run, "probe": probe.tolist()}, resume)
        with opened as store, progress_bar(progress, total=len(names), initial=store.done, unit="image") as bar:
            read = batches(preprocess, names, items, batch_size, workers, on_error, store.done)
            with contextlib.closing(read):
                for batch in read:
                    rows = _rows(model, batch.pixels, normalize) if batch.indices else np.empty([0, len(probe)])
                    store.add(rows, batch)
                    bar.update(batch.end - store.before)
            if not store.rows:
                raise ValueError(f"none of the {len(names)} images can be read; {store.damaged[0][1]}")
            warn_of_damage(store.damaged)
            skipped = {name for name, _ in store.damaged}
            return store.finish([name for name in names if name not in skipped])


def require_output(path: str) -> None:
    """Raises what `embed` would for an output it cannot write, before any work is done.

    Raises:
        ValueError: if its name has another extension, or something else would be overwritten.
        FileNotFoundError: if there is no folder for it.
        ImportError: if it takes pyarrow, which is not installed.
    """
    if not path.endswith((".npy", ".parquet")):
        raise ValueError(f"the output is {path!r}; choose a name that ends with .npy or .parquet")
    require_place(path)
    if _is_parquet(path):
        _pyarrow_parquet()
    elif os.path.exists(_json_of(path)) and not os.path.exists(path):
        raise ValueError(f"{_json_of(path)} is of something else and would be overwritten; choose another output")


def load_features(path: StrPath) -> Features:
    """Reads what `embed` wrote.

    Args:
        path: path of a `.npy` file, which is mapped into memory and not read, or a `.parquet` file, which is read.

    Returns:
        `Features`.

    Raises:
        ValueError: if the file is not one of `embed`'s.
        OSError: if it or its `.json` cannot be read.
    """
    path = os.fspath(path)
    if _is_parquet(path):
        parquet = _pyarrow_parquet()
        with _refused_as_no_features(path):
            table = parquet.read_table(path)
            column = table.column("feature").combine_chunks()
            features = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
            paths, damaged = table.column("path").to_pylist(), json.loads(table.schema.metadata[b"damaged"])
    else:
        with _refused_as_no_features(path):
            features = np.load(path, mmap_mode="r", allow_pickle=False)
            dimensions = features.ndim
        described = _json_of(path)
        with open(described, encoding="utf-8") as file, _refused_as_no_features(described):
            known = json.load(file)
            paths, damaged = list(known["paths"]), list(known["damaged"])
        if dimensions != 2 or len(features) != len(paths):
            raise ValueError(f"{path} has the shape {list(features.shape)}, and {len(paths)} paths are beside it")
    return Features(features, paths, [tuple(pair) for pair in damaged])


def _pyarrow_parquet() -> ModuleType:
    require("parquet")
    from pyarrow import parquet

    return parquet


@contextlib.contextmanager
def _refused_as_no_features(path: str) -> Iterator[None]:
    """Says in our words what numpy, pyarrow and json find wrong: numpy calls other files pickles."""
    try:
        yield
    except (AttributeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of features: expected what `embed` writes") from error


def _rows(model: Encoder, pixels: np.ndarray, normalize: bool = True) -> np.ndarray:
    return encode(model, pixels, normalize).astype("float32").numpy()  # [B, E]


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


def _json_of(path: str) -> str:
    return os.path.splitext(path)[0] + ".json"


def _digest(names: list[Name]) -> str:
    return hashlib.sha256("\0".join(map(str, names)).encode("utf-8", "surrogateescape")).hexdigest()


def _probe(preprocess: Callable[[Any], Any]) -> np.ndarray:
    """A preprocessed image of noise: the same feature of it tells the same model and preprocessing."""
    noise = np.random.default_rng(0).integers(0, 256, [300, 400, 3], dtype=np.uint8)
    return np.asarray(preprocess(Image.fromarray(noise)))  # [3, R, R]


class _Memory:
    """Features kept as an array."""

    def __init__(self, count: int, width: int):
        self.features = np.empty([count, width], np.float32)
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
    """Features appended to a `.npy` file under a hidden name, and a journal of what is safely there.

    The journal has a line that describes the run, then one per checkpoint: images done, rows written, images damaged
    since the last. A checkpoint is noted when its rows are on the disk; what is beyond the last is cut off on resuming.
    """

    def __init__(self, output: str, run: dict[str, Any], resume: bool):
        require_output(output)
        folder, name = os.path.split(os.path.abspath(output))
        self.output, self.run, self.resume = output, run, resume
        self.partial = os.path.join(folder, f".{name}.partial")
        self.journal_path = os.path.join(folder, f".{name}.journal")
        self.done = self.before = self.rows = self.rows_noted = 0
        self.damaged: list[tuple[Name, str]] = []
        self.unnoted: list[tuple[Name, str]] = []

    def __enter__(self) -> "_File":
        self.journal = open(self.journal_path, "a+b")
        try:
            lock(self.journal, self.output, self.journal_path)
            open(self.partial, "ab").close()  # so that it exists
            self.file = open(self.partial, "r+b")
            try:
                self._continue()
            except BaseException:
                self.file.close()
                raise
        except BaseException:
            self.journal.close()
            raise
        self.noted_at = time.monotonic()
        return self

    def __exit__(
        self,
        error: Optional[type[BaseException]],
        value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if error and not self.rows_noted:  # nothing is worth keeping
            os.unlink(self.partial)
            os.unlink(self.journal_path)
        self.file.close()
        self.journal.close()

    def _continue(self) -> None:
        """Finds where the journal ends, and cuts off what is beyond; or starts anew."""
        self.journal.seek(0)
        lines = self.journal.read().split(b"\n")[:-1]  # what follows the last newline was not written whole
        notes = [json.loads(line) for line in lines]
        if self.resume and len(notes) > 1 and os.path.getsize(self.partial) >= self._size(notes[-1]["rows"]):
            self._require_same_run(notes[0])
            self.done = self.before = notes[-1]["done"]
            self.rows = self.rows_noted = notes[-1]["rows"]
            self.damaged = [tuple(pair) for note in notes[1:] for pair in note["damaged"]]
            self.journal.truncate(sum(len(line) + 1 for line in lines))
        else:
            self.journal.truncate(0)
            self._note(self.run)
        self.file.truncate(self._size(self.rows))
        self.file.seek(0, os.SEEK_END)

    def _size(self, rows: int) -> int:
        return _NPY_HEADER + rows * len(self.run["probe"]) * 4

    def _require_same_run(self, old: dict[str, Any]) -> None:
        new, keys = self.run, ("batch_size", "normalize")
        reasons = [f"{key} {old[key]} then, {new[key]} now" for key in keys if old[key] != new[key]]
        if (old["images"], old["count"]) != (new["images"], new["count"]):
            reasons.append(f"other images ({old['count']} then, {new['count']} now)")
        tolerance = 1e-5 * np.abs(new["probe"]).max()  # of a GPU that chose other kernels this time
        if len(old["probe"]) != len(new["probe"]) or not np.allclose(old["probe"], new["probe"], 0, tolerance):
            reasons.append("another model or preprocessing")
        if reasons:
            raise ValueError(
                f"an earlier run for {self.output} was interrupted, and differs from this one: {'; '.join(reasons)}. "
                "Run it again as it was to continue it, or with resume=False to start anew"
            )

    def add(self, rows: np.ndarray, batch: Batch) -> None:
        self.file.write(np.ascontiguousarray(rows, np.float32).data)
        self._count(rows, batch)
        self.unnoted += batch.damaged
        if time.monotonic() - self.noted_at > _CHECKPOINT_SECONDS:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self._note({"done": self.done, "rows": self.rows, "damaged": self.unnoted})
        self.unnoted, self.rows_noted, self.noted_at = [], self.rows, time.monotonic()

    def _note(self, line: dict[str, Any]) -> None:
        self.journal.write(json.dumps(line).encode() + b"\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def finish(self, paths: list[Name]) -> Features:
        header = io.BytesIO()
        shape = (self.rows, len(self.run["probe"]))
        description = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        self.file.seek(0)
        self.file.write(header.getvalue())
        self._checkpoint()
        if _is_parquet(self.output):
            self._write_parquet(paths, shape)
        else:
            self._write_npy(paths)
        os.unlink(self.journal_path)
        return load_features(self.output)

    def _write_npy(self, paths: list[Name]) -> None:
        """Renames the file, with no moment when features have the paths of others beside them."""
        with replacing(_json_of(self.output)) as (file, _):
            file.write(json.dumps({"paths": paths, "damaged": self.damaged}, indent=0).encode())
            file.flush()
            os.fsync(file.fileno())
            if os.path.exists(_json_of(self.output)):
                os.unlink(_json_of(self.output))
            os.replace(self.partial, self.output)

    def _write_parquet(self, paths: list[Name], shape: tuple[int, int]) -> None:
        import pyarrow

        parquet = _pyarrow_parquet()
        width = shape[1]
        kind = pyarrow.list_(pyarrow.float32(), width)
        name = pyarrow.string() if isinstance(paths[0], str) else pyarrow.int64()
        schema = pyarrow.schema([("path", name), ("feature", kind)], {"damaged": json.dumps(self.damaged)})
        features = np.load(self.partial, mmap_mode="r")
        step = max(1, _CHUNK // (width * 4))
        with replacing(self.output, ".parquet") as (file, _), parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, len(paths), step):
                rows = pyarrow.array(features[start : start + step].reshape(-1))
                columns = [
                    pyarrow.array(paths[start : start + step], name),
                    pyarrow.FixedSizeListArray.from_arrays(rows, width),
                ]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
        os.unlink(self.partial)


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
        model: from `load`: the one that made the features.
        preprocess: from `load`.
        features: [N, E], normalised or not, as `embed` and `load_features` return them. An array in a file is read in
            pieces: it may be larger than the memory.
        paths: N names of the images.
        query: a text, if it is a string; an image, if it is a `pathlib.Path`, a PIL image or a uint8 array.
        top_k: number of images to return, at most.

    Returns:
        A list of `Match`, the best first.

    Raises:
        ValueError: if the features do not fit the model or the paths, or the image cannot be read.
        RuntimeError: if the text is too long.
    """
    target = _query_feature(model, preprocess, query)
    if features.ndim != 2 or features.shape[1] != len(target) or len(features) != len(paths):
        raise ValueError(
            f"the features are {list(features.shape)}, expected [{len(paths)}, {len(target)}]: one row for each of the "
            f"{len(paths)} paths, as wide as the model's embedding"
        )
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it is at least 1")
    best_rows, best_scores = np.empty(0, np.int64), np.empty(0, np.float32)
    step = max(1, _CHUNK // (4 * len(target)))
    for start in range(0, len(features), step):
        chunk = np.asarray(features[start : start + step], np.float32)  # [C, E]
        scores = chunk @ target / np.linalg.norm(chunk, axis=1)  # [C]
        rows = np.concatenate([best_rows, np.arange(start, start + len(chunk))])
        scores = np.concatenate([best_scores, scores])
        best = np.lexsort([rows, -scores])[:top_k]  # of equal ones, the first
        best_rows, best_scores = rows[best], scores[best]
    return [Match(paths[row], float(score)) for row, score in zip(best_rows, best_scores)]


def _query_feature(model: Encoder, preprocess: Callable[[Any], Any], query: Any) -> np.ndarray:
    """The feature [E] of a text or an image, of length 1."""
    with inference(model):
        if isinstance(query, str):
            feature = model.encode_text(tokenize(query, model.context_length))[0].astype("float32").numpy()  # [E]
        else:
            feature = _rows(model, np.asarray(preprocess(query))[None])[0]  # [E]
    return feature / np.linalg.norm(feature)

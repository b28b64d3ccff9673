"""Compiled forms of models in the cache: made once, by one process, and loaded in seconds.

Compiling a ViT-B/32 takes longer than encoding some hundred images does, so the commands keep what they compile.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from . import __version__
from .checkpoints.dialects import from_checkpoint
from .checkpoints.files import StrPath, sha256
from .checkpoints.reading import read, shards
from .checkpoints.settings import FILES
from .defaults import BATCH_SIZE
from .engines import Predictor, require_engine
from .errors import CheckpointError
from .extras import makes_openvino, version_of
from .hub import CacheError, cache_folder, find, load, locked
from .images import batches
from .shards import Picture
from .transforms import ImageTransform
from .translation import MOST_BYTES, too_large

MOST_FORMS = 4  # kept; the one that was used longest ago goes first
FEWEST_PICTURES, MOST_PICTURES = 100, 300  # that int8 is quantised by
_TEMPORARY = (CheckpointError, FileNotFoundError)  # what a damaged form raises


class Form(NamedTuple):
    """A compiled form in the cache."""

    folder: str
    bytes: int
    used: float  # seconds since 1970, when it was last loaded


def load_compiled(
    name_or_path: StrPath,
    engine: Optional[str] = None,
    precision: str = "float32",
    cache_dir: Optional[StrPath] = None,
    activation: Optional[str] = None,
    threads: Optional[int] = None,
    calibration: Sequence[StrPath] = (),
    prefix: Optional[str] = None,
    resolution: Optional[int] = None,
    heads: Optional[int] = None,
    *,
    mirror: Optional[str] = None,
) -> tuple[Predictor, ImageTransform]:
    """Loads a model in the form made for speed on a CPU, which is compiled once and kept in the cache.

    A form belongs to the weights' checksum, and to the versions of this package, of Paddle and of the engine. The cache
    keeps four of them; `paddle-clip cache` tells their size and clears them.

    Args:
        name_or_path: what `load` takes.
        engine: "openvino" or "paddle", see `Predictor`; by default OpenVINO, if the extra `openvino` is installed and
            each tower has less than 2 GiB of weights.
        precision: "float32"; "bfloat16", on a processor that has such products; or by OpenVINO "int8", which quantises
            the image encoder.
        cache_dir: folder of the cache, see `load`.
        activation: "quickgelu" or "gelu", where a file does not tell, see `load`.
        threads: number of threads; by default one for each core this process may use.
        calibration: for "int8" the paths of 100 pictures or more of the kind the model will see. 300 of them, spread
            evenly, quantise it; other pictures make another form.
        prefix: start of the model's names in a file that has several, see `load`.
        resolution: side of the images in pixels, see `load`.
        heads: number of the image tower's heads, where nothing tells it, see `load`.
        mirror: base URL of a mirror, see `load`.

    Returns:
        The `Predictor` and its preprocessing.

    Raises:
        CheckpointError, DownloadError, ValueError: as `load` raises them; ValueError too for too few pictures.
        ImportError: if the engine is not installed.
        RuntimeError: if the model cannot be translated for the engine.
    """
    require_engine(engine, precision, "cpu", threads)
    pictures = _spread(calibration) if precision == "int8" else []
    path = find(name_or_path, cache_dir, mirror)
    settings = {"activation": activation, "prefix": prefix, "resolution": resolution, "heads": heads}
    engine = engine or default_engine(path, precision, **settings)
    folder = _folder(path, engine, cache_dir, settings, pictures)
    try:
        with locked(folder):
            if os.path.exists(folder):
                try:
                    return _opened(folder, engine, precision, threads)
                except _TEMPORARY as error:
                    warnings.warn(f"{folder} is damaged and is made again: {error}", RuntimeWarning, stacklevel=2)
                    shutil.rmtree(folder)
            _make(path, folder, engine, settings, pictures)
            _forget(cache_dir, folder)
            return _opened(folder, engine, precision, threads)
    except CacheError:
        if not os.path.exists(folder):
            raise
        return _opened(folder, engine, precision, threads)  # in a cache that is read-only


def default_engine(path: str, precision: str = "float32", **settings: Any) -> str:
    """The engine that `load_compiled` takes for a checkpoint by default."""
    if precision == "int8":
        return "openvino"
    if not makes_openvino():
        return "paddle"
    may_be_too_large = 2 * sum(map(os.path.getsize, shards(path))) > MOST_BYTES  # in float16, all in one tower
    if may_be_too_large and too_large(from_checkpoint(read(path), path, **settings).config):
        return "paddle"
    return "openvino"


def has_form(name_or_path: StrPath, engine: str, cache_dir: Optional[StrPath] = None, **settings: Any) -> bool:
    """Whether the cache holds the form that `load_compiled` makes; a model that is not downloaded yet has none."""
    return bool(forms(cache_dir)) and os.path.exists(
        _folder(find(name_or_path, cache_dir), engine, cache_dir, settings)
    )


def forms(cache_dir: Optional[StrPath] = None) -> list[Form]:
    """The compiled forms in the cache, the one used last first."""
    place, found = _place(cache_dir), []
    for name in os.listdir(place) if os.path.isdir(place) else ():
        folder = os.path.join(place, name)
        about = os.path.join(folder, "config.json")
        if os.path.isfile(about):
            size = sum(entry.stat().st_size for entry in os.scandir(folder))
            found.append(Form(folder, size, os.stat(about).st_mtime))
    return sorted(found, key=lambda form: -form.used)


def clear(cache_dir: Optional[StrPath] = None) -> list[Form]:
    """Deletes all compiled forms in the cache and returns what they were."""
    found = forms(cache_dir)
    for form in found:
        shutil.rmtree(form.folder)
    return found


def _place(cache_dir: Optional[StrPath]) -> str:
    return os.path.join(cache_folder(cache_dir), "compiled")


def _spread(paths: Sequence[Any]) -> Sequence[Any]:
    """At most 300 of some pictures, spread evenly, to quantise by."""
    if len(paths) < FEWEST_PICTURES:
        raise ValueError(
            f"int8 is quantised by pictures, and calibration has {len(paths)}; give {FEWEST_PICTURES} or more of the "
            "kind the model will see, or use precision='float32'"
        )
    return paths[:: -(-len(paths) // MOST_PICTURES)]


def _folder(
    path: str, engine: str, cache_dir: Optional[StrPath], settings: dict[str, Any], pictures: Sequence[Any] = ()
) -> str:
    """Where the form of a checkpoint is kept; all that it depends on is in the name."""
    beside = (os.path.join(os.path.dirname(path), name) for name in FILES)
    depends_on = {
        "weights": [sha256(file) for file in shards(path)],
        "settings": [sha256(file) for file in beside if os.path.isfile(file)],
        "asked": sorted(item for item in settings.items() if item[1] is not None),
        "engine": engine,
        "pictures": [_identity(picture) for picture in pictures],
        "versions": [__version__, *(version_of(name) for name in ("paddlepaddle", "paddlepaddle-gpu", "openvino"))],
    }
    described = json.dumps(depends_on, default=lambda number: number.item())  # numpy's
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.join(_place(cache_dir), f"{stem}-{engine}-{digest}")


def _identity(picture: Any) -> tuple[str, int, int]:
    """The path of a picture, and the size and time of its file or of the shard it is in."""
    state = os.stat(picture.shard if isinstance(picture, Picture) else picture)
    return str(picture), state.st_size, state.st_mtime_ns


def _make(path: str, folder: str, engine: str, settings: dict[str, Any], pictures: Sequence[Any]) -> None:
    from .deploy import export  # here, as it takes Paddle

    model, preprocess = load(path, **settings)
    calibration = _pixels(preprocess, pictures) if pictures else None
    export(model, folder, openvino=engine == "openvino", calibration=calibration)


def _pixels(preprocess: ImageTransform, pictures: Sequence[Any]) -> np.ndarray:
    """Those of the pictures that can be read, [N, 3, R, R]; whoever encodes them tells of the others."""
    parts = [batch.pixels for batch in batches(preprocess, pictures, pictures, BATCH_SIZE, on_error="skip")]
    pixels = np.concatenate([part for part in parts if len(part)] or [np.empty([0])])
    if len(pixels) < FEWEST_PICTURES:
        raise ValueError(
            f"int8 takes {FEWEST_PICTURES} pictures or more, and of {len(pictures)} only {len(pixels)} can be read"
        )
    return pixels


def _opened(folder: str, engine: str, precision: str, threads: Optional[int]) -> tuple[Predictor, ImageTransform]:
    predictor = Predictor(folder, threads, "cpu", engine, precision)
    with contextlib.suppress(OSError):  # of a cache that is read-only, from which nothing is deleted
        os.utime(os.path.join(folder, "config.json"))
    return predictor, predictor.preprocess


def _forget(cache_dir: Optional[StrPath], new: str) -> None:
    """Deletes the forms used longest ago beyond those that are kept."""
    for form in forms(cache_dir)[MOST_FORMS:]:
        if form.folder != new:
            shutil.rmtree(form.folder, ignore_errors=True)

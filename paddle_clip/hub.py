"""Models by name or file: OpenAI's catalogue, download, cache, `load`."""

import contextlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

from filelock import FileLock
from tqdm import tqdm

from .checkpoints import dialects
from .checkpoints.conversion import convert
from .checkpoints.files import StrPath, expanded, naming, open_hidden, sha256
from .checkpoints.reading import find_weights, read
from .checkpoints.writing import verify_checksums
from .encoding import HALF_DTYPES, device_name, require_dtype, require_dynamic_mode
from .errors import CheckpointError
from .presets import PRESETS, TINY, TINY_CN, Preset, build
from .presets import preset as find_preset
from .transforms import ImageTransform, image_transform

if TYPE_CHECKING:
    from .model import CLIP

BASE_URL = "https://openaipublic.azureedge.net/clip/models"
LOAD_DTYPES = ("float32", "float64", *HALF_DTYPES)
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
_SLOWEST, _SLOW_SECONDS = 2048, 60  # bytes a second, over so many seconds, below which a download is given up
# OpenAI's files have about two bytes for each parameter, and a MB or so of code beside them. None has four.
_BYTES_OF_PARAMETER, _BYTES_BESIDE = 4, 1 << 24


class DownloadError(OSError):
    """An official file cannot be fetched. The message names the URL and the way to do without the network."""


class CacheError(OSError):
    """The cache cannot be made or written. The message names the folder and how to choose another."""


def available_models() -> list[str]:
    """OpenAI's model names, as `load` takes them."""
    return [row.name for row in PRESETS]


def load(
    name_or_path: StrPath,
    dtype: Any = "float32",
    cache_dir: Optional[StrPath] = None,
    activation: Optional[str] = None,
    prefix: Optional[str] = None,
    resolution: Optional[int] = None,
    heads: Optional[int] = None,
    *,
    device: Optional[Any] = None,
    jit: bool = False,
    download_root: Optional[StrPath] = None,
    mirror: Optional[str] = None,
) -> "tuple[CLIP, ImageTransform]":
    """Loads a CLIP model and the preprocessing of its images (OpenAI's `clip.load`).

    Args:
        name_or_path: a name listed by `available_models()`, which is downloaded and converted once; "tiny", a small
            model of coloured shapes that is in the package and needs no network, or "tiny_cn", which knows them in
            Chinese; or the path of a `.pt`, `.pdparams` or `.safetensors` file, of this library or another, or of a
            model's folder: all that `convert` takes.
        dtype: what the towers compute in: "float32", "float64", or on a GPU "float16" or "bfloat16"; half precision
            leaves norms, embeddings and `logit_scale` in float32, as in OpenAI's files. Paddle's own, such as
            `paddle.float32`, will do too.
        cache_dir: folder for downloaded and converted files; by default the environment variable PADDLE_CLIP_CACHE,
            or ~/.cache/paddle_clip. It may be read-only, if it holds what is needed.
        activation: "quickgelu" or "gelu", for a file that does not tell: one of another program, or a GELU model saved
            with `paddle.save`, which keeps no metadata. Where only OpenAI's names tell, which open_clip shares, a
            warning says so.
        prefix: start of the model's names in a file that has several, such as "teacher.".
        resolution: side R of the images in pixels, for which the image positions are interpolated (bicubic, with
            antialiasing, as in open_clip); by default that of the file.
        heads: number of the image tower's heads, where neither the file nor what is beside it tells it.
        device: "cpu", "gpu", "gpu:1", or PyTorch's "cuda": where the model is put, and all Tensors that are made from
            then on, as by `paddle.set_device`. By default Paddle's current device.
        jit: False, as in OpenAI's code; in place of True there is `compile`.
        download_root: OpenAI's name of `cache_dir`.
        mirror: base URL of a mirror of OpenAI's files, which is checked as OpenAI's are; by default the environment
            variable PADDLE_CLIP_MIRROR, or OpenAI's own.

    Returns:
        The model, in eval mode, and the callable PIL image, path or uint8 array -> float32 Tensor [3, R, R], which
        prepares pictures as the file, or the settings beside it, say. A file with one tower alone makes a model that
        encodes with it, and a warning says what the model lacks.

    Raises:
        ValueError: if the dtype is unknown or cannot run on the current device, the name is neither a model nor a
            file, or the model cannot have the resolution or the heads.
        CheckpointError: if the file is not a CLIP checkpoint.
        DownloadError: if the model must be fetched and cannot be.
        OSError: if the cache cannot be made or written.
        RuntimeError: if Paddle is in static mode.
    """
    import paddle

    from .layers import load_strictly, undrawn

    require_dynamic_mode()
    if jit:
        raise ValueError("jit=True: load(name) gives the layers, and paddle_clip.compile(model) makes them fast")
    dtype = dtype_name(dtype)
    if device is not None:
        paddle.set_device(device_name(device))
    require_dtype(dtype, paddle.get_device())
    path = find(name_or_path, cache_dir or download_root, mirror)
    checkpoint = read(path)
    verify_checksums(checkpoint, path)
    weights = dialects.from_checkpoint(checkpoint, path, activation, prefix, resolution, heads)
    if weights.alone:
        lacks = "encode_text" if weights.config.has_image else "encode_image"
        warnings.warn(f"{path} is {weights.alone}: {lacks} and logits take the whole model", stacklevel=2)
    if weights.activation_assumed:
        warnings.warn(
            f"{path}: activation {weights.config.activation} by {weights.activation_from}; "
            "a file that open_clip trained with GELU needs activation='gelu'",
            stacklevel=2,
        )
    with undrawn(), _float32_by_default():
        model = build(weights.config)
    if dtype == "float64":
        model.to(dtype="float64")
    elif dtype in HALF_DTYPES:
        for layer in model.sublayers():
            if isinstance(layer, (paddle.nn.Conv2D, paddle.nn.Linear)):
                layer.to(dtype=getattr(paddle, dtype))
    # Released as they are read, or the file's pages would take as much memory as the weights.
    load_strictly(model, weights.arrays, release=checkpoint.release)
    model.eval()
    model.preprocessing = weights.preprocessing
    return model, image_transform(weights.config.image_resolution, *weights.preprocessing)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of `load`: a string, or Paddle's or numpy's own, such as `paddle.float32`."""
    name = getattr(dtype, "__name__", None) or str(dtype).split(".")[-1]
    if name.partition(":")[0] in ("cpu", "cuda", "gpu"):
        raise ValueError(f"dtype is {dtype!r}, which is a device: load(name, device={name!r})")
    if name not in LOAD_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(LOAD_DTYPES)}")
    return name


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """Layers are made in float32, whatever `paddle.set_default_dtype` says."""
    import paddle

    chosen = paddle.get_default_dtype()
    paddle.set_default_dtype("float32")
    try:
        yield
    finally:
        paddle.set_default_dtype(chosen)


def find(name_or_path: StrPath, cache_dir: Optional[StrPath] = None, mirror: Optional[str] = None) -> str:
    """The path of a file, of a folder's weights, or of the file of a model by name, fetched if need be; see `load`."""
    name_or_path = os.fsdecode(name_or_path)
    if name_or_path not in (*available_models(), TINY.name, TINY_CN.name):
        path = find_weights(name_or_path)
        if os.path.isfile(path):
            return path
    row = _row_of(name_or_path)
    if row in (TINY, TINY_CN):
        return os.path.join(os.path.dirname(__file__), "data", row.file)
    return _cached(row, cache_folder(cache_dir), mirror)


def _row_of(name: str) -> Preset:
    """The row of a model that has a published file, by one of its names."""
    ways = "or give the path of a .pt, .pdparams or .safetensors file or of a folder"
    try:
        row = find_preset(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is neither a file nor a model: {error}, {ways}") from None
    if not row.file:
        raise ValueError(f"{row.name} is none of OpenAI's models, which can be fetched: fetch its file, {ways}")
    return row


def url_of(row: Preset, mirror: Optional[str] = None) -> str:
    """Where OpenAI publishes the file of a preset, or the mirror has it that is given or PADDLE_CLIP_MIRROR names."""
    base = mirror or os.environ.get("PADDLE_CLIP_MIRROR") or BASE_URL
    return f"{base.rstrip('/')}/{row.sha256}/{row.file}"


def cache_folder(cache_dir: Optional[StrPath] = None) -> str:
    """The folder of downloaded, converted and compiled files: as given, $PADDLE_CLIP_CACHE, or ~/.cache/paddle_clip."""
    return expanded(cache_dir or os.environ.get("PADDLE_CLIP_CACHE") or os.path.join("~", ".cache", "paddle_clip"))


def _cached(row: Preset, cache_dir: str, mirror: Optional[str] = None) -> str:
    """The path of a model's converted weights, which are made at most once, by one process at a time."""
    original = os.path.join(cache_dir, row.file)
    converted = os.path.splitext(original)[0] + ".pdparams"
    if os.path.exists(converted):  # it got its name when it was complete
        return converted
    try:
        with locked(original):
            if not os.path.exists(converted):
                _fetch(row, original, mirror)
                convert(original, converted)
    except (CacheError, PermissionError):
        if not os.path.exists(original):
            raise
        _require_official(row, original)
        return original  # in a cache that is read-only, and holds what is needed
    return converted


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Locks a file of the cache for this process, and makes its folder.

    Raises:
        CacheError: if the system does not let it.
    """
    lock = FileLock(path + ".lock")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
        raise CacheError(
            f"the cache {os.path.dirname(path)} cannot be written: {error}. Give cache_dir=, or set PADDLE_CLIP_CACHE, "
            "to a folder that can be"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _fetch(row: Preset, path: str, mirror: Optional[str] = None) -> None:
    """Makes `path` the official file of a preset, continuing an interrupted download."""
    url = url_of(row, mirror)
    if os.path.exists(path):
        _require_official(row, path)
        return
    partial = path + ".partial"
    try:
        _download(url, partial, _BYTES_OF_PARAMETER * row.parameters + _BYTES_BESIDE)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(
            f"cannot download {row.name} from {url} ({error}{_advice(error)}). Run it again to continue; or fetch the "
            f"file elsewhere and put it into {os.path.dirname(path)}, or load it by its path; or set "
            "PADDLE_CLIP_MIRROR (in Python mirror=, too) to the base URL of a mirror. "
            f"The model {TINY.name!r} needs no network"
        ) from error
    found = sha256(partial)
    if found != row.sha256:
        os.unlink(partial)
        raise DownloadError(f"{url} gave a file with SHA-256 {found}, expected {row.sha256}; run it again")
    os.replace(partial, path)


def _require_official(row: Preset, path: str) -> None:
    found = sha256(path)
    if found != row.sha256:
        raise CheckpointError(
            f"{path} is not OpenAI's {row.file}: its SHA-256 is {found}, expected {row.sha256}. "
            "Delete it to download it again, or load it by its path if it is your own"
        )


def _advice(error: Exception) -> str:
    """What helps against an error of the network, where it can be told."""
    if isinstance(getattr(error, "reason", error), ssl.SSLError):
        return "; where a network has certificates of its own, set SSL_CERT_FILE to the file that holds them"
    return ""


def _download(url: str, partial: str, largest: int) -> None:
    """Appends to `partial` what it lacks of the file at `url`, which has at most `largest` bytes."""
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing beyond it: complete, or not the same file, which its SHA-256 tells
            return
        raise
    with response:
        have, total = _place(response, have)
        if total is not None and total > largest:
            raise OSError(f"it is said to have {total:,} bytes, and the file has {largest:,} at most")
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(url), disable=None)
        with bar, naming(partial), open_hidden(partial) as file:
            file.truncate(have)
            file.seek(have)
            for chunk in _chunks(response):
                if file.tell() + len(chunk) > largest:
                    file.truncate(0)  # it is another file
                    raise OSError(f"it goes on after {largest:,} bytes, which the file has at most")
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() != total:
                raise OSError(f"the connection closed after {file.tell():,} of {total:,} bytes")


def _place(response: http.client.HTTPResponse, have: int) -> tuple[int, Optional[int]]:
    """Where the bytes of a response belong in the file, and the file's size if it is told."""
    if response.status not in (200, 206, None):  # none is given for a mirror's file://
        raise OSError(f"the server answered {response.status} {response.reason}, and sent no file")
    start = have if response.status == 206 else 0  # otherwise the server sends the file from its start
    sent = response.headers.get("Content-Range")
    if response.status == 206 and sent is not None and not sent.startswith(f"bytes {start}-"):
        raise OSError(f"the server sent {sent:.80} of the file, and was asked for what follows byte {start}")
    length = response.headers.get("Content-Length")
    if length is not None and not length.isdecimal():
        raise OSError(f"the server says that it sends {length!r:.80} bytes")
    return start, None if length is None else start + int(length)


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The parts of a response as they arrive; raises OSError where they arrive too slowly to be waited for."""
    begun, received = time.monotonic(), 0
    while chunk := response.read1(_CHUNK):
        yield chunk
        received += len(chunk)
        seconds = time.monotonic() - begun
        if seconds > _SLOW_SECONDS:
            if received < _SLOWEST * seconds:
                raise OSError(f"{received:,} bytes came in {seconds:.0f} s, which is too slow to wait for")
            begun, received = time.monotonic(), 0

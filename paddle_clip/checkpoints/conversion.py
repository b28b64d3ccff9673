"""A checkpoint file in, a weights file out: `convert`, `check` and `save`."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np

from ..config import CLIPConfig
from ..errors import CheckpointError
from ..presets import PRESETS, preset_of
from . import dialects
from .casting import cast, dtype_name
from .files import Checkpoint, StrPath, sha256
from .reading import read
from .writing import Progress, no_progress, verify_checksums, write

TARGET_DTYPES = ("float32", "float16", "bfloat16", "published", "keep")


class Report(NamedTuple):
    """What a file is, and what a conversion did."""

    kind: str  # of file, and the program whose names its tensors have
    config: CLIPConfig
    preset: Optional[str]  # OpenAI's name, or None for a model of other sizes
    activation_from: str  # what told the activation
    activation_assumed: bool  # whether only names told it that models of either activation have
    official: Optional[str]  # name of the official file whose SHA-256 the input has, or None
    sha256: str  # of the input
    tensors: int  # weights
    dropped: list[str]  # names of the model's tensors that are not weights
    ignored: int  # number of tensors beside the model, such as an optimizer's
    prefix: str  # of the model's names in the file
    output: str = ""
    bytes: int = 0  # of the output
    seconds: float = 0.0


class Contents(NamedTuple):
    """What `check` counts in a file."""

    dtypes: dict[str, int]  # {dtype: number of weights}
    nan: int
    inf: int
    checksums: int  # number of tensors compared with the checksums the file carries; 0 if it carries none


class Model(Protocol):
    """What `save` needs of a model; a `CLIP` has it."""

    config: CLIPConfig

    def state_dict(self) -> dict[str, Any]: ...


def convert(
    source: StrPath,
    output: Optional[StrPath] = None,
    dtype: str = "float32",
    activation: Optional[str] = None,
    progress: Progress = no_progress,
) -> Report:
    """Converts a CLIP checkpoint, with neither torch nor Paddle.

    Args:
        source: path of a checkpoint, recognised by its content: of OpenAI, open_clip, Hugging Face, paddleclip 1.0 or
            this package, as PyTorch, Paddle or safetensors save it.
        output: path to write, by extension `.pdparams`, `.safetensors` or `.pt` (OpenAI's names, for PyTorch). By
            default the source with the extension `.pdparams`.
        dtype: "float32", "float16", "bfloat16", "published" for OpenAI's mix of float16 and float32, or "keep" for
            each tensor's own.
        activation: "quickgelu" or "gelu", where the file does not tell.
        progress: wraps an iterable of one name per tensor written, and is told their number: a progress bar.

    Returns:
        A `Report`.

    Raises:
        CheckpointError: if the source is not a CLIP checkpoint or the output cannot be written. Nothing is written
            then, and an existing output is untouched.
        OSError: likewise, if the system refuses to read or write a file.
        ValueError: if the dtype or the activation is unknown.
    """
    start = time.perf_counter()
    source = os.fspath(source)
    output = os.path.splitext(source)[0] + ".pdparams" if output is None else os.fspath(output)
    if dtype not in TARGET_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(TARGET_DTYPES)}")
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(source, output):
        raise CheckpointError(f"{output} is the input itself; choose another output")
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(sha256, source)
        checkpoint = read(source)
        weights = dialects.from_checkpoint(checkpoint, source, activation)
        verify_checksums(checkpoint, source)

        def metadata(checksums: str) -> dict[str, str]:
            described = {"activation": weights.config.activation, "source": os.path.basename(source)}
            return {**described, "source_sha256": digest.result(), "crc32": checksums}

        dtype_of: Callable[[str], str] = dialects.published_dtype if dtype == "published" else lambda name: dtype
        write(output, _layout(weights.arrays, output), dtype_of, metadata, progress, checkpoint.release)
        report = _report(checkpoint, weights, digest.result())
    seconds = time.perf_counter() - start
    return report._replace(output=output, bytes=os.path.getsize(output), seconds=seconds)


def check(source: StrPath, activation: Optional[str] = None) -> tuple[Report, Contents]:
    """Reports on a checkpoint without writing anything.

    Args:
        source: path of a checkpoint.
        activation: as for `convert`.

    Returns:
        A `Report` and its `Contents`.

    Raises:
        CheckpointError: if it is not a CLIP checkpoint, or a tensor changed since we wrote the file.
        OSError: if it cannot be read.
    """
    source = os.fspath(source)
    checkpoint = read(source)
    weights = dialects.from_checkpoint(checkpoint, source, activation)
    checksums = verify_checksums(checkpoint, source)
    dtypes: dict[str, int] = {}
    nan = inf = 0
    for array in weights.arrays.values():
        name = dtype_name(array.dtype)
        dtypes[name] = dtypes.get(name, 0) + 1
        array = np.asarray(array)
        if name == "bfloat16":
            array = cast(array, "float32")
        finite = np.isfinite(array)
        if not finite.all():
            missing = int(np.isnan(array).sum())
            nan, inf = nan + missing, inf + int(array.size - finite.sum()) - missing
        checkpoint.release()
    return _report(checkpoint, weights, sha256(source)), Contents(dtypes, nan, inf, checksums)


def save(model: Model, path: StrPath) -> None:
    """Writes a model's weights to a file `load` reads, with its activation.

    Args:
        model: a `CLIP`.
        path: the file, by extension `.safetensors`, `.pt` (OpenAI's names and layouts, for PyTorch) or
            `.pdparams`. It gets its name once it is complete and has been read back.

    Raises:
        CheckpointError: if `path` has another extension or cannot become the file; an existing one is untouched.
        OSError: likewise, if the system refuses to write.
    """
    path = os.fspath(path)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    described = {"activation": model.config.activation}
    write(path, _layout(arrays, path), lambda name: "keep", lambda checksums: {**described, "crc32": checksums})


def _layout(arrays: dict[str, Any], output: str) -> dict[str, Any]:
    """The arrays under the names and in the layouts that an output has by its extension."""
    if not output.endswith(".pt"):
        return arrays
    return dict(dialects.to_openai(name, np.asarray(array)) for name, array in arrays.items())


def _report(checkpoint: Checkpoint, weights: dialects.Weights, digest: str) -> Report:
    row = preset_of(weights.config)
    return Report(
        kind=f"{checkpoint.kind}, {weights.dialect}'s names",
        config=weights.config,
        preset=row.name if row else None,
        activation_from=weights.activation_from,
        activation_assumed=weights.activation_assumed,
        official=next((row.file for row in PRESETS if row.sha256 == digest), None),
        sha256=digest,
        tensors=len(weights.arrays),
        dropped=weights.dropped,
        ignored=weights.ignored,
        prefix=weights.prefix,
    )

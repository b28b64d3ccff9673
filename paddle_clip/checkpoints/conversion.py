"""Converts and checks checkpoint files, and saves models: `convert`, `check` and `save`."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np

from ..checks import unwrapped
from ..config import CLIPConfig, Preprocessing
from ..errors import CheckpointError
from ..presets import PRESETS, preset_of
from . import dialects
from .casting import cast, dtype_name
from .files import Checkpoint, StrPath, expanded, sha256
from .reading import INDEX, find_weights, read
from .settings import metadata_of
from .writing import Progress, no_progress, verify_checksums, write

TARGET_DTYPES = ("float32", "float16", "bfloat16", "published", "keep")


class Report(NamedTuple):
    """The description of a file and of its conversion."""

    kind: str  # form of the file, and the program that named its tensors
    config: CLIPConfig
    preset: Optional[str]  # OpenAI's name of the model, or None for other sizes
    activation_from: str  # source of the activation
    activation_assumed: bool  # whether its source is names that models of either activation have
    official: Optional[str]  # name of the official file whose SHA-256 the input has, or None
    sha256: str  # SHA-256 of the input
    tensors: int  # number of weights
    dropped: list[str]  # names of the model's tensors that are not weights
    ignored: int  # number of tensors beside the model, such as an optimizer's
    prefix: str  # prefix of the model's names in the file
    output: str = ""
    bytes: int = 0  # size of the output
    seconds: float = 0.0
    preprocessing: Preprocessing = Preprocessing()  # how the model's pictures are prepared


class Contents(NamedTuple):
    """The numbers that `check` counts in a file."""

    dtypes: dict[str, int]  # {dtype: number of weights}
    nan: int
    inf: int
    checksums: int  # number of tensors compared with checksums in the file; 0 if it has none


class Model(Protocol):
    """The part of a model that `save` uses; a `CLIP` has it."""

    config: CLIPConfig
    preprocessing: Preprocessing

    def state_dict(self) -> dict[str, Any]: ...


def convert(
    source: StrPath,
    output: Optional[StrPath] = None,
    dtype: str = "float32",
    activation: Optional[str] = None,
    progress: Progress = no_progress,
    prefix: Optional[str] = None,
    resolution: Optional[int] = None,
    heads: Optional[int] = None,
) -> Report:
    """Converts a CLIP checkpoint, with neither torch nor Paddle.

    If it fails, nothing is written, and an existing output is untouched.

    Args:
        source: path of a checkpoint, recognised by its content: of OpenAI, open_clip, Hugging Face, paddleclip 1.0 or
            this package, PaddleNLP or PaddleMIX, as PyTorch, Paddle or safetensors save it; or the folder of a model,
            see `find_weights`. One tower alone will do.
        output: path to write, by extension `.pdparams`, `.safetensors` or `.pt` (OpenAI's names, for PyTorch). By
            default the source with the extension `.pdparams`, beside it.
        dtype: "float32", "float16", "bfloat16", "published" for OpenAI's mix of float16 and float32, or "keep" for
            the dtype each tensor has.
        activation: activation of the model, "quickgelu" or "gelu", where the file does not tell it.
        progress: function that shows an iterable of tensor names, whose number it gets too, as a progress bar.
        prefix: start of the model's names in the file, such as "teacher.", where it has several models.
        resolution: side of the images in pixels, for which the image positions are interpolated (bicubic, with
            antialiasing, as in open_clip); by default that of the file.
        heads: number of the image tower's heads, where neither the file nor what is beside it tells it.

    Returns:
        A report on the file and its conversion.

    Raises:
        CheckpointError: if the source is not a CLIP checkpoint or the output cannot be written.
        OSError: if the system refuses to read or write a file.
        ValueError: if the dtype or the activation is unknown, or the model cannot have the resolution or the heads.
    """
    start = time.perf_counter()
    source = find_weights(source)
    output = default_output(source) if output is None else expanded(output)
    if dtype not in TARGET_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(TARGET_DTYPES)}")
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(source, output):
        raise CheckpointError(f"{output} is the input itself; choose another output")
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(sha256, source)
        checkpoint = read(source)
        weights = dialects.from_checkpoint(checkpoint, source, activation, prefix, resolution, heads)
        verify_checksums(checkpoint, source)

        def metadata(checksums: str) -> dict[str, str]:
            described = {**metadata_of(weights.config, weights.preprocessing), "source": os.path.basename(source)}
            return {**described, "source_sha256": digest.result(), "crc32": checksums}

        dtype_of: Callable[[str], str] = dialects.published_dtype if dtype == "published" else lambda name: dtype
        write(output, layout(weights.arrays, output), dtype_of, metadata, progress, checkpoint.release)
        report = _report(checkpoint, weights, digest.result())
    seconds = time.perf_counter() - start
    return report._replace(output=output, bytes=os.path.getsize(output), seconds=seconds)


def default_output(source: str) -> str:
    """The path that `convert` writes by default: model.pdparams for model.safetensors, in shards or not."""
    return os.path.splitext(source[: -len(INDEX)] if source.endswith(INDEX) else source)[0] + ".pdparams"


def check(
    source: StrPath,
    activation: Optional[str] = None,
    prefix: Optional[str] = None,
    resolution: Optional[int] = None,
    heads: Optional[int] = None,
) -> tuple[Report, Contents]:
    """Reports on a checkpoint without writing anything.

    Args:
        source: path of a checkpoint or of a folder, see `convert`.
        activation, prefix, resolution, heads: see `convert`.

    Returns:
        A report on the file, and the counts of its contents.

    Raises:
        CheckpointError: if it is not a CLIP checkpoint, or a tensor changed since we wrote the file.
        OSError: if it cannot be read.
    """
    source = find_weights(source)
    checkpoint = read(source)
    weights = dialects.from_checkpoint(checkpoint, source, activation, prefix, resolution, heads)
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
            nans = int(np.isnan(array).sum())
            nan, inf = nan + nans, inf + int(array.size - finite.sum()) - nans
        checkpoint.release()
    return _report(checkpoint, weights, sha256(source)), Contents(dtypes, nan, inf, checksums)


def save(model: Model, path: StrPath) -> None:
    """Writes a model's weights and its settings to a file that `load` reads.

    Args:
        model: a `CLIP`, or one in `paddle.DataParallel`.
        path: path to write, by extension `.safetensors`, `.pt` (OpenAI's names and layouts, for PyTorch) or
            `.pdparams`. The file gets its name once it is complete and has been read back.

    Raises:
        CheckpointError: if `path` has another extension or cannot be written; an existing file is untouched.
        OSError: if the system refuses to write; an existing file is untouched.
        ValueError: if `model` is none, such as a state dict.
    """
    if isinstance(model, dict):
        raise ValueError(
            "save takes the model, which knows its activation, and found a state dict: save(model, path), or keep the "
            "dict alone with paddle.save(state_dict, path)"
        )
    model = unwrapped(model)
    save_weights({name: tensor.numpy() for name, tensor in model.state_dict().items()}, model, path)


def save_weights(arrays: dict[str, Any], model: Model, path: StrPath) -> None:
    """Writes weights of a model that need not be those it has; see `save`."""
    path = expanded(path)
    described = metadata_of(model.config, model.preprocessing)
    write(path, layout(arrays, path), lambda name: "keep", lambda checksums: {**described, "crc32": checksums})


def layout(arrays: dict[str, Any], output: str) -> dict[str, Any]:
    """The arrays under the names and in the layouts that the extension of the output asks for."""
    if not output.endswith(".pt"):
        return arrays
    prefix = "state_dict." if any(name.startswith("bert.") for name in arrays) else ""  # as cn_clip loads it
    theirs = (dialects.to_openai(name, np.asarray(array)) for name, array in arrays.items())
    return {prefix + name: array for name, array in theirs}


def _report(checkpoint: Checkpoint, weights: dialects.Weights, digest: str) -> Report:
    row = preset_of(weights.config)
    return Report(
        kind=", ".join(filter(None, [checkpoint.kind, f"{weights.dialect}'s names", weights.alone])),
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
        preprocessing=weights.preprocessing,
    )

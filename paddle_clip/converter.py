"""A checkpoint file in, a weights file out: what the doors in convert/ and the cache of `hub` do."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import numpy as np

from . import archives, weights, writers
from .errors import CheckpointError
from .presets import PRESETS, CLIPConfig, preset_of

DTYPES = ("float32", "float16", "bfloat16", "published", "keep")


class Report(NamedTuple):
    """What a file is, and what a conversion did."""

    kind: str  # of file, and the program whose names its tensors have
    config: CLIPConfig
    preset: Optional[str]  # OpenAI's name, or None for a model of other sizes
    activation_from: str  # what told the activation
    official: Optional[str]  # name of the official file whose SHA-256 the input has, or None
    sha256: str  # of the input
    tensors: int  # weights
    dropped: list  # names of the model's tensors that are not weights
    ignored: int  # number of tensors beside the model, such as an optimizer's
    prefix: str  # of the model's names in the file
    output: str = ""
    bytes: int = 0  # of the output
    seconds: float = 0.0


class Contents(NamedTuple):
    """What `check` counts in a file."""

    dtypes: dict  # {dtype: number of weights}
    nan: int
    inf: int
    checksums: int  # number of tensors compared with the checksums the file carries; 0 if it carries none


def convert(source, output=None, dtype="float32", activation=None, progress=lambda names, total: names):
    """Converts a CLIP checkpoint, with neither torch nor paddle.

    Args:
        source: path of a checkpoint, recognised by its content: see `archives.read` and `weights.DIALECTS`.
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
    """
    start = time.perf_counter()
    source = os.fspath(source)
    output = os.path.splitext(source)[0] + ".pdparams" if output is None else os.fspath(output)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(source, output):
        raise CheckpointError(f"{output} is the input itself; choose another output with -o")
    with ThreadPoolExecutor(1) as pool:
        sha256 = pool.submit(archives.sha256, source)
        checkpoint = archives.read(source)
        found = weights.from_checkpoint(checkpoint, source, activation)
        writers.verify_checksums(checkpoint, source)
        arrays = found.arrays
        if output.endswith(".pt"):
            arrays = dict(weights.to_openai(name, np.asarray(array)) for name, array in arrays.items())

        def metadata(checksums):
            told = {"activation": found.config.activation, "source": os.path.basename(source)}
            return {**told, "source_sha256": sha256.result(), "crc32": checksums}

        dtype_of = weights.published_dtype if dtype == "published" else lambda name: dtype
        writers.write(output, arrays, dtype_of, metadata, progress, checkpoint.release)
        report = _report(checkpoint, found, sha256.result())
    seconds = time.perf_counter() - start
    return report._replace(output=output, bytes=os.path.getsize(output), seconds=seconds)


def check(source, activation=None):
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
    checkpoint = archives.read(source)
    found = weights.from_checkpoint(checkpoint, source, activation)
    checksums = writers.verify_checksums(checkpoint, source)
    dtypes, nan, inf = {}, 0, 0
    for array in found.arrays.values():
        name = "bfloat16" if array.dtype == archives.BFLOAT16 else array.dtype.name
        dtypes[name] = dtypes.get(name, 0) + 1
        array = np.asarray(array)
        if name == "bfloat16":
            array = writers.cast(array, "float32")
        finite = np.isfinite(array)
        if not finite.all():
            missing = int(np.isnan(array).sum())
            nan, inf = nan + missing, inf + int(array.size - finite.sum()) - missing
        checkpoint.release()
    return _report(checkpoint, found, archives.sha256(source)), Contents(dtypes, nan, inf, checksums)


def _report(checkpoint, found, sha256):
    row = preset_of(found.config)
    return Report(
        kind=f"{checkpoint.kind}, {found.dialect}'s names",
        config=found.config,
        preset=row.name if row else None,
        activation_from=found.activation_from,
        official=next((row.file for row in PRESETS if row.sha256 == sha256), None),
        sha256=sha256,
        tensors=len(found.arrays),
        dropped=found.dropped,
        ignored=found.ignored,
        prefix=found.prefix,
    )

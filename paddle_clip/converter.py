"""A checkpoint file in, a Paddle weights file out: what `convert/pt2paddle.py` and the cache of `hub` do."""

import os
import time
from typing import NamedTuple, Optional

from . import archives, weights
from .errors import CheckpointError
from .presets import PRESETS, CLIPConfig, preset_of

DTYPES = ("float32", "float16", "bfloat16", "keep")


class Report(NamedTuple):
    """What a conversion did."""

    output: str
    config: CLIPConfig
    preset: Optional[str]  # OpenAI's name, or None for a model of other sizes
    official: Optional[str]  # name of the official file whose SHA-256 the input has, or None
    sha256: str  # of the input
    tensors: int
    dropped: list[str]  # tensors of the input that are not weights
    bytes: int  # of the output
    seconds: float


def convert(source, output=None, dtype="float32", progress=lambda arrays: arrays):
    """Converts a checkpoint of OpenAI's CLIP to Paddle weights, with neither torch nor paddle.

    Args:
        source: path of a `.pt`, `.pdparams` or `.safetensors` file, recognised by its content.
        output: path to write; by default the source with the extension `.pdparams`.
        dtype: "float32", "float16", "bfloat16", or "keep" for each tensor's own.
        progress: wraps the list of (name, array) pairs that is written, such as a progress bar.

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
    tensors = archives.read(source)
    if os.path.exists(output) and os.path.samefile(source, output):
        raise CheckpointError(f"{output} is the input itself; choose another output with -o")
    config, arrays, dropped = weights.from_checkpoint(tensors, source)
    sha256 = archives.sha256(source)

    def converted(pairs):
        for name, array in pairs:
            yield name, archives.cast(array, dtype, name)

    pairs = list(arrays.items())
    passes = iter([progress(pairs), pairs])  # the first pass writes, the second compares
    archives.write_pdparams(output, lambda: converted(next(passes)))
    row = preset_of(config)
    return Report(
        output=output,
        config=config,
        preset=row.name if row else None,
        official=next((row.file for row in PRESETS if row.sha256 == sha256), None),
        sha256=sha256,
        tensors=len(arrays),
        dropped=dropped,
        bytes=os.path.getsize(output),
        seconds=time.perf_counter() - start,
    )

"""Recognises the form of a checkpoint file, and reads the forms that are not PyTorch's."""

import json
import math
import os
import struct
from typing import Any, Optional

import numpy as np

from ..errors import CheckpointError
from . import pickles, torch_files
from .casting import SAFETENSORS_DTYPES
from .files import DOWNLOAD_AGAIN, MAX_DIRECTORY, Checkpoint, MappedFile, StrPath

_RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_TUPLE = {"builtins.tuple", "__builtin__.tuple"}
_NUMPY_GLOBALS = {
    *_RECONSTRUCT,
    *_TUPLE,
    "numpy.ndarray",
    "numpy.dtype",
    "collections.OrderedDict",
    "_codecs.encode",
}
_NUMPY_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "b1"}
_MAX_SHARDS = 1000


def read(path: StrPath) -> Checkpoint:
    """Reads every tensor of a checkpoint, whatever its extension.

    Args:
        path: path of a TorchScript archive, a `torch.save` file (zip, or the format before PyTorch 1.6), a
            `.pdparams`, a `.safetensors` file, or the `.safetensors.index.json` of a sharded one.

    Returns:
        {dotted name: array}: dots join the names of nested dicts and modules. Values that are not tensors are left out.

    Raises:
        CheckpointError: if the file is none of these, is damaged, or asks for anything but tensors.
        OSError: if the file cannot be opened.
    """
    path = os.fspath(path)
    mapped = MappedFile(path)
    start = bytes(mapped.data[:64])
    if start.startswith(torch_files.ZIP_MAGIC):
        checkpoint = torch_files.read_zip(mapped)
    elif start.startswith(torch_files.LEGACY_MAGIC):
        checkpoint = torch_files.read_legacy(mapped)
    elif start.startswith(b"\x80") and not _fits_safetensors(mapped.data):
        checkpoint = _read_pickle(mapped)
    elif start[8:9] == b"{":
        checkpoint = _read_safetensors(mapped)
    elif start.startswith(b"{"):
        checkpoint = _read_index(mapped)
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: expected a PyTorch .pt, a Paddle .pdparams or a .safetensors file, found "
            f"{len(mapped.data):,} bytes starting with {start[:8]!r}. {DOWNLOAD_AGAIN}"
        )
    checkpoint.maps.insert(0, mapped)
    if not checkpoint:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a CLIP model")
    return checkpoint


def _fits_safetensors(data: memoryview) -> bool:
    """Whether the data starts with the length of a JSON header it has room for, which no pickle does."""
    return bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


# --------------------------------------------------------------------------------------------------- pickles of arrays


def _read_pickle(mapped: MappedFile) -> Checkpoint:
    parsed = pickles.parse(mapped.data, _NUMPY_GLOBALS.__contains__, mapped.path)
    checkpoint = Checkpoint("Paddle state dict")
    pickles.flatten(mapped.path, parsed.tree, _numpy_array, checkpoint)
    if parsed.comment:
        pickles.add_metadata(checkpoint, parsed.comment)
    return checkpoint


def _numpy_array(node: pickles.Node) -> Optional[np.ndarray]:
    if node.name in _TUPLE:  # paddle.save's (name, array) pair
        return _numpy_array(node.args[0][1])
    if node.name not in _RECONSTRUCT:
        return None
    _version, shape, dtype, fortran, content = node.state
    if isinstance(content, pickles.Node) and content.name == "_codecs.encode":  # bytes in pickle protocol 2
        content = content.args[0].encode("latin1")
    code, order = dtype.args[0], dtype.state[1]
    if dtype.name != "numpy.dtype" or code not in _NUMPY_DTYPES or order not in "<|":
        raise ValueError(f"an array has dtype {order}{code}")
    return np.frombuffer(content, np.dtype(order + code)).reshape(shape, order="F" if fortran else "C")


# --------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(mapped: MappedFile) -> Checkpoint:
    path, data, checkpoint = mapped.path, mapped.data, Checkpoint("safetensors file")
    try:
        (size,) = struct.unpack("<Q", data[:8])
        if size > min(len(data) - 8, MAX_DIRECTORY):
            raise ValueError(f"its header claims {size:,} bytes")
        header = json.loads(bytes(data[8 : 8 + size]), object_pairs_hook=_once)
        content, end_of_last = data[8 + size :], 0
        checkpoint.metadata.update(header.pop("__metadata__", {}))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{path}: {name} is of dtype {entry['dtype']}; re-save it as F32, F16 or BF16")
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
            if not end_of_last <= start <= end <= len(content) or math.prod(shape) * dtype.itemsize != end - start:
                raise ValueError(f"{name} is out of bounds or overlaps another")
            checkpoint[name] = np.frombuffer(content[start:end], dtype).reshape(shape)
            end_of_last = end
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged or truncated .safetensors file ({error!r})") from None
    return checkpoint


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _read_index(mapped: MappedFile) -> Checkpoint:
    """Reads the shards that a `model.safetensors.index.json` lists, which lie in its folder."""
    path, checkpoint = mapped.path, Checkpoint("sharded safetensors file")
    try:
        if len(mapped.data) > MAX_DIRECTORY:
            raise ValueError("it is too large")
        places = json.loads(bytes(mapped.data), object_pairs_hook=_once)["weight_map"]
        files = sorted(set(places.values()))
        if any(file != os.path.basename(file) for file in files) or len(files) > _MAX_SHARDS:
            raise ValueError("its shards are not in its folder")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the index of a sharded .safetensors file ({error!r})") from None
    for file in files:
        shard = _read_safetensors(MappedFile(os.path.join(os.path.dirname(path), file)))
        wrong = shard.keys() ^ {name for name, place in places.items() if place == file}
        if wrong:
            raise CheckpointError(f"{path}: {file} does not hold what the index says: {', '.join(sorted(wrong))}")
        checkpoint.update(shard)
        checkpoint.metadata.update(shard.metadata)
        checkpoint.maps += shard.maps
    return checkpoint

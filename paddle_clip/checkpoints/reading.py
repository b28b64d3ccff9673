"""Recognises the form of a checkpoint file, and reads the forms that are not PyTorch's."""

import json
import math
import os
from typing import Any, Optional

import numpy as np

from ..errors import CheckpointError, listed
from . import pickles, torch_files, trees
from .casting import BFLOAT16, SAFETENSORS_DTYPES, cast
from .files import DOWNLOAD_AGAIN, MAX_DIRECTORY, Checkpoint, MappedFile, StrPath, expanded

_PAIR = {"builtins.tuple", "__builtin__.tuple"}
_MAX_SHARDS = 1000
# What Hugging Face, open_clip and PaddleNLP call the weights in a model's folder; the first that is there is read.
_WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "model_state.pdparams",
)
INDEX = ".index.json"  # ends the name of a list of shards


def find_weights(path: StrPath) -> str:
    """The path of the weights in a model's folder, as it is downloaded from a hub; the path itself if it is no folder.

    Raises:
        CheckpointError: if the folder holds no weights by the names of Hugging Face or open_clip, those of several
            models, or what `export` wrote.
    """
    path = expanded(path)
    if not os.path.isdir(path):
        return path
    names = sorted(os.listdir(path))
    found = [name for weights in _WEIGHTS for name in (weights, weights + INDEX) if name in names]
    if {"image.pdiparams", "text.pdiparams"} <= {*names}:
        raise CheckpointError(
            f"{path} is an exported model, of which only its programs are left: give the checkpoint it was made "
            f"of, or run it with paddle_clip.Predictor({path!r})"
        )
    if not found:
        raise CheckpointError(
            f"{path} holds no weights: expected {', '.join(_WEIGHTS[:-1])} or {_WEIGHTS[-1]}, found "
            f"{listed(names) or 'nothing'}. If one of them is a checkpoint, give its path"
        )
    first, *others = (os.path.join(path, name) for name in found)
    if any(not _holds_same_model(first, other) for other in others):
        raise CheckpointError(f"{path} holds several models: {listed(found)}; give the path of one of them")
    return first


def _holds_same_model(path: str, other: str) -> bool:
    """Whether two files seem to hold one model, in whatever names: hubs offer it in several forms."""
    try:
        ours, theirs = _summary(read(path)), _summary(read(other))
    except CheckpointError:  # such as a pointer of Git LFS in place of a file: of no matter, unless it is the first
        return True
    same_numbers = ours[0] == theirs[0] and len(ours[1]) == len(theirs[1])
    return same_numbers and all(
        a.shape == b.shape and np.allclose(cast(a, "float32"), cast(b, "float32"), 0 if a.dtype == b.dtype else 1e-2, 0)
        for a, b in zip(ours[1], theirs[1])
    )


def _summary(checkpoint: Checkpoint) -> tuple[int, list[np.ndarray]]:
    """How many weights there are, and two of them that all programs lay out alike."""
    floats = {
        name: array
        for name, array in checkpoint.items()
        if (array.dtype.kind == "f" or array.dtype == BFLOAT16) and not name.endswith("attn_mask")
    }
    ends = ("logit_scale", "ln_final.weight", "final_layer_norm.weight")
    alike = [
        array.reshape(-1)
        for name, array in sorted(floats.items(), key=lambda item: item[1].size)
        if name.endswith(ends)
    ]
    return sum(array.size for array in floats.values()), alike


def read(path: StrPath) -> Checkpoint:
    """Reads every tensor of a checkpoint, whatever its extension.

    Args:
        path: path of a TorchScript archive, a `torch.save` file (zip, or the format before PyTorch 1.6), a
            `.pdparams`, a `.safetensors` file, or the `.index.json` of a sharded one; or the folder of a model, see
            `find_weights`.

    Returns:
        {dotted name: array}: dots join the names of nested dicts and modules. Values that are not tensors are left out.

    Raises:
        CheckpointError: if the file is none of these, is damaged, or asks for anything but tensors.
        OSError: if the file cannot be opened.
    """
    path = find_weights(path)
    mapped = MappedFile(path)
    checkpoint = _read_index(mapped) if _is_index(mapped.data) else _read_one(mapped)
    checkpoint.maps.insert(0, mapped)
    if not checkpoint:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a CLIP model")
    return checkpoint


def _read_one(mapped: MappedFile) -> Checkpoint:
    """Reads a file that is not an index, by its form."""
    start = bytes(mapped.data[:64])
    if start.startswith(torch_files.ZIP_MAGIC):
        return torch_files.read_zip(mapped)
    if start.startswith(torch_files.LEGACY_MAGIC):
        return torch_files.read_legacy(mapped)
    if start.startswith(b"\x80") and not _fits_safetensors(mapped.data):
        return _read_pickle(mapped)
    if start[8:9] == b"{":
        return _read_safetensors(mapped)
    raise CheckpointError(
        f"{mapped.path} is not a checkpoint: expected a PyTorch .pt, a Paddle .pdparams or a .safetensors file, found "
        f"{len(mapped.data):,} bytes starting with {start[:8]!r}. {DOWNLOAD_AGAIN}"
    )


def _is_index(data: memoryview) -> bool:
    """Whether the data is a JSON object; the length before a safetensors header may begin with a brace too."""
    return bytes(data[:1]) == b"{" and not _fits_safetensors(data)


def _fits_safetensors(data: memoryview) -> bool:
    """Whether the data starts with the length of a JSON header it has room for, which no pickle does."""
    return bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


# --------------------------------------------------------------------------------------------------- pickles of arrays


def _read_pickle(mapped: MappedFile) -> Checkpoint:
    parsed = pickles.parse(mapped.data, mapped.path)
    checkpoint = Checkpoint("Paddle state dict")
    trees.flatten(mapped.path, parsed.tree, _numpy_array, checkpoint, len(mapped.data))
    if parsed.comment:
        trees.add_metadata(checkpoint, parsed.comment)
    return checkpoint


def _numpy_array(node: pickles.Node) -> Optional[np.ndarray]:
    if node.name not in _PAIR:
        return trees.numpy_array(node)
    _name, array = node.args[0]  # paddle.save's (name, array) pair
    found = trees.numpy_array(array) if isinstance(array, pickles.Node) else None
    if found is None:
        raise ValueError("a pair of a name and an array has no array")
    return found


# --------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(mapped: MappedFile) -> Checkpoint:
    path, data, checkpoint = mapped.path, mapped.data, Checkpoint("safetensors file")
    try:
        header, content = _header(data)
        end_of_last = 0
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        checkpoint.metadata.update(metadata)
        entries = [(trees.sizes(entry["data_offsets"]), name, entry) for name, entry in header.items()]
        for (start, end), name, entry in sorted(entries, key=lambda item: item[0]):
            dtype, shape = SAFETENSORS_DTYPES.get(str(entry["dtype"])), trees.sizes(entry["shape"])
            if dtype is None:
                raise CheckpointError(f"{path}: {name} is of dtype {entry['dtype']}; re-save it as F32, F16 or BF16")
            if not end_of_last == start <= end <= len(content) or math.prod(shape) * dtype.itemsize != end - start:
                raise ValueError(f"{name} is out of bounds, overlaps another or leaves a gap")
            checkpoint[trees.require_name(name)] = np.frombuffer(content[start:end], dtype).reshape(shape)
            end_of_last = end
        if end_of_last != len(content):  # something else could hide there, as the format's own library says
            raise ValueError(f"{len(content) - end_of_last:,} bytes belong to no tensor")
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged or truncated .safetensors file ({error!r})") from None
    return checkpoint


def _header(data: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file, and the bytes of its tensors."""
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, MAX_DIRECTORY):
        raise ValueError(f"its header claims {size:,} bytes")
    header = json.loads(bytes(data[8 : 8 + size]), object_pairs_hook=_once, parse_int=_integer, parse_float=_integer)
    return header, data[8 + size :]


def _integer(text: str) -> int:
    """A whole number of a header; Python would take time in the square of its length."""
    if len(text) > 20:
        raise ValueError(f"a number has {len(text)} characters")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _read_index(mapped: MappedFile) -> Checkpoint:
    """Reads the shards that a `model.safetensors.index.json` or `pytorch_model.bin.index.json` lists."""
    path, checkpoint = mapped.path, Checkpoint("sharded safetensors file")
    places = _places(mapped)
    for file in sorted(set(places.values())):
        shard_file = MappedFile(os.path.join(os.path.dirname(path), file))
        shard = _read_one(shard_file)
        wrong = shard.keys() ^ {name for name, place in places.items() if place == file}
        if wrong:
            raise CheckpointError(f"{path}: {file} does not hold what the index says: {listed(sorted(wrong))}")
        checkpoint.kind = f"sharded {shard.kind}"
        checkpoint.update(shard)
        checkpoint.metadata.update(shard.metadata)
        checkpoint.maps += [shard_file, *shard.maps]
    return checkpoint


def shards(path: str) -> list[str]:
    """The paths of the files that hold a checkpoint's tensors: itself, or the shards that an index lists."""
    mapped = MappedFile(path)
    if not _is_index(mapped.data):
        return [path]
    return [os.path.join(os.path.dirname(path), file) for file in sorted(set(_places(mapped).values()))]


def _places(mapped: MappedFile) -> dict[str, str]:
    """{name of a tensor: name of the file in the index's folder that holds it}."""
    path = mapped.path
    try:
        if len(mapped.data) > MAX_DIRECTORY:
            raise ValueError("it is too large")
        places = json.loads(bytes(mapped.data), object_pairs_hook=_once)["weight_map"]
        files = set(places.values())
        if any(file != os.path.basename(file) for file in files) or len(files) > _MAX_SHARDS:
            raise ValueError("its shards are not in its folder")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the index of a sharded checkpoint ({error!r})") from None
    absent = sorted(file for file in files if not os.path.exists(os.path.join(os.path.dirname(path), file)))
    if absent:
        raise CheckpointError(f"{path} names shards that are not beside it: {listed(absent)}. Download them, too")
    return dict(places)

"""Writes {name: array} as `.pdparams`, `.safetensors` or PyTorch's `.pt`, with neither framework.

A file gets its name only once it is complete, has been read back, and every tensor has been compared.
"""

import json
import math
import os
import pickle
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, Union

import numpy as np

from ..errors import CheckpointError, listed
from .casting import SAFETENSORS_DTYPES, TORCH_DTYPES, Widener, cast, result_dtype
from .files import Checkpoint, StrPath, crc32, crc32_of_array, replacing, require_place, write_at
from .reading import read

_RELEASE_OVER = 1 << 20  # bytes of a tensor whose pages are released once it is read

Checksums = dict[str, int]  # {name: CRC-32 of a tensor}
Progress = Callable[[Iterable[str], int], Iterable[str]]


class _Tensor(NamedTuple):
    """The dtype and the shape of a tensor to write."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


Tensors = dict[str, _Tensor]
Piece = Union[bytes, str]  # a piece of a file: bytes, or the name of the tensor whose numbers it holds


def no_progress(names: Iterable[str], total: int) -> Iterable[str]:
    """A progress bar that shows nothing."""
    return names


def require_output(path: StrPath) -> None:
    """Raises what `write` would for a file it cannot write, before any work is done."""
    _form_of(os.fspath(path))
    require_place(path)


def _form_of(path: str) -> "_Form":
    form = _FORMS.get(os.path.splitext(path)[1])
    if form is None:
        raise CheckpointError(f"the output is {path}; choose a name that ends with {_listed(list(_FORMS))}")
    return form


def write(
    path: StrPath,
    arrays: Mapping[str, Any],
    dtype_of: Callable[[str], str],
    metadata: Callable[[str], dict[str, str]],
    progress: Progress = no_progress,
    release: Callable[[], None] = lambda: None,
) -> None:
    """Writes a checkpoint in the form its extension names: `.pdparams`, `.safetensors` or `.pt`.

    Before the file is complete, and after any failure, an existing file of that name is untouched.

    Args:
        path: path of the file to write.
        arrays: {name: array}; anything with `shape`, `dtype` and `__array__` will do, and is made into an array only
            when it is written; uint16 stands for bfloat16.
        dtype_of: function returning the dtype to write the tensor of a name in, as `cast` takes it.
        metadata: function of the tensors' checksums, a string, returning the {string: string} to write with them.
            It is called twice and must return values of the same lengths.
        progress: function that shows an iterable of tensor names, whose number it gets too, as a progress bar.
        release: function called from time to time; the arrays written by then are no longer needed.

    Raises:
        CheckpointError: if `path` has another extension or cannot be written, a number does not fit its dtype, or the
            file read back differs.
        OSError: if the disk is full or the folder cannot be written.
    """
    path = os.fspath(path)
    form = _form_of(path)
    tensors = {
        name: _Tensor(result_dtype(array.dtype, dtype_of(name)), tuple(array.shape)) for name, array in arrays.items()
    }
    checksums = dict.fromkeys(arrays, 0)

    def pieces() -> list[Piece]:
        return form(tensors, checksums, metadata(_checksum_text(checksums)))

    # All lengths are known in advance, so two threads write the tensors to their places, in any order. The pieces that
    # depend on the checksums come last; the checksums do not change their lengths.
    offsets, length = _layout(pieces(), tensors)
    with replacing(path) as (file, temporary):
        _write_tensors(file, arrays, tensors, dtype_of, offsets, checksums, progress, release)
        if _write_rest(file, pieces(), tensors) != length:
            raise AssertionError("the metadata changed its length")
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(os.fsync, file.fileno())
            _compare(temporary, tensors, checksums)
            flushed.result()


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _layout(pieces: list[Piece], tensors: Tensors) -> tuple[dict[str, int], int]:
    """The offset of each tensor in a file, and the file's length."""
    offsets, position = {}, 0
    for piece in pieces:
        if isinstance(piece, str):
            offsets[piece] = position
        position += tensors[piece].nbytes if isinstance(piece, str) else len(piece)
    return offsets, position


def _write_tensors(
    file: BinaryIO,
    arrays: Mapping[str, Any],
    tensors: Tensors,
    dtype_of: Callable[[str], str],
    offsets: dict[str, int],
    checksums: Checksums,
    progress: Progress,
    release: Callable[[], None],
) -> None:
    """Writes the numbers of all tensors to their places, and puts their checksums into `checksums`."""
    in_thread = threading.local()

    def put(name: str) -> str:
        array, tensor = np.asarray(arrays[name]), tensors[name]
        parts: Iterable[np.ndarray]
        if array.dtype == np.float16 and tensor.dtype == np.float32:
            in_thread.widener = getattr(in_thread, "widener", None) or Widener()
            parts = in_thread.widener.parts(array)  # the usual case, in which no number is too large
        else:
            parts = [np.ascontiguousarray(cast(array, dtype_of(name), name))]
        offset = offsets[name]
        for part in parts:
            content = part.reshape(-1).view(np.uint8).data
            checksums[name] = crc32(content, checksums[name])
            write_at(file, content, offset)
            offset += len(content)
        if tensor.nbytes > _RELEASE_OVER:
            release()
        return name

    with ThreadPoolExecutor(2) as pool:
        try:
            for _ in progress(pool.map(put, arrays), len(arrays)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_rest(file: BinaryIO, pieces: list[Piece], tensors: Tensors) -> int:
    """Writes the pieces around the tensors and returns the file's length."""
    start = 0
    for piece in pieces:
        if isinstance(piece, str):
            start += tensors[piece].nbytes
        else:
            write_at(file, piece, start)
            start += len(piece)
    return start


def _checksum_text(checksums: Checksums) -> str:
    return json.dumps({name: f"{crc:08x}" for name, crc in checksums.items()})


def verify_checksums(checkpoint: Checkpoint, source: str) -> int:
    """Compares a checkpoint's tensors with the checksums in its metadata.

    Returns:
        The number of tensors compared: 0 if the file has no checksums.

    Raises:
        CheckpointError: if tensors were changed, added or lost since the file was written, with the names of all.
    """
    try:
        checksums = json.loads(checkpoint.metadata.get("crc32", "{}"))
        expected = {name: int(crc, 16) for name, crc in checksums.items()}
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{source} is damaged: its checksums cannot be read") from None
    if not expected:
        return 0
    found = {}
    for name, array in checkpoint.items():
        found[name] = crc32_of_array(array)
        if array.nbytes > _RELEASE_OVER:
            checkpoint.release()
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{source} is damaged: {listed(wrong)} changed since it was written; convert it again")
    return len(found)


def _compare(path: str, tensors: Tensors, checksums: Checksums) -> None:
    checkpoint = read(path)
    found = {name: _Tensor(array.dtype, array.shape) for name, array in checkpoint.items()}
    wrong = {name for name in tensors.keys() | found.keys() if tensors.get(name) != found.get(name)}

    def read_back(name: str) -> int:
        crc = crc32_of_array(checkpoint[name])
        if tensors[name].nbytes > _RELEASE_OVER:
            checkpoint.release()
        return crc

    with ThreadPoolExecutor(2) as pool:
        names = sorted(found.keys() - wrong)
        wrong |= {name for name, crc in zip(names, pool.map(read_back, names)) if crc != checksums[name]}
    if wrong:
        raise CheckpointError(f"{listed(sorted(wrong))} read back differ from what was written; is the disk sound?")


# --------------------------------------------------------------------------------------------------------------- forms
# Each function takes {name: _Tensor}, {name: crc32} and the metadata, and returns the pieces of the file in order.
# Their lengths do not depend on the checksums.

_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_TORCH_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_FAR = _ZIP64 = (1 << 32) - 1  # from here on a place in a zip stands elsewhere, in eight bytes, and this in its own
_ALIGNMENT = 64  # bytes tensors are aligned to, as in PyTorch's files


def _plain(value: Any) -> bytes:
    """The pickle opcodes for a value of built-in types."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _pickle(tensors: Tensors, checksums: Checksums, metadata: dict[str, str]) -> list[Piece]:
    """The pickle that `paddle.save(state_dict, path)` writes, for every numpy to read: {name: array}.

    Arrays name `numpy.core`, which every numpy can import. The last key is Paddle's table from structured to parameter
    names, which Paddle expects. The metadata is a string that is pushed and dropped: unpicklers never return it.
    """
    pieces: list[Piece] = [b"\x80\x04}("]
    for name, tensor in tensors.items():
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _plain((0,)) + b"C\x01btR(K\x01"
        head += _plain(tensor.shape) + b"cnumpy\ndtype\n" + _plain((tensor.dtype.str.lstrip("<|"), False, True)) + b"R"
        head += _plain((3, tensor.dtype.str[0], None, None, None, -1, -1, 0)) + b"b\x89\x8e"
        pieces += [_plain(name) + head + struct.pack("<Q", tensor.nbytes), name, b"tb"]
    table = _plain("StructuredToParameterName@@") + _plain({name: name for name in tensors})
    return [*pieces, table + b"u" + _plain(json.dumps(metadata)) + b"0."]


def _safetensors(tensors: Tensors, checksums: Checksums, metadata: dict[str, str]) -> list[Piece]:
    """The safetensors format: the header's length, the header in JSON, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "paddle", **metadata}}
    start = 0
    for name, tensor in tensors.items():
        places = [start, start + tensor.nbytes]
        header[name] = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": places}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)) + text, *tensors]


def _torch(tensors: Tensors, checksums: Checksums, metadata: dict[str, str]) -> list[Piece]:
    """The zip that `torch.save(state_dict, path)` writes: a pickle, and the bytes of each tensor.

    Names that all begin with "state_dict." are those of a state dict within a dict.
    All entries have one fixed date, so that the same tensors give the same file.
    """
    nested = "state_dict." if all(name.startswith("state_dict.") for name in tensors) else ""
    pickled = b"\x80\x02" + (b"}" + _plain("state_dict") if nested else b"") + b"ccollections\nOrderedDict\n)R("
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        storage = "c" + _TORCH_NAMES[tensor.dtype].replace(".", "\n") + "\n"
        pickled += _plain(name[len(nested) :]) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        pickled += _plain("storage") + storage.encode() + _plain(str(key)) + _plain("cpu")
        pickled += _plain(math.prod(tensor.shape)) + b"tQ" + _plain(0)
        pickled += _plain(tensor.shape) + _plain(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    entries: list[tuple[str, Piece]] = [
        ("data.pkl", pickled + (b"us." if nested else b"u.")),
        ("byteorder", b"little"),
    ]
    entries += [(f"data/{key}", name) for key, name in enumerate(tensors)]
    entries += [("version", b"3\n"), ("paddle_clip.json", json.dumps(metadata).encode())]
    return _zip(entries, tensors, checksums)


def _zip(entries: Sequence[tuple[str, Piece]], tensors: Tensors, checksums: Checksums) -> list[Piece]:
    """A zip of uncompressed entries: bytes, or a tensor by its name."""
    pieces: list[Piece] = []
    directory, position = b"", 0
    for entry, content in entries:
        path = f"archive/{entry}".encode()
        size = tensors[content].nbytes if isinstance(content, str) else len(content)
        crc = checksums[content] if isinstance(content, str) else crc32(content)
        # Version 2.0, no flags, stored, 1 January 1980.
        fields = struct.pack("<HHHHHIII", 20, 0, 0, 0, 33, crc, size, size)
        padding = -(position + 30 + len(path) + 4) % _ALIGNMENT
        extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as PyTorch pads
        local = b"PK\3\4" + fields + struct.pack("<HH", len(path), len(extra)) + path + extra
        far = struct.pack("<HHQ", 1, 8, position) if position >= _FAR else b""
        directory += b"PK\1\2" + struct.pack("<H", 20) + fields
        directory += struct.pack("<HHHHHII", len(path), len(far), 0, 0, 0, 0, _ZIP64 if far else position) + path + far
        pieces += [local, content]
        position += len(local) + size
    count, size = len(entries), len(directory)
    if position >= _FAR:
        directory += b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, position)
        directory += b"PK\6\7" + struct.pack("<IQI", 0, position + size, 1)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, size, _ZIP64 if position >= _FAR else position, 0)
    return [*pieces, directory + b"PK\5\6" + end]


_Form = Callable[[Tensors, Checksums, dict[str, str]], list[Piece]]
_FORMS: dict[str, _Form] = {".pdparams": _pickle, ".safetensors": _safetensors, ".pt": _torch}

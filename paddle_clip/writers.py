"""{name: numpy array} -> checkpoint files: `.pdparams`, `.safetensors` and PyTorch's `.pt`, with neither framework.

A file gets its name only once it is complete, has been read back and every tensor compared.
"""

import contextlib
import json
import math
import os
import pickle
import stat
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from . import archives
from .archives import BFLOAT16, crc32
from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


_RELEASE_EVERY = 1 << 26  # bytes of the source
_PART = 1 << 20  # numbers written at once
_BLOCK = 1 << 17  # numbers widened at once: they stay in the cache
# Bytes given to the system at once. For more, Linux looks for pages of 2 MB and up, which are rarely at hand: some ten
# times slower, where the host of a virtual machine has to find them.
_PIECE = 1 << 19
_STRIP = 16  # numbers of a row transposed at once: a cache line of the result
_HALF_SCALE = np.float32(2.0**112)
_RELEASE_OVER = 1 << 20  # bytes of a tensor read back


def write(path, arrays, dtype_of, metadata, progress=lambda names, total: names, release=lambda: None):
    """Writes a checkpoint in the form its extension names: `.pdparams`, `.safetensors` or `.pt`.

    Before the file is complete, and after any failure, an existing file of that name is untouched.

    Args:
        path: the file to write.
        arrays: {name: array}; anything with `shape`, `dtype` and `__array__` will do, and is made into an array only
            when it is written; uint16 stands for bfloat16.
        dtype_of: a function of a name returning the dtype to write it in, as `cast` takes it.
        metadata: a function of the tensors' checksums, a string, returning the {string: string} to write with them.
            It is called twice, and returns values of the same lengths.
        progress: wraps an iterable of one name per tensor written, and is told their number: a progress bar.
        release: called now and then, when the arrays written so far are no longer needed.

    Raises:
        CheckpointError: if `path` has another extension or cannot become the file, a number does not fit its dtype, or
            the file read back differs.
        OSError: if the disk is full or the folder cannot be written.
    """
    form = {".pdparams": _pickle, ".safetensors": _safetensors, ".pt": _torch}.get(os.path.splitext(path)[1])
    if form is None:
        raise CheckpointError(f"the output is {path}; choose a name that ends with .pdparams, .safetensors or .pt")
    dtypes = {name: _result_dtype(array.dtype, dtype_of(name)) for name, array in arrays.items()}
    tensors = {name: _Tensor(dtypes[name], tuple(array.shape)) for name, array in arrays.items()}
    checksums = dict.fromkeys(arrays, 0)
    # Every length is known before a number is: so the tensors are written in any order, each to its place, two at a
    # time, and what depends on their checksums, of the same length, is filled in at last.
    offsets, position = {}, 0
    for piece in form(tensors, checksums, metadata(_checksum_text(checksums))):
        if isinstance(piece, str):
            offsets[piece] = position
        position += tensors[piece].nbytes if isinstance(piece, str) else len(piece)

    with _replacing(path) as (file, temporary):
        own = threading.local()

        def put(name):
            array, tensor = np.asarray(arrays[name]), tensors[name]
            if array.dtype == np.float16 and tensor.dtype == np.float32:
                own.widener = getattr(own, "widener", None) or _Widener()
                parts = own.widener.parts(array)  # the usual case, which never fails
            else:
                parts = [np.ascontiguousarray(cast(array, dtype_of(name), name))]
            offset = offsets[name]
            for part in parts:
                content = part.reshape(-1).view(np.uint8).data
                checksums[name] = crc32(content, checksums[name])
                _write_at(file, content, offset)
                offset += len(content)
            return name

        unreleased = 0
        with ThreadPoolExecutor(2) as pool:
            try:
                for name in progress(pool.map(put, arrays), len(arrays)):
                    unreleased += arrays[name].dtype.itemsize * math.prod(arrays[name].shape)
                    if unreleased > _RELEASE_EVERY:
                        unreleased = 0
                        release()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        start = 0
        for piece in form(tensors, checksums, metadata(_checksum_text(checksums))):
            if isinstance(piece, str):
                start += tensors[piece].nbytes
            else:
                _write_at(file, piece, start)
                start += len(piece)
        if start != position:
            raise AssertionError("the metadata changed its length")
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(os.fsync, file.fileno())
            _compare(temporary, tensors, checksums)
            flushed.result()


def require_place(path):
    """Raises FileNotFoundError if there is no folder for a file, ValueError if something else has its name."""
    _require_folder(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} exists and is not a file; choose another output")


def _require_folder(path):
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise FileNotFoundError(f"the folder of the output {path!r} does not exist")


class _Tensor(NamedTuple):
    """What is known of a tensor before it is written."""

    dtype: np.dtype
    shape: tuple

    @property
    def nbytes(self):
        return self.dtype.itemsize * math.prod(self.shape)


class _Widener:
    """float16 -> float32, part by part: numpy's own cast is the slowest step of a conversion.

    The bits of a float16, moved to a float32's places, are its value over 2^112; only infinities and NaNs need more.
    The memory is used again and again: new pages would cost more than the cast.
    """

    def __init__(self):
        self.part = np.empty(_PART, np.float32)
        self.block = np.empty(_BLOCK, np.float32)
        # In this thread, as another library may have told the processor.
        self.subnormals_are_zero = np.array(1 << 13, np.int32).view(np.float32) * _HALF_SCALE == 0

    def parts(self, array):
        """The array's rows in order, in contiguous parts; each is gone when the next is asked for."""
        if array.flags.c_contiguous:
            array = array.reshape(-1)
        rows = max(1, _PART // max(1, math.prod(array.shape[1:])))
        for start in range(0, len(array), rows):
            some = array[start : start + rows]
            if some.size > self.part.size:
                self.part = np.empty(some.size, np.float32)
            part = self.part[: some.size].reshape(some.shape)
            if some.ndim == 1 and not self.subnormals_are_zero:
                for at in range(0, some.size, _BLOCK):
                    self._widen(part[at : at + _BLOCK], some[at : at + _BLOCK])
            elif self._is_transposed(some) and not self.subnormals_are_zero:
                self._transpose(part, some.T)
            else:
                np.copyto(part, some)
            yield part

    def _is_transposed(self, array):
        return array.ndim == 2 and array.strides[0] == array.itemsize and len(array) <= self.block.size

    def _transpose(self, part, array):
        height = self.block.size // array.shape[1]
        for start in range(0, len(array), height):
            rows = array[start : start + height]
            block = self.block[: rows.size].reshape(rows.shape)
            self._widen(block, rows)
            for at in range(0, len(rows), _STRIP):
                strip = block[at : at + _STRIP].T
                np.copyto(part[:, start + at : start + at + strip.shape[1]], strip)

    @staticmethod
    def _widen(result, halves):
        bits = result.view(np.int32)
        np.copyto(bits, halves.view(np.int16))  # extends the sign
        bits <<= 13
        bits &= np.int32(-0x70002000)  # 0x8FFFE000: sign, exponent, mantissa
        result *= _HALF_SCALE
        if result.max() >= 65536 or result.min() <= -65536:  # float16's highest exponent
            bits[np.abs(result) >= 65536] |= 0x7F800000


def _write_at(file, content, offset):
    view = memoryview(content)
    while len(view):
        count = os.pwrite(file.fileno(), view[:_PIECE], offset)
        view, offset = view[count:], offset + count


@contextlib.contextmanager
def _replacing(path):
    """A new file beside `path` that takes its name when the block ends well, and is deleted when it does not.

    It has one name, so that what a killed process left is used up by the next, and a lock, so that two do not write it.
    """
    _require_folder(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(f"{path} exists and is not a regular file; choose another output with -o")
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.partial")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(temporary, flags, 0o666), "r+b") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another process is writing {path}; wait for it, or choose another -o") from None
            if not os.path.exists(temporary) or not os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                raise CheckpointError(f"another process has just written {path}; run it again if that was not meant")
        try:
            file.truncate()
            yield file, temporary
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _checksum_text(checksums):
    return json.dumps({name: f"{crc:08x}" for name, crc in checksums.items()})


def verify_checksums(checkpoint, source):
    """Compares a checkpoint's tensors with the checksums in its metadata.

    Returns:
        The number of tensors compared: 0 if the file has no checksums.

    Raises:
        CheckpointError: naming every tensor that was changed, added or lost since the file was written.
    """
    try:
        checksums = json.loads(checkpoint.metadata.get("crc32", "{}"))
        expected = {name: int(crc, 16) for name, crc in checksums.items()}
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{source} is damaged: its checksums cannot be read") from None
    if not expected:
        return 0
    found = {name: crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for name, array in checkpoint.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{source} is damaged: {', '.join(wrong)} changed since it was written; convert it again")
    return len(found)


def _compare(path, tensors, checksums):
    checkpoint = archives.read(path)
    found = {name: _Tensor(array.dtype, array.shape) for name, array in checkpoint.items()}
    wrong = {name for name in tensors.keys() | found.keys() if tensors.get(name) != found.get(name)}
    with ThreadPoolExecutor(2) as pool:
        right = sorted(found.keys() - wrong)
        for name, crc in zip(right, pool.map(_crc32, map(checkpoint.get, right))):
            if crc != checksums[name]:
                wrong.add(name)
            if tensors[name].nbytes > _RELEASE_OVER:
                checkpoint.release()
    if wrong:
        raise CheckpointError(f"{', '.join(sorted(wrong))} read back differ from what was written; is the disk sound?")


def _crc32(array):
    return crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


# -------------------------------------------------------------------------------------------------------------- dtypes


def _result_dtype(dtype, target):
    if target == "keep":
        return dtype
    return BFLOAT16 if target == "bfloat16" else np.dtype(target)


def cast(array, dtype, name="an array"):
    """A copy or view of a floating-point array in another dtype, rounded to nearest even.

    float64 goes to bfloat16 by way of float32.

    Args:
        array: float16, float32, float64, or uint16 standing for bfloat16.
        dtype: "float32", "float64", "float16", "bfloat16" (the result is uint16), or "keep".
        name: of the array, for messages.

    Raises:
        CheckpointError: if a finite number is too large for the dtype.
    """
    if dtype == "keep" or dtype == ("bfloat16" if array.dtype == BFLOAT16 else array.dtype.name):
        return array
    if array.dtype == BFLOAT16:
        array = np.asarray(array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        result = array.astype(np.float32 if dtype == "bfloat16" else dtype, order="C")
        if dtype == "bfloat16":
            result = _to_bfloat16(result)
    if result.itemsize < array.itemsize:
        exponent = np.uint16(0x7F80)  # all ones: an infinity or no number
        finite = (result & exponent) != exponent if dtype == "bfloat16" else np.isfinite(result)
        if not np.array_equal(np.isfinite(array), finite):
            raise CheckpointError(f"{name} has numbers too large for {dtype}; convert with --dtype float32 or keep")
    return result


def _to_bfloat16(array):
    """float32 -> the upper halves of its bits, rounded to nearest even."""
    bits = array.view(np.uint32)
    rounded = np.where(np.isnan(array), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))  # a NaN stays one
    return np.asarray(rounded >> 16).astype(BFLOAT16)


# --------------------------------------------------------------------------------------------------------------- forms
# Each is a function of {name: _Tensor}, {name: crc32} and the metadata, returning what the file is made of, in order:
# bytes, or the name of a tensor for its content. The lengths do not depend on the checksums.

_SAFETENSORS_NAMES = {dtype: name for name, dtype in archives.SAFETENSORS_DTYPES.items()}
_TORCH_NAMES = {dtype: name for name, dtype in archives.TORCH_DTYPES.items()}
_ALIGNMENT = 64  # of tensors, as in PyTorch's files


def _plain(value):
    """The pickle opcodes for a value of built-in types."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _pickle(tensors, checksums, metadata):
    """What `paddle.save(state_dict, path)` writes, for any numpy to read: {name: array}.

    Arrays name `numpy.core`, which every numpy can import. The last key is Paddle's table from structured to parameter
    names, which it expects. The metadata is a string that is pushed and dropped: unpicklers never return it.
    """
    pieces = [b"\x80\x04}("]
    for name, tensor in tensors.items():
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _plain((0,)) + b"C\x01btR(K\x01"
        head += _plain(tensor.shape) + b"cnumpy\ndtype\n" + _plain((tensor.dtype.str.lstrip("<|"), False, True)) + b"R"
        head += _plain((3, tensor.dtype.str[0], None, None, None, -1, -1, 0)) + b"b\x89\x8e"
        pieces += [_plain(name) + head + struct.pack("<Q", tensor.nbytes), name, b"tb"]
    table = _plain("StructuredToParameterName@@") + _plain({name: name for name in tensors})
    return [*pieces, table + b"u" + _plain(json.dumps(metadata)) + b"0."]


def _safetensors(tensors, checksums, metadata):
    """The safetensors format: the header's length, the header in JSON, the tensors."""
    header, start = {"__metadata__": {"format": "paddle", **metadata}}, 0
    for name, tensor in tensors.items():
        places = [start, start + tensor.nbytes]
        header[name] = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": places}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)) + text, *tensors]


def _torch(tensors, checksums, metadata):
    """What `torch.save(state_dict, path)` writes: a zip with a pickle, and the bytes of each tensor.

    Nothing is dated, so that the same tensors give the same file.
    """
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
        storage = "c" + _TORCH_NAMES[tensor.dtype].replace(".", "\n") + "\n"
        pickled += _plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _plain("storage") + storage.encode()
        pickled += _plain(str(key)) + _plain("cpu") + _plain(math.prod(tensor.shape)) + b"tQ" + _plain(0)
        pickled += _plain(tensor.shape) + _plain(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    entries = [("data.pkl", pickled + b"u."), ("byteorder", b"little")]
    entries += [(f"data/{key}", name) for key, name in enumerate(tensors)]
    entries += [("version", b"3\n"), ("paddle_clip.json", json.dumps(metadata).encode())]

    pieces, directory, position = [], b"", 0
    for name, content in entries:
        name = f"archive/{name}".encode()
        is_tensor = isinstance(content, str)
        size = tensors[content].nbytes if is_tensor else len(content)
        crc = checksums[content] if is_tensor else crc32(content)
        # Version 2.0, no flags, stored, 1 January 1980.
        fields = struct.pack("<HHHHHIII", 20, 0, 0, 0, 33, crc, size, size)
        padding = -(position + 30 + len(name) + 4) % _ALIGNMENT
        extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as PyTorch pads
        local = b"PK\3\4" + fields + struct.pack("<HH", len(name), len(extra)) + name + extra
        directory += b"PK\1\2" + struct.pack("<H", 20) + fields
        directory += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, position) + name
        pieces += [local, content]
        position += len(local) + size
    if position >= 1 << 32:
        raise CheckpointError("the weights are larger than the 4 GiB of a .pt; write a .safetensors file instead")
    count, size = len(entries), len(directory)
    return [*pieces, directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, position, 0)]

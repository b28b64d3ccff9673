"""{name: numpy array} -> checkpoint files: `.pdparams`, `.safetensors` and PyTorch's `.pt`, with neither framework.

A file gets its name only once it is complete, has been read back and every tensor compared.
"""

import contextlib
import json
import os
import pickle
import stat
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import archives
from .archives import BFLOAT16
from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write(path, arrays, dtype_of, metadata, progress=lambda pairs: pairs, release=lambda: None):
    """Writes a checkpoint in the form its extension names: `.safetensors`, `.pt`, or else Paddle's.

    Before the file is complete, and after any failure, an existing file of that name is untouched.

    Args:
        path: the file to write.
        arrays: {name: array}; anything with `shape`, `dtype` and `__array__` will do, and is made into an array only
            when it is written; uint16 stands for bfloat16.
        dtype_of: a function of a name returning the dtype to write it in, as `cast` takes it.
        metadata: a function of the tensors' checksums, a string, returning the {string: string} to write with them.
            It may be called twice, and returns values of the same lengths.
        progress: wraps the list of (name, array) pairs that is written, such as a progress bar.
        release: called after each tensor, when its array is no longer needed.

    Raises:
        CheckpointError: if `path` cannot become the file, a number does not fit its dtype, or the file read back
            differs.
        OSError: if the disk is full or the folder cannot be written.
    """
    forms = {".safetensors": _Safetensors, ".pt": _Torch}
    form = forms.get(os.path.splitext(path)[1], _Pickle)
    dtypes = {name: _result_dtype(array.dtype, dtype_of(name)) for name, array in arrays.items()}
    tensors = {name: (dtypes[name], tuple(array.shape)) for name, array in arrays.items()}
    checksums = dict.fromkeys(arrays, 0)
    with _replacing(path) as file:
        written = form(file, tensors, lambda: metadata(_checksum_text(checksums)))

        def add(name, content):
            checksums[name] = zlib.crc32(content)
            written.add(name, content)
            release()

        try:
            # While one tensor is written, the next is cast.
            with ThreadPoolExecutor(1) as pool:
                pending = []
                for name, array in progress(list(arrays.items())):
                    result = cast(np.asarray(array), dtype_of(name), name)
                    content = np.ascontiguousarray(result).reshape(-1).view(np.uint8).data
                    if pending:
                        pending.pop().result()
                    pending.append(pool.submit(add, name, content))
                for last in pending:
                    last.result()
            written.close()
        except BaseException:
            written.abandon()
            raise
        file.flush()
        os.fsync(file.fileno())
        _compare(file.name, tensors, checksums)


@contextlib.contextmanager
def _replacing(path):
    """A new file beside `path` that takes its name when the block ends well, and is deleted when it does not.

    It has one name, so that what a killed process left is used up by the next, and a lock, so that two do not write it.
    """
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
            yield _Named(file, temporary)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


class _Named:
    """An open file with the path it was opened by, which a file from a descriptor does not know."""

    def __init__(self, file, name):
        self.name = name
        self._file = file

    def __getattr__(self, attribute):
        return getattr(self._file, attribute)


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
    found = {
        name: zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for name, array in checkpoint.items()
    }
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{source} is damaged: {', '.join(wrong)} changed since it was written; convert it again")
    return len(found)


def _compare(path, tensors, checksums):
    checkpoint = archives.read(path)
    try:
        found = {name: (array.dtype, array.shape) for name, array in checkpoint.items()}
        wrong = [name for name in tensors.keys() | found.keys() if tensors.get(name) != found.get(name)]
        for name in tensors.keys() - set(wrong):
            if zlib.crc32(checkpoint[name].reshape(-1).view(np.uint8)) != checksums[name]:
                wrong.append(name)
            checkpoint.release()
    finally:
        checkpoint.clear()
    if wrong:
        raise CheckpointError(f"{', '.join(sorted(wrong))} read back differ from what was written; is the disk sound?")


# -------------------------------------------------------------------------------------------------------------- dtypes


def _result_dtype(dtype, target):
    if target == "keep":
        return dtype
    return BFLOAT16 if target == "bfloat16" else np.dtype(target)


def cast(array, dtype, name="an array"):
    """A copy or view of a floating-point array in another dtype, rounded to nearest even.

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
        result = _to_bfloat16(array.astype(np.float32)) if dtype == "bfloat16" else array.astype(dtype)
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


_SAFETENSORS_NAMES = {dtype: name for name, dtype in archives.SAFETENSORS_DTYPES.items()}
_TORCH_NAMES = {dtype: name for name, dtype in archives.TORCH_DTYPES.items()}


def _plain(value):
    """The pickle opcodes for a value of built-in types."""
    return pickle.dumps(value, protocol=2)[2:-1]


class _Form:
    """A file being written: `add` each tensor's bytes in order, then `close`, or `abandon` it."""

    def __init__(self, file, tensors, metadata):
        self.file = file
        self.tensors = tensors  # {name: (dtype, shape)}
        self.metadata = metadata  # a function returning {string: string}

    def abandon(self):
        """Lets go of the file, whose content no longer matters."""


class _Pickle(_Form):
    """What `paddle.save(state_dict, path)` writes, for any numpy to read: {name: array}.

    Arrays name `numpy.core`, which every numpy can import. The last key is Paddle's table from structured to parameter
    names, which it expects. The metadata is a string that is pushed and dropped: unpicklers never return it.
    """

    def __init__(self, file, tensors, metadata):
        super().__init__(file, tensors, metadata)
        file.write(b"\x80\x04}(")

    def add(self, name, content):
        dtype, shape = self.tensors[name]
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _plain((0,)) + b"C\x01btR(K\x01"
        head += _plain(shape) + b"cnumpy\ndtype\n" + _plain((dtype.str.lstrip("<|"), False, True)) + b"R"
        head += _plain((3, dtype.str[0], None, None, None, -1, -1, 0)) + b"b\x89\x8e"
        self.file.write(_plain(name) + head + struct.pack("<Q", content.nbytes))
        self.file.write(content)
        self.file.write(b"tb")

    def close(self):
        table = _plain("StructuredToParameterName@@") + _plain({name: name for name in self.tensors})
        self.file.write(table + b"u" + _plain(json.dumps(self.metadata())) + b"0.")


class _Safetensors(_Form):
    """The safetensors format: the header's length, the header in JSON, the tensors."""

    def __init__(self, file, tensors, metadata):
        super().__init__(file, tensors, metadata)
        self.size = len(self._header())
        file.write(self._header())

    def _header(self):
        header, start = {"__metadata__": {"format": "paddle", **self.metadata()}}, 0
        for name, (dtype, shape) in self.tensors.items():
            end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors start aligned
        return struct.pack("<Q", len(text)) + text

    def add(self, name, content):
        self.file.write(content)

    def close(self):
        header = self._header()  # now with the checksums
        if len(header) != self.size:
            raise AssertionError("the metadata changed its length")
        self.file.seek(0)
        self.file.write(header)


class _Torch(_Form):
    """What `torch.save(state_dict, path)` writes: a zip with a pickle, and the bytes of each tensor."""

    def __init__(self, file, tensors, metadata):
        super().__init__(file, tensors, metadata)
        self.keys = {name: str(index) for index, name in enumerate(tensors)}
        self.zip = zipfile.ZipFile(file, "w")
        pickled = b"\x80\x02ccollections\nOrderedDict\n)R("
        for name, (dtype, shape) in tensors.items():
            count = int(np.prod(shape, dtype=np.int64))
            strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
            storage = "c" + _TORCH_NAMES[dtype].replace(".", "\n") + "\n"
            pickled += _plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _plain("storage") + storage.encode()
            pickled += _plain(self.keys[name]) + _plain("cpu") + _plain(count) + b"tQ" + _plain(0) + _plain(shape)
            pickled += _plain(tuple(strides)) + b"\x89ccollections\nOrderedDict\n)RtR"
        self._add("data.pkl", pickled + b"u.")
        self._add("byteorder", b"little")

    def _add(self, name, content):
        info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that the same tensors give the same file
        info.file_size = len(content)
        with self.zip.open(info, "w") as entry:
            entry.write(content)

    def add(self, name, content):
        self._add(f"data/{self.keys[name]}", content)

    def close(self):
        self._add("version", b"3\n")
        self._add("paddle_clip.json", json.dumps(self.metadata()).encode())
        self.zip.close()

    def abandon(self):
        with contextlib.suppress(OSError, ValueError):  # else it would try, and complain, when it is collected
            self.zip.close()

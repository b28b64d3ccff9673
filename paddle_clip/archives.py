"""Checkpoint files <-> {name: numpy array}: formats and safety, nothing of CLIP, neither torch nor paddle.

Arrays that are read are views of the mapped file. bfloat16, which numpy lacks, is held as uint16, Paddle's convention.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import pickle
import secrets
import stat
import struct
import zipfile
import zlib

import numpy as np

from . import pickles
from .errors import CheckpointError

BFLOAT16 = np.dtype("<u2")
_STORAGES = {
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_SAFETENSORS = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_TORCH_GLOBALS = {
    *_STORAGES,
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
}
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
_LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_DOWNLOAD_AGAIN = "If it was downloaded, download it again"
_MAX_DEPTH = 64  # of nested modules and dicts
_MAX_TENSORS = 100_000


def read(path):
    """Reads every tensor of a checkpoint, whatever its extension says.

    Args:
        path: a TorchScript archive or `torch.save` zip (`.pt`), a `.pdparams`, or a `.safetensors` file.

    Returns:
        {dotted name: read-only array}, views of the mapped file. Nested dicts and modules are joined with dots; what
        is not a tensor is left out.

    Raises:
        CheckpointError: if the file is none of these, is damaged, or asks for anything but tensors.
        OSError: if it cannot be opened.
    """
    data = _map(path)
    if data[:4] == b"PK\x03\x04":
        tensors = _read_torch(path, data)
    elif data[:1] == b"\x80":
        tensors = _read_pickle(path, data)
    elif len(data) > 9 and data[8:9] == b"{":
        tensors = _read_safetensors(path, data)
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: expected a PyTorch .pt, a Paddle .pdparams or a .safetensors file, found "
            f"{len(data):,} bytes starting with {bytes(data[:8])!r}. {_DOWNLOAD_AGAIN}"
        )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a CLIP model")
    return tensors


def sha256(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    digest.update(_map(path))
    return digest.hexdigest()


def _map(path):
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if info.st_size == 0:
            raise CheckpointError(f"{path} is empty. {_DOWNLOAD_AGAIN}")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# ---------------------------------------------------------------------------------------------- torch's zip archives


def _read_torch(path, data):
    entries = _zip_entries(path, data)
    pickled = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise CheckpointError(f"{path} is a zip but not a PyTorch checkpoint: expected one <root>/data.pkl")
    root = pickled[0][: -len("data.pkl")]
    if root + "byteorder" in entries and bytes(entries[root + "byteorder"]()) != b"little":
        raise CheckpointError(f"{path} was saved on a big-endian machine; re-save it on a little-endian one")

    storages = {}

    def storage(node):
        if not isinstance(node, pickles.Persistent) or len(node.id) < 5 or node.id[0] != "storage":
            raise CheckpointError(f"{path} is damaged: a tensor refers to something that is not a storage")
        _, kind, key, _location, count = node.id[:5]
        if key not in storages:
            if f"{root}data/{key}" not in entries:
                raise CheckpointError(f"{path} is damaged: the data of storage {key} is missing")
            storages[key] = entries[f"{root}data/{key}"]()
        dtype = _STORAGES[kind]
        if len(storages[key]) != count * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged: storage {key} has {len(storages[key]):,} bytes, expected {count} x {dtype}"
            )
        return np.frombuffer(storages[key], dtype)

    def tensor(node):
        if node.name == "torch._utils._rebuild_parameter":
            return tensor(node.args[0])
        if node.name == "torch._utils._rebuild_tensor_v2":
            return _strided(storage(node.args[0]), *node.args[1:4])
        return None

    def allowed(name):
        return name in _TORCH_GLOBALS or name.startswith("__torch__.")

    return _flatten(path, pickles.parse(entries[pickled[0]](), allowed, path), tensor)


def _zip_entries(path, data):
    """{entry name: function returning its checked bytes} of a zip whose entries are stored, in bounds and apart."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            directory = archive.start_dir
    except Exception as error:  # zipfile raises many kinds on damaged input
        raise CheckpointError(f"{path} is a damaged or truncated zip ({error}). {_DOWNLOAD_AGAIN}") from None

    entries, end_of_last = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, header = info.filename, data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{path} is damaged: no header where entry {name} should start")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        end = start + info.compress_size
        if name in entries or info.header_offset < end_of_last or end > directory:
            raise CheckpointError(f"{path} is damaged: entry {name} is doubled, overlaps another or is out of bounds")
        entries[name] = _content(path, info, data[start:end])
        end_of_last = end
    return entries


def _content(path, info, content):
    """A function returning the bytes of a zip entry, once they are known to be stored and undamaged."""

    def checked():
        # PyTorch deflates the code of a TorchScript archive, which is never read, and nothing else.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"{path}: entry {info.filename} is compressed; re-save the file with torch.save")
        if zlib.crc32(content) != info.CRC:
            raise CheckpointError(f"{path} is damaged: entry {info.filename} fails its checksum. {_DOWNLOAD_AGAIN}")
        return content

    return checked


def _strided(storage, offset, shape, strides):
    """The tensor torch describes by storage, offset, shape and strides (in elements), as a view."""
    if len(shape) != len(strides) or len(shape) > 32 or min((offset, *shape, *strides)) < 0:
        raise ValueError("a tensor has impossible strides")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if count and (last >= storage.size or count > storage.size):
        raise ValueError("a tensor reaches beyond its storage")
    if not count:
        return np.empty(shape, storage.dtype)
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False)


# ----------------------------------------------------------------------------------------------- pickles of arrays


def _read_pickle(path, data):
    tree = pickles.parse(data, _NUMPY_GLOBALS.__contains__, path)
    if tree == _LEGACY_TORCH_MAGIC:
        raise CheckpointError(
            f"{path} is in PyTorch's format from before 1.6. Re-save it where PyTorch is installed: python -c "
            f"\"import torch; torch.save(torch.load('{path}', map_location='cpu'), 'resaved.pt')\""
        )
    return _flatten(path, tree, _numpy_array)


def _numpy_array(node):
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


def _flatten(path, tree, tensor):
    """{dotted name: array} of the tensors in a tree of dicts, lists and nodes."""
    tensors, visits = {}, 0

    def visit(name, value, depth):
        nonlocal visits
        visits += 1
        if depth > _MAX_DEPTH or visits > 10 * _MAX_TENSORS:
            raise CheckpointError(f"{path} is not a checkpoint: its contents are nested too deeply or too many")
        if isinstance(value, pickles.Node):
            array = tensor(value)
            if array is not None:
                if name in tensors:
                    raise CheckpointError(f"{path} is not a checkpoint: it names {name} twice")
                tensors[name] = array
                return
            value = value.state if isinstance(value.state, dict) and not value.items else value.items
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            for key, child in value.items():
                if isinstance(child, (pickles.Node, dict, list, tuple)):
                    visit(f"{name}.{key}" if name else str(key), child, depth + 1)

    try:
        visit("", tree, 0)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return tensors


# ------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(path, data):
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(bytes(data[8 : 8 + size])) if size <= len(data) - 8 else None
        content = data[8 + size :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            dtype, shape = _SAFETENSORS[entry["dtype"]], entry["shape"]
            if not 0 <= start <= end <= len(content) or math.prod(shape) * dtype.itemsize != end - start:
                raise ValueError(f"{name} is out of bounds")
            tensors[name] = np.frombuffer(content[start:end], dtype).reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is a damaged or truncated .safetensors file ({error!r})") from None
    return tensors


# ------------------------------------------------------------------------------------------------ dtypes and writing


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


def write_pdparams(path, tensors):
    """Writes what `paddle.save(state_dict, path)` would write, for any numpy to read.

    The file gets its name only once it is complete, has been read back and every tensor compared; before that, and
    after any failure, an existing file of that name is untouched.

    Args:
        path: the file to write.
        tensors: a function returning a fresh iterator of (name, array) each time it is called, so that only one
            array need be in memory at a time; uint16 stands for bfloat16.

    Raises:
        CheckpointError: if `path` cannot become the file, or the file read back differs.
        OSError: if the disk is full or the folder cannot be written.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(f"{path} exists and is not a regular file; choose another output with -o")
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as file:
            _write_pickle(file, tensors())
            file.flush()
            os.fsync(file.fileno())
        _compare(temporary, tensors())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _compare(path, tensors):
    written = read(path)
    for name, array in tensors:
        back = written.pop(name, None)
        if back is None or back.dtype != array.dtype or back.shape != array.shape or back.tobytes() != array.tobytes():
            raise CheckpointError(f"{name} read back from {path} differs from what was written; is the disk sound?")
    if written:
        raise CheckpointError(f"{path} read back holds tensors that were not written: {', '.join(sorted(written))}")


def _write_pickle(file, tensors):
    """Streams a protocol 4 pickle of {name: array}, naming `numpy.core`, which every numpy can import.

    The second key is Paddle's table from structured to parameter names, which it expects in a state dict.
    """

    def plain(value):  # the opcodes for a value of built-in types
        return pickle.dumps(value, protocol=2)[2:-1]

    file.write(b"\x80\x04}(")
    names = []
    for name, array in tensors:
        names.append(name)
        code = array.dtype.str.lstrip("<|")
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        file.write(plain(name))
        file.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + plain((0,)) + b"C\x01btR(K\x01")
        file.write(plain(array.shape))
        file.write(b"cnumpy\ndtype\n" + plain((code, False, True)) + b"R")
        file.write(plain((3, array.dtype.str[0], None, None, None, -1, -1, 0)) + b"b\x89\x8e")
        file.write(struct.pack("<Q", content.nbytes))
        file.write(content)
        file.write(b"tb")
    file.write(plain("StructuredToParameterName@@") + plain({name: name for name in names}) + b"u.")

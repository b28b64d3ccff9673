"""Checkpoint files -> {name: numpy array}: formats and safety, nothing of CLIP, neither torch nor paddle.

bfloat16, which numpy lacks, is held as uint16, Paddle's convention.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import mmap
import os
import stat
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import pickles
from .errors import CheckpointError

try:
    from isal.isal_zlib import crc32  # eight times as fast as zlib's
except ImportError:  # it is not built for this processor
    from zlib import crc32

TORCHSCRIPT = "TorchScript archive"  # the kind of file OpenAI publishes
BFLOAT16 = np.dtype("<u2")
TORCH_DTYPES = {
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
SAFETENSORS_DTYPES = {
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
    *TORCH_DTYPES,
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
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
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of PyTorch's magic number
_DOWNLOAD_AGAIN = "If it was downloaded, download it again"
_MAX_DEPTH = 64  # of nested modules and dicts
_MAX_TENSORS = 100_000
_MAX_NAME = 1000  # characters
_MAX_DIRECTORY = 1 << 24  # bytes of a zip's directory, a safetensors header, a JSON file
_MAX_SHARDS = 1000
_RELEASE_OVER = 1 << 20  # bytes checked
_HASHED_AT_ONCE = 1 << 24  # bytes


class Checkpoint(dict):
    """{dotted name: read-only array} of a file; the arrays are views of the mapped file."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind  # what the file is, in words
        self.metadata = {}  # {string: value} the file or its folder says of itself
        self.maps = []

    def neighbour(self, name):
        """What a JSON file of this name beside the checkpoint holds, or None if there is none.

        Raises:
            CheckpointError: if it is not a JSON object.
        """
        if not self.maps:
            return None
        path = os.path.join(os.path.dirname(self.maps[0].path), name)
        try:
            with _open(path) as file:
                content = json.loads(file.read(_MAX_DIRECTORY))
        except FileNotFoundError:
            return None
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} cannot be used: it is not a JSON object")
        return content

    def release(self):
        """Takes the pages read so far out of this process's memory; they are read again when they are used."""
        for mapped in self.maps:
            mapped.release()


class _Mapped:
    """A regular, non-empty file mapped for reading; `data` is a memoryview of it."""

    def __init__(self, path):
        with _open(path) as file:
            self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path = path
        self.data = memoryview(self._mmap)

    def release(self):
        if hasattr(self._mmap, "madvise"):
            self._mmap.madvise(mmap.MADV_DONTNEED)


def _open(path):
    """Opens a file for reading, unless it is empty or no regular file: a pipe would wait, a device may have no end."""
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if info.st_size == 0:
        raise CheckpointError(f"{path} is empty. {_DOWNLOAD_AGAIN}")
    return open(path, "rb", buffering=0)


def read(path):
    """Reads every tensor of a checkpoint, whatever its extension says.

    Args:
        path: a TorchScript archive, a `torch.save` file (zip, or the format before PyTorch 1.6), a `.pdparams`, a
            `.safetensors` file, or the `.safetensors.index.json` of a sharded one.

    Returns:
        `Checkpoint`. Nested dicts and modules are joined with dots; what is not a tensor is left out.

    Raises:
        CheckpointError: if the file is none of these, is damaged, or asks for anything but tensors.
        OSError: if it cannot be opened.
    """
    path = os.fspath(path)
    mapped = _Mapped(path)
    data = mapped.data
    if data[:4] == b"PK\x03\x04":
        checkpoint = _read_torch_zip(mapped)
    elif data[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC:
        checkpoint = _read_torch_legacy(mapped)
    elif data[:1] == b"\x80" and not _fits_safetensors(data):
        checkpoint = _read_pickle(mapped)
    elif data[8:9] == b"{":
        checkpoint = _read_safetensors(mapped)
    elif data[:1] == b"{":
        checkpoint = _read_index(mapped)
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: expected a PyTorch .pt, a Paddle .pdparams or a .safetensors file, found "
            f"{len(data):,} bytes starting with {bytes(data[:8])!r}. {_DOWNLOAD_AGAIN}"
        )
    checkpoint.maps.insert(0, mapped)
    if not checkpoint:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a CLIP model")
    return checkpoint


def _fits_safetensors(data):
    """Whether the data starts with the length of a JSON header it has room for, which no pickle does."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def sha256(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest, mapped = hashlib.sha256(), _Mapped(path)
    for start in range(0, len(mapped.data), _HASHED_AT_ONCE):
        digest.update(mapped.data[start : start + _HASHED_AT_ONCE])
        mapped.release()
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ torch's files


def _read_torch_zip(mapped):
    path, entries = mapped.path, _zip_entries(mapped)
    pickled = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise CheckpointError(f"{path} is a zip but not a PyTorch checkpoint: expected one <root>/data.pkl")
    root = pickled[0][: -len("data.pkl")]
    if root + "byteorder" in entries and bytes(entries[root + "byteorder"]()) != b"little":
        raise CheckpointError(f"{path} was saved on a big-endian machine; re-save it on a little-endian one")

    parsed = pickles.parse(entries[pickled[0]](), _torch_allows, path)
    keys = {node.id[2] for node in parsed.persistents if isinstance(node.id, tuple) and len(node.id) > 2}
    names = {key: f"{root}data/{key}" for key in keys}
    missing = sorted(str(key) for key, name in names.items() if name not in entries)
    if missing:
        raise CheckpointError(f"{path} is damaged: the data of storage {', '.join(missing)} is missing")
    with ThreadPoolExecutor(2) as pool:
        storages = dict(zip(names, pool.map(lambda name: entries[name](), names.values())))
    checkpoint = Checkpoint(TORCHSCRIPT if root + "constants.pkl" in entries else "PyTorch state dict")
    _flatten(path, parsed.tree, _torch_tensor(path, storages), checkpoint)
    if root + "paddle_clip.json" in entries:
        _add_metadata(checkpoint, bytes(entries[root + "paddle_clip.json"]()))
    return checkpoint


def _read_torch_legacy(mapped):
    """The format before PyTorch 1.6: five pickles, the fourth the object, the fifth its storages' keys, then these."""
    path, data, trees, position = mapped.path, mapped.data, [], 0
    for _ in range(5):
        parsed = pickles.parse(data[position:], _torch_allows, path)
        position += parsed.end
        trees.append(parsed.tree)
        if len(trees) == 4:
            persistents = parsed.persistents
    try:
        if trees[2]["little_endian"] is not True:
            raise CheckpointError(f"{path} was saved on a big-endian machine; re-save it on a little-endian one")
        sizes = {node.id[2]: TORCH_DTYPES[node.id[1]].itemsize for node in persistents}
        storages = {}
        for key in trees[4]:
            (count,) = struct.unpack("<q", data[position : position + 8])
            end = position + 8 + count * sizes[key]
            if count < 0 or end > len(data):
                raise ValueError("a storage reaches beyond the file")
            storages[key] = data[position + 8 : end]
            position = end
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or truncated ({error}). {_DOWNLOAD_AGAIN}") from None
    checkpoint = Checkpoint("PyTorch state dict in the format before PyTorch 1.6")
    _flatten(path, trees[3], _torch_tensor(path, storages), checkpoint)
    return checkpoint


def _torch_allows(name):
    return name in _TORCH_GLOBALS or name.startswith("__torch__.")


def _torch_tensor(path, storages):
    """A function making the array of a node that stands for a tensor, or None of any other.

    Args:
        path: of the file, for messages.
        storages: {key: bytes}.
    """

    def storage(node):
        if not isinstance(node, pickles.Persistent) or len(node.id) < 5 or node.id[0] != "storage":
            raise CheckpointError(f"{path} is damaged: a tensor refers to something that is not a storage")
        _, kind, key, _location, count = node.id[:5]
        dtype = TORCH_DTYPES[kind]
        if len(storages[key]) != count * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged: storage {key} has {len(storages[key]):,} bytes, expected {count} x {dtype}"
            )
        return np.frombuffer(storages[key], dtype)

    def tensor(node):
        if node.name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return tensor(node.args[0])
        if node.name == "torch._utils._rebuild_tensor_v2":
            return _strided(storage(node.args[0]), *node.args[1:4])
        return None

    return tensor


class _BoundedFile(io.FileIO):
    """A file that refuses to be read in large pieces, as zipfile reads the directory whatever size it claims."""

    def read(self, size=-1):
        if size > _MAX_DIRECTORY:
            raise ValueError(f"its directory claims {size:,} bytes")
        return super().read(size)


def _zip_entries(mapped):
    """{entry name: function returning its checked bytes} of a zip whose entries are stored, in bounds and apart."""
    path, data = mapped.path, mapped.data
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
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
        entries[name] = _content(mapped, info, data[start:end])
        end_of_last = end
    return entries


def _content(mapped, info, content):
    """A function returning the bytes of a zip entry, once they are known to be stored and undamaged."""
    path = mapped.path

    def checked():
        # PyTorch deflates the code of a TorchScript archive, which is never read, and nothing else.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"{path}: entry {info.filename} is compressed; re-save the file with torch.save")
        if crc32(content) != info.CRC:
            raise CheckpointError(f"{path} is damaged: entry {info.filename} fails its checksum. {_DOWNLOAD_AGAIN}")
        if len(content) > _RELEASE_OVER:
            mapped.release()
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


def _read_pickle(mapped):
    parsed = pickles.parse(mapped.data, _NUMPY_GLOBALS.__contains__, mapped.path)
    checkpoint = Checkpoint("Paddle state dict")
    _flatten(mapped.path, parsed.tree, _numpy_array, checkpoint)
    if parsed.comment:
        _add_metadata(checkpoint, parsed.comment)
    return checkpoint


def _add_metadata(checkpoint, text):
    with contextlib.suppress(ValueError, RecursionError):  # what is not ours says nothing to us
        metadata = json.loads(text)
        checkpoint.metadata.update(metadata if isinstance(metadata, dict) else {})


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


def _flatten(path, tree, tensor, tensors):
    """Puts the arrays of a tree of dicts, lists and nodes into `tensors`, by dotted name."""
    visits = 0

    def visit(name, value, depth):
        nonlocal visits
        visits += 1
        if depth > _MAX_DEPTH or visits > 10 * _MAX_TENSORS or len(tensors) > _MAX_TENSORS or len(name) > _MAX_NAME:
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
                    key = str(key)[: _MAX_NAME + 1]  # a longer one is refused there
                    visit(f"{name}.{key}" if name else key, child, depth + 1)

    try:
        visit("", tree, 0)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(mapped):
    path, data, checkpoint = mapped.path, mapped.data, Checkpoint("safetensors file")
    try:
        (size,) = struct.unpack("<Q", data[:8])
        if size > min(len(data) - 8, _MAX_DIRECTORY):
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


def _once(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _read_index(mapped):
    """The shards that a `model.safetensors.index.json` lists, which lie in its folder."""
    path, checkpoint = mapped.path, Checkpoint("sharded safetensors file")
    try:
        if len(mapped.data) > _MAX_DIRECTORY:
            raise ValueError("it is too large")
        places = json.loads(bytes(mapped.data), object_pairs_hook=_once)["weight_map"]
        files = sorted(set(places.values()))
        if any(file != os.path.basename(file) for file in files) or len(files) > _MAX_SHARDS:
            raise ValueError("its shards are not in its folder")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the index of a sharded .safetensors file ({error!r})") from None
    for file in files:
        shard = _read_safetensors(_Mapped(os.path.join(os.path.dirname(path), file)))
        wrong = shard.keys() ^ {name for name, place in places.items() if place == file}
        if wrong:
            raise CheckpointError(f"{path}: {file} does not hold what the index says: {', '.join(sorted(wrong))}")
        checkpoint.update(shard)
        checkpoint.metadata.update(shard.metadata)
        checkpoint.maps += shard.maps
    return checkpoint

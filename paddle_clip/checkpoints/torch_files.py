"""Reads PyTorch's files: TorchScript archives, zips of `torch.save`, and its format before PyTorch 1.6."""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import numpy as np

from ..errors import CheckpointError, listed
from . import pickles, trees
from .casting import TORCH_DTYPES, dtype_name, foreign
from .files import DOWNLOAD_AGAIN, MAX_DIRECTORY, TORCHSCRIPT, Checkpoint, MappedFile, crc32

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of PyTorch's magic number

_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"  # a tensor of a class of its own, or with attributes
_PLAIN = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_FOREIGN = {  # functions that make tensors of other forms, and what their dtype is called here
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta, a tensor without numbers",
    "torch._utils._rebuild_wrapper_subclass": "of another class of tensors",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of another device",
}
_MAX_WRAPPERS = 4  # a parameter of a tensor with attributes, and the like
_FEW = 1 << 16  # numbers of a tensor that may repeat those of a smaller storage, as `expand` does
_RELEASE_OVER = 1 << 20  # bytes of an entry that are released once they are checked


def read_zip(mapped: MappedFile) -> Checkpoint:
    """Reads a TorchScript archive or a `torch.save` file.

    Raises:
        CheckpointError: if it is neither, is damaged, or asks for anything but tensors.
    """
    path, entries = mapped.path, _zip_entries(mapped)
    pickled = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise CheckpointError(f"{path} is a zip but not a PyTorch checkpoint: expected one <root>/data.pkl")
    root = pickled[0][: -len("data.pkl")]
    if root + "byteorder" in entries and bytes(entries[root + "byteorder"]()) != b"little":
        raise CheckpointError(f"{path} was saved on a big-endian machine; re-save it on a little-endian one")

    parsed = pickles.parse(entries[pickled[0]](), path)
    names = {node.id[2]: f"{root}data/{node.id[2]}" for node in parsed.persistents if _is_storage(node)}
    missing = [key for key, name in names.items() if name not in entries]
    if missing:
        raise CheckpointError(f"{path} is damaged: the data of storage {listed(missing)} is missing")
    with ThreadPoolExecutor(2) as pool:
        storages = dict(zip(names, pool.map(lambda name: entries[name](), names.values())))
    checkpoint = Checkpoint(TORCHSCRIPT if root + "constants.pkl" in entries else "PyTorch state dict")
    trees.flatten(path, parsed.tree, _tensor_maker(path, storages), checkpoint, len(mapped.data))
    if root + "paddle_clip.json" in entries:
        trees.add_metadata(checkpoint, bytes(entries[root + "paddle_clip.json"]()))
    return checkpoint


def read_legacy(mapped: MappedFile) -> Checkpoint:
    """Reads the format before PyTorch 1.6.

    It is five pickles: the fourth is the object, the fifth the keys of its storages. The storages' bytes follow.

    Raises:
        CheckpointError: if the file is damaged, or asks for anything but tensors.
    """
    path, data, position = mapped.path, mapped.data, 0
    pickled = []
    for _ in range(5):
        pickled.append(pickles.parse(data[position:], path))
        position += pickled[-1].end
    _magic, _protocol, system, content, keys = pickled
    try:
        if system.tree["little_endian"] is not True:
            raise CheckpointError(f"{path} was saved on a big-endian machine; re-save it on a little-endian one")
        sizes = {node.id[2]: TORCH_DTYPES[node.id[1]].itemsize for node in content.persistents if _is_storage(node)}
        storages = {}
        if not all(isinstance(key, str) for key in keys.tree):
            raise ValueError("the keys of its storages are no texts")
        for key in keys.tree:
            (count,) = struct.unpack("<q", data[position : position + 8])
            end = position + 8 + count * sizes[key]
            if count < 0 or end > len(data):
                raise ValueError("a storage reaches beyond the file")
            storages[key] = data[position + 8 : end]
            position = end
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or truncated ({error}). {DOWNLOAD_AGAIN}") from None
    checkpoint = Checkpoint("PyTorch state dict in the format before PyTorch 1.6")
    trees.flatten(path, content.tree, _tensor_maker(path, storages), checkpoint, len(data))
    return checkpoint


def _is_storage(node: Any) -> bool:
    """Whether a node refers to a storage: ("storage", class, key, location, number of elements, perhaps a view)."""
    if not isinstance(node, pickles.Persistent) or not isinstance(node.id, tuple) or len(node.id) < 5:
        return False
    word, kind, key, _location, count = node.id[:5]
    are_texts = isinstance(word, str) and isinstance(kind, str) and isinstance(key, str)
    return are_texts and word == "storage" and type(count) is int and 0 <= count < 1 << 62


def _tensor_maker(path: str, storages: dict[str, memoryview]) -> Callable[[pickles.Node], Optional[np.ndarray]]:
    """A function that returns the array of a node that stands for a tensor, and None for other nodes.

    Args:
        path: path of the file, for messages.
        storages: {key: bytes} of the file.
    """

    def storage(node: Any) -> np.ndarray:
        if not _is_storage(node):
            raise CheckpointError(f"{path} is damaged: a tensor refers to something that is not a storage")
        _, kind, key, _location, count = node.id[:5]
        if kind not in TORCH_DTYPES or key not in storages:
            raise ValueError(f"a tensor lies in a storage that is not there, {key[:100]!r} of {kind[:100]}")
        dtype = TORCH_DTYPES[kind]
        if len(storages[key]) != count * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged: storage {key} has {len(storages[key]):,} bytes, "
                f"expected {count} x {dtype_name(dtype)}"
            )
        array = np.frombuffer(storages[key], dtype)
        if len(node.id) > 5 and node.id[5] is not None:  # a part of a storage, in the first releases of PyTorch
            _key, start, length = node.id[5]
            start, length = trees.sizes((start, length))
            array = array[start : start + length]
        return array

    def tensor(node: pickles.Node) -> Optional[np.ndarray]:
        for _ in range(_MAX_WRAPPERS):
            if node.name in _PARAMETERS and isinstance(node.args[0], pickles.Node):
                node = node.args[0]
            elif node.name == _WITH_ATTRIBUTES:
                node = (
                    pickles.Node(str(node.args[0]), node.args[2]) if isinstance(node.args[0], pickles.Global) else node
                )
        if node.name in _PLAIN:
            return _strided(storage(node.args[0]), *node.args[1:4])
        if node.name == "torch._utils._rebuild_tensor_v3":  # of the dtypes that have no storages of their own
            return foreign(_last(node.args[6]))
        if node.name in _FOREIGN or node.name == _WITH_ATTRIBUTES:
            return foreign(_FOREIGN.get(node.name, "of another class of tensors"))
        return trees.numpy_array(node)

    return tensor


def _last(name: Any) -> str:
    return name.rpartition(".")[2] if isinstance(name, pickles.Global) else "of another dtype"


def _strided(storage: np.ndarray, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """A view of a storage as the tensor that torch describes by offset, shape and strides in elements."""
    (offset,), shape, strides = trees.sizes((offset,)), trees.sizes(shape), trees.sizes(strides)
    if len(shape) != len(strides):
        raise ValueError("a tensor has impossible strides")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if count and (last >= storage.size or count > max(storage.size, _FEW)):
        raise ValueError("a tensor reaches beyond its storage")
    if not count:
        return np.empty(shape, storage.dtype)
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False)


# ---------------------------------------------------------------------------------------------------------- zip entries


class _BoundedFile(io.FileIO):
    """A file that refuses large reads: zipfile would read a zip's directory whatever size it claims."""

    def read(self, size: Optional[int] = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise ValueError(f"its directory claims {size:,} bytes")
        return super().read(size)


def _zip_entries(mapped: MappedFile) -> dict[str, Callable[[], memoryview]]:
    """{entry name: function returning its checked bytes} of a zip, whose entries must be in bounds and apart."""
    path, data = mapped.path, mapped.data
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            directory = archive.start_dir
    except Exception as error:  # zipfile raises many kinds on damaged input
        raise CheckpointError(f"{path} is a damaged or truncated zip ({error}). {DOWNLOAD_AGAIN}") from None

    entries: dict[str, Callable[[], memoryview]] = {}
    end_of_last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, header = info.filename, data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != ZIP_MAGIC:
            raise CheckpointError(f"{path} is damaged: no header where entry {name} should start")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        end = start + info.compress_size
        if name in entries or info.header_offset < end_of_last or end > directory:
            raise CheckpointError(f"{path} is damaged: entry {name} is doubled, overlaps another or is out of bounds")
        entries[name] = _content(mapped, info, data[start:end])
        end_of_last = end
    return entries


def _content(mapped: MappedFile, info: zipfile.ZipInfo, content: memoryview) -> Callable[[], memoryview]:
    """A function that checks that a zip entry is stored and undamaged, and returns its bytes."""
    path = mapped.path

    def checked() -> memoryview:
        # PyTorch deflates the code of a TorchScript archive, which is never read, and nothing else.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"{path}: entry {info.filename} is compressed; re-save the file with torch.save")
        if crc32(content) != info.CRC:
            raise CheckpointError(f"{path} is damaged: entry {info.filename} fails its checksum. {DOWNLOAD_AGAIN}")
        if len(content) > _RELEASE_OVER:
            mapped.release()
        return content

    return checked

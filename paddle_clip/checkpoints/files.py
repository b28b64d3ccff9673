"""Maps files for reading, computes their checksums, locks them, and replaces them in one step."""

import contextlib
import errno
import hashlib
import json
import lzma
import mmap
import os
import shutil
import stat
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Optional, Union

import numpy as np

from ..errors import CheckpointError

try:
    from isal.isal_zlib import crc32  # eight times as fast as zlib's
except ImportError:  # it is not built for this processor
    from zlib import crc32

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Checkpoint",
    "MappedFile",
    "StrPath",
    "abandon",
    "brief",
    "crc32",
    "crc32_of_array",
    "crc32_of_file",
    "expanded",
    "former",
    "held",
    "lock",
    "naming",
    "open_hidden",
    "open_regular",
    "read_json",
    "reading",
    "release_pages",
    "replacing",
    "replacing_folder",
    "require_place",
    "sha256",
    "write_at",
]

StrPath = Union[str, "os.PathLike[str]"]

TORCHSCRIPT = "TorchScript archive"  # the kind of file OpenAI publishes
DOWNLOAD_AGAIN = "If it was downloaded, download it again"
MAX_DIRECTORY = 1 << 24  # bytes of a zip's directory, a safetensors header, a JSON file
_READ_AT_ONCE = 1 << 24  # bytes
# Bytes written at once. For more, Linux looks for pages of 2 MB and up, which are rarely free: some 10x slower where
# the host of a virtual machine has to find them.
_WRITTEN_AT_ONCE = 1 << 19
_BRIEF = 60  # characters of a name that a message shows
_seeking = threading.Lock()
# What is raised for files that are damaged, or made to do harm.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,  # of numpy, which reads a header as Python
    zipfile.BadZipFile,
    zlib.error,
)


def expanded(path: StrPath) -> str:
    """A path as a string, with the home folder for `~`: no shell did it in a Dockerfile, a notebook or an option."""
    return os.path.expanduser(os.fsdecode(path))


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Names a file in errors of the system that do not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = path
        raise


@contextlib.contextmanager
def reading(path: str, expected: str) -> Iterator[None]:
    """Raises one error in place of all that numpy, zipfile, json and pyarrow raise for what is in a file.

    Args:
        path: path of the file.
        expected: what it should be and who writes it, for the message: numpy calls all other files pickles.

    Raises:
        CheckpointError: if it is something else.
        OSError: if the system does not let it be read.
    """
    try:
        yield
    except _DAMAGED as error:
        if isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise CheckpointError(f"{path} is not {expected}") from error


class Checkpoint(dict[str, np.ndarray]):
    """{dotted name: read-only array} of a file; the arrays are views of the mapped file.

    Attributes:
        kind: form of the file, in words.
        metadata: {string: value} stored in the file.
        maps: mapped files that hold its arrays; the first is the file that was asked for.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.metadata: dict[str, Any] = {}
        self.maps: list[MappedFile] = []

    def neighbour(self, name: str) -> Optional[dict[str, Any]]:
        """The content of the JSON file of this name beside the checkpoint, or None if there is none.

        Raises:
            CheckpointError: if it is not a JSON object.
        """
        if not self.maps:
            return None
        path = os.path.join(os.path.dirname(self.maps[0].path), name)
        try:
            return read_json(path)
        except FileNotFoundError:
            return None

    def release(self) -> None:
        """Takes the pages read so far out of this process's memory; they are read again when they are used."""
        for mapped in self.maps:
            mapped.release()


class MappedFile:
    """A regular, non-empty file mapped for reading; `data` is a memoryview of it."""

    def __init__(self, path: StrPath):
        self.path = os.fspath(path)
        with open_regular(self.path) as file:
            self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = memoryview(self._mmap)

    def release(self) -> None:
        """Takes the pages read so far out of this process's memory."""
        release_pages(self._mmap)


def release_pages(mapped: mmap.mmap) -> None:
    """Takes the pages of a mapped file out of this process's memory, where the system can; reading brings them back."""
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def open_regular(path: str) -> BinaryIO:
    """Opens a file for reading, unless it is empty or not regular: a pipe would wait, a device may have no end."""
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if info.st_size == 0:
        raise CheckpointError(f"{path} is empty. {DOWNLOAD_AGAIN}")
    return open(path, "rb")


def brief(value: Any) -> str:
    """The start of a value as a text in one line that can be printed."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 3]}..."


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: if the file cannot be read or holds anything else.
        FileNotFoundError: if there is no such file.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(MAX_DIRECTORY))
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be used: it is not a JSON object")
    return content


# ----------------------------------------------------------------------------------------------------------- checksums


def sha256(path: StrPath) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest, mapped = hashlib.sha256(), MappedFile(path)
    for start in range(0, len(mapped.data), _READ_AT_ONCE):
        digest.update(mapped.data[start : start + _READ_AT_ONCE])
        mapped.release()
    return digest.hexdigest()


def crc32_of_file(path: StrPath) -> int:
    """The CRC-32 of a file's bytes."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_AT_ONCE):
            value = crc32(block, value)
    return value


def crc32_of_array(array: np.ndarray) -> int:
    """The CRC-32 of an array's numbers in C order."""
    return crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


# ------------------------------------------------------------------------------------------------------------- writing


def require_place(path: StrPath) -> None:
    """Raises OSError if a file has no folder that can be written to, ValueError if something else has its name."""
    path = expanded(path)
    _require_folder(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} exists and is not a file; choose another output")


def _require_folder(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder of the output {path!r} does not exist")
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written to", folder)


def write_at(file: BinaryIO, content: Any, offset: int) -> None:
    """Writes bytes at an offset of a file, past its buffer; several threads may do so at once."""
    view = memoryview(content)
    while len(view):
        count = _write_some(file, view[:_WRITTEN_AT_ONCE], offset)
        view, offset = view[count:], offset + count


def _write_some(file: BinaryIO, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), view, offset)
    with _seeking:  # Windows, where a file has one position for all threads
        file.seek(offset)
        count = file.write(view)
        file.flush()
        return count


def lock(descriptor: int, path: str, temporary: str) -> None:
    """Locks a file or folder for this process until it is closed, where the system has `flock`.

    Args:
        descriptor: of the open file or folder.
        path: path of the output, for messages.
        temporary: path it was opened by.

    Raises:
        CheckpointError: if another process has locked it, or replaced it since it was opened.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another process is writing {path}; wait for it, or choose another output") from None
    try:
        replaced = not os.path.samestat(os.fstat(descriptor), os.stat(temporary))
    except FileNotFoundError:  # the other has renamed it
        replaced = True
    if replaced:
        raise CheckpointError(f"another process has just written {path}; run this again to replace it")


def open_hidden(path: str) -> BinaryIO:
    """Opens a hidden file of ours for reading and writing, and makes it if it is missing.

    Raises:
        CheckpointError: if something else has its name, such as a link, whose target would be overwritten.
    """
    wrong = CheckpointError(f"{path} is a link, or no file: delete it, or choose another output")
    if os.path.islink(path):
        raise wrong
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # a name of another file's; 0 once a writer has replaced it
        os.close(descriptor)
        raise wrong
    return open(descriptor, "r+b")


@contextlib.contextmanager
def replacing(path: StrPath, extension: str = "") -> Iterator[tuple[BinaryIO, str]]:
    """Opens a new file beside `path`, which takes its name when the block ends well and is deleted otherwise.

    The new file has a fixed name, so that the next process reuses what a killed one left, and a lock, so that two
    processes do not write it at once. An existing file is untouched until it is replaced in one step.

    Args:
        path: path of the file to make or replace.
        extension: ending of the new file's name, for libraries that choose a format by it.

    Yields:
        The new file, empty and open for reading and writing, and its path.

    Raises:
        CheckpointError: if `path` is something other than a regular file, or another process is writing it.
        FileNotFoundError: if there is no folder for the file.
    """
    path = expanded(path)
    _require_folder(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(f"{path} exists and is not a regular file; choose another output")
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.partial{extension}")
    with open_hidden(temporary) as file:
        lock(file.fileno(), path, temporary)
        try:
            with naming(path):
                file.truncate()
                yield file, temporary
                file.flush()
            if fcntl is None:  # Windows does not rename open files
                file.close()
            os.replace(temporary, path)
        except BaseException:
            if fcntl is None:
                abandon(file)
            os.unlink(temporary)
            abandon(file)  # once nobody else can find it
            raise


def abandon(file: BinaryIO) -> None:
    """Closes a file that is given up: what could not be written would be tried again, and raise again."""
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def held(path: StrPath) -> Iterator[None]:
    """Keeps other processes from making the same output while the block lasts, where the system has `flock`.

    The lock is on a hidden file, which the next process removes if this one is killed.

    Raises:
        CheckpointError: if another process is making it.
        OSError: if its folder is missing, or cannot be written to.
    """
    path = expanded(path)
    _require_folder(path)
    folder, name = os.path.split(os.path.abspath(path))
    hidden = os.path.join(folder, f".{name}.lock")
    if fcntl is None:
        yield
        return
    with open_hidden(hidden) as file:
        lock(file.fileno(), path, hidden)
        try:
            yield
        finally:
            os.unlink(hidden)


def former(folder: str) -> str:
    """The hidden name of a folder that is being replaced, from then on until it is deleted."""
    place, name = os.path.split(os.path.abspath(folder))
    return os.path.join(place, f".{name}.old")


@contextlib.contextmanager
def replacing_folder(folder: str) -> Iterator[str]:
    """Makes a new folder beside `folder`, which takes its name when the block ends well and is deleted otherwise.

    As with `replacing`, the new folder has a fixed name and a lock. There is a moment at which only `former(folder)`
    holds what was there before; if the process is killed then, the next one puts it back first.

    Yields:
        The path of the new folder, which is empty.

    Raises:
        CheckpointError: if another process is writing the folder, or a link has the new folder's name.
    """
    place, name = os.path.split(os.path.abspath(folder))
    partial, old = os.path.join(place, f".{name}.partial"), former(folder)
    for path in (partial, old):
        if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise CheckpointError(f"{path} is no folder: delete it, or choose another output")
    with contextlib.ExitStack() as stack:
        os.makedirs(partial, exist_ok=True)
        if fcntl is not None:  # Windows does not open folders
            descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            lock(descriptor, folder, partial)
        if os.path.exists(old) and not os.path.exists(folder):
            os.rename(old, folder)
        for path in (old, *(entry.path for entry in os.scandir(partial))):
            _remove(path)
        try:
            with naming(folder):
                yield partial
            if os.path.exists(folder):
                os.rename(folder, old)
            try:
                os.rename(partial, folder)
            except BaseException:
                if os.path.exists(old):
                    os.rename(old, folder)
                raise
        finally:
            _remove(partial)
        _remove(old)


def _remove(path: str) -> None:
    """Deletes a file or folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)

"""Tar shards of pictures and captions, as WebDataset and img2dataset write them: found, indexed, read in any order.

The members of a shard that share a key, their name up to the first dot, belong together: 12.jpg, 12.txt, 12.json. The
headers of a shard are read once; they tell where each member is, and then any of them is read by itself.
"""

import errno
import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, Union

from .checkpoints.files import StrPath, expanded

EXTENSION = ".tar"
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Picture:
    """An image in a shard, which is read when it is used. Its text is its path, `shard.tar/key.jpg`."""

    __slots__ = ("name", "offset", "shard", "size")

    def __init__(self, shard: str, name: str, offset: int, size: int):
        self.shard, self.name, self.offset, self.size = shard, name, offset, size

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """The bytes of the image's file."""
        return read_at(self.shard, self.offset, self.size)


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int  # of its first byte
    size: int

    @property
    def key(self) -> str:
        """What the files of one sample share."""
        folder, name = os.path.split(self.name)
        return os.path.join(folder, name.partition(".")[0])


def shards_of(source: Union[StrPath, Sequence[StrPath]]) -> list[str]:
    """The paths of the shards that a source names; none if it names something else.

    Args:
        source: a `.tar`; a folder of them; a pattern, such as `*.tar` or `{000..009}.tar`; or several of these.

    Raises:
        FileNotFoundError: if no file fits a pattern.
    """
    if not isinstance(source, (str, os.PathLike)):
        return [shard for part in source if isinstance(part, (str, os.PathLike)) for shard in shards_of(part)]
    path = expanded(source)
    if os.path.isdir(path):
        return sorted(os.path.join(path, name) for name in os.listdir(path) if _is_shard(name))
    if not path.endswith(EXTENSION):
        return []
    if os.path.exists(path):
        return [path]
    return [shard for pattern in _numbered(path) for shard in _fitting(pattern)]


def _is_shard(name: str) -> bool:
    return name.endswith(EXTENSION) and not name.startswith(".")


def _numbered(path: str) -> list[str]:
    """The paths that `{000..009}` stands for."""
    match = _NUMBERS.search(path)
    if not match:
        return [path]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return [more for number in numbers for more in _numbered(path[: match.start()] + number + path[match.end() :])]


def _fitting(pattern: str) -> list[str]:
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), pattern)
    return found


def members(file: BinaryIO, shard: str) -> Iterator[Member]:
    """The files in an open shard, in their order, without hidden ones; only headers are read.

    Raises:
        ValueError: if it is no tar, is compressed or damaged, or ends early.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and not os.path.basename(member.name).startswith("."):
                    yield Member(member.name, member.offset_data, member.size)
            # Blocks of zeros end every tar, of which some writers make one. To tarfile a damaged header is an end too.
            file.seek(archive.offset)
            end = file.read(2 * tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends early")
            if any(end):
                raise tarfile.ReadError(f"there is no header at byte {archive.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is damaged, or no tar that is uncompressed: {error}") from None


def members_of(shard: str) -> list[Member]:
    """The files in a shard, see `members`."""
    with open(shard, "rb") as file:
        return list(members(file, shard))


def read_at(shard: str, offset: int, size: int) -> bytes:
    """Bytes of a shard; several threads may read at once."""
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)

"""Features of collections too large for one machine, by Ray Data: a folder of parquet parts, in any order, each once.

A part is made of the same images whatever happens: of some thousand files, or of one tar shard. An actor embeds it as
`embed` does and gives it its name when it is complete. So a part that exists is done, and a worker that dies costs the
part it was at.
"""

import contextlib
import fnmatch
import functools
import glob
import io
import itertools
import json
import logging
import os
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union
from urllib.parse import unquote

from .checkpoints.files import StrPath, expanded
from .defaults import BATCH_SIZE
from .encoding import Encoder, progress_bar
from .extras import require
from .features import Run, describe, digest, embed, require_same_run, shard_name, write_table
from .images import EXTENSIONS, image_files, shards_at
from .shards import EXTENSION, members
from .threads import available_cores

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

FILES_IN_A_PART = 4096
_REACHED_WITHIN = 10  # seconds
_NO_PART = {"part": 0, "parts": 1, "names": []}  # for which the model is loaded and compared
_WAY_OUT = "choose another output"
_SHARDS_AND_IMAGES = (EXTENSION, *EXTENSIONS)

Loader = Callable[..., tuple[Encoder, Callable[[Any], Any]]]


class Embedded(NamedTuple):
    """What `embed_on_ray` did.

    Attributes:
        output: the folder of the parts.
        parts: number of parts in the folder.
        made: number of parts this call made; the others existed.
        images: number of images in these.
        damaged: number of images that were skipped in these.
    """

    output: str
    parts: int
    made: int
    images: int
    damaged: int


class Place(NamedTuple):
    """A file system, and what is put before a name to make its path there."""

    files: "FileSystem"
    scheme: str  # that names start with, such as s3://, which is no part of the path
    root: str

    def path_of(self, name: str) -> str:
        return os.path.join(self.root, name[len(self.scheme) :])


def embed_on_ray(
    load: Loader,
    source: Union[StrPath, Sequence[StrPath]],
    output: StrPath,
    address: Optional[str] = None,
    threads: int = 1,
    actors: Optional[int] = None,
    gpus: float = 0,
    batch_size: int = BATCH_SIZE,
    on_error: str = "raise",
    normalize: bool = True,
    progress: Optional[bool] = None,
) -> Embedded:
    """Computes the features of images on a Ray cluster, as `embed` does on one machine.

    Run again with the same model, it makes the parts that are missing. `load_features` reads a part, and `merge` makes
    one file of all.

    Args:
        load: function that returns a model and its preprocessing, called once in each actor as `load(threads=…)`; such
            as `functools.partial(paddle_clip.load_compiled, "ViT-B/32")`. Weights and package are on every machine.
        source: a folder, a pattern, tar shards, or several of these, as every machine sees them; or the URI of one that
            pyarrow opens, such as `s3://bucket/folder`. A shard is a part by itself; of image files 4,096 are.
        output: folder or URI of the parts, `part-0000i-of-0000n.parquet`, with columns "path" and "feature". The
            damaged images of a part, with reasons, are in its metadata.
        address: of the cluster, see `ray.init`; by default RAY_ADDRESS, or a cluster of this machine alone that lives
            as long as the call. A process that is connected already stays where it is.
        threads: number of CPUs that an actor takes, and of threads it has.
        actors: number of actors; by default as many as the CPUs, or the GPUs, of the cluster allow.
        gpus: GPUs that an actor takes.
        batch_size, on_error, normalize, progress: see `embed`.

    Returns:
        Numbers of parts and images.

    Raises:
        ValueError: if an image cannot be read and `on_error` is "raise", there are no images, or the folder has parts
            of other images or another model.
        ImportError: if Ray is not installed.
        ConnectionError: if there is no cluster at the address.
    """
    require("ray")
    place, names = _sources(source)
    target = _place(expanded(output))
    parts = _parts(names, batch_size)
    described = {"images": digest(names), "count": len(names), "batch_size": batch_size, "normalize": normalize}
    missing, earlier = _missing(target, len(parts), described)
    rows = [{"part": part, "parts": len(parts), "names": parts[part]} for part in missing] or [_NO_PART]
    settings = {"batch_size": batch_size, "on_error": on_error, "normalize": normalize, "workers": threads}
    worker = (load, threads, place, target, described, earlier, settings)
    images = damaged = 0
    with _cluster(address) as ray, progress_bar(progress, total=len(parts), initial=len(parts) - len(missing)) as bar:
        count = min(actors or _most_actors(ray.cluster_resources(), threads, gpus), len(rows))
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=threads,
            num_gpus=gpus,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            images, damaged = images + row["images"], damaged + row["damaged"]
            bar.update(len(missing) > 0)
    return Embedded(os.fspath(output), len(parts), len(missing), images, damaged)


def _most_actors(resources: Mapping[str, float], threads: int, gpus: float) -> int:
    """As many as the cluster has room for; Ray would wait for ever for what it has not."""
    there = [resources.get("CPU", 0) / threads, *([resources.get("GPU", 0) / gpus] if gpus else [])]
    if min(there) < 1:
        found = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        needs = f"{threads} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ValueError(f"an actor takes {needs}, and the cluster has {found}: take fewer, or give actors=…")
    return int(min(there))


class _Worker:
    """Embeds a part, in an actor of Ray."""

    def __init__(
        self,
        load: Loader,
        threads: int,
        place: Place,
        target: Place,
        described: Run,
        earlier: Optional[Run],
        settings: dict[str, Any],
    ):
        self.load, self.threads, self.place, self.target = load, threads, place, target
        self.described, self.earlier, self.settings = described, earlier, settings

    @functools.cached_property
    def model(self) -> tuple[Encoder, Callable[[Any], Any], Run]:
        """The model, its preprocessing, and the description of the run, which is that of the parts that exist."""
        model, preprocess = self.load(threads=self.threads)
        run = {**self.described, **describe(model, preprocess, self.settings["normalize"])}
        if self.earlier:
            require_same_run(self.earlier, run, self.target.root, _WAY_OUT)
        return model, preprocess, run

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Embeds the one part of a batch; errors are told to the caller, as Ray would wrap them in its own."""
        name = shard_name("part.parquet", int(rows["part"][0]), int(rows["parts"][0]))
        images, damaged, error = 0, 0, ""
        try:
            sources = [str(name) for name in rows["names"][0]]
            if self.model and sources:  # without sources the model is compared alone
                images, damaged = self._embed(sources, name)
        except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as failure:
            error = str(failure) or type(failure).__name__
        return {"images": [images], "damaged": [damaged], "error": [error]}

    def _embed(self, sources: list[str], name: str) -> tuple[int, int]:
        import pyarrow.fs

        model, preprocess, run = self.model
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of damaged images, which the part lists
            items = _Items(self.place, sources, stack)
            found = embed(model, preprocess, items, shard=(0, 1), progress=False, **self.settings)
        paths = [items.names[int(index)] for index in found.paths]
        damaged = [(items.names[int(index)], reason) for index, reason in found.damaged]
        final = self.target.path_of(name)
        partial = self.target.path_of(f".{name}.{uuid.uuid4().hex}.partial")
        with self.target.files.open_output_stream(partial) as file:
            write_table(file, found.features, paths, damaged, {"run": json.dumps(run)})
        if isinstance(self.target.files, pyarrow.fs.LocalFileSystem):
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        self.target.files.move(partial, final)
        return len(paths), len(damaged)


class _Items:
    """The images of a part, as open files that are read when they are taken.

    Attributes:
        names: their paths, as `embed` names them.
    """

    def __init__(self, place: Place, sources: Sequence[str], stack: contextlib.ExitStack):
        self.names: list[str] = []
        self.readers: list[Callable[[], bytes]] = []
        for source in sources:
            if source.endswith(EXTENSION):
                self._add_shard(source, stack.enter_context(place.files.open_input_file(place.path_of(source))))
            else:
                self.names.append(source)
                self.readers.append(functools.partial(_content, place.files, place.path_of(source)))

    def _add_shard(self, source: str, file: Any) -> None:
        for member in members(file, source):
            if member.name.lower().endswith(EXTENSIONS):
                self.names.append(f"{source}/{member.name}")
                self.readers.append(functools.partial(file.read_at, member.size, member.offset))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> io.BytesIO:
        file = io.BytesIO(self.readers[index]())
        file.name = self.names[index]  # for messages
        return file


def _content(files: "FileSystem", path: str) -> bytes:
    with files.open_input_file(path) as file:
        return file.readall()


# ------------------------------------------------------------------------------------------------ sources, parts, Ray


def _place(path: str) -> Place:
    """The file system of a path or URI, with the path as the root of what is in it."""
    from pyarrow import fs

    if "://" not in path:
        return Place(fs.LocalFileSystem(), "", os.path.abspath(path))
    files, root = fs.FileSystem.from_uri(path)
    return Place(files, "", root)


def _sources(source: Union[StrPath, Sequence[StrPath]]) -> tuple[Place, list[str]]:
    """Where the images are, and the names of their files or shards."""
    from pyarrow import fs

    if isinstance(source, str) and "://" in source:
        place, names = _listed_uri(source)
    else:
        several = [source] if isinstance(source, (str, os.PathLike)) else source
        place = Place(fs.LocalFileSystem(), "", os.getcwd())
        names = [name for each in several for name in _listed_path(expanded(each))]
    if not names:
        raise ValueError(f"{source} has no images: looked for {' '.join('*' + end for end in _SHARDS_AND_IMAGES)}")
    return place, names


def _listed_path(path: str) -> list[str]:
    if path.endswith(EXTENSION) or os.path.isdir(path):
        return shards_at(path) or image_files(path)
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file fits {path}")
    return found


def _listed_uri(uri: str) -> tuple[Place, list[str]]:
    """The files of a URI: those in a folder, those that fit a pattern, or the one."""
    from pyarrow import fs

    address, mark, query = uri.partition("?")  # such as ?region=eu-west-1
    folder = address[: address.index("*")].rpartition("/")[0] if "*" in address else address.rstrip("/")
    files, root = fs.FileSystem.from_uri(folder + mark + query)
    address, folder = unquote(address), unquote(folder)
    scheme = folder.removesuffix(root)
    if files.get_file_info(root).type == fs.FileType.File:
        return Place(files, scheme, ""), [folder]
    found = files.get_file_info(fs.FileSelector(root, recursive=True))
    names = sorted(scheme + info.path for info in found if info.is_file)
    fitting = [name for name in names if fnmatch.fnmatchcase(name, address)] if "*" in address else names
    images = [name for name in fitting if name.lower().endswith(EXTENSIONS)]
    return Place(files, scheme, ""), images or [name for name in fitting if name.endswith(EXTENSION)]


def _parts(names: list[str], batch_size: int) -> list[list[str]]:
    """The names of each part: a shard, or files in whole batches, so that batches are those of `embed`."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}; it must be a whole number, at least 1")
    parts: list[list[str]] = []
    for is_shard, group in itertools.groupby(names, lambda name: name.endswith(EXTENSION)):
        found, size = list(group), 1 if is_shard else max(1, FILES_IN_A_PART // batch_size) * batch_size
        parts += [found[first : first + size] for first in range(0, len(found), size)]
    return parts


def _missing(target: Place, parts: int, described: Run) -> tuple[list[int], Optional[Run]]:
    """The parts that are not there yet, and the description of the run that made the others."""
    from pyarrow import fs, parquet

    target.files.create_dir(target.root, recursive=True)
    there = {info.base_name for info in target.files.get_file_info(fs.FileSelector(target.root)) if info.is_file}
    for name in there:
        if name.startswith(".part-") and name.endswith(".partial"):  # of a worker that died
            target.files.delete_file(target.path_of(name))
    names = [shard_name("part.parquet", part, parts) for part in range(parts)]
    others = sorted(name for name in there - set(names) if not name.startswith("."))
    if others:
        raise ValueError(f"{target.root} has other files, such as {others[0]}; choose another output")
    done = next((name for name in names if name in there), None)
    earlier = None
    if done:
        with target.files.open_input_file(target.path_of(done)) as file:
            earlier = json.loads(parquet.read_schema(file).metadata[b"run"])
        require_same_run(earlier, {**earlier, **described}, target.root, _WAY_OUT)
    return [part for part, name in enumerate(names) if name not in there], earlier


@contextlib.contextmanager
def _cluster(address: Optional[str]) -> Iterator[Any]:
    """Ray, connected to a cluster; what is connected here is left at the end."""
    import ray
    import ray.data

    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _require_reachable(address)
    own: dict[str, Any] = {} if address else {"num_cpus": available_cores(), "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raises ConnectionError if nothing answers at an address: Ray would try for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACHED_WITHIN).close()
    except OSError as error:
        raise ConnectionError(f"there is no Ray cluster at {address}: {error}") from None

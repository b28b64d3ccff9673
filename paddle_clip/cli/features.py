"""`paddle-clip embed`, `search` and `probe`."""

import argparse
import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..defaults import IMAGES_FOUND
from .shared import (
    SAMPLES,
    WORTH_COMPILING,
    add_batch_size,
    add_command,
    add_engine,
    add_images,
    add_json,
    add_model,
    add_on_error,
    add_workers,
    load_encoder,
    named_images,
    print_json,
)

if TYPE_CHECKING:
    import numpy as np

    from ..encoding import Encoder
    from ..transforms import ImageTransform
    from .shared import Commands


def add_embed(commands: "Commands") -> None:
    """Adds the command `embed`."""
    parser = add_command(
        commands,
        embed,
        "compute the features of images and write them to a file",
        [
            "photos/ -o photos.npy         # and photos.json with their paths",
            "photos/ -o photos.parquet --on-error skip",
            "'shards/{00000..00331}.tar' -o photos.npy",
            "photos/ -o photos.npy --shard 0/8   # to photos-00000-of-00008.npy; `merge` makes one file of all",
            "shards/ -o features/ --ray          # parts in a folder, on a Ray cluster; needs ray[data]",
        ],
        after_interruption="; run it again as it was to go on from there",
    )
    add_images(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="file to write, .npy or .parquet; with --ray a folder"
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="embed the part I of N, counted from 0, to a file of its own"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="embed on the Ray cluster of this address, or on this machine alone; each actor takes --threads CPUs (1)",
    )
    add_on_error(parser)
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where an earlier run was interrupted, or start anew (default: go on)",
    )
    parser.add_argument("--restart", dest="resume", action="store_false", help=argparse.SUPPRESS)
    parser.add_argument("--raw", action="store_true", help="do not normalise the features")
    add_batch_size(parser)
    add_workers(parser)
    add_model(parser)
    add_engine(parser)
    add_json(parser)


def embed(arguments: argparse.Namespace) -> None:
    """Writes the features of images."""
    if arguments.ray is not None:
        return _embed_on_ray(arguments)

    from .. import features

    images = named_images(arguments.images)
    features.require_output(arguments.output)
    model, preprocess = load_encoder(arguments, images)
    found = features.embed(
        model,
        preprocess,
        images,
        arguments.output,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        on_error=arguments.on_error,
        normalize=not arguments.raw,
        resume=arguments.resume,
        shard=arguments.shard,
    )
    output = features.shard_name(arguments.output, *arguments.shard) if arguments.shard else arguments.output
    count, width = found.features.shape
    if arguments.json:
        print_json({"output": output, "count": count, "width": width, "damaged": found.damaged})
    else:
        damaged = f", {len(found.damaged):,} images skipped" if found.damaged else ""
        print(f"{output}: {count:,} features of {width} numbers{damaged}")


def _shard(text: str) -> tuple[int, int]:
    """Reads I/N; argparse tells the user where it cannot be read."""
    shard, shards = map(int, text.split("/"))
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"{text}: shards are counted from 0/{shards} to {shards - 1}/{shards}")
    return shard, shards


_shard.__name__ = "I/N"  # in argparse's message


def _embed_on_ray(arguments: argparse.Namespace) -> None:
    """Writes the features of images as parts in a folder."""
    if arguments.shard or not arguments.resume:
        raise ValueError("--ray makes the parts that are missing in its folder: leave out --shard and --no-resume")
    if arguments.precision == "int8":
        raise ValueError("--ray takes int8 from an export: give --model a folder that `paddle-clip export` wrote")

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is raised

    from ..bulk import embed_on_ray

    sources = [path for name in arguments.images for path in (named_images([name]) if name == SAMPLES else [name])]
    options = {name: value for name, value in vars(arguments).items() if name not in ("parser", "run")}
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what becomes of its workers
        done = embed_on_ray(
            functools.partial(_load_in_actor, options),
            sources[0] if len(sources) == 1 else sources,
            arguments.output,
            arguments.ray or None,
            threads=arguments.threads or 1,
            gpus=1 if (arguments.device or "").startswith("gpu") else 0,
            batch_size=arguments.batch_size,
            on_error=arguments.on_error,
            normalize=not arguments.raw,
        )
    if arguments.json:
        print_json(done._asdict())
    else:
        damaged = f", {done.damaged:,} images skipped" if done.damaged else ""
        print(f"{done.output}: {done.parts:,} parts, {done.made:,} of them new: {done.images:,} features{damaged}")


def _load_in_actor(options: dict[str, Any], threads: int) -> "tuple[Encoder, ImageTransform]":
    """The model of the options, for more images than compiling takes."""
    return load_encoder(argparse.Namespace(**{**options, "threads": threads}), [""] * WORTH_COMPILING)


def add_merge(commands: "Commands") -> None:
    """Adds the command `merge`."""
    parser = add_command(
        commands,
        merge,
        "put files of features together",
        [
            "photos-*-of-*.npy -o photos.npy   # what `embed --shard` wrote",
            "features/ -o photos.npy           # a folder of parts, as `embed --ray` writes it",
        ],
        needs_paddle=False,
    )
    parser.add_argument("parts", nargs="+", metavar="PART", help="files that `embed` wrote, or one folder of them")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="file to write, .npy or .parquet")
    add_json(parser)


def merge(arguments: argparse.Namespace) -> None:
    """Puts files of features together."""
    from .. import features

    parts = arguments.parts
    found = features.merge(parts[0] if len(parts) == 1 else parts, arguments.output)
    count, width = found.features.shape
    if arguments.json:
        print_json({"output": arguments.output, "count": count, "width": width, "damaged": found.damaged})
    else:
        print(f"{arguments.output}: {count:,} features of {width} numbers")


def add_search(commands: "Commands") -> None:
    """Adds the command `search`."""
    parser = add_command(
        commands,
        search,
        "find the images nearest to a text or an image, among features of `embed`",
        [
            "photos.npy 'a dog on a beach'",
            "photos.npy --image dog.jpg --top-k 3",
        ],
    )
    parser.add_argument("features", metavar="FEATURES", help="a file that `paddle-clip embed` wrote")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("text", metavar="TEXT", nargs="?", help="what to look for")
    query.add_argument("--image", metavar="FILE", help="an image to look for the like of")
    parser.add_argument(
        "--top-k", type=int, default=IMAGES_FOUND, metavar="K", help="images shown (default: %(default)s)"
    )
    add_model(parser)
    add_engine(parser)
    add_json(parser)


def search(arguments: argparse.Namespace) -> None:
    """Prints the images nearest to a text or an image."""
    from .. import features

    rows, paths, _ = features.load_features(arguments.features)
    query: Any = arguments.text
    found: list[Any] = []
    if arguments.image:
        found = named_images([arguments.image])
        if len(found) > 1:
            raise ValueError(f"{arguments.image} has {len(found)} images: --image takes one")
        query = Path(found[0]) if isinstance(found[0], str) else found[0]
    model, preprocess = load_encoder(arguments, found)
    matches = features.search(model, preprocess, rows, paths, query, arguments.top_k)
    if arguments.json:
        print_json([match._asdict() for match in matches])
        return
    for match in matches:
        print(f"{match.score:6.3f}  {match.path}")


def add_probe(commands: "Commands") -> None:
    """Adds the command `probe`."""
    parser = add_command(
        commands,
        probe,
        "fit a linear probe on features of labelled images; needs scikit-learn",
        [
            "animals/train --test animals/test",
            "animals/train --C 0.316 -o animals.npz",
        ],
    )
    parser.add_argument("train", metavar="TRAIN", help="a folder with one folder of images per class")
    parser.add_argument("--test", metavar="FOLDER", help="another such folder, to measure accuracy on")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the probe to this .npz")
    parser.add_argument(
        "--C", type=float, metavar="C", help="inverse regularisation (default: chosen on held-out images)"
    )
    add_batch_size(parser)
    add_workers(parser)
    add_model(parser)
    add_engine(parser)
    add_json(parser)


def probe(arguments: argparse.Namespace) -> None:
    """Fits a linear probe and prints its accuracy."""
    from ..extras import require
    from ..zeroshot import labelled_files

    require("probe")
    if arguments.output:
        from ..checkpoints.files import require_place

        require_place(arguments.output)
    images = {}  # the paths and labels of each folder
    for folder in filter(None, (arguments.train, arguments.test)):
        paths, items, classes = labelled_files(folder)
        images[folder] = paths, [classes[label] for _, label in items]

    from ..features import embed
    from ..probe import linear_probe, require_classes

    require_classes(images[arguments.train][1], arguments.C is None)
    model, preprocess = load_encoder(arguments, [path for paths, _ in images.values() for path in paths])

    def features_and_labels(folder: str) -> "tuple[np.ndarray, list[str]]":
        paths, labels = images[folder]
        found = embed(
            model,
            preprocess,
            paths,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            normalize=False,  # as in OpenAI's example
        )
        return found.features, labels

    rows, labels = features_and_labels(arguments.train)
    fitted = linear_probe(rows, labels, arguments.C)
    accuracy = {"train": fitted.score(rows, labels)}
    if arguments.test:
        accuracy["test"] = fitted.score(*features_and_labels(arguments.test))
    if arguments.output:
        fitted.save(arguments.output)
    if arguments.json:
        print_json({"images": len(labels), "classes": len(fitted.classes), "C": fitted.C, **accuracy})
        return
    print(f"{len(labels):,} images of {len(fitted.classes)} classes, C {fitted.C:.3g}")
    print(", ".join(f"accuracy on {name} {share:.2%}" for name, share in accuracy.items()))

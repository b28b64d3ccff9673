"""`paddle-clip embed`, `search` and `probe`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..defaults import IMAGES_FOUND
from .shared import (
    add_batch_size,
    add_command,
    add_engine,
    add_images,
    add_json,
    add_model,
    add_on_error,
    add_workers,
    image_paths,
    load_encoder,
    print_json,
    require_folder,
)

if TYPE_CHECKING:
    import numpy as np

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
        ],
        after_interruption="; run it again as it was to go on from there",
    )
    add_images(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="file to write, .npy or .parquet")
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
    images = image_paths(arguments.images)

    from .. import features

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
    )
    count, width = found.features.shape
    if arguments.json:
        print_json({"output": arguments.output, "count": count, "width": width, "damaged": found.damaged})
    else:
        damaged = f", {len(found.damaged):,} images skipped" if found.damaged else ""
        print(f"{arguments.output}: {count:,} features of {width} numbers{damaged}")


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
    found: list[str] = []
    if arguments.image:
        found = image_paths([arguments.image])
        if len(found) > 1:
            raise ValueError(f"{arguments.image} has {len(found)} images: --image takes one")
        query = Path(found[0])
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
    for folder in filter(None, (arguments.train, arguments.test)):
        require_folder(folder)
    if arguments.output:
        from ..checkpoints.files import require_place

        require_place(arguments.output)

    from ..features import embed
    from ..probe import linear_probe
    from ..zeroshot import labelled_files

    folders = list(filter(None, (arguments.train, arguments.test)))
    model, preprocess = load_encoder(arguments, [path for folder in folders for path in labelled_files(folder)[0]])

    def features_and_labels(folder: str) -> "tuple[np.ndarray, list[str]]":
        paths, items, folders = labelled_files(folder)
        found = embed(
            model,
            preprocess,
            paths,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            normalize=False,  # as in OpenAI's example
        )
        return found.features, [folders[label] for _, label in items]

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

"""`paddle-clip classify`, `similarity` and `evaluate`."""

import argparse
import os
import re
from typing import TYPE_CHECKING

from ..defaults import LABELS_SHOWN
from .messages import retrieval_in_words
from .shared import (
    add_batch_size,
    add_command,
    add_engine,
    add_images,
    add_json,
    add_labels,
    add_model,
    add_on_error,
    add_workers,
    labels_and_templates,
    load_encoder,
    named_images,
    print_json,
    read_lines,
    require_folder,
)

if TYPE_CHECKING:
    from .shared import Commands


def add_classify(commands: "Commands") -> None:
    """Adds the command `classify`."""
    parser = add_command(
        commands,
        classify,
        "tell which of some labels fits an image best",
        [
            "photo.jpg --labels dog cat horse",
            "photos/ --prompts imagenet --top-k 3 --json",
            "@samples --labels 'red circle' 'blue star' --model tiny    # offline",
        ],
    )
    add_images(parser)
    add_labels(parser)
    parser.add_argument(
        "--top-k", type=int, default=LABELS_SHOWN, metavar="K", help="labels shown of each image (default: %(default)s)"
    )
    add_batch_size(parser)
    add_model(parser)
    add_engine(parser)
    add_json(parser)


def classify(arguments: argparse.Namespace) -> None:
    """Prints the best labels of each image."""
    labels, templates = labels_and_templates(arguments)
    if not labels:
        raise ValueError("there are no labels: give --labels, --labels-file or --prompts")
    images = named_images(arguments.images)
    names = list(map(str, images))
    model, preprocess = load_encoder(arguments, images)

    from .. import zeroshot

    found = zeroshot.classify(model, preprocess, images, labels, templates, arguments.top_k, arguments.batch_size)
    if arguments.json:
        print_json([{"image": name, "labels": [label._asdict() for label in best]} for name, best in zip(names, found)])
        return
    for name, best in zip(names, found):
        print(name)
        for prediction in best:
            print(f"  {prediction.probability:7.2%}  {prediction.label}")


def add_similarity(commands: "Commands") -> None:
    """Adds the command `similarity`."""
    parser = add_command(
        commands,
        similarity,
        "show the cosine similarity of each image with each text",
        [
            "a.jpg b.jpg --texts 'a dog on a beach' 'a bowl of soup'",
            "photos/ --texts-file captions.txt --json",
            "@samples --model tiny --plot similarity.png    # offline",
        ],
    )
    add_images(parser)
    parser.add_argument("--texts", nargs="+", metavar="TEXT", default=[], help="texts (default: the images' names)")
    parser.add_argument("--texts-file", metavar="FILE", help="a file with one text per line")
    parser.add_argument("--plot", metavar="FILE", help="draw the matrix to a .png, .pdf or .svg; needs matplotlib")
    add_batch_size(parser)
    add_model(parser)
    add_engine(parser)
    add_json(parser)


def similarity(arguments: argparse.Namespace) -> None:
    """Prints, or draws, the cosines of images and texts."""
    from .. import plots

    images = named_images(arguments.images)
    names = list(map(str, images))
    texts = arguments.texts + (read_lines(arguments.texts_file) if arguments.texts_file else [])
    texts = texts or [re.sub("[-_]+", " ", os.path.splitext(os.path.basename(name))[0]) for name in names]
    if arguments.plot:
        import logging

        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Paddle makes it tell of its font cache
        plots.require_writable(arguments.plot)
    model, preprocess = load_encoder(arguments, images)

    from ..encoding import unit
    from ..features import embed
    from ..zeroshot import text_features

    rows = embed(model, preprocess, images, batch_size=arguments.batch_size).features  # [N, E]
    cosines = rows @ unit(text_features(model, texts)).T  # [N, M]
    if arguments.plot:
        plots.similarity(images, texts, cosines, arguments.plot)
    if arguments.json:
        print_json({"images": names, "texts": texts, "similarity": cosines.tolist()})
        return
    width = min(max(map(plots.text_width, texts)), 60)
    fitted = [plots.fitted(text, width) for text in texts]
    for name, row in zip(names, cosines):
        print(name)
        for text, cosine in zip(fitted, row):
            print(f"  {text}  {cosine:6.3f}{'  <' if cosine == row.max() else ''}")


def add_evaluate(commands: "Commands") -> None:
    """Adds the command `evaluate`."""
    parser = add_command(
        commands,
        evaluate,
        "measure zero-shot accuracy on a folder with one folder of images per class, or retrieval on captions",
        [
            "imagenet/val --prompts imagenet",
            "captions.csv    # recall@1, 5 and 10, both ways",
            "animals/ --template 'a photo of a {}, a type of animal.'",
        ],
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="a folder whose folders, sorted, are the classes; or a CSV file with the columns image and caption",
    )
    add_labels(parser, "class names in the order of the sorted folders (default: the folders' names)")
    add_on_error(parser)
    add_batch_size(parser)
    add_workers(parser)
    add_model(parser)
    add_engine(parser)
    add_json(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the zero-shot accuracy on a folder, or the retrieval on a table."""
    labels, templates = labels_and_templates(arguments)
    if os.path.isfile(os.path.expanduser(arguments.folder)):
        _evaluate_table(arguments, bool(labels))
        return
    require_folder(arguments.folder)

    from .. import zeroshot

    paths, _, _ = zeroshot.labelled_files(arguments.folder)
    model, preprocess = load_encoder(arguments, paths)

    found = zeroshot.evaluate(
        model,
        preprocess,
        arguments.folder,
        labels,
        templates or zeroshot.default_template(model),
        arguments.batch_size,
        arguments.workers,
        arguments.on_error,
    )
    if arguments.json:
        print_json(found._asdict())
    else:
        print(f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%} of {found.count:,} images")


def _evaluate_table(arguments: argparse.Namespace, has_labels: bool) -> None:
    from ..pairs import read_pairs

    if has_labels or arguments.on_error != "raise":
        raise ValueError(f"{arguments.folder} has captions of its own: leave out labels, prompts and on_error='skip'")
    pairs = read_pairs(arguments.folder)
    model, preprocess = load_encoder(arguments, [image for image, _ in pairs])

    from ..recall import retrieval

    found = retrieval(model, preprocess, pairs, arguments.batch_size, arguments.workers)
    if arguments.json:
        print_json(found._asdict())
    else:
        print(f"{retrieval_in_words(found)} of {found.images:,} images and {found.texts:,} captions")

"""Reads (image, caption) pairs from a CSV file, a folder of captioned images, or a folder per class."""

import csv
import os

from .checkpoints.files import StrPath, expanded
from .defaults import TEMPLATE
from .images import image_files

_SHOWN = 5  # examples in an error message


Pair = tuple[str, str]  # path of an image, caption


def read_pairs(path: StrPath, template: str = TEMPLATE) -> list[Pair]:
    """Reads the (image, caption) pairs of a data set.

    Args:
        path: path of one of
            a CSV file with the columns `image`, paths relative to the file, and `caption`; others are ignored;
            a folder of images, each with its caption in a text file of the same name, such as dog.jpg and dog.txt;
            a folder of one folder per class, whose name, `_` standing for a space, is put into the template.
        template: caption of a class, in which `{}` stands for its name.

    Returns:
        (path, caption) of each pair; pairs of a folder are sorted by path.

    Raises:
        ValueError: if there are no pairs, columns, captions or images are missing, or the template has no `{}`.
        OSError: if a file or folder cannot be read.
    """
    path = expanded(path)
    pairs = _pairs_of_folder(path, template) if os.path.isdir(path) else _pairs_of_csv(path)
    if not pairs:
        raise ValueError(f"{path} holds no (image, caption) pairs")
    _require_none([image for image, _ in pairs if not os.path.isfile(image)], "images named in {} do not exist", path)
    _require_none([image for image, caption in pairs if not caption.strip()], "images of {} have empty captions", path)
    return pairs


def _pairs_of_csv(path: str) -> list[Pair]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            columns = rows.fieldnames or []
            if not {"image", "caption"} <= set(columns):
                found = ", ".join(columns) or "none"
                raise ValueError(f"{path} needs the columns image and caption in its first line; found {found:.200}")
            folder = os.path.dirname(path)
            return [(os.path.join(folder, row["image"] or ""), row["caption"] or "") for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None


def _pairs_of_folder(folder: str, template: str) -> list[Pair]:
    images = image_files(folder)
    texts = [os.path.splitext(image)[0] + ".txt" for image in images]
    captioned = [os.path.isfile(text) for text in texts]
    if any(captioned):
        bare = [image for image, has_caption in zip(images, captioned) if not has_caption]
        _require_none(bare, "images of {} have no text file of the same name", folder)
        return [(image, _read_text(text)) for image, text in zip(images, texts)]
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} for the name of the class")
    classless = [image for image in images if os.path.samefile(os.path.dirname(image), folder)]
    _require_none(classless, "images of {} have neither a text file of the same name nor a folder of a class", folder)
    return [(image, template.replace("{}", _class_of(image, folder))) for image in images]


def _class_of(image: str, folder: str) -> str:
    return os.path.relpath(image, folder).split(os.sep)[0].replace("_", " ")


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8-sig") as file:
        try:
            return " ".join(file.read().split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8: {error}") from None


def _require_none(wrong: list[str], what: str, path: str) -> None:
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{len(wrong)} {what.format(path)}: {', '.join(wrong[:_SHOWN])}{more}")

"""Reads (image, caption) pairs from a CSV file, a folder of captioned images, or a folder per class."""

import csv
import os
from typing import Optional

from .checkpoints.files import StrPath, expanded
from .defaults import NOT_UTF8, TEMPLATE
from .images import image_files

_SHOWN = 5  # examples in an error message
# Columns of a table: ours, open_clip's, Hugging Face's.
_IMAGES, _CAPTIONS = ["image", "filepath", "file_name"], ["caption", "title", "text"]


Pair = tuple[str, str]  # path of an image, caption


def read_pairs(
    path: StrPath, template: str = TEMPLATE, image_column: Optional[str] = None, caption_column: Optional[str] = None
) -> list[Pair]:
    """Reads the (image, caption) pairs of a data set.

    Args:
        path: path of one of
            a table, CSV or separated by tabs, with the columns `image`, paths relative to the file, and `caption`, or
            open_clip's `filepath` and `title`, or Hugging Face's `file_name` and `text`; others are ignored;
            a folder of images, each with its caption in a text file of the same name, such as dog.jpg and dog.txt;
            a folder of one folder per class, whose name, `_` standing for a space, is put into the template.
        template: caption of a class, in which `{}` stands for its name.
        image_column: name of the column of paths, where it is another.
        caption_column: name of the column of captions, where it is another.

    Returns:
        (path, caption) of each pair; pairs of a folder are sorted by path.

    Raises:
        ValueError: if there are no pairs, columns, captions or images are missing, or the template has no `{}`.
        OSError: if a file or folder cannot be read.
    """
    path = expanded(path)
    pairs = (
        _pairs_of_folder(path, template) if os.path.isdir(path) else _pairs_of_csv(path, image_column, caption_column)
    )
    if not pairs:
        raise ValueError(f"{path} holds no (image, caption) pairs")
    _require_none([image for image, _ in pairs if not os.path.isfile(image)], "images named in {} do not exist", path)
    _require_none([image for image, caption in pairs if not caption.strip()], "images of {} have empty captions", path)
    return pairs


def _pairs_of_csv(path: str, image_column: Optional[str], caption_column: Optional[str]) -> list[Pair]:
    images, captions = (
        ([image_column] if image_column else _IMAGES),
        ([caption_column] if caption_column else _CAPTIONS),
    )
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            head = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter="\t" if "\t" in head else ",")
            columns = rows.fieldnames or []
            image = next((name for name in images if name in columns), None)
            caption = next((name for name in captions if name in columns), None)
            if image is None or caption is None:
                found = ", ".join(columns) or "none"
                raise ValueError(
                    f"{path} needs the columns {images[0]} and {captions[0]} in its first line; found {found:.200}. "
                    "Name them by image_column='…' and caption_column='…'"
                )
            folder = os.path.dirname(path)
            return [(os.path.join(folder, row[image] or ""), row[caption] or "") for row in rows]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} {NOT_UTF8}: {error}") from None
        except csv.Error as error:
            raise ValueError(f"{path} is not a CSV file: {error}") from None


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
            raise ValueError(f"{path} {NOT_UTF8}: {error}") from None


def _require_none(wrong: list[str], what: str, path: str) -> None:
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{len(wrong)} {what.format(path)}: {', '.join(wrong[:_SHOWN])}{more}")

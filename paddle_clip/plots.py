"""Pictures of results, drawn by matplotlib (the extra `plot`)."""

import os
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from .checkpoints.files import StrPath, replacing
from .extras import require
from .transforms import open_image, resize_and_crop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .training import Step

_INCH = 0.86  # side of a cell
_ABOVE = 1.05  # cells, of the thumbnails
_LINE = 30  # letters of a text's line
_LINES = 3
# With simplified Chinese letters, on Linux, Windows and macOS.
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # all of the family's letters are in each of its files
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
    "Arial Unicode MS",
)
_POINTS = 9.5  # of the letters
_INK = "#1f2933"
_BEST = "#e8762d"
_BLUES = ["#f7fafc", "#cfe3f3", "#7fb3dd", "#2f7fc1", "#0b3c6f"]


def similarity(
    images: Sequence[Any], texts: Sequence[str], cosines: Any, output: StrPath, title: Optional[str] = None
) -> None:
    """Draws images along the top, texts along the side, and the similarity of each two in their cell.

    Args:
        images: N images: paths, PIL images or uint8 arrays.
        texts: M strings; what does not fit three lines is cut.
        cosines: array [N, M].
        output: file to write, by extension .png, .pdf or .svg; it is whole, or not there.
        title: title of the picture.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the extension is none of its formats, an image cannot be read, or the sizes do not fit.
        OSError: if the file cannot be written.
    """
    require_writable(output)
    fonts = _fonts("".join([*texts, title or ""]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # _fonts says it in one line
        _draw(images, texts, np.asarray(cosines), output, title, fonts)


def _draw(
    images: Sequence[Any],
    texts: Sequence[str],
    cosines: np.ndarray,
    output: StrPath,
    title: Optional[str],
    fonts: list[str],
) -> None:
    from matplotlib.figure import Figure

    cosines = cosines.T  # [M, N], as drawn
    if cosines.shape != (len(texts), len(images)):
        raise ValueError(f"{len(images)} images and {len(texts)} texts do not fit a matrix {list(cosines.T.shape)}")
    rows, columns = cosines.shape
    labels = [_wrapped(text) for text in texts]
    letters = max(text_width(line) for label in labels for line in label.split("\n"))
    left = 0.25 + 0.075 * letters  # inches, of a mean letter's width
    top = 0.5 if title else 0.15
    width, height = left + columns * _INCH + 0.15, top + (rows + _ABOVE) * _INCH + 0.15
    figure = Figure(figsize=(width, height), facecolor="white")

    def axes(x: float, y: float, across: float, down: float) -> "Axes":
        """Axes whose upper left corner is at (x, y) inches from that of the figure."""
        return figure.add_axes((x / width, 1 - (y + down) / height, across / width, down / height))

    _draw_matrix(axes(left, top + _ABOVE * _INCH, columns * _INCH, rows * _INCH), cosines, labels, fonts)
    for column, image in enumerate(images):
        margin = 0.04 * _INCH
        place = axes(left + column * _INCH + margin, top + margin, _INCH - 2 * margin, _INCH - 2 * margin)
        _draw_thumbnail(place, image)
    if title:
        # Many fonts with Chinese letters have one weight alone.
        weight = "bold" if text_width(title) == len(title) else "normal"
        x, y = left / width, 1 - 0.3 / height
        figure.text(x, y, title, size=12, weight=weight, family=fonts, color=_INK, parse_math=False)
    _save(figure, output)


def training(steps: Sequence["Step"], output: StrPath, title: Optional[str] = None) -> None:
    """Draws the loss of each step, and that on the validation's pairs.

    Args:
        steps: what `finetune` returns.
        output: file to write, by extension .png, .pdf or .svg; it is whole, or not there.
        title: title of the picture.

    Raises:
        ImportError, ValueError, OSError: as `similarity`.
    """
    require_writable(output)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot([step.step for step in steps], [step.loss for step in steps], color=_BLUES[2], label="training")
    measured = [(step.step, step.validation.loss) for step in steps if step.validation]
    if measured:
        axes.plot(*zip(*measured), color=_BEST, marker="o", label="validation")
        axes.legend(frameon=False)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    if title:
        axes.set_title(title, color=_INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, output)


def require_writable(output: StrPath) -> None:
    """Raises what `similarity` would for a file it cannot write, before any work is done.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if it has no such format.
        OSError: if there is no folder for the file.
    """
    require("plot")
    from matplotlib.backend_bases import FigureCanvasBase

    if _format(output) not in FigureCanvasBase.filetypes:
        raise ValueError(f"{os.fspath(output)} is no picture's name; end it with .png, .pdf or .svg")
    os.listdir(os.path.dirname(os.path.abspath(output)))


def _draw_matrix(grid: "Axes", cosines: np.ndarray, labels: list[str], fonts: list[str]) -> None:
    """Draws the numbers [M, N] in coloured cells, with a frame around the highest of each column."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    rows, columns = cosines.shape
    low, high = float(cosines.min()), float(cosines.max())
    span = high - low or 1.0
    colours = LinearSegmentedColormap.from_list("blues", _BLUES)
    grid.imshow(cosines, cmap=colours, vmin=low, vmax=low + span, aspect="auto", interpolation="nearest")
    grid.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    grid.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    grid.grid(which="minor", color="white", linewidth=2)
    grid.tick_params(which="both", length=0)
    grid.set_xticks([])
    grid.set_yticks(range(rows), labels, family=fonts, size=_POINTS, color=_INK, linespacing=1.15, parse_math=False)
    for spine in grid.spines.values():
        spine.set_visible(False)
    best = cosines.argmax(axis=0)  # [N], of each image
    for row in range(rows):
        for column in range(columns):
            is_best = best[column] == row
            dark = (cosines[row, column] - low) / span > 0.55
            grid.text(
                column,
                row,
                f"{cosines[row, column]:.2f}",
                ha="center",
                va="center",
                fontsize=_POINTS + 1 if is_best else _POINTS,
                fontweight="bold" if is_best else "normal",
                color="white" if dark else _INK,
            )
            if is_best:
                corner = (column - 0.47, row - 0.47)
                grid.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, linewidth=2, edgecolor=_BEST))


def _draw_thumbnail(place: "Axes", image: Any) -> None:
    """Draws the square in the middle of an image."""
    place.imshow(np.asarray(resize_and_crop(open_image(image), 256).convert("RGB")), aspect="auto")
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set_color("#cbd2d9")


def _save(figure: "Figure", output: StrPath) -> None:
    with replacing(output) as (file, _):
        figure.savefig(file, dpi=150, format=_format(output))


def _format(output: StrPath) -> str:
    return os.path.splitext(output)[1].lstrip(".").lower()


def text_width(line: str) -> int:
    """The number of Latin letters as wide as a line: an ideograph takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def fitted(text: str, width: int) -> str:
    """A line of a table: a text that is cut or filled up to a width in Latin letters."""
    if text_width(text) > width:
        while text_width(text) >= width:
            text = text[:-1]
        text += "…"
    return text + " " * (width - text_width(text))


def _fonts(text: str) -> list[str]:
    """The families of fonts for a text: matplotlib's own, and one with Chinese letters, if the text has such."""
    import matplotlib
    from matplotlib import font_manager

    fonts = list(matplotlib.rcParams["font.family"])
    if text_width(text) == len(text):
        return fonts
    installed = {font.name for font in font_manager.fontManager.ttflist}
    found = next((name for name in _CHINESE_FONTS if name in installed), None)
    if found is None:
        warnings.warn(
            "no font with Chinese letters is installed, and the picture has boxes in their place: install one, such as "
            "fonts-noto-cjk by apt or google-noto-sans-cjk-fonts by dnf, and delete matplotlib's cache, "
            f"{matplotlib.get_cachedir()}",
            RuntimeWarning,
            stacklevel=3,
        )
    return [*fonts, found] if found else fonts


def _wrapped(text: str) -> str:
    letters = _LINE * len(text) // max(1, text_width(text))  # fewer, where they are wide
    return "\n".join(textwrap.wrap(text, max(2, letters), max_lines=_LINES, placeholder=" …")) or " "

"""Tables of positional embeddings: image grids of another size, and Long-CLIP's two tables joined into one."""

import dataclasses
from typing import Any

import numpy as np

from ..config import CLIPConfig
from .casting import cast, dtype_name
from .shapes import RESNET_CELL

_KEPT = 20  # positions that Long-CLIP leaves as CLIP trained them


def join_long(arrays: dict[str, Any]) -> None:
    """Joins the two text tables of Long-CLIP, in place: it adds the first 20 rows of one and the rest of the other."""
    first, rest = arrays.get("positional_embedding"), arrays.get("positional_embedding_res")
    if first is not None and rest is not None and first.shape == rest.shape and first.dtype == rest.dtype:
        arrays["positional_embedding"] = np.concatenate([first[:_KEPT], rest[_KEPT:]])
        del arrays["positional_embedding_res"]


def resize_grid(arrays: dict[str, Any], config: CLIPConfig, resolution: int, source: str) -> CLIPConfig:
    """Interpolates the image positions of a model for another resolution, in place (open_clip's `resize_pos_embed`).

    Args:
        arrays: {our name: array}; the table is [1 + S * S, D], the class token or the mean first, and keeps its dtype.
        config: the model's sizes.
        resolution: side of the square image, in pixels.
        source: name of the file, for messages.

    Returns:
        The sizes at the new resolution.

    Raises:
        ValueError: if the resolution is no multiple of a cell of the grid, or the model takes no images.
    """
    if not config.has_image:
        raise ValueError(f"{source} takes no images, but resolution={resolution} was given")
    cell = config.vision_patch_size or RESNET_CELL
    if not isinstance(resolution, (int, np.integer)) or resolution < cell or resolution % cell:
        raise ValueError(
            f"resolution is {resolution!r}; {source} takes multiples of {cell} pixels, as resolution="
            f"{config.image_resolution} is"
        )
    if resolution != config.image_resolution:
        name = "visual.positional_embedding" if config.is_vit else "visual.attnpool.positional_embedding"
        table, old, new = arrays[name], config.image_resolution // cell, resolution // cell
        exact, weights = cast(table, "float64"), bicubic(old, new)  # [1 + S*S, D], [T, S]
        grid = np.tensordot(weights, exact[1:].reshape(old, old, -1), 1)  # [T, S, D]
        grid = np.tensordot(weights, grid, (1, 1)).swapaxes(0, 1)  # [T, T, D]
        resized = np.concatenate([exact[:1], grid.reshape(new * new, -1)])  # [1 + T*T, D]
        arrays[name] = cast(resized, dtype_name(table.dtype))
    return dataclasses.replace(config, image_resolution=int(resolution))


def bicubic(size: int, new_size: int) -> np.ndarray:
    """The weights [new size, size] of PyTorch's and PIL's bicubic resizing with antialiasing, in float64.

    Keys' kernel with a = -0.5, stretched where the result is smaller; rows add up to 1 at the borders too.
    """
    scale = size / new_size
    centre = (np.arange(new_size) + 0.5) * scale  # [new size]
    x = np.abs(np.arange(size) + 0.5 - centre[:, None]) / max(scale, 1.0)  # [new size, size]
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)

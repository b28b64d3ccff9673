"""Measures how well images find their captions among all captions, and captions their images (paper, section 3.1.3)."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from .defaults import BATCH_SIZE
from .distributed import Ranks
from .encoding import Encoder, logit_factor, unit
from .features import embed
from .zeroshot import text_features

RECALLS = (1, 5, 10)
_ROWS = 1024  # of similarities, held at once
ALONE = Ranks()


class Retrieval(NamedTuple):
    """How well images and captions find each other.

    Attributes:
        image_to_text: {k: share of images with one of their captions among the k most similar captions}, k 1, 5 and 10.
        text_to_image: {k: share of captions with their image among the k most similar images}.
        loss: the loss CLIP is trained with, the mean over batches.
        images: number of images.
        texts: number of captions.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    loss: float
    images: int
    texts: int


def retrieval(
    model: Encoder,
    preprocess: Callable[[Any], Any],
    pairs: Sequence[tuple[Any, str]],
    batch_size: int = BATCH_SIZE,
    workers: Optional[int] = None,
) -> Retrieval:
    """Measures retrieval on (image, caption) pairs, as clip_benchmark does.

    An image may have several captions, in pairs of their own: pairs of the same path, or the same object, have one
    image. Captions longer than the model's context are cut.

    Args:
        model: from `load`.
        preprocess: from `load`.
        pairs: a list of (image, caption), as `read_pairs` returns it.
        batch_size: images encoded at once, and pairs of a batch of the loss.
        workers: number of threads that decode; by default one per core, eight at most.

    Raises:
        ValueError: if there are no pairs, or an image cannot be read.
    """
    return measured(model, preprocess, pairs, batch_size, workers, batch_size, ALONE)


def measured(
    model: Encoder,
    preprocess: Callable[[Any], Any],
    pairs: Sequence[tuple[Any, str]],
    batch_size: int,
    workers: Optional[int],
    pairs_of_loss: int,
    ranks: Ranks,
) -> Retrieval:
    """`retrieval`, with the loss over batches of another size, and with processes that each encode their share."""
    if not len(pairs):
        raise ValueError("there are no pairs to measure on")
    images, image_of = _images(pairs)

    def image_rows(rows: list[Any]) -> np.ndarray:
        return embed(model, preprocess, rows, batch_size=batch_size, workers=workers, progress=False).features

    def text_rows(rows: list[Any]) -> np.ndarray:
        return unit(text_features(model, rows, truncate=True)).astype(np.float32)

    image_features = _shared(ranks, images, image_rows)  # [N, E]
    texts = _shared(ranks, [caption for _, caption in pairs], text_rows)  # [M, E]
    loss = _loss(image_features[image_of], texts, logit_factor(model), pairs_of_loss)
    return Retrieval(*recalls(image_features, texts, image_of), loss, len(images), len(texts))


def recalls(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> tuple[dict[int, float], dict[int, float]]:
    """The recalls of normalised features: images [N, E], texts [M, E] and the image of each text, [M] -> `Retrieval`'s.

    An image counts as found by its best caption, however many it has. Of equal similarities the wrong ones come first.
    """
    own = np.arange(len(images))
    return _shares(_places(images, texts, own, image_of)), _shares(_places(texts, images, image_of, own))


def _places(queries: np.ndarray, items: np.ndarray, of_query: np.ndarray, of_item: np.ndarray) -> np.ndarray:
    """The number of wrong items before the first right one of each query, which is of the same image.

    Args:
        queries: [Q, E].
        items: [I, E].
        of_query: the image of each query, [Q].
        of_item: the image of each item, [I].

    Returns:
        [Q].
    """
    places = []
    for first in range(0, len(queries), _ROWS):
        right = of_query[first : first + _ROWS, None] == of_item  # [R, I]
        scores = queries[first : first + _ROWS] @ items.T  # [R, I]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)  # [R, 1]
        places.append(((scores >= best) & ~right).sum(axis=1))
    return np.concatenate(places)


def _shares(places: np.ndarray) -> dict[int, float]:
    return {k: float((places < k).mean()) for k in RECALLS}


def _images(pairs: Sequence[tuple[Any, str]]) -> tuple[list[Any], np.ndarray]:
    """The images, each once, and the index of that of each pair, [M]."""
    indices: dict[Any, int] = {}
    images: list[Any] = []
    image_of = []
    for image, _ in pairs:
        key = os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)
        if key not in indices:
            indices[key] = len(images)
            images.append(image)
        image_of.append(indices[key])
    return images, np.array(image_of)


def _shared(ranks: Ranks, rows: list[Any], encode: Callable[[list[Any]], np.ndarray]) -> np.ndarray:
    """The features [N, E] of N rows, of which each process encodes a share."""
    share = -(-len(rows) // ranks.count)
    own = [rows[min(place, len(rows) - 1)] for place in range(ranks.rank * share, (ranks.rank + 1) * share)]
    return ranks.gather_arrays(ranks.together(lambda: encode(own)))[: len(rows)]


def _loss(images: np.ndarray, texts: np.ndarray, factor: float, size: int) -> float:
    """The mean loss over batches of a size, of pairs in an order that is always the same; [M, E] each.

    A data set is often sorted, and pairs that are alike are harder to tell apart.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    size = min(size, len(texts))
    losses = []
    for first in range(0, len(texts) - size + 1, size):
        rows = order[first : first + size]
        logits = factor * (images[rows] @ texts[rows].T).astype(np.float64)  # [B, B]
        for axis in (0, 1):
            highest = logits.max(axis=axis, keepdims=True)  # so that no exponential is too large
            log_sums = (highest + np.log(np.exp(logits - highest).sum(axis=axis, keepdims=True))).reshape(-1)  # [B]
            losses.append(float((log_sums - logits.diagonal()).mean()))
    return sum(losses) / len(losses)

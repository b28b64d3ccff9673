"""What is given to the encoders, checked before they compute: `CLIP` and `Predictor` share these messages."""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from .arrays import is_tensor

OPENAI_VOCABULARY, BERT_VOCABULARY = 49408, 21128
BERT_START, BERT_END = 101, 102  # ids of [CLS] and [SEP]


def unwrapped(model: Any) -> Any:
    """The model within what Paddle puts around it for training on several devices, such as `paddle.DataParallel`.

    Raises:
        ValueError: if it is no model.
    """
    while not hasattr(model, "encode_image") and hasattr(model, "_layers"):
        model = model._layers
    if not hasattr(model, "encode_image"):
        hint = "; load returns (model, preprocess): give its first" if isinstance(model, tuple) else ""
        raise ValueError(f"a model is what load, compile or Predictor gives; found {type(model).__name__}{hint}")
    return model


def as_numbers(value: Any) -> Any:
    """A list of numbers or rows, or another library's Tensor, as an array; all else as it is."""
    if is_tensor(value) or not (isinstance(value, (list, tuple)) or hasattr(value, "__array__")):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unlike length
        return value
    return array if array.dtype.kind in "if" else value  # not one of pictures


def require_images(images: Any, size: int) -> None:
    """Raises ValueError unless `images` are a Tensor or array [N, 3, size, size] of floating-point numbers."""
    takes = f"this model takes [N, 3, {size}, {size}]"
    if not _is_array(images):
        raise ValueError(
            f"images are {_kind(images)}; {takes}: preprocess(image).unsqueeze(0) for one, "
            "paddle.stack([preprocess(image) for image in images]) for several"
        )
    shape = list(images.shape)
    if shape == [3, size, size]:
        raise ValueError(f"images are {shape}; {takes}: images.unsqueeze(0), or images[None], makes one a batch")
    if len(shape) != 4 or shape[1:] != [3, size, size]:
        raise ValueError(
            f"images are {shape}; {takes}: prepare them with the preprocess that paddle_clip.load() returns, and stack "
            "them into a batch"
        )
    dtype = _dtype(images)
    if "float" not in dtype:
        raise ValueError(f"images are {dtype}; {takes} in float32: prepare them with preprocess, which normalises them")


def require_tokens(tokens: Any, length: int, vocabulary: Optional[int] = None) -> None:
    """Raises ValueError unless `tokens` are a Tensor or array [N, 1 to length] of ids below `vocabulary`."""
    takes = f"this model takes [N, 1 to {length}]"
    if not _is_array(tokens):
        raise ValueError(f"tokens are {_kind(tokens)}; {takes}: model.tokenize(texts) makes them of texts")
    shape = list(tokens.shape)
    if len(shape) == 1 and shape[0]:
        raise ValueError(f"tokens are {shape}; {takes}: tokens.unsqueeze(0), or tokens[None], makes one row a batch")
    if len(shape) != 2 or not 0 < shape[1] <= length:
        raise ValueError(f"tokens are {shape}; {takes}: model.tokenize(texts, truncate=True) cuts long texts")
    dtype = _dtype(tokens)
    if "int" not in dtype:
        raise ValueError(f"tokens are {dtype}; {takes} in int64, as model.tokenize(texts) returns them")
    if shape[0]:
        ids = np.asarray(tokens)  # less than half the time of Paddle's minimum and maximum
        low, high = int(ids.min()), int(ids.max())
        if vocabulary == OPENAI_VOCABULARY and high < BERT_VOCABULARY and _are_berts(ids):
            raise ValueError(
                f"tokens are Chinese-CLIP's, which begin with {BERT_START} and end with {BERT_END}; this model takes "
                "OpenAI's: model.tokenize(texts) makes them of texts"
            )
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ValueError(
                f"token ids are from {low} to {high}; this model knows 0 to {(vocabulary or high + 1) - 1}: "
                "model.tokenize(texts) makes them of texts"
            )


def _are_berts(ids: np.ndarray) -> bool:
    """Whether all rows begin and end as texts of Chinese-CLIP do, and no text of OpenAI's."""
    return bool((ids[:, 0] == BERT_START).all() and (ids == BERT_END).any(axis=1).all())


def _is_array(value: Any) -> bool:
    return is_tensor(value) or isinstance(value, np.ndarray)


def _dtype(value: Any) -> str:
    return str(value.dtype).split(".")[-1]


def _kind(value: Any) -> str:
    """What a value is, in words: its type, and that of its first item."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value):
        return f"a {type(value).__name__} of {_type(value[0])}"
    return f"of the type {_type(value)}"


def _type(value: Any) -> str:
    """The name of a value's type, with its package: there are several Tensors."""
    package = "paddle" if is_tensor(value) else type(value).__module__.partition(".")[0]
    return type(value).__name__ if package == "builtins" else f"{package}.{type(value).__name__}"

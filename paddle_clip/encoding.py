"""What texts and images share when they are encoded: models that do it, precision, progress bars."""

import contextlib
from collections.abc import Iterator
from typing import Any, Optional, Protocol, runtime_checkable

import numpy as np
import paddle
from paddle import Tensor
from tqdm import tqdm

from .layers import float32_if_half

HALF_DTYPES = ("float16", "bfloat16")


@runtime_checkable
class Encoder(Protocol):
    """What encodes images and texts into one space: a `CLIP` or a `Predictor`.

    Attributes:
        embed_dim: width E of the features.
        context_length: longest text in tokens.
        logit_scale: 0-d Tensor, the logarithm of the factor on cosine similarities.
    """

    embed_dim: int
    context_length: int
    logit_scale: Tensor

    def encode_image(self, image: Any) -> Any:
        """Image features of [B, 3, R, R], not normalised: [B, E]."""
        ...

    def encode_text(self, text: Any) -> Any:
        """Text features of token ids [B, L], not normalised: [B, E]."""
        ...


def require_dtype(dtype: str, device: str) -> None:
    """Raises ValueError if a dtype does not run on a device: half precision takes a GPU."""
    if dtype in HALF_DTYPES and device == "cpu":
        raise ValueError(
            f"{dtype} does not run on the CPU: Paddle has no {dtype} kernels there. Use dtype='float32', or a GPU "
            "build of Paddle with paddle.set_device('gpu')"
        )


@contextlib.contextmanager
def inference(model: Encoder) -> Iterator[None]:
    """No gradients, and eval mode, which a model that was training leaves again at the end."""
    trained = model if isinstance(model, paddle.nn.Layer) and model.training else None
    if trained:
        trained.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        if trained:
            trained.train()


def unit(features: Tensor) -> Tensor:
    """Features divided by their length; in float32 if they were in half precision."""
    features = float32_if_half(features)
    return features / features.norm(axis=-1, keepdim=True)


def encode(model: Encoder, pixels: np.ndarray, normalize: bool = True) -> Tensor:
    """The features [B, E] of preprocessed images, an array [B, 3, R, R]; see `unit` for their dtype."""
    features = model.encode_image(paddle.to_tensor(pixels))
    return unit(features) if normalize else features


def progress_bar(progress: Optional[bool], **options: Any) -> "tqdm[Any]":
    """A tqdm bar: on a terminal if `progress` is None, else always or never."""
    return tqdm(disable=None if progress is None else not progress, **options)

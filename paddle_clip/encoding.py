"""What texts and images share when they are encoded: models that do it, precision, progress bars."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from .arrays import as_array
from .checks import unwrapped
from .tokenizer import token_ids

HALF_DTYPES = ("float16", "bfloat16")


@runtime_checkable
class Encoder(Protocol):
    """What encodes images and texts into one space: a `CLIP` or a `Predictor`.

    Attributes:
        embed_dim: width E of the features.
        context_length: longest text in tokens.
    """

    embed_dim: int
    context_length: int

    @property
    def logit_scale(self) -> Any:
        """0-d Tensor, the logarithm of the factor on cosine similarities."""
        ...

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


def require_dynamic_mode() -> None:
    """Raises RuntimeError in Paddle's static mode, in which no model runs."""
    import paddle

    if not paddle.in_dynamic_mode():
        raise RuntimeError("Paddle is in static mode, and models run in dynamic mode: call paddle.disable_static()")


def device_name(device: Any) -> str:
    """Paddle's name of a device; PyTorch's "cuda" is "gpu". Raises ValueError for a GPU Paddle is not built for."""
    name = str(device).replace("cuda", "gpu")
    if name.startswith("gpu"):
        import paddle

        if not paddle.device.is_compiled_with_cuda():
            raise ValueError(
                f"the device is {device!r}, and this build of Paddle has no CUDA: use device='cpu', or install a build "
                "that has it, see docs/install.md"
            )
    return name


@contextlib.contextmanager
def inference(model: Encoder) -> Iterator[Encoder]:
    """No gradients, and eval mode, which a model that was training leaves again at the end.

    Yields:
        The model itself, without what `paddle.DataParallel` puts around it.

    Raises:
        RuntimeError: if Paddle is in static mode.
        ValueError: if it is no model.
    """
    model = unwrapped(model)
    if takes_arrays(model):  # and has neither
        yield model
        return
    require_dynamic_mode()
    import paddle

    trained = model if isinstance(model, paddle.nn.Layer) and model.training else None
    if trained:
        trained.eval()
    try:
        with paddle.no_grad():
            yield model
    finally:
        if trained:
            trained.train()


def tokenized(model: Encoder, texts: Sequence[str], truncate: bool = False) -> np.ndarray:
    """The ids [N, L] of texts, by the tokenizer of the model's text tower, without a Tensor on the way."""
    return token_ids(texts, model.context_length, truncate, getattr(model, "text_tower", "clip"))


def encode_images(model: Encoder, pixels: np.ndarray) -> np.ndarray:
    """The features [B, E] of preprocessed images [B, 3, R, R], not normalised; float32 from half precision."""
    return as_array(model.encode_image(_as_taken(model, pixels)))


def encode_tokens(model: Encoder, tokens: np.ndarray) -> np.ndarray:
    """The features [B, E] of token ids [B, L], not normalised; float32 from half precision."""
    return as_array(model.encode_text(_as_taken(model, tokens)))


def unit(features: np.ndarray) -> np.ndarray:
    """Features divided by their length."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def logit_factor(model: Encoder) -> float:
    """The factor on cosine similarities."""
    return math.exp(model.log_scale if hasattr(model, "log_scale") else float(model.logit_scale))


def progress_bar(progress: Optional[bool], **options: Any) -> "tqdm[Any]":
    """A tqdm bar: on a terminal if `progress` is None, else always or never."""
    return tqdm(disable=None if progress is None else not progress, **options)


def takes_arrays(model: Encoder) -> bool:
    """Whether a model takes numpy arrays and needs no Paddle, as a `Predictor` does."""
    return getattr(model, "takes_arrays", False)


def _as_taken(model: Encoder, array: np.ndarray) -> Any:
    if takes_arrays(model):
        return array
    import paddle

    return paddle.to_tensor(array)

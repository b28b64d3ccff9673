"""numpy arrays and Paddle's Tensors, for code that runs with and without Paddle.

Paddle takes more than a second to import: what only needs numpy does not import it.
"""

import sys
from typing import Any

import numpy as np

from .extras import PADDLE_IS_INSTALLED


class WorkerArray(np.ndarray):
    """An array in a worker process of a DataLoader, with the method `numpy` that code for Tensors calls there."""

    def numpy(self) -> np.ndarray:
        """The array itself."""
        return np.asarray(self)


def as_tensor(array: np.ndarray) -> Any:
    """The array as a Tensor; as it is where Paddle is not installed, and in a worker process of a DataLoader.

    Paddle's Tensors end such a process. The loader makes Tensors of its arrays.
    """
    if not PADDLE_IS_INSTALLED:
        return array
    import paddle

    return paddle.to_tensor(array) if paddle.io.get_worker_info() is None else array.view(WorkerArray)


def is_tensor(value: Any) -> bool:
    """Whether a value is one of Paddle's Tensors."""
    paddle = sys.modules.get("paddle")
    return paddle is not None and isinstance(value, paddle.Tensor)


def as_array(value: Any) -> np.ndarray:
    """The array of a Tensor or of anything numpy takes; numbers in half precision become float32."""
    if is_tensor(value) and str(value.dtype).endswith("float16"):
        value = value.astype("float32")  # the array of a bfloat16 Tensor would be one of its bits
    return np.asarray(value)

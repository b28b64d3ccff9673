"""The loss CLIP is trained with (paper, figure 3 and section 2.5)."""

import math

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from .layers import float32_if_half

MAX_LOGIT_SCALE = math.log(100)


class ContrastiveLoss(nn.Layer):
    """Symmetric cross entropy over the cosine similarities of a batch of pairs.

    Image i belongs to text i and to no other of the batch. The temperature is clamped as in the paper: similarities are
    multiplied by 100 at most. The clamp lets gradients through, so a scale past the limit finds its way back; call
    `clamp` after each optimiser step to keep the parameter itself within it.
    """

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """The mean loss of a batch.

        Args:
            image_features: [B, E], normalised or not, in any floating-point dtype.
            text_features: [B, E], like `image_features`.
            logit_scale: 0-d logarithm of the factor on similarities, such as `model.logit_scale`.

        Returns:
            The loss, 0-d, in float32 for half-precision features.

        Raises:
            ValueError: if images and texts differ in number.
        """
        if image_features.shape[0] != text_features.shape[0]:
            raise ValueError(
                f"{image_features.shape[0]} images and {text_features.shape[0]} texts: the loss takes pairs"
            )
        image_features = F.normalize(float32_if_half(image_features), axis=-1)  # [B, E]
        text_features = F.normalize(float32_if_half(text_features), axis=-1)  # [B, E]
        logit_scale = logit_scale.astype(image_features.dtype)
        clamped = logit_scale + (logit_scale.clip(max=MAX_LOGIT_SCALE) - logit_scale).detach()
        logits_per_image = clamped.exp() * image_features @ text_features.t()  # [B, B]
        labels = paddle.arange(image_features.shape[0])
        return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_image.t(), labels)) / 2

    @staticmethod
    def clamp(logit_scale: Tensor) -> None:
        """Lowers the parameter `logit_scale` to ln 100 if it is above."""
        with paddle.no_grad():
            logit_scale.set_value(logit_scale.clip(max=MAX_LOGIT_SCALE))

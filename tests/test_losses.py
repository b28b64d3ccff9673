import math

import numpy as np
import paddle
import pytest
import torch

from paddle_clip import ContrastiveLoss
from paddle_clip.losses import MAX_LOGIT_SCALE


def pytorch(images, texts, scale):
    images, texts, scale = (torch.tensor(array, requires_grad=True) for array in (images, texts, scale))
    normal = torch.nn.functional.normalize
    logits = scale.clamp(max=math.log(100)).exp() * normal(images, dim=-1) @ normal(texts, dim=-1).T
    labels = torch.arange(len(images))
    loss = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    (loss / 2).backward()
    return loss.item() / 2, images.grad.numpy(), texts.grad.numpy(), scale.grad.item()


@pytest.fixture
def pairs():
    random = np.random.default_rng(0)
    images = random.standard_normal((6, 16))
    return images, images + random.standard_normal((6, 16)) * 0.5


def test_equals_pytorch(pairs):
    images, texts = (paddle.to_tensor(array, stop_gradient=False) for array in pairs)
    scale = paddle.to_tensor(2.5, dtype="float64", stop_gradient=False)
    loss = ContrastiveLoss()(images, texts, scale)
    loss.backward()
    expected = pytorch(*pairs, np.float64(2.5))
    for ours, theirs in zip((loss, images.grad, texts.grad, scale.grad), expected):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)  # Paddle's cross entropy is float32 inside


def test_temperature_is_clamped_and_finds_its_way_back(pairs):
    images, texts = (paddle.to_tensor(array) for array in pairs)
    loss, limit = ContrastiveLoss(), paddle.to_tensor(MAX_LOGIT_SCALE, dtype="float64")
    beyond = paddle.to_tensor(9.0, dtype="float64", stop_gradient=False)
    value = loss(images, texts, beyond)
    assert value.item() == pytest.approx(loss(images, texts, limit).item(), rel=1e-12)
    value.backward()
    assert beyond.grad.item() != 0
    loss.clamp(beyond)
    assert beyond.item() == pytest.approx(math.log(100))
    below = paddle.to_tensor(1.0)
    loss.clamp(below)
    assert below.item() == 1


def test_half_precision_is_computed_in_float32(pairs):
    images, texts = (paddle.to_tensor(array.astype(np.float16)) for array in pairs)
    loss = ContrastiveLoss()(images * 1e-3, texts, paddle.to_tensor(4.6, dtype="float16"))
    assert loss.dtype == paddle.float32
    assert np.isfinite(loss.item())


def test_as_many_images_as_texts(pairs):
    images, texts = (paddle.to_tensor(array) for array in pairs)
    with pytest.raises(ValueError, match="6 images and 5 texts"):
        ContrastiveLoss()(images, texts[:5], paddle.to_tensor(1.0))

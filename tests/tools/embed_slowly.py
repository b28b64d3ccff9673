"""Embeds a folder as `test_features.py` does, with checkpoints after every batch, slowly enough to be killed.

python tests/tools/embed_slowly.py FOLDER OUTPUT SECONDS_PER_IMAGE
"""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, HERE]

import paddle_clip  # noqa: F401  isort: skip  before paddle, see extras.ZLIB_IS_BROKEN
import paddle

from paddle_clip import embed, features, image_transform, presets
from variants import RESNET

BATCH_SIZE = 5


def small_model():
    """A model with batch norms, the same in every process."""
    paddle.seed(7)
    model = presets.build(RESNET)
    model.eval()
    return model, image_transform(RESNET.image_resolution)


class Slow:
    """A preprocessing that sleeps before each image."""

    def __init__(self, preprocess, seconds):
        self.preprocess, self.seconds = preprocess, seconds

    def __call__(self, image):
        time.sleep(self.seconds)
        return self.preprocess.array(image)


if __name__ == "__main__":
    features._CHECKPOINT_SECONDS = 0
    model, preprocess = small_model()
    slow = Slow(preprocess, float(sys.argv[3]))
    embed(model, slow, sys.argv[1], sys.argv[2], BATCH_SIZE, workers=2, on_error="skip", progress=False)

"""Images per second of `embed` and of the encoder alone, and the peak memory of `embed` along the way.

    python benchmarks/embed.py [--preset ViT-B/32] [--images 2000] [--batch-size 64]
    python benchmarks/embed.py --preset small --images 20000

The script draws JPEGs of 256 to 500 pixels into a temporary folder, embeds the folder into a `.npy` file with a model
of random weights, and then encodes up to 30 batches that are already tensors. `small` is a model that costs next to
nothing: with it the script measures decoding, of many images in little time. Memory is this process's peak so far.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import paddle_clip  # noqa: F401  isort: skip  before paddle, see extras.ZLIB_IS_BROKEN
import numpy as np
import paddle
from PIL import Image

from paddle_clip import CLIPConfig, embed, image_transform
from paddle_clip.presets import build, preset

SMALL = CLIPConfig(64, 224, 1, 64, 56, 64, 1, 1, 77, 100)
BATCHES_ALONE = 30  # largest number of batches encoded alone


def draw(path):
    """Writes a JPEG of smooth colours and some grain, of about 50 kB."""
    random = np.random.default_rng(int(os.path.basename(path)[:-4]))
    width, height = random.integers(256, 501, 2)
    smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    grain = random.integers(-12, 13, (height, width, 3), dtype=np.int16)
    array = np.asarray(smooth.resize((width, height), Image.BICUBIC)) + grain
    Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="ViT-B/32", help="one of OpenAI's model names, or small")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    config = SMALL if arguments.preset == "small" else preset(arguments.preset).config
    model, preprocess = build(config), image_transform(config.image_resolution)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{index:06}.jpg") for index in range(arguments.images)]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # not in our memory
            list(pool.map(draw, paths, chunksize=100))
        size = sum(map(os.path.getsize, paths)) / len(paths)
        print(f"{arguments.preset}, {len(paths):,} JPEGs of {size / 1e3:.0f} kB, batches of {arguments.batch_size}")
        measure(model, preprocess, folder, arguments)


def measure(model, preprocess, folder, arguments):
    encode_image, count, quarter = model.encode_image, 0, 0

    def counted(pixels):
        nonlocal count, quarter
        features = encode_image(pixels)
        count += len(pixels)
        while quarter < 4 and count >= (quarter + 1) * arguments.images // 4:
            quarter += 1
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(f"  {quarter * 25:3} % of the images, peak memory {peak:,.0f} MB", flush=True)
        return features

    resolution = model.visual.input_resolution
    batch = paddle.rand([arguments.batch_size, 3, resolution, resolution])
    with paddle.no_grad():
        encode_image(batch).numpy()
        model.encode_image = counted
        output = os.path.join(folder, "features.npy")
        start = time.perf_counter()
        embed(model, preprocess, folder, output, arguments.batch_size, arguments.workers, progress=False)
        embedded = arguments.images / (time.perf_counter() - start)
        batches = min(-(-arguments.images // arguments.batch_size), BATCHES_ALONE)
        start = time.perf_counter()
        for _ in range(batches):
            encode_image(batch).numpy()
        alone = batches * arguments.batch_size / (time.perf_counter() - start)
    print(f"  embed {embedded:.1f} images/s, encoder alone {alone:.1f} images/s, ratio {embedded / alone:.2f}")


if __name__ == "__main__":
    main()

"""Images a second of decoding and preprocessing, in one thread and in as many as there are cores.

    python benchmarks/preprocess.py [--images 200]

The images are JPEGs of 500 x 375 pixels of smooth noise. The encoder waits for them only if it is faster; see
encode.py.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from PIL import Image

from paddle_clip.transforms import image_transform


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--resolution", type=int, default=224)
    arguments = parser.parse_args()
    transform = image_transform(arguments.resolution).array
    random = np.random.default_rng(0)
    print("| threads | images/s |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{index}.jpg") for index in range(arguments.images)]
        for path in paths:
            small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        for threads in sorted({1, os.cpu_count()}):
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(transform, paths[:8]))
                start = time.perf_counter()
                list(pool.map(transform, paths))
                print(f"| {threads} | {len(paths) / (time.perf_counter() - start):.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Speed and accuracy of the int8 image encoder against the float32 one, both by OpenVINO.

    python benchmarks/int8.py [--model ViT-B/32]

The script measures the accuracy of the model in the package, on drawings it was not trained on: cosine of the features,
how often the zero-shot choice among all colours and shapes is the same, and how often it is right. It measures the
speed of a preset with random weights; the two encoders take turns. It needs the extra int8 and prints two tables.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "examples")]

import numpy as np

import paddle_clip  # before paddle
import train_tiny
from paddle_clip.presets import PRESETS, preset
from peers import make_checkpoint

# isort: split
import paddle


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[row.name for row in PRESETS], metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=950)
    arguments = parser.parse_args()
    paddle.set_device("cpu")
    accuracy(arguments.pictures)
    speed(arguments.model, arguments.batches, arguments.rounds)


def pictures(preprocess, number, seed, side):
    """Scenes of combinations held out of the training, and their images [N, 3, R, R]."""
    scenes, images = train_tiny.test_pictures(train_tiny.HELD_OUT, number, seed)
    return scenes, np.stack([preprocess(image.resize((side, side))).numpy() for image in images])


def accuracy(number):
    model, preprocess = paddle_clip.load("tiny")
    scenes, images = pictures(preprocess, number, 7, model.visual.input_resolution)
    _, calibration = pictures(preprocess, 300, 8, model.visual.input_resolution)
    exact = paddle_clip.compile(model, engine="openvino").encode_image(images)
    quantised = paddle_clip.compile(model, calibration=calibration).encode_image(images)
    cosine = (exact * quantised).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(quantised, axis=1)
    names = [" ".join(pair) for pair in train_tiny.COMBINATIONS]
    classifier = paddle_clip.zero_shot_classifier(model, names, train_tiny.TEMPLATES, progress=False).numpy()
    truth = [train_tiny.COMBINATIONS.index(scene[:2]) for scene in scenes]
    chosen = {name: (features @ classifier).argmax(1) for name, features in (("f", exact), ("q", quantised))}
    columns = "tiny, pictures", "cosine, mean", "least", "same choice", "right, float32", "right, int8"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print(
        f"| {number} | {cosine.mean():.5f} | {cosine.min():.5f} | {(chosen['f'] == chosen['q']).mean():.2%} | "
        f"{(chosen['f'] == truth).mean():.2%} | {(chosen['q'] == truth).mean():.2%} |\n"
    )


def speed(name, batches, rounds):
    side = preset(name).config.image_resolution
    with tempfile.TemporaryDirectory() as folder:
        model, preprocess = paddle_clip.load(make_checkpoint(name, folder))
        _, images = pictures(preprocess, max(batches), 7, side)
        _, calibration = pictures(preprocess, 32, 8, side)
        encoders = {
            "float32": paddle_clip.compile(model, engine="openvino"),
            "int8": paddle_clip.compile(model, calibration=calibration),
        }
    features = {kind: encoder.encode_image(images) for kind, encoder in encoders.items()}
    exact, quantised = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features.values())
    print(f"| {name}, images a second | {' | '.join(map(str, batches))} |\n|---{'|---' * len(batches)}|")
    rates = {kind: [] for kind in encoders}
    for batch in batches:
        times = {kind: [] for kind in encoders}
        for measured in range(-2, rounds):
            for kind, encoder in encoders.items():
                time.sleep(0.2)
                start = time.perf_counter()
                encoder.encode_image(images[:batch])
                if measured >= 0:
                    times[kind].append(time.perf_counter() - start)
        for kind, seconds in times.items():
            rates[kind].append(batch / statistics.median(seconds))
    for kind, row in rates.items():
        print(f"| {kind} | {' | '.join(f'{rate:.1f}' for rate in row)} |")
    ratios = (fast / slow for fast, slow in zip(rates["int8"], rates["float32"]))
    print(f"| int8 / float32 | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    print(f"\nCosine of the features of {len(images)} drawings, random weights: {(exact * quantised).sum(1).min():.5f}")


if __name__ == "__main__":
    main()

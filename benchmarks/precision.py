"""Speed and accuracy of lower precisions against OpenVINO in float32: int8 images; bfloat16 images and texts.

    python benchmarks/precision.py [--model ViT-B/32]

The script measures the accuracy of the model in the package, on drawings it was not trained on: cosine of the features,
how often the zero-shot choice among all colours and shapes is the same, and how often it is right. It measures the
speed of a preset with random weights; the encoders take turns. It needs the extra int8 and prints two tables. On a
processor without products in bfloat16 those rows are left out with a note.
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
import tiny_world
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
    scenes, images = train_tiny.test_pictures(tiny_world.HELD_OUT, number, seed)
    return scenes, np.stack([preprocess(image.resize((side, side))).numpy() for image in images])


def encoders(model, calibration):
    """{precision: the compiled model}, float32 first."""
    made = {"float32": paddle_clip.compile(model, engine="openvino")}
    made["int8"] = paddle_clip.compile(model, calibration=calibration)
    try:
        made["bfloat16"] = paddle_clip.compile(model, engine="openvino", precision="bfloat16")
        made["bfloat16 by Paddle"] = paddle_clip.compile(model, engine="paddle", precision="bfloat16")
    except ValueError as error:
        print(f"(bfloat16 is left out: {error})")
    return made


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def accuracy(number):
    model, preprocess = paddle_clip.load("tiny")
    scenes, images = pictures(preprocess, number, 7, model.visual.input_resolution)
    made = encoders(model, pictures(preprocess, 300, 8, model.visual.input_resolution)[1])
    names = [" ".join(pair) for pair in tiny_world.COMBINATIONS]
    truth = np.array([tiny_world.COMBINATIONS.index(scene[:2]) for scene in scenes])
    features = {kind: unit(encoder.encode_image(images)) for kind, encoder in made.items()}
    classifiers = {
        kind: np.asarray(paddle_clip.zero_shot_classifier(encoder, names, tiny_world.TEMPLATES))
        for kind, encoder in made.items()
    }
    exact = (features["float32"] @ classifiers["float32"]).argmax(1)
    columns = f"tiny, {number} pictures", "cosine, mean", "least", "same choice", "right"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print(f"| float32 | | | | {(exact == truth).mean():.2%} |")
    for kind in list(made)[1:]:
        image = (features[kind] * features["float32"]).sum(1)
        text = (classifiers[kind] * classifiers["float32"]).sum(0)
        rows = [(f"{kind}, images", image, features[kind], classifiers["float32"])]
        if kind != "int8":  # whose texts are in float32
            rows.append((f"{kind}, texts", text, features["float32"], classifiers[kind]))
            rows.append((f"{kind}, both", np.concatenate([image, text]), features[kind], classifiers[kind]))
        for name, cosine, ours, classifier in rows:
            chosen = (ours @ classifier).argmax(1)
            cells = f"{cosine.mean():.6f} | {cosine.min():.6f} | {(chosen == exact).mean():.2%}"
            print(f"| {name} | {cells} | {(chosen == truth).mean():.2%} |")


def speed(name, batches, rounds):
    side = preset(name).config.image_resolution
    with tempfile.TemporaryDirectory() as folder:
        model, preprocess = paddle_clip.load(make_checkpoint(name, folder))
        _, images = pictures(preprocess, max(batches), 7, side)
        made = encoders(model, pictures(preprocess, 32, 8, side)[1])
    features = {kind: unit(encoder.encode_image(images)) for kind, encoder in made.items()}
    print(f"\n| {name}, images a second | {' | '.join(map(str, batches))} | least cosine, drawings |")
    print(f"|---{'|---' * len(batches)}|---|")
    rates = {kind: [] for kind in made}
    for batch in batches:
        times = {kind: [] for kind in made}
        for measured in range(-2, rounds):
            for kind, encoder in made.items():
                time.sleep(0.2)
                start = time.perf_counter()
                encoder.encode_image(images[:batch])
                if measured >= 0:
                    times[kind].append(time.perf_counter() - start)
        for kind, seconds in times.items():
            rates[kind].append(batch / statistics.median(seconds))
    for kind, row in rates.items():
        least = (features[kind] * features["float32"]).sum(1).min()
        print(f"| {kind} | {' | '.join(f'{rate:.1f}' for rate in row)} | {least:.5f} |")
    for kind in list(rates)[1:]:
        ratios = (fast / slow for fast, slow in zip(rates[kind], rates["float32"]))
        print(f"| {kind} / float32 | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | |")


if __name__ == "__main__":
    main()

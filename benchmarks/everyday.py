"""Seconds of whole commands as a newcomer types them, start included, ours and our peers' scripts.

    python benchmarks/everyday.py [--images 2000] [--classes 25] [--rows openai 'embed …' …]

Nothing is set in the environment. The checkpoint has random weights; the JPEGs are drawn, see embed.py. A peer's script
is what its README shows: a DataLoader with two workers, batches of 64, features saved as .npy. It reads pictures by our
preprocessing, which does what torchvision's does. "cold" is the first time, with an empty cache; "warm" the second.
OpenVINO's programs of OpenAI's model are made before the stopwatch starts.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

ENVIRONMENT = dict(os.environ)  # Paddle, imported below, sets OMP_NUM_THREADS to 1 for all whom we start
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np

import peers
from paddle_clip import IMAGENET_CLASSES, IMAGENET_TEMPLATES
from paddle_clip.images import image_files
from paddle_clip.presets import PRESETS

BATCH = 64
# What is typed after `paddle-clip TASK …`. Each is measured cold, then warm.
OURS = {
    "ours": [],
    "ours, eager": ["--engine", "eager"],
    "ours, Paddle Inference": ["--engine", "paddle"],
    "ours, OpenVINO": ["--engine", "openvino"],
    "ours, bfloat16": ["--precision", "bfloat16"],
    "ours, Paddle Inference, bfloat16": ["--engine", "paddle", "--precision", "bfloat16"],
}
PEERS = ("openai", "open_clip", "hugging_face", "openvino", "openvino_default")
TASKS = {
    "embed": "{images} JPEGs embedded",
    "classify": "first photo classified",
    "texts": "a photo among {classes} classes × 80 prompts",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[row.name for row in PRESETS], metavar="MODEL")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=25, help="the first of ImageNet's 1,000")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], metavar="ROW")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run(*arguments.run)
    with tempfile.TemporaryDirectory() as folder:
        world = prepare(folder, arguments)
        for task in arguments.tasks:
            measure(task, world, arguments)
    return None


def prepare(folder, arguments):
    """Makes the checkpoint, the pictures and the labels: their paths."""
    from embed import draw

    world = {name: os.path.join(folder, name) for name in ("photos", "labels.txt", "cache", "output")}
    os.mkdir(world["photos"])
    paths = [os.path.join(world["photos"], f"{index:06}.jpg") for index in range(arguments.images)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(draw, paths, chunksize=100))
    with open(world["labels.txt"], "w") as file:
        file.write("\n".join(IMAGENET_CLASSES[: arguments.classes]))
    world["checkpoint"] = peers.make_checkpoint(arguments.model, folder)
    if any(row.startswith("openvino") for row in arguments.rows):
        peers._onnx(world["checkpoint"])
    return world


def measure(task, world, arguments):
    """Prints the table of one task."""
    title = TASKS[task].format(images=f"{arguments.images:,}", classes=arguments.classes)
    print(f"\n| {arguments.model}, {title}: seconds | cold | warm | OpenAI's code / warm |", flush=True)
    print("|---|---|---|---|")
    seconds = {}
    for row in sorted(arguments.rows, key=lambda row: row != "openai"):
        shutil.rmtree(world["cache"], ignore_errors=True)
        seconds[row] = [stopwatch(task, row, world) for _ in range(2)]
        if None in seconds[row]:
            continue
        cold, warm = seconds[row]
        ratio = f"{seconds['openai'][1] / warm:.2f}" if seconds.get("openai") else ""
        print(f"| {peers.PEERS.get(row, row)} | {cold:.1f} | {warm:.1f} | {ratio} |", flush=True)


def stopwatch(task, row, world):
    """Seconds of a whole process, or None with a note if it could not do its task."""
    if row in OURS:
        command = [sys.executable, "-m", "paddle_clip", *ours(task, world), "--model", world["checkpoint"], *OURS[row]]
    else:
        command = [sys.executable, os.path.abspath(__file__), "--run", row, task, json.dumps(world)]
    shutil.rmtree(world["output"], ignore_errors=True)
    os.mkdir(world["output"])
    environment = {**ENVIRONMENT, "PADDLE_CLIP_CACHE": world["cache"]}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        print(f"({row} is left out: {done.stderr.strip().splitlines()[-1]})")
        return None
    return seconds


def ours(task, world):
    """The arguments of our command, but for the model and the engine."""
    photo = os.path.join(world["photos"], "000000.jpg")
    if task == "embed":
        return ["embed", world["photos"], "-o", os.path.join(world["output"], "features.npy")]
    if task == "classify":
        return ["classify", photo, "--labels", "a dog", "a cat", "a diagram"]
    templates = [word for template in IMAGENET_TEMPLATES for word in ("--template", template)]
    return ["classify", photo, "--labels-file", world["labels.txt"], *templates]


# ------------------------------------------------------------------------------------------------------ peers' scripts


class Photos:
    """A PyTorch data set of preprocessed pictures."""

    def __init__(self, paths, resolution):
        self.paths, self.resolution = paths, resolution

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from paddle_clip import image_transform

        return image_transform(self.resolution).array(self.paths[index])


def run(peer, task, world):
    """Does a task by a peer, as its README would."""
    world = json.loads(world)
    call, config = getattr(peers, peer)(world["checkpoint"], "cpu", "float32"), peers._config(world["checkpoint"])
    paths = image_files(world["photos"]) if task == "embed" else [os.path.join(world["photos"], "000000.jpg")]
    photos = Photos(paths, config.image_resolution)
    features = np.concatenate([call("image", pixels) for pixels in batches(photos, task)])
    if task == "embed":
        return np.save(os.path.join(world["output"], "features.npy"), features)
    templates, labels = ["a photo of {}"], ["a dog", "a cat", "a diagram"]
    if task == "texts":
        templates = IMAGENET_TEMPLATES
        with open(world["labels.txt"]) as file:
            labels = file.read().splitlines()
    columns = []
    for label in labels:  # class by class and at full length, as OpenAI's notebook
        texts = call("text", tokens([template.replace("{}", label) for template in templates]))
        column = (texts / np.linalg.norm(texts, axis=-1, keepdims=True)).mean(0)
        columns.append(column / np.linalg.norm(column))
    print((features @ np.stack(columns, 1)).argmax())
    return None


def batches(photos, task):
    """Batches of preprocessed pictures, by PyTorch's DataLoader; a single photo needs none."""
    if task != "embed":
        yield photos[0][None]
        return
    from torch.utils.data import DataLoader

    for pixels in DataLoader(photos, BATCH, num_workers=2):
        yield pixels.numpy()


def tokens(texts):
    from paddle_clip.tokenizer import token_ids

    return token_ids(texts)


if __name__ == "__main__":
    main()

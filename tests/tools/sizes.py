"""Prints the time and memory that reading takes, by the size of what is read: `python tests/tools/sizes.py`.

What is read is all structure: thousands of small parts, where the work is. Time and memory must grow no faster than the
size; a text that would take longer is refused. The script exits 1 where sixteen times the size takes forty times as
long.
"""

import json
import os
import pathlib
import pickle
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, HERE]

import numpy as np
from building import entry, legacy_file, plain_file, safetensors, text, torch_file

import paddle_clip
from paddle_clip import CheckpointError
from paddle_clip.checkpoints import reading
from paddle_clip.checkpoints.files import read_json
from paddle_clip.features import load_features
from paddle_clip.probe import LinearProbe

TIMES = (1, 4, 16)  # sizes
MOST = 40  # times as long for sixteen times the size
SHORT = 0.02  # seconds, below which nothing is said of growth


def nested(count):
    return b"}(" + b"".join(text(f"layer.{index}.weight") + b"](Ne" for index in range(count)) + b"u"


def pickled(path, count):
    path.write_bytes(pickle.dumps({f"layer.{index}.weight": np.ones(2, np.float32) for index in range(count)}, 4))


def header(path, count):
    path.write_bytes(safetensors({f"layer.{index}.weight": entry([0], (0, 0)) for index in range(count)}, b""))


def features(path, count):
    np.save(path.with_suffix(".npy"), np.zeros([count, 4], np.float32))
    paths = [f"photos/{index}.jpg" for index in range(count)]
    path.with_suffix(".json").write_text(json.dumps({"paths": paths, "damaged": []}))
    path.with_suffix(".npy").rename(path)
    path.with_suffix(".json").rename(path.parent / "x.json")


def probe(path, count):
    LinearProbe(np.ones([count, 8], np.float32), np.ones(8, np.float32), np.arange(8), 1.0).save(path)


def config(path, count):
    path.write_text(json.dumps({f"key{index}": [index, {}] for index in range(count)}))


def written(content):
    return lambda path, count: path.write_text(content * count)


def tokenized(path):
    paddle_clip.tokenize(path.read_text(), truncate=True)


# {format: (name of the file, what makes it, its smallest count, what reads it)}
FORMATS = {
    ".pt, zip": ("x.pt", lambda path, count: torch_file(path, nested(count)), 10_000, reading.read),
    ".pt, legacy": ("x.pt", lambda path, count: legacy_file(path, nested(count)), 10_000, reading.read),
    ".pt, plain": ("x.pt", lambda path, count: plain_file(path, nested(count)), 10_000, reading.read),
    ".pdparams": ("x.pdparams", pickled, 2_500, reading.read),
    ".safetensors": ("x.safetensors", header, 5_000, reading.read),
    ".npy and .json": ("x.npy", features, 25_000, load_features),
    ".npz of a probe": ("x.npz", probe, 50_000, LinearProbe.load),
    "config.json": ("x.json", config, 25_000, read_json),
    "text, words": ("x", written("a cat "), 2_500, tokenized),
    "text, letters": ("x", written("ab"), 2_500, tokenized),
    "text, entities": ("x", written("&amp;amp;"), 1_500, tokenized),
    "text, newlines": ("x", written("\n"), 15_000, tokenized),
    "text, Chinese": ("x", written("猫"), 15_000, tokenized),
}


def peak():
    """Most memory of this process since its peak was forgotten, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def measured(read, path):
    """Seconds and bytes of memory that reading a file takes in a process of its own, and whether it was read."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before, start, outcome = peak(), time.process_time(), "read"
        try:
            read(path)
        except (CheckpointError, RuntimeError, ValueError):
            outcome = "refused"
        found = [time.process_time() - start, peak() - before, outcome]
        os.write(sender, json.dumps(found).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as file:
        found = json.loads(file.read())
    os.waitpid(child, 0)
    return found


def main():
    paddle_clip.tokenize("warm")
    failed = False
    print(f"{'format':<16} {'size':>10} {'seconds':>8} {'memory':>10}")
    for name, (file, make, count, read) in FORMATS.items():
        seconds = []
        for times in TIMES:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, file)
                make(path, count * times)
                took, memory, outcome = measured(read, path)
                size = sum(file.stat().st_size for file in path.parent.iterdir())
            print(f"{name:<16} {size / 1e6:>7.2f} MB {took:>8.3f} {memory / 1e6:>7.1f} MB  {outcome}", flush=True)
            seconds += [took] if outcome == "read" else []
        if len(seconds) == len(TIMES) and seconds[-1] > SHORT and seconds[-1] > MOST * max(seconds[0], SHORT / MOST):
            print(f"error: {name}: {seconds[-1] / seconds[0]:.0f} times as long", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Images and texts a second of both encoders, ours and our peers', in one run.

    python benchmarks/encode.py [--models RN50 ViT-B/32] [--batches 1 8 32] [--peers openai openvino …]

The weights are random; every peer runs in its own process, nothing set in the environment, and they take turns. The
script prints a table in Markdown: medians, the ratio of ours to the best peer of the same precision, and the share of
the machine's limit for matrix products. OpenVINO left to itself takes bfloat16 where the processor has it; all others
compute in --dtype. What is not installed is left out with a note: pip install onnx onnxruntime openvino; the Makefile
has the rest.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from paddle_clip.presets import CHINESE, OPEN_CLIP, PRESETS, preset
from peers import LOWER, OURS, PEERS, make_checkpoint, medians, start


def flops(config, tower):
    """Floating-point operations of the matrix products and convolutions of one image or one text of 77 tokens."""
    if tower == "text":
        return transformer_flops(config.transformer_layers, config.transformer_width, config.context_length)
    if config.vision_patch_size:
        patches = (config.image_resolution // config.vision_patch_size) ** 2
        patch = 2 * patches * config.vision_width * 3 * config.vision_patch_size**2
        return patch + transformer_flops(config.vision_layers, config.vision_width, patches + 1)
    return None


def transformer_flops(layers, width, tokens):
    return layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


LIMIT = """
import time, numpy, torch
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
image, kernel = a.reshape(1, 1024, 32, 32), b.reshape(1024, 1024, 1, 1)
def seconds(product):
    start = time.perf_counter()
    for _ in range(10):
        product()
    return (time.perf_counter() - start) / 10
with torch.no_grad():
    for product in (lambda: a @ b, lambda: torch.conv2d(image, kernel)):  # by MKL, by oneDNN
        seconds(product)
        print(2 * 1024**3 / numpy.median([seconds(product) for _ in range(9)]))
"""


def matrix_product_limit():
    """Floating-point operations a second of PyTorch's fastest float32 matrix product of side 1024, of three runs."""
    runs = [subprocess.run([sys.executable, "-c", LIMIT], capture_output=True, text=True, check=True) for _ in range(3)]
    return max(float(line) for run in runs for line in run.stdout.split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [row.name for row in (*PRESETS, *OPEN_CLIP, *CHINESE)]
    parser.add_argument("--models", nargs="+", default=["RN50", "ViT-B/32"], choices=names, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--towers", nargs="+", default=["image", "text"], choices=["image", "text"])
    parser.add_argument("--peers", nargs="*", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], metavar="PEER")
    parser.add_argument(
        "--lengths", nargs="+", type=int, help="tokens of the texts, which are padded (default: no pad)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="by default nothing is set in the environment")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    arguments = parser.parse_args()
    limit = matrix_product_limit() if arguments.device == "cpu" else None
    print(f"{processor()}, {arguments.threads or 'all'} threads, {arguments.dtype}; {versions()}")
    if limit:
        print(f"Matrix products of side 1024: {limit / 1e9:.0f} GFLOP/s")
    for model in arguments.models:
        measure(model, arguments, limit)


def measure(model, arguments, limit):
    """Prints the table of one model."""
    config = preset(model).config
    calls = [("image", batch, 0) for batch in arguments.batches if "image" in arguments.towers]
    lengths = arguments.lengths or [config.context_length] if "text" in arguments.towers else []
    calls += [("text", batch, length) for length in lengths for batch in arguments.batches]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(model, folder)
        workers = start(arguments.peers, checkpoint, arguments.device, arguments.threads, arguments.dtype)
        times = medians(workers, calls, arguments.rounds)
        for worker in workers.values():
            worker.close()
    print(f"\n| {model}, a second | " + " | ".join(_head(*call) for call in calls) + " |")
    print("|---" * (len(calls) + 1) + "|")
    rates = {key: key[1][1] / seconds for key, seconds in times.items()}
    for peer in workers:
        cells = [f"{rates[peer, call]:.1f}" for call in calls]
        print(f"| {OURS.get(peer) or PEERS[peer]} | {' | '.join(cells)} |")
    for peer in (peer for peer in workers if peer in OURS):
        rivals = [other for other in workers if other in PEERS and (other in LOWER) == (peer in LOWER)]
        if rivals:
            cells = [f"{rates[peer, call] / max(rates[other, call] for other in rivals):.2f}" for call in calls]
            print(f"| {OURS[peer]} / best peer | {' | '.join(cells)} |")
    for peer in (peer for peer in workers if peer in OURS and limit):
        needed = [None if 0 < length < config.context_length else flops(config, tower) for tower, _, length in calls]
        cells = [f"{rates[peer, c] * n / limit:.0%}" if n else "" for c, n in zip(calls, needed)]
        print(f"| {OURS[peer]}, share of the limit | {' | '.join(cells)} |", flush=True)


def _head(tower, batch, length):
    return f"{tower} × {batch}" + (f", {length} tokens" if length else "")


def processor():
    """The processor's name."""
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def versions():
    from importlib import metadata

    found = []
    for name in ("paddlepaddle", "paddlepaddle-gpu", "torch", "onnxruntime", "openvino", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()

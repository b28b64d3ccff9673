"""Seconds and peak memory of converting a checkpoint, against `cp` and against PyTorch plus Paddle.

    python benchmarks/convert.py [RN50 ViT-B/32 ViT-L/14]

For each preset OpenAI's code makes a checkpoint. Then three routes run in turn, several times over, each in its own
process: `cp` of the input and of the output, flushed to the disk as the converter flushes; `convert/pt2paddle.py`; and
the usual route, torch.jit.load, transposing by hand and paddle.save. The script prints the medians. It needs torch and
clip-anytorch.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROUTES = ("cp", "ours", "usual")

USUAL = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, paddle
state = torch.jit.load(sys.argv[1], map_location="cpu").state_dict()
result = {}
for name, tensor in state.items():
    linear = name.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")) or (
        "attnpool" in name and name.endswith("_proj.weight"))
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    result[name] = paddle.to_tensor((tensor.t() if linear else tensor).contiguous().numpy())
paddle.save(result, sys.argv[2])
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", default=["RN50", "ViT-B/32", "ViT-L/14"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    columns = "checkpoint, MB in, MB out, cp s, ours s, usual s, ours / cp, usual / ours, ours peak MB, usual peak MB"
    print(f"| {columns.replace(', ', ' | ')} |\n{'|---' * 10}|", flush=True)
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as folder:
            print(row(preset, folder, arguments.rounds), flush=True)


def row(preset, folder, rounds):
    """The row of a preset in the table."""
    source, output = os.path.join(folder, "in.pt"), os.path.join(folder, "out.pdparams")
    reference = os.path.join(ROOT, "convert", "reference.py")
    subprocess.run([sys.executable, reference, "make", preset, source], check=True, stdout=subprocess.DEVNULL)
    convert = [sys.executable, os.path.join(ROOT, "convert", "pt2paddle.py"), source, "-o", output]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    copies = [os.path.join(folder, name) for name in ("copy1", "copy2")]
    copy = f"cp {source} {copies[0]} && cp {output} {copies[1]} && sync {copies[0]} {copies[1]}"
    usual = os.path.join(folder, "usual.pdparams")
    kept = os.path.join(folder, "kept.pdparams")
    os.replace(output, kept)
    copy = copy.replace(output, kept)
    commands = {"cp": ["sh", "-c", copy], "ours": convert, "usual": [sys.executable, "-c", USUAL, source, usual]}
    seconds, peaks = {route: [] for route in ROUTES}, {}
    for _ in range(rounds):
        for route in ROUTES:
            for path in (*copies, output, usual):
                if os.path.exists(path):
                    os.unlink(path)
            os.sync()
            elapsed, peaks[route] = measure(commands[route])
            seconds[route].append(elapsed)
    cp, ours, usual = (statistics.median(seconds[route]) for route in ROUTES)
    sizes = [os.path.getsize(path) / 1e6 for path in (source, kept)]
    return (
        f"| {preset} | {sizes[0]:.0f} | {sizes[1]:.0f} | {cp:.2f} | {ours:.2f} | {usual:.2f} | {ours / cp:.2f} | "
        f"{usual / ours:.1f} | {peaks['ours']:.0f} | {peaks['usual']:.0f} |"
    )


def measure(command):
    """Seconds of a command, from start to end of its process, and its peak resident memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - start
    if status:
        raise SystemExit(f"error: {' '.join(command)[:80]} failed")
    return elapsed, usage.ru_maxrss / 1e3


if __name__ == "__main__":
    main()

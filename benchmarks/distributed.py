"""Training in two processes against one: pairs a second; bytes between processes and memory against the formulas.

    python benchmarks/distributed.py [--model tiny] [--batch 64] [--rounds 5]

One process with one thread trains on batches of a size; two processes with one thread each train on batches of that
size each. Both run in turn, round by round, and the medians are compared. So do two processes that know nothing of each
other: they show what the machine gives when all its cores are busy. The bytes are those that the operating system
counted on the loopback interface, so nothing else may use it meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from scale import gathered, reduced, state


def resident(peak=False):
    """Bytes of memory of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM" if peak else "VmRSS"))


def loopback_bytes():
    with open("/proc/net/dev") as file:
        line = next(line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])  # sent


def work(arguments):
    """Trains in this process, one of those that were launched, and prints what the first one measured."""
    import numpy as np

    import paddle_clip
    from paddle_clip import presets, training
    from paddle_clip.distributed import join

    ranks = join()
    resident_before = resident()
    if arguments.model == "tiny":
        model = paddle_clip.load("tiny")[0]
    else:
        model = presets.build(presets.preset(arguments.model).config)
    model.eval()
    size = model.config.image_resolution
    random = np.random.default_rng(ranks.rank)
    images = random.normal(size=[arguments.batch, 3, size, size]).astype("float32")
    captions = [f"a photo of thing number {index}" for index in range(arguments.batch)]
    optimizer = training._optimizer(model.parameters(), 0.2, None)
    optimizer.set_lr(1e-5)
    batch = training.Batch(arguments.batch, images, [], captions, [])

    import paddle

    scaler = paddle.amp.GradScaler(enable=False)
    times, sent = [], []
    for _ in range(arguments.steps + 1):
        ranks.together(lambda: None)
        before, start = loopback_bytes(), time.perf_counter()
        training._step(model, optimizer, scaler, batch, arguments.batch, None, None, ranks)
        times.append(time.perf_counter() - start)
        ranks.together(lambda: None)
        sent.append(loopback_bytes() - before)
    if ranks.rank == 0:
        result = {
            "seconds": sorted(times[1:])[len(times[1:]) // 2],
            "sent": sorted(sent[1:])[len(sent[1:]) // 2],
            "memory": resident(peak=True) - resident_before,
            "parameters": sum(parameter.size for parameter in model.parameters()),
            "embed_dim": model.embed_dim,
        }
        print(f"\nRESULT {json.dumps(result)}", flush=True)


def launched(arguments, count):
    command = [os.path.abspath(__file__), "--work", "--model", arguments.model]
    command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
    if count == 1:
        command = [sys.executable, *command]
    else:
        log = ["--log_dir", tempfile.mkdtemp()]
        launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(count)]
        command = [*launcher, *log, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_minloglevel": "2", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(done.stdout + done.stderr)
    return json.loads(line.removeprefix("RESULT "))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a published architecture such as ViT-B/32")
    parser.add_argument("--batch", type=int, default=64, help="pairs of each process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    one, several, apart = [], [], []
    for _ in range(arguments.rounds):
        one.append(launched(arguments, 1))
        several.append(launched(arguments, arguments.ranks))
        with ThreadPoolExecutor(arguments.ranks) as pool:
            apart += pool.map(lambda _: launched(arguments, 1), range(arguments.ranks))
    medians = [sorted(result["seconds"] for result in results)[len(results) // 2] for results in (one, several, apart)]
    speeds = [
        arguments.batch * count / seconds for count, seconds in zip((1, arguments.ranks, arguments.ranks), medians)
    ]
    last, batch = several[-1], arguments.ranks * arguments.batch
    formula = gathered(arguments.ranks, batch, last["embed_dim"]) + reduced(arguments.ranks, last["parameters"])
    formula *= arguments.ranks
    sent = min(result["sent"] for result in several)
    print(f"{arguments.model}, {arguments.batch} pairs a process, one thread each")
    print(f"1 process {speeds[0]:.1f} pairs/s, {arguments.ranks} processes {speeds[1]:.1f} pairs/s: ", end="")
    print(f"{speeds[1] / speeds[0]:.2f} times; {arguments.ranks} apart {speeds[2] / speeds[0]:.2f} times")
    print(f"bytes a step: {sent:,} on the loopback, {formula:,.0f} by the formula: {sent / formula:.4f} times")
    kept = state(last["parameters"])
    print(f"memory of a process: {last['memory'] / 1e9:.2f} GB, without activations {kept / 1e9:.2f} by the formula")


if __name__ == "__main__":
    main()

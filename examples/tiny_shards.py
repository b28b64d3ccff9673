"""Trains the CLIP of train_tiny.py by `finetune`, from tar shards, in as many processes as the launcher starts.

    python examples/tiny_shards.py write shards
    python -m paddle.distributed.launch --nproc_per_node 2 examples/tiny_shards.py train shards
    python examples/tiny_shards.py test shards

draws the same pairs into shards, trains from random weights, and prints the accuracies that clip_tiny.json has of
the model in the package. The pairs of a batch were chosen to be alike, so `finetune` keeps their order. On CPUs set
GLOO_SOCKET_IFNAME=lo. After an interruption run the second line again: it goes on from the last checkpoint.
"""

import argparse
import glob
import io
import multiprocessing
import os
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, os.pardir), HERE]

import paddle_clip

# isort: split
import paddle

import tiny_world
import train_tiny  # after paddle: processes share the cores
from paddle_clip.distributed import join
from paddle_clip.presets import TINY

SHARDS = 47
TRAINED = "tiny.pdparams"  # name of the result


def write(arguments):
    """Writes the shards."""
    os.makedirs(arguments.folder, exist_ok=True)
    batches = train_tiny.Batches(arguments.steps, arguments.batch_size, TINY.config.image_resolution, arguments.seed)
    of_shard = -(-arguments.steps // SHARDS)
    firsts = range(0, arguments.steps, of_shard)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        paths = [os.path.join(arguments.folder, f"{first // of_shard:03}.tar") for first in firsts]
        parts = [range(first, min(first + of_shard, arguments.steps)) for first in firsts]
        list(pool.map(write_shard, paths, [batches] * len(parts), parts))


def write_shard(path, batches, indices):
    """Writes some of the batches."""
    with tarfile.open(path, "w") as shard:
        for index in indices:
            for place, (picture, caption) in enumerate(zip(*batches.drawn(index))):
                file = io.BytesIO()
                picture.save(file, "png")
                for content, extension in ((file.getvalue(), "png"), (caption.encode(), "txt")):
                    member = tarfile.TarInfo(f"{index * batches.size + place:09}.{extension}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def train(arguments):
    """Trains on the shards in two stages; one whose weights are there is done.

    Batch norms of random weights need the statistics of batches, which are noisy, as each process sees its own pictures
    alone. Once there are averages, training goes on with these.
    """
    shards = sorted(glob.glob(os.path.join(arguments.folder, "*.tar")))
    early = len(shards) // 3
    begun, trained = (os.path.join(arguments.folder, name) for name in ("begun.pdparams", TRAINED))
    paddle.seed(arguments.seed)
    model = paddle_clip.clip_tiny()
    for output, paths, epochs, warmup in ((begun, shards[:early], 1, 0.0667), (trained, shards[early:], 2, 0.02)):
        if os.path.exists(output):
            model, _ = paddle_clip.load(output)
            continue
        paddle_clip.finetune(
            model,
            paddle_clip.read_pairs(paths),
            output,
            epochs=epochs,
            batch_size=arguments.batch_size // join().count,
            learning_rate=2e-3,
            warmup=warmup,
            weight_decay=0.05,
            clip_norm=1,
            train_norms=output == begun,
            shuffle=False,
            save_every=300,
            resume=True,
            on_step=lambda step: step.step % 100 or print(f"step {step.step}  loss {step.loss:.4f}", flush=True),
        )


def test(arguments):
    """Prints zero-shot accuracies."""
    model, preprocess = paddle_clip.load(os.path.join(arguments.folder, TRAINED))
    for name, combinations in (("held out", tiny_world.HELD_OUT), ("seen", tiny_world.SEEN)):
        scenes, pictures = train_tiny.test_pictures(combinations, arguments.pictures, arguments.seed)
        accuracy = train_tiny.evaluate(model, preprocess, scenes, pictures)
        print(f"{name}: " + ", ".join(f"{what} {percent} %" for what, percent in accuracy.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", choices=("write", "train", "test"))
    parser.add_argument("folder", help="of the shards and the weights")
    parser.add_argument("--steps", type=int, default=4700, help="batches to train on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=48, help="of all processes together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pairs (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1200, help="pictures in each test (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 3 or not 1 <= arguments.batch_size <= tiny_world.MOST_PAIRS:
        parser.error(f"--steps must be 3 or more, and --batch-size from 1 to {tiny_world.MOST_PAIRS}")
    {"write": write, "train": train, "test": test}[arguments.work](arguments)


if __name__ == "__main__":
    main()

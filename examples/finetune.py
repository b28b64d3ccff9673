"""Teaches the tiny model five shapes it has never seen, from pictures with captions in a folder.

    python examples/finetune.py

draws the pictures, writes them to a folder, each with its caption in a .txt file of the same name, trains on them, and
prints zero-shot accuracy before and after. Some colours of each new shape are never trained on. The shapes the model
knew are tested too, because training on new things makes a model forget. With your own pictures these lines do it:

    model, preprocess = paddle_clip.load("ViT-B/32")
    paddle_clip.finetune(model, paddle_clip.read_pairs("captions.csv"), "mine.pdparams", epochs=5)

or `paddle-clip finetune captions.csv -o mine.pdparams --epochs 5`. What makes it forget less can be tried:

    python examples/finetune.py --lora 8 --known 5 --epochs 12 --alpha 0.9
"""

import argparse
import os
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, os.pardir), HERE]

import numpy as np

import paddle_clip
import tiny_world

# Outlines as in tiny_world, y downwards.
NEW = {
    "hexagon": [tiny_world.regular(6, 1.0)],
    "house": [np.array([(0, -1.1), (0.85, -0.3), (0.85, 0.85), (-0.85, 0.85), (-0.85, -0.3)])],
    "hourglass": [np.array([(-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)])],
    "lightning": [np.array([(0.3, -1.1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1.1), (0.6, -0.2), (0.05, -0.2)])],
    "table": [np.array([(-1, -0.6), (1, -0.6), (1, 0.8), (0.6, 0.8), (0.6, 0), (-0.6, 0), (-0.6, 0.8), (-1, 0.8)])],
}
OLD = tuple(tiny_world.SHAPES)
tiny_world.SHAPES.update(NEW)


def combinations(shapes, held_out):
    """(colour, shape) pairs: a held-out quarter of the colours of each shape, the rest, or with None all."""
    return [
        (colour, shape)
        for i, colour in enumerate(tiny_world.COLOURS)
        for j, shape in enumerate(shapes)
        if held_out is None or ((i + j) % 4 == 0) == held_out
    ]


def pictures(pairs, number, seed):
    """Yields `number` pictures of each (colour, shape) pair, each with the index of its pair."""
    random = np.random.default_rng(seed)
    for index, (colour, shape) in enumerate(pairs):
        for _ in range(number):
            background = tiny_world.choose(random, tiny_world.BACKGROUNDS, [colour])
            yield tiny_world.draw(tiny_world.Scene(colour, shape, background, size="large"), random), index


def accuracy(model, preprocess, pairs, names, number=10):
    """Zero-shot accuracy on new pictures of some pairs, among all names."""
    labels = [names.index(" ".join(pair)) for pair in pairs]
    data = [(picture, labels[index]) for picture, index in pictures(pairs, number, seed=10**6)]
    return paddle_clip.evaluate(model, preprocess, data, names, tiny_world.TEMPLATES, progress=False).top1


def write_pairs(folder, pairs, number, seed):
    """Adds `number` pictures of each (colour, shape) pair to a folder, with captions."""
    random = np.random.default_rng(seed)
    for count, (picture, index) in enumerate(pictures(pairs, number, seed)):
        picture.save(os.path.join(folder, f"{seed}-{count:05}.png"))
        template = tiny_world.choose(random, tiny_world.TEMPLATES)
        with open(os.path.join(folder, f"{seed}-{count:05}.txt"), "w", encoding="utf-8") as file:
            file.write(template.format(" ".join(pairs[index])))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", default="finetuned.pdparams", help="file for the weights")
    parser.add_argument("--pictures", type=int, default=30, help="number per colour and shape (default: %(default)s)")
    parser.add_argument("--known", type=int, default=0, help="the same of shapes it knew (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lora", type=int, help="rank; trains LoRA and the words, with four times the learning rate")
    parser.add_argument("--alpha", type=float, default=1, help="goes part of the way back, see paddle_clip.interpolate")
    arguments = parser.parse_args()

    before, preprocess = paddle_clip.load("tiny")
    model, _ = paddle_clip.load("tiny")
    names = [" ".join(pair) for pair in combinations((*OLD, *NEW), None)]
    tests = {
        "new shapes": combinations(NEW, held_out=False),
        "new shapes in colours not trained on": combinations(NEW, held_out=True),
        "shapes it knew": combinations(OLD, None),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(folder, tests["new shapes"], arguments.pictures, seed=0)
        write_pairs(folder, tests["shapes it knew"], arguments.known, seed=1)
        pairs = paddle_clip.read_pairs(folder)
        adapted = {"lora": arguments.lora, "unfreeze": ["token_embedding"]} if arguments.lora else {}
        rate = 2e-3 if arguments.lora else 5e-4
        steps = paddle_clip.finetune(
            model, pairs, epochs=arguments.epochs, batch_size=64, learning_rate=rate, **adapted
        )
    after = paddle_clip.interpolate(before, model, arguments.alpha)
    paddle_clip.save(after, arguments.output)
    print(f"{len(pairs)} pictures, {len(steps)} steps: loss {steps[0].loss:.3f} -> {steps[-1].loss:.3f}")
    print(f"{'zero-shot accuracy among ' + str(len(names)) + ' names':<40}{'before':>8}{'after':>8}")
    for title, tested in tests.items():
        shares = [accuracy(each, preprocess, tested, names) for each in (before, after)]
        print(f"{title:<40}{shares[0]:>8.1%}{shares[1]:>8.1%}")


if __name__ == "__main__":
    main()

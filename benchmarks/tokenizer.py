"""Captions a second of our tokenizer and OpenAI's, both warm, and whether the tokens are the same.

    python benchmarks/tokenizer.py [--captions 100000]

The captions are OpenAI's ImageNet class names in its 80 templates, some with endings that photographers write.
The script needs clip-anytorch.
"""

import argparse
import os
import random
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "convert")]

import paddle_clip
from paddle_clip import tokenizer
from reference import openai

ENDINGS = ["", " in the snow.", ", taken in 2019", " (close-up)", " with my sister's camera", " #nofilter"] * 3 + [
    " — 35mm"
]


def captions(count, seed=0):
    """Random captions, one in nineteen not plain ASCII."""
    choose = random.Random(seed).choice
    templates, names = paddle_clip.IMAGENET_TEMPLATES, paddle_clip.IMAGENET_CLASSES
    return [choose(templates).replace("{}", choose(names)) + choose(ENDINGS) for _ in range(count)]


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    texts = captions(parser.parse_args().captions)
    rounds = parser.parse_args().rounds
    theirs, ours = openai("simple_tokenizer").SimpleTokenizer(), tokenizer.SimpleTokenizer()
    same = all(theirs.encode(text) == ours.encode(text) for text in texts)  # this warms both up
    paddle_clip.tokenize(texts)
    times = {"OpenAI, encode": [], "ours, encode": [], "ours, tokenize (padded Tensor)": []}
    for _ in range(rounds):
        times["OpenAI, encode"].append(timed(lambda: [theirs.encode(text) for text in texts])[0])
        times["ours, encode"].append(timed(lambda: [ours.encode(text) for text in texts])[0])
        times["ours, tokenize (padded Tensor)"].append(timed(lambda: paddle_clip.tokenize(texts))[0])
    best = {name: min(seconds) for name, seconds in times.items()}
    print(f"{len(texts):,} captions, tokens {'identical' if same else 'DIFFERENT'}")
    print("| | captions a second | to OpenAI's |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {len(texts) / seconds:,.0f} | {best['OpenAI, encode'] / seconds:.1f} |")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())

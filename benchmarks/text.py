"""Prompts a second: ImageNet's 1000 class names in OpenAI's 80 templates, of which a sample is timed.

    python benchmarks/text.py [--model ViT-B/32] [--prompts 320]

Peers get tokens and encode batches of 80 prompts padded to 77 tokens, as OpenAI's notebook does class by class. Ours
start from the texts, sort them by length and leave out the padding. The script prints a table in Markdown, with the
extrapolated time of all prompts.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np

import paddle_clip
from paddle_clip.presets import PRESETS
from peers import OURS, PEERS, make_checkpoint, start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[row.name for row in PRESETS], metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=320, help="prompts in the sample, a multiple of 80")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], metavar="PEER")
    arguments = parser.parse_args()
    prompts = [
        template.replace("{}", name)
        for name in paddle_clip.IMAGENET_CLASSES
        for template in paddle_clip.IMAGENET_TEMPLATES
    ]
    texts = random.Random(0).sample(prompts, arguments.prompts)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(arguments.model, folder)
        tokens, words = (os.path.join(folder, name) for name in ("tokens.npy", "texts.json"))
        np.save(tokens, paddle_clip.tokenize(texts).numpy())
        with open(words, "w") as file:
            json.dump(texts, file)
        workers = start(arguments.peers, checkpoint)
        times = {peer: [] for peer in workers}
        for measured in range(-1, arguments.rounds):  # the first round warms up
            for peer, worker in workers.items():
                time.sleep(0.2)
                seconds = worker.pass_seconds(words, tokens, 80)
                if measured >= 0:
                    times[peer].append(seconds)
        for worker in workers.values():
            worker.close()
    rates = {peer: len(texts) / float(np.median(seconds)) for peer, seconds in times.items()}
    best = max((rate for peer, rate in rates.items() if peer in PEERS), default=None)
    print(
        f"| {arguments.model}, {len(texts)} of {len(prompts):,} prompts | a second | to the best peer | all, minutes |"
    )
    print("|---|---|---|---|")
    for peer, rate in rates.items():
        ratio = f"{rate / best:.2f}" if best else ""
        print(f"| {OURS.get(peer) or PEERS[peer]} | {rate:.1f} | {ratio} | {len(prompts) / rate / 60:.1f} |")


if __name__ == "__main__":
    main()

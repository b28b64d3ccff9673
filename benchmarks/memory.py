"""Resident memory of each peer's process after it encoded 8 images and 8 texts, and its peak, loading included.

python benchmarks/memory.py [--model ViT-B/32]
"""

import argparse
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddle_clip.presets import PRESETS
from peers import OURS, PEERS, Worker, make_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[row.name for row in PRESETS], metavar="MODEL")
    parser.add_argument("--peers", nargs="*", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], metavar="PEER")
    arguments = parser.parse_args()
    print(f"| {arguments.model} | MB | peak MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(arguments.model, folder)
        for peer in arguments.peers:
            worker = Worker(peer, checkpoint)
            if not worker.missing:
                worker.seconds("image", 8)
                worker.seconds("text", 8)
                now, peak = (f"{size / 1e6:.0f}" for size in worker.memory())
                print(f"| {OURS.get(peer) or PEERS[peer]} | {now} | {peak} |", flush=True)
            worker.close()


if __name__ == "__main__":
    main()

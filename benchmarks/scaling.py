"""Images a second and memory of batches from 1 to 256.

python benchmarks/scaling.py [--model ViT-B/32] [--peers eager compiled openai]
"""

import argparse
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddle_clip.presets import PRESETS
from peers import OURS, PEERS, make_checkpoint, medians, start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[row.name for row in PRESETS], metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument(
        "--peers", nargs="*", default=["compiled", "compiled_openvino"], choices=[*OURS, *PEERS], metavar="PEER"
    )
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workers = start(arguments.peers, make_checkpoint(arguments.model, folder))
        names = [OURS.get(peer) or PEERS[peer] for peer in workers]
        print(f"| {arguments.model}, batch | {' | '.join(f'{name}, images/s | peak MB' for name in names)} |")
        print("|---" * (1 + 2 * len(names)) + "|")
        for batch in arguments.batches:
            call = ("image", batch, 77)
            times = medians(workers, [call], arguments.rounds)
            cells = [
                f"{batch / times[peer, call]:.1f} | {worker.memory()[1] / 1e6:.0f}" for peer, worker in workers.items()
            ]
            print(f"| {batch} | {' | '.join(cells)} |", flush=True)
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()

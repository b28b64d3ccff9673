"""Kills conversions at random moments: `python tests/tools/kill.py RN50.pt [--count 200]`.

After each one, there must be no output, the file from before, or the complete result. After the last, a conversion that
nobody kills must succeed and leave nothing but its output. Otherwise the script exits 1.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from paddle_clip import convert
from paddle_clip.checkpoints.files import sha256


def kill(source, count, seed=0, number=signal.SIGKILL):
    """Returns how often the output was missing, untouched and complete; raises if it ever was anything else."""
    outcomes, moments = collections.Counter(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        complete, output = os.path.join(folder, "complete.pdparams"), os.path.join(folder, "x.pdparams")
        command = [sys.executable, os.path.join(ROOT, "convert", "pt2paddle.py"), source, "-o", output]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        os.replace(output, complete)
        expected = sha256(complete)
        for _ in range(count):
            before = moments.choice([None, b"what was there before"])
            if before:
                with open(output, "wb") as file:
                    file.write(before)
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.uniform(0, 1.1 * seconds))
            running.send_signal(number)
            running.wait()
            outcomes[_state(output, before, expected)] += 1
            if os.path.exists(output):
                os.unlink(output)
        convert(source, output)
        assert sha256(output) == expected, "the conversion that was not killed differs"
        assert sorted(os.listdir(folder)) == ["complete.pdparams", "x.pdparams"], os.listdir(folder)
    return outcomes


def _state(output, before, expected):
    if not os.path.exists(output):
        assert before is None, "an existing file vanished"
        return "missing"
    if before and os.path.getsize(output) == len(before):
        with open(output, "rb") as file:
            assert file.read() == before, "an existing file changed"
        return "untouched"
    assert sha256(output) == expected, "a partial or wrong file has the final name"
    return "complete"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="a checkpoint to convert")
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    outcomes = kill(os.path.abspath(arguments.file), arguments.count)
    print(f"{arguments.count} conversions killed: " + ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())))


if __name__ == "__main__":
    main()

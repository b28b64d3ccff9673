"""Converts CLIP checkpoints to Paddle weights: `python convert/pt2paddle.py RN50.pt` writes RN50.pdparams.

The script needs neither PyTorch nor Paddle, and works from a clone that is not installed. It is the command
`paddle-clip convert` with one more option, `--verify`, which needs convert/parity.py.
"""

import argparse
import os
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir))
warnings.simplefilter("ignore", RuntimeWarning)  # "Paddle is not installed" does not matter here

from paddle_clip.checkpoints.conversion import Report
from paddle_clip.checkpoints.reading import read
from paddle_clip.checkpoints.writing import verify_checksums
from paddle_clip.cli import conversion


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    conversion.add_convert_arguments(parser)
    parser.add_argument(
        "--verify", action="store_true", help="run PyTorch and Paddle on the result; without torch, check its checksums"
    )
    arguments = parser.parse_args()
    # Termination works like an interruption from the keyboard: a half-written file is deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def after(file: str, report: Report) -> str:
        if not arguments.verify:
            return ""
        is_same = arguments.dtype in ("float32", "keep") and arguments.prefix is None and arguments.resolution is None
        return verify(file if is_same else report.output, report)

    return conversion.convert(arguments, after)


def verify(file: str, report: Report) -> str:
    """Compares a result with PyTorch and returns the table to print; where PyTorch cannot, checks its checksums.

    PyTorch runs `file`: the one the result was converted from, or the result itself if its numbers are others.
    """
    is_whole = report.config.has_image and report.config.has_text
    if not is_whole or any(find_spec(name) is None for name in ("torch", "paddle")) or not _has_reference():
        compared = verify_checksums(read(report.output), report.output)
        missing = "PyTorch, clip-anytorch or Paddle is missing to run it"
        missing = missing if is_whole else "OpenAI's code runs no tower alone"
        return f"\n  verified {compared} tensors by their checksums; {missing}"
    command = [sys.executable, os.path.join(HERE, "parity.py"), file, "--converted", report.output]
    command += ["--activation", report.config.activation, "--heads", str(report.config.vision_heads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{report.output} was written but does not pass: {done.stderr.replace('error: ', '')}")
    return f"\n{done.stdout.rstrip()}"


def _has_reference() -> bool:
    import importlib.metadata  # imported here: it takes long beside a conversion

    try:
        importlib.metadata.distribution("clip-anytorch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

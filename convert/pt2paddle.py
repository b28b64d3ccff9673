"""Converts OpenAI's CLIP checkpoints to Paddle weights: `python convert/pt2paddle.py RN50.pt` writes RN50.pdparams.

Needs neither PyTorch nor Paddle, and works from a clone that is not installed.
"""

import argparse
import os
import sys
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
warnings.simplefilter("ignore", RuntimeWarning)  # "Paddle is not installed" is no news here

from tqdm import tqdm

from paddle_clip.converter import DTYPES, convert


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .pt, .pdparams or .safetensors file")
    parser.add_argument("-o", "--output", help="file to write (default: FILE with the extension .pdparams)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the result (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.output and len(arguments.files) > 1:
        parser.error("-o names one output; convert several files without it")

    failed = False
    for file in arguments.files:
        try:
            report = convert(file, arguments.output, arguments.dtype, progress=_bar)
        except (ValueError, OSError, MemoryError) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            failed = True
        else:
            print(_describe(file, report))
    return int(failed)


def _one_line(error):
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _bar(arrays):
    return tqdm(arrays, desc="converting", unit="tensor", leave=False, disable=None)  # none in a pipe


def _describe(file, report):
    preset = report.preset or f"none of the nine presets: {report.config}"
    official = f"official {report.official}" if report.official else "not an official file"
    dropped = f" ({len(report.dropped)} that are not weights dropped)" if report.dropped else ""
    return (
        f"{file} -> {report.output}\n"
        f"  preset   {preset}\n"
        f"  SHA-256  {report.sha256}: {official}\n"
        f"  tensors  {report.tensors}{dropped}\n"
        f"  bytes    {report.bytes:,}\n"
        f"  seconds  {report.seconds:.2f}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        sys.exit(1)

"""Converts CLIP checkpoints to Paddle weights: `python convert/pt2paddle.py RN50.pt` writes RN50.pdparams.

Needs neither PyTorch nor Paddle, and works from a clone that is not installed.
"""

import argparse
import importlib.metadata
import os
import signal
import sys
import warnings
from importlib.util import find_spec

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir))
warnings.simplefilter("ignore", RuntimeWarning)  # "Paddle is not installed" is no news here

from paddle_clip import archives, writers
from paddle_clip.converter import DTYPES, check, convert
from paddle_clip.presets import ACTIVATIONS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a checkpoint of OpenAI, open_clip, Hugging Face, paddleclip 1.0 or paddle_clip, told by its content",
    )
    parser.add_argument(
        "-o", "--output", help="file to write, by extension .pdparams (default), .safetensors or .pt (for PyTorch)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the result (default: %(default)s)")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="of the model, where the file does not tell")
    parser.add_argument("--check", action="store_true", help="report on the files and write nothing")
    parser.add_argument(
        "--verify", action="store_true", help="run PyTorch and Paddle on the result; without torch, check its checksums"
    )
    arguments = parser.parse_args()
    if arguments.output and len(arguments.files) > 1:
        parser.error("-o names one output; convert several files without it")
    require_different_outputs(parser, arguments.files)
    if arguments.check:
        return each(arguments.files, lambda file: describe_contents(file, *check(file, arguments.activation)))

    def converted(file):
        report = convert(file, arguments.output, arguments.dtype, arguments.activation, progress)
        return describe_conversion(file, report) + (verify(file, report, arguments.dtype) if arguments.verify else "")

    return each(arguments.files, converted)


def each(files, work):
    """Prints what `work` says of each file, or one error line; returns the exit code."""
    # As an interruption from the keyboard: what is half written is deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = False
    for file in files:
        try:
            print(work(file), flush=True)
        except (ValueError, OSError, MemoryError) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print(f"error: interrupted at {file}; no partial file is left", file=sys.stderr)
            return 1
    return int(failed)


def progress(names, total):
    """A progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        return names
    try:
        from tqdm import tqdm  # here, as importing it takes longer than converting a small file
    except ImportError:
        return names
    return tqdm(names, total=total, desc="converting", unit="tensor", leave=False)


def _one_line(error):
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def require_different_outputs(parser, files):
    """Stops the program if two files would be converted to one."""
    stems = [os.path.realpath(os.path.splitext(file)[0]) for file in files]
    if len(set(stems)) < len(stems):
        parser.error("two of these files have one output, as their names differ in the extension alone: use -o")


def verify(file, report, dtype):
    """What the comparison of a result with PyTorch prints; where PyTorch is missing, what its checksums say.

    A result that was rounded is compared with itself in PyTorch, any other with the file it was made of.
    """
    file = file if dtype in ("float32", "keep") else report.output
    if any(find_spec(name) is None for name in ("torch", "paddle")) or not _has_reference():
        compared = writers.verify_checksums(archives.read(report.output), report.output)
        missing = "PyTorch, clip-anytorch or Paddle is missing to run it"
        return f"\n  verified {compared} tensors by their checksums; {missing}"
    import subprocess

    command = [sys.executable, os.path.join(HERE, "parity.py"), file, "--converted", report.output]
    command += ["--activation", report.config.activation]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{report.output} was written but does not pass: {done.stderr.replace('error: ', '')}")
    return f"\n{done.stdout.rstrip()}"


def _has_reference():
    try:
        importlib.metadata.distribution("clip-anytorch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def describe(report):
    """The lines that tell what a file is, as (label, text)."""
    beside = f", {report.ignored} tensors beside {report.prefix}* ignored" if report.ignored else ""
    dropped = f" ({len(report.dropped)} that are not weights dropped)" if report.dropped else ""
    official = f"official {report.official}" if report.official else "not an official file"
    return [
        ("format", report.kind + beside),
        ("preset", report.preset or f"none of the nine presets: {report.config}"),
        ("activation", f"{report.config.activation} (by {report.activation_from})"),
        ("SHA-256", f"{report.sha256}: {official}"),
        ("tensors", f"{report.tensors}{dropped}"),
    ]


def describe_conversion(file, report):
    """What a conversion did."""
    lines = [*describe(report), ("bytes", f"{report.bytes:,}"), ("seconds", f"{report.seconds:.2f}")]
    return "\n".join([f"{file} -> {report.output}", *(f"  {label:<10} {text}" for label, text in lines)])


def describe_contents(file, report, contents):
    """What is in a file."""
    lines = [
        *describe(report),
        ("dtypes", ", ".join(f"{count} {dtype}" for dtype, count in sorted(contents.dtypes.items()))),
        ("NaN, inf", f"{contents.nan:,}, {contents.inf:,}"),
        ("checksums", f"{contents.checksums} tensors are as written" if contents.checksums else "none in the file"),
    ]
    return "\n".join([file, *(f"  {label:<10} {text}" for label, text in lines)])


if __name__ == "__main__":
    sys.exit(main())

"""`paddle-clip models` and `convert`; also what the scripts in convert/ do."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..config import CLIPConfig, Preprocessing
from ..presets import PRESETS, TINY, TINY_CN, table
from .messages import in_options, print_error
from .shared import INTERRUPTED, add_command, add_json, add_settings, print_json, settings

if TYPE_CHECKING:
    from ..checkpoints.conversion import Contents, Report
    from .shared import Commands


def add_models(commands: "Commands") -> None:
    """Adds the command `models`."""
    parser = add_command(commands, models, "list the models", ["", "--json"], needs_paddle=False)
    add_json(parser)


def models(arguments: argparse.Namespace) -> None:
    """Prints the table of presets."""
    rows = (*PRESETS, TINY_CN, TINY)
    if not arguments.json:
        print(table(rows))
        return
    described = []
    for row in map(asdict, rows):
        sizes = row.pop("config")
        described.append({**row, **sizes})
    print_json(described)


def add_convert(commands: "Commands") -> None:
    """Adds the command `convert`."""
    parser = add_command(
        commands,
        convert,
        "convert checkpoints of PyTorch and others to Paddle weights, or back",
        [
            "RN50.pt                     # writes RN50.pdparams",
            "RN50.pt --check             # tells what it is and writes nothing",
            "RN50.pdparams -o back.pt --dtype published",
        ],
        needs_paddle=False,
    )
    add_convert_arguments(parser)
    add_json(parser)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command `convert` and the script convert/pt2paddle.py both take."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a checkpoint of OpenAI, open_clip, Hugging Face, PaddleNLP, PaddleMIX, paddleclip 1.0 or paddle_clip, "
        "told by its content; or the folder of a model",
    )
    parser.add_argument(
        "-o", "--output", help="file to write, by extension .pdparams (default), .safetensors or .pt (for PyTorch)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="dtype of the output: float32 (default), float16, bfloat16, published (OpenAI's mix of float16 and "
        "float32), or keep",
    )
    add_settings(parser)
    parser.add_argument("--check", action="store_true", help="report on the files and write nothing")
    parser.set_defaults(parser=parser, json=False)


def convert(arguments: argparse.Namespace, after: "Callable[[str, Report], str]" = lambda file, report: "") -> int:
    """Converts files, or reports on them; what `after` returns is printed after each."""
    from ..checkpoints import conversion
    from ..checkpoints.reading import find_weights

    if not arguments.check:
        require_different_outputs(arguments)

    def work(file: str) -> str:
        contents, file = None, find_weights(file)
        if arguments.check:
            report, contents = conversion.check(file, **settings(arguments))
        else:
            asked = settings(arguments)
            report = conversion.convert(file, arguments.output, arguments.dtype, progress=progress, **asked)
        if arguments.json:
            pictures = report.preprocessing._asdict()
            described = {**report._asdict(), "config": asdict(report.config), "preprocessing": pictures}
            return json.dumps({"file": file, **described, **(contents._asdict() if contents else {})})
        if contents:
            return describe_contents(file, report, contents)
        return describe_conversion(file, report) + after(file, report)

    return for_each(arguments.files, work, arguments.parser)


def require_different_outputs(arguments: argparse.Namespace) -> None:
    """Ends the program if several files would be converted to one."""
    if arguments.output and len(arguments.files) > 1:
        arguments.parser.error("-o names one output; convert several files without it")
    from ..checkpoints.conversion import default_output

    outputs = [os.path.realpath(file if os.path.isdir(file) else default_output(file)) for file in arguments.files]
    if len(set(outputs)) < len(outputs):
        arguments.parser.error(
            "two of these files have one output, as only their extensions differ: convert each alone, with -o"
        )


def for_each(files: list[str], work: Callable[[str], str], parser: argparse.ArgumentParser) -> int:
    """Prints what `work` says of each file, or one error line; returns the exit code."""
    failed = False
    for file in files:
        try:
            print(in_options(work(file), parser), flush=True)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError) as error:
            print_error(error, parser)
            failed = True
        except KeyboardInterrupt:
            print_error(f"interrupted at {file}; no partial file is left")
            return INTERRUPTED
    return int(failed)


def progress(names: Iterable[str], total: int) -> Iterable[str]:
    """A progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        return names
    try:
        from tqdm import tqdm  # here, as importing it takes longer than converting a small file
    except ImportError:
        return names
    return tqdm(names, total=total, desc="converting", unit="tensor", leave=False)


def _describe(report: "Report") -> list[tuple[str, str]]:
    """The lines that tell what a file is, as (label, text)."""
    beside = f", {report.ignored} tensors beside {report.prefix}* ignored" if report.ignored else ""
    dropped = f" ({len(report.dropped)} that are not weights dropped)" if report.dropped else ""
    official = f"official {report.official}" if report.official else "not an official file"
    gelu = "; a file that open_clip trained with GELU needs activation='gelu'" if report.activation_assumed else ""
    return [
        ("format", report.kind + beside),
        ("preset", report.preset or f"none: {_describe_sizes(report.config)}"),
        ("activation", f"{report.config.activation} (by {report.activation_from}{gelu})"),
        *([("pictures", _describe_preprocessing(report))] if report.preprocessing != Preprocessing() else []),
        ("SHA-256", f"{report.sha256}: {official}"),
        ("tensors", f"{report.tensors}{dropped}"),
    ]


def _describe_sizes(config: CLIPConfig) -> str:
    sizes = asdict(config)
    told = ("activation", "text_tower")  # on a line of its own, and by the name of the form
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None and name not in told)


def _describe_preprocessing(report: "Report") -> str:
    settings = report.preprocessing
    mean, std = ([round(number, 4) for number in numbers] for numbers in (settings.mean, settings.std))
    return f"mean {mean}, std {std}, {settings.interpolation}, resize mode {settings.resize_mode}"


def describe_conversion(file: str, report: "Report") -> str:
    """What a conversion did."""
    lines = [*_describe(report), ("bytes", f"{report.bytes:,}"), ("seconds", f"{report.seconds:.2f}")]
    return "\n".join([f"{file} -> {report.output}", *(f"  {label:<10} {text}" for label, text in lines)])


def describe_contents(file: str, report: "Report", contents: "Contents") -> str:
    """What is in a file."""
    lines = [
        *_describe(report),
        ("dtypes", ", ".join(f"{count} {dtype}" for dtype, count in sorted(contents.dtypes.items()))),
        ("NaN, inf", f"{contents.nan:,}, {contents.inf:,}"),
        ("checksums", f"{contents.checksums} tensors are as written" if contents.checksums else "none in the file"),
    ]
    return "\n".join([file, *(f"  {label:<10} {text}" for label, text in lines)])

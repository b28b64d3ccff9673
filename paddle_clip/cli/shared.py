"""What commands share: options, models and images by name, output."""

import argparse
import codecs
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from ..config import ACTIVATIONS
from ..defaults import BATCH_SIZE, CHINESE_TEMPLATE, NOT_UTF8, TEMPLATE

if TYPE_CHECKING:
    from ..encoding import Encoder
    from ..model import CLIP
    from ..transforms import ImageTransform

    Commands = argparse._SubParsersAction["Parser"]

DEFAULT_MODEL = "ViT-B/32"
INTERRUPTED = 128 + signal.SIGINT
SAMPLES = "@samples"
# About as many as OpenVINO needs to save what compiling takes: ViT-B/32 500, RN50 150 on a Zen 4, 2,000 on a Zen 3.
WORTH_COMPILING = 400


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def add_command(
    commands: "Commands",
    run: Callable[[argparse.Namespace], Optional[int]],
    help: str,
    examples: Sequence[str],
    after_interruption: str = "",
    needs_paddle: bool = True,
) -> Parser:
    """Adds the command that a function runs, by the function's name.

    Args:
        commands: what `add_subparsers` returned.
        run: the action; it takes the parsed arguments and may return an exit code.
        help: what the command does.
        examples: lines for its help.
        after_interruption: what an interrupted user may do.
        needs_paddle: whether it takes Paddle.
    """
    name = run.__name__
    child = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="examples:\n" + "\n".join(f"  paddle-clip {name} {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    child.set_defaults(run=run, parser=child, after_interruption=after_interruption, needs_paddle=needs_paddle)
    return child


# ------------------------------------------------------------------------------------------------------------- options


def add_images(parser: Parser) -> None:
    """IMAGE …; `named_images` reads it."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help=f"files, folders, or {SAMPLES}: the pictures that come with the model tiny",
    )


def add_labels(parser: Parser, what: str = "labels") -> None:
    """--labels, --labels-file, --prompts, --language and --template; `labels_and_templates` reads them."""
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", nargs="+", metavar="LABEL", help=what)
    labels.add_argument("--labels-file", metavar="FILE", help="a file with one label per line")
    labels.add_argument("--prompts", metavar="DATASET", help="class names and templates of the paper, such as imagenet")
    parser.add_argument(
        "--language", choices=("en", "zh"), default="en", help="language of --prompts: en (default), or zh for Chinese"
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help=f"text with {{}} for the label (default: {TEMPLATE!r}, or "
        f"{CHINESE_TEMPLATE!r} for Chinese-CLIP); the features of several are averaged",
    )


def add_batch_size(parser: Parser) -> None:
    """--batch-size."""
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images at once (default: %(default)s)"
    )


def add_workers(parser: Parser) -> None:
    """--workers."""
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that read images (default: one per core, up to 8)"
    )


def add_on_error(parser: Parser) -> None:
    """--on-error."""
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="raise: stop at the first image that cannot be read (default); skip: leave such images out",
    )
    parser.add_argument("--skip-damaged", dest="on_error", action="store_const", const="skip", help=argparse.SUPPRESS)


def add_model(parser: Parser, dtype: bool = True) -> None:
    """--model, --device and --dtype, and what `add_settings` adds; `load_model` reads them."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|FILE",
        help="a model of `paddle-clip models`, which is downloaded once, a checkpoint, or a folder that `export` wrote "
        "(default: %(default)s)",
    )
    add_settings(parser)
    parser.add_argument("--device", metavar="DEVICE", help="cpu, gpu or gpu:1 (default: a GPU, if Paddle can use it)")
    if dtype:
        parser.add_argument(
            "--dtype", default="float32", help="float32 (default), float64, or on a GPU float16 or bfloat16"
        )


def add_engine(parser: Parser) -> None:
    """--engine, --precision and --threads; `load_encoder` reads them."""
    parser.add_argument(
        "--engine",
        choices=("auto", "eager", "paddle", "openvino"),
        default="auto",
        help="what runs the model: eager: Paddle's layers; paddle or openvino: a compiled form, made once and kept in "
        f"the cache; auto (default): a compiled form if it is in the cache, or for {WORTH_COMPILING} images and more",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="precision of products: float32 (default); bfloat16, on a processor that has such products; or int8 for "
        "images, by OpenVINO, quantised by 300 of those at hand",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the model (default: all cores)")


def add_activation(parser: argparse.ArgumentParser) -> None:
    """--activation."""
    parser.add_argument(
        "--activation", choices=ACTIVATIONS, help="activation of the model, where a checkpoint does not tell it"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--activation, --prefix, --resolution and --heads; `settings` reads them."""
    add_activation(parser)
    parser.add_argument(
        "--prefix", metavar="NAME", help="start of the model's names in a checkpoint with several, such as teacher."
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side of the images, for which the image positions are interpolated (default: the model's own)",
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="heads of the image tower, where nothing beside a checkpoint tells them"
    )


def add_json(parser: Parser, help: str = "print JSON") -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=help)


# ---------------------------------------------------------------------------------------------------- what options mean


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_settings`'s options ask for, as `load`, `convert` and `check` take it."""
    return {name: getattr(arguments, name) for name in ("activation", "prefix", "resolution", "heads")}


def load_model(arguments: argparse.Namespace) -> "tuple[CLIP, ImageTransform]":
    """The model and preprocessing of `add_model`'s options."""
    import paddle  # noqa: F401  for its handler

    from ..hub import load

    _handle_sigterm()
    dtype = arguments.dtype if "dtype" in arguments else "float32"
    loaded = load(arguments.model, dtype, **settings(arguments), device=arguments.device)
    _handle_sigterm()
    return loaded


def _handle_sigterm() -> None:
    """Puts our handler in place again, as Paddle's imports set their own, which can hang."""
    if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def load_encoder(arguments: argparse.Namespace, images: Sequence[Any]) -> "tuple[Encoder, ImageTransform]":
    """The model and preprocessing of `add_model`'s and `add_engine`'s options.

    Args:
        arguments: the parsed options.
        images: paths of the images that will be encoded: they tell whether compiling is worth its time, and int8 is
            quantised by them.
    """
    from ..engines import Predictor
    from ..exported import is_export

    if is_export(arguments.model):
        if arguments.engine == "eager":
            raise ValueError(f"{arguments.model} is an export, which holds compiled forms alone: leave --engine out")
        asked = [f"--{name}" for name, value in settings(arguments).items() if value is not None]
        asked += ["--dtype"] if arguments.dtype != "float32" else []
        if asked:
            raise ValueError(
                f"{arguments.model} is an export, which stays as it was made: leave {', '.join(asked)} out"
            )
        engine = None if arguments.engine == "auto" else arguments.engine
        predictor = Predictor(arguments.model, arguments.threads, arguments.device, engine, arguments.precision)
        return predictor, predictor.preprocess
    engine = _choose_engine(arguments, len(images))
    if engine == "eager":
        return _load_eager(arguments)

    from ..compiled import load_compiled
    from ..hub import CacheError

    try:
        loaded = load_compiled(
            arguments.model,
            engine,
            arguments.precision,
            threads=arguments.threads,
            calibration=images,
            **settings(arguments),
        )
    except CacheError as error:
        if arguments.engine != "auto" or arguments.precision != "float32":
            raise
        warnings.warn(f"Paddle's layers run the model, as {error}", RuntimeWarning, stacklevel=2)
        return _load_eager(arguments)
    _handle_sigterm()
    return loaded


def _load_eager(arguments: argparse.Namespace) -> "tuple[CLIP, ImageTransform]":
    if arguments.threads:
        from ..threads import use_cores

        use_cores(arguments.threads)
    return load_model(arguments)


def _is_tower_alone(arguments: argparse.Namespace) -> bool:
    """Whether the model is one tower, which has no compiled form."""
    from ..checkpoints import dialects, reading
    from ..hub import find

    path = find(arguments.model)
    return bool(dialects.from_checkpoint(reading.read(path), path, **settings(arguments)).alone)


def _choose_engine(arguments: argparse.Namespace, images: int) -> str:
    """The engine asked for; for `auto` a compiled form, where it can run the model and is made or worth its time."""
    engine, precision = arguments.engine, arguments.precision
    on_cpu = not arguments.device or arguments.device == "cpu"
    if engine == "eager" and precision != "float32":
        raise ValueError(f"{precision} takes a compiled form: leave --engine out, or give --dtype {precision} on a GPU")
    must_compile = engine not in ("auto", "eager") or precision != "float32"
    if must_compile and (arguments.dtype != "float32" or not on_cpu):
        raise ValueError(
            "compiled forms are for the CPU and float32: leave --device and --dtype out, or --engine and --precision"
        )
    if engine == "auto":
        from ..extras import is_gpu_build

        if precision == "float32" and (arguments.dtype != "float32" or not on_cpu or is_gpu_build()):
            return "eager"
        from ..compiled import default_engine, has_form
        from ..hub import find

        engine = default_engine(find(arguments.model), precision, **settings(arguments))
        worth = images >= WORTH_COMPILING or has_form(arguments.model, engine, **settings(arguments))
        if precision == "float32" and (not worth or _is_tower_alone(arguments)):
            return "eager"
    return engine


def named_images(names: Sequence[str]) -> list[Any]:
    """The images that were named: the paths of files, of those in folders and of the samples, and those in shards."""
    from ..images import images_at, samples, shards_at

    images: list[Any] = []
    for name in map(os.path.expanduser, names):
        if name == SAMPLES:
            images += samples()
        elif os.path.isdir(name) or shards_at(name):
            images += images_at(name)
        else:
            with open(name, "rb"):  # that it is missing is said before a model is loaded
                images.append(name)
    return images


def labels_and_templates(
    arguments: argparse.Namespace,
) -> tuple[Optional[list[Union[str, list[str]]]], Optional[Sequence[str]]]:
    """The class names of `add_labels`'s options, or None, and the templates, or None for the model's own."""
    if arguments.prompts:
        from ..zeroshot import prompts

        labels, templates = prompts(arguments.prompts, arguments.language)
        return labels, arguments.template or templates
    labels = read_lines(arguments.labels_file) if arguments.labels_file else arguments.labels
    if labels and len(labels) == 1 and re.search("[,;，、；]", str(labels[0])):
        warnings.warn(
            f"{labels[0]!r} is one label, which fits every image: separate labels by spaces, and put quotes around one "
            "of several words",
            stacklevel=2,
        )
    return labels, arguments.template


def read_lines(path: str) -> list[Any]:
    """The lines of a text file that are not empty."""
    with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
        try:
            lines = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} {NOT_UTF8}: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty: expected one text per line")
    return lines


def require_folder(path: str) -> None:
    """Raises OSError if a folder cannot be read, before a model is loaded."""
    os.listdir(os.path.expanduser(path))


def print_json(value: Any) -> None:
    """Prints a value as JSON; in ASCII, where the output is not in UTF-8 or a file name is no text."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    readable = is_utf8 and text.encode("utf-8", "replace").decode() == text
    print(text if readable else json.dumps(value, indent=1))

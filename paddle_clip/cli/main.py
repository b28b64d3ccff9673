"""`paddle-clip`: the parser of all commands, and what happens around the one that runs."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Optional

from .. import __version__
from ..extras import NO_PADDLE, PADDLE_IS_INSTALLED
from . import chinese, conversion, deployment, features, finetuning, zero_shot
from .messages import print_error, warning_printer
from .shared import INTERRUPTED, Parser

PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows does not have
# What libraries raise for input they cannot use. Anything else is a fault of ours and shows its traceback.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 1 after one line that says what is wrong, 130 after an interruption, 141 where nobody reads
        the output any more. Arguments that argparse refuses raise `SystemExit` with 2, and `--help` with 0.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = warning_printer(arguments.parser)
        try:
            if not PADDLE_IS_INSTALLED and arguments.needs_paddle:
                raise ImportError(NO_PADDLE)
            code = arguments.run(arguments)
            sys.stdout.flush()
            return code or 0
        except BrokenPipeError:
            return PIPE_CLOSED
        except KeyboardInterrupt:
            print_error(f"interrupted{arguments.after_interruption}")
            return INTERRUPTED
        except ERRORS as error:
            print_error(error, arguments.parser)
            return 1


def console() -> None:
    """The program `paddle-clip`, with a process to itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half written is deleted then, too
    for stream in filter(None, (sys.stdout, sys.stderr)):  # closed ones are None
        stream.reconfigure(errors="surrogateescape")  # file names that are no text
    sys.exit(main())


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything `paddle-clip` takes."""
    parser = Parser(
        prog="paddle-clip",
        description="OpenAI's CLIP on PaddlePaddle.",
        epilog="paddle-clip COMMAND --help shows the command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"paddle-clip {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        conversion.add_models,
        conversion.add_convert,
        zero_shot.add_classify,
        zero_shot.add_similarity,
        features.add_embed,
        features.add_merge,
        features.add_search,
        zero_shot.add_evaluate,
        features.add_probe,
        finetuning.add_finetune,
        deployment.add_export,
        deployment.add_cache,
        deployment.add_bench,
    ):
        add(commands)
    if chinese.is_wanted():
        chinese.translate(parser)
    return parser
